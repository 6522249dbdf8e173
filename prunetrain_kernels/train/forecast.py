"""Where norms, schedule and lambda lead: which channel slices the lasso will have brought to zero by then.

The subgradient moves a slice of norm n towards zero by about `lr * lambda / (1 - momentum)` a step, and so does the
proximal step. With the *reach* of an epoch, the sum over its steps of `lr / (1 - momentum)`, this reads

    d n / d reach  =  -(lambda * pull - resistance)

The *pull* is 1 for the slice's own group, and for the groups of the other side, which hold the same weights too, what
they add along the slice: `n * sum(m) / sum(m^2)` over their norms m. The *resistance* is what training does to the
norm otherwise: gradients, weight decay, noise. It is measured, slice by slice, from one epoch's end to the next, and
smoothed. A channel is gone when every slice of it is: at lambda, those whose `need` is at most lambda, where

    need  =  max over its slices of  (n / reach + resistance) / pull

This is a forecast, not a promise: the resistance changes as training goes on. The paper has nothing of the kind.
"""

import contextlib
import copy
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunetrain_kernels.cost import Flops, share, share_text
from prunetrain_kernels.graph import ChannelGraph, Keep
from prunetrain_kernels.graph.keep import as_they_go
from prunetrain_kernels.graph.sparse import everywhere, largest_in_spaces
from prunetrain_kernels.prune.optimizer_holdings import groups_of
from prunetrain_kernels.prune.optimizers import all_optimizers
from prunetrain_kernels.regularizer import GroupLasso, SliceNorms
from prunetrain_kernels.train.original import OriginalChannels
from prunetrain_kernels.train.present import Present

SHORTEST = 1e-30  # reach that takes nothing to zero but what is there
SMOOTHING = 0.5  # of the resistance: how much of it the latest epoch decides
# what helps where weights are NaN or infinite
DIVERGED = "the training has diverged: lower the learning rate, or see why by training without the lasso"

Sides = tuple[Tensor, Tensor]  # numbers of a layer's input slices (C,) and output slices (K,), on the CPU


@dataclass(frozen=True)
class Forecast:
    """What a network's slices are now, and what is expected of them at the end of the training.

    Attributes:
        epoch, epochs: epochs trained, and of the whole training.
        smallest, median: norms of the slices that have a lasso.
        threshold: of the sparse test, for the largest absolute weight of a slice.
        moves: how far the lasso will move a slice until the end, if nothing resists: lambda times the reach left.
        inference, training: FLOPs per image that are expected at the end, as shares of the dense network's.
        measured: whether the resistance of the slices was measured; else it is taken for none.
    """

    epoch: float
    epochs: float
    smallest: float
    median: float
    threshold: float
    moves: float
    inference: float
    training: float
    measured: bool

    def __str__(self) -> str:
        """A part of a line for a log."""
        condition = "" if self.measured else ", if nothing resists"
        return (
            f"smallest slice {self.smallest:.2g}, median {self.median:.2g} (sparse below {self.threshold:g}), the "
            f"lasso moves them by {self.moves:.2g} until epoch {self.epochs:g}: {share_text(self.inference)} of the "
            f"inference FLOPs expected{condition}"
        )


@dataclass(frozen=True)
class Now:
    """A training at one moment: what a forecast is made from.

    Attributes:
        present: what is known of the model.
        scheduler: of the learning rate, or a list of several, or None.
        passed: epochs trained.
        coefficient: lambda, 0 where there is no lasso.
        round_to: as of `choose`.
    """

    model: nn.Module
    present: Present
    scheduler: Any
    passed: float
    coefficient: float
    round_to: int = 1

    @property
    def original(self) -> OriginalChannels:
        """The dense network's channels that are left."""
        return self.present.original

    @property
    def flops(self) -> tuple[float, float]:
        """Training and inference FLOPs per image."""
        return self.present.flops.training, self.present.flops.inference

    def shape_flops(self) -> "ShapeFlops":
        return ShapeFlops.of(self.present, self.model)

    def slice_norms(self) -> dict[str, SliceNorms]:
        return self.present.lasso.slice_norms()

    def has_diverged(self) -> bool:
        """Whether a weight with a lasso is NaN or infinite."""
        return not all(bool(side.isfinite().all()) for norms in self.slice_norms().values() for side in norms[:2])

    def penalty(self) -> float:
        """R(W), from the norms."""
        layers = self.slice_norms().values()
        sides = (pair for norms in layers for pair in zip(norms[:2], norms.factors(), strict=True))
        return sum(float((side.double() * factors).sum()) for side, factors in sides)

    def by_original(self, of_slices: Mapping[str, Sequence[Any]]) -> dict[str, "Sides"]:
        """Numbers of the present slices at their places in the dense network; NaN where no slice is any more."""
        result = {}
        for name, sides in of_slices.items():
            if name not in self.original.kept:  # a depthwise convolution down to one channel looks like any other
                continue
            whole = [
                torch.full((n,), torch.nan, dtype=torch.float32, device="cpu")
                for n in self.original.dense_layers[name][1:]
            ]
            for side in (0, 1):
                whole[side][self.numbers(name, side)] = sides[side].float()
            result[name] = whole[0], whole[1]
        return result

    def numbers(self, name: str, side: int) -> Tensor:
        """The original numbers of a layer's present input (0) or output (1) slices."""
        return self.present.slice_numbers(name, side)


# -- FLOPs of a shape --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShapeFlops:
    """FLOPs per image as a function of how many channels each space keeps.

    A layer's FLOPs go with its weight, and a weight with the channels of its two spaces. What belongs to no layer stays
    as it is. Exact where the network has a `FlopTable`; else each layer's share is estimated from the maps it makes.

    Attributes:
        graph: of the present shape.
        layers: of each layer the training and inference FLOPs per image, now.
        followers: likewise, of depthwise convolutions.
        rest: training and inference FLOPs of what belongs to no layer.
    """

    graph: ChannelGraph
    layers: dict[str, tuple[float, float]]
    followers: dict[str, tuple[float, float]]
    rest: tuple[float, float]

    @classmethod
    def of(cls, present: Present, model: nn.Module) -> "ShapeFlops":
        """Those of the network in its present shape, whose FLOPs must be known."""
        graph, table = present.graph, present.flop_table
        if table is not None:
            of_layers = {
                name: tuple(
                    float(per_weight.get(name, 0)) * _weights_of(model, name)
                    for per_weight in (table.training, table.inference)
                )
                for name in table.training | table.inference
            }
        else:
            forward = {
                layer.name: 2.0 * _weights_of(model, layer.name) * math.prod(layer.map_out)
                for layer in graph.layers.values()
            }
            of_layers = {name: (3 * flops, flops) for name, flops in forward.items()}
        layers = {name: (flops[0], flops[1]) for name, flops in of_layers.items() if name in graph.layers}
        followers = {name: (flops[0], flops[1]) for name, flops in of_layers.items() if name in graph.followers}
        known = [sum(flops[i] for flops in (*layers.values(), *followers.values())) for i in (0, 1)]
        rest = max(0.0, present.flops.training - known[0]), max(0.0, present.flops.inference - known[1])
        return cls(graph, layers, followers, rest)

    def of_keep(self, keep: Keep) -> tuple[float, float]:
        """Training and inference FLOPs per image once `keep` is carried out."""
        shares = {}
        for name in self.graph.layers:
            sides = zip(keep.live[name], self.graph.computed(name), strict=True)
            left = math.prod(len(then) / max(1, len(now)) for then, now in sides)
            shares[name] = 0.0 if name in keep.removed else left
        counts = [len(channels) for channels in keep.channels]
        return self._sum(shares, counts, keep.removed)

    def of_counts(self, counts: Sequence[int]) -> tuple[float, float]:
        """Training and inference FLOPs per image if each space has so many channels; a layer without any costs
        nothing, for the branch that it is in goes."""
        spaces = self.graph.spaces
        shares = {
            name: counts[layer.input] / spaces[layer.input].size * counts[layer.output] / spaces[layer.output].size
            for name, layer in self.graph.layers.items()
        }
        return self._sum(shares, counts, frozenset())

    def _sum(self, shares: dict[str, float], counts: Sequence[int], removed: frozenset[str]) -> tuple[float, float]:
        totals = list(self.rest)
        for name, flops in self.layers.items():
            for i in (0, 1):
                totals[i] += flops[i] * shares[name]
        for name, flops in self.followers.items():
            space = self.graph.followers[name].space
            left = 0.0 if name in removed else counts[space] / self.graph.spaces[space].size
            for i in (0, 1):
                totals[i] += flops[i] * left
        return totals[0], totals[1]


def _weights_of(model: nn.Module, name: str) -> int:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.numel()


# -- the schedule ------------------------------------------------------------------------------------------------------


def rates_to_come(scheduler: Any, optimizer: Optimizer, group: int, passed: float, epochs: int) -> list[float]:
    """Learning rates of a parameter group in the coming epochs, by running a copy of the scheduler ahead.

    Args:
        scheduler: any with PyTorch's `step()`, or a list of several, stepped after each epoch or after each step; which
            of the two shows after the first epoch. None, or one that cannot be run ahead (because it waits for a loss,
            say): the present rate stays.
        passed: epochs trained so far.

    Returns:
        A mean rate for each of the coming epochs, which begin where the training is now, be it within an epoch.
    """
    settings = groups_of(optimizer)[group]
    for candidate in scheduler if isinstance(scheduler, list | tuple) else [scheduler]:
        numbers = [i for i, other in enumerate(groups_of(getattr(candidate, "optimizer", None))) if other is settings]
        if numbers:
            try:
                return _run_ahead(candidate, numbers[0], passed, epochs)
            except Exception:  # anybody's code; the forecast then goes by the present rate
                break
    return [_rate_of(settings)] * epochs


def _rate_of(settings: Mapping[str, Any]) -> float:
    """The learning rate of a parameter group; 1 where the optimizer has none (A2Grad): its steps count alike then."""
    return float(settings.get("lr", 1.0))


def _run_ahead(scheduler: Any, group: int, passed: float, epochs: int) -> list[float]:
    settings = [
        {name: copy.deepcopy(value) for name, value in parameter_group.items() if name != "params"}
        for parameter_group in scheduler.optimizer.param_groups
    ]
    stand_in = torch.optim.SGD([torch.zeros(1, device="cpu")], lr=1.0)
    stand_in.param_groups = [{**of_group, "params": []} for of_group in settings]
    counting = (
        scheduler if hasattr(scheduler, "last_epoch") else next(iter(getattr(scheduler, "_schedulers", [])), None)
    )
    steps = getattr(counting, "last_epoch", round(passed))
    # one that is stepped after each epoch has made one step at most before the first is over
    per_epoch = max(1, round(steps / passed)) if passed >= 1 or (passed > 0 and steps > 1) else 1
    begun = passed - math.floor(passed + 1e-6) if per_epoch == 1 else 0.0  # of the epoch that is being trained
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the stand-in's own step was never called
        ahead = copy.deepcopy(scheduler, {id(scheduler.optimizer): stand_in})
        # after the last epoch it may have been stepped, or be about to be
        due = max(0, (round(passed * per_epoch) if per_epoch > 1 else math.floor(passed + 1e-6)) - steps)
        for _ in range(due):
            ahead.step()
        for _ in range(epochs + 1):
            of_epoch = 0.0
            for _ in range(per_epoch):
                of_epoch += float(stand_in.param_groups[group]["lr"])
                with contextlib.suppress(ValueError):  # one with an end has come to it: the last rate stays
                    ahead.step()
            rates.append(of_epoch / per_epoch)
    if begun < 1e-6:
        return rates[:epochs]
    return [(1 - begun) * rate + begun * after for rate, after in itertools.pairwise(rates)]


def leading_group(optimizers: Sequence[Optimizer], lasso: GroupLasso) -> tuple[Optimizer, int]:
    """The optimizer, and the number of its parameter group, that most of the weights with a lasso are in; of optimizers
    around others, the innermost."""
    weights = {id(weight): weight.numel() for weight in lasso.weights()[0]}
    groups = [
        (sum(weights.get(id(p), 0) for p in group["params"]), optimizer, number)
        for optimizer in reversed(all_optimizers(optimizers))
        for number, group in enumerate(groups_of(optimizer))
    ]
    return max(groups, key=lambda group: group[0])[1:]  # the first of equals


def reach_per_rate(optimizer: Optimizer, group: int) -> float:
    """What one step's reach is for a learning rate of 1: 1 / (1 - momentum); 1 for optimizers without momentum."""
    settings = groups_of(optimizer)[group]
    momentum = float(settings.get("momentum") or 0.0)
    dampening = float(settings.get("dampening") or 0.0) if momentum else 0.0
    return (1 - dampening) / (1 - momentum) if momentum < 1 else math.inf


# -- what the lasso has done so far ------------------------------------------------------------------------------------


@dataclass
class Course:
    """How the slices have moved so far, numbered by the dense network.

    `note_step` is called before every step, `look` at every epoch's end.

    Attributes:
        optimizer, group: whose learning rate and steps count, and the number of the parameter group.
        epochs: of the whole training, None where that is not known.
        steps: of the optimizer since the last look, those of replayed CUDA graphs left out; `calls`: of `note_step`;
            `rate`, `last_rate`: the learning rates at the first and at the latest of them; `replays`: of CUDA graphs,
            until the last look.
        passed: epochs at the last look; `steps_per_epoch`: as counted until then.
        norms: of all slices at the last look, NaN where pruned; `resistance`: smoothed, NaN where unknown.
        begun: whether a step with a lasso was noted.
        warned: whether the user knows that nothing will be pruned; `diverged`: that weights are NaN or infinite.
    """

    optimizer: Optimizer
    group: int
    epochs: float | None
    steps: int = 0
    calls: int = 0
    replays: int = 0
    rate: float | None = None
    last_rate: float | None = None
    passed: float = 0.0
    steps_per_epoch: float = 0.0
    norms: dict[str, Sides] = field(default_factory=dict)
    resistance: dict[str, Sides] = field(default_factory=dict)
    begun: bool = False
    warned: bool = False
    diverged: bool = False

    @classmethod
    def counting(cls, optimizers: Sequence[Optimizer], lasso: GroupLasso, epochs: float | None) -> "Course":
        """A course that counts the steps of the optimizer that most of the lasso's weights are in."""
        course = cls(*leading_group(optimizers, lasso), epochs)

        def count(*_: Any) -> None:
            course.steps += 1

        with contextlib.suppress(AttributeError, TypeError):  # one that is no whole Optimizer: `calls` are counted
            course.optimizer.register_step_post_hook(count)
        return course

    @property
    def measured(self) -> bool:
        return bool(self.resistance)

    @property
    def has_momentum(self) -> bool:
        """Whether the optimizer moves weights by the rate times the gradient, as SGD does, and Adam does not."""
        settings = groups_of(self.optimizer)[self.group]
        return "momentum" in settings and "alpha" not in settings  # RMSprop has both

    def note_step(self, now: Callable[[], Now]) -> None:
        """Notes the learning rate, before each step, and the norms before the first one."""
        self.calls, self.begun = self.calls + 1, True
        if not self.norms:
            self.norms = now().by_original(now().slice_norms())
        # A scheduler may be stepped before the end of the epoch is told. A rate that is a tensor is read then: here
        # it would be waited for in each step, and a step that is being captured may not.
        settings = groups_of(self.optimizer)[self.group]
        self.last_rate = None if isinstance(settings.get("lr"), Tensor) else _rate_of(settings)
        self.rate = self.last_rate if self.rate is None else self.rate

    def _rate_now(self) -> float:
        return _rate_of(groups_of(self.optimizer)[self.group])

    def _steps_made(self) -> int:
        """Updates since the last look: as the optimizer counts them, replayed graphs too, or else the calls before."""
        replayed = getattr(self.optimizer, "replays", 0)
        return self.steps + replayed - self.replays or self.calls

    def look(self, now: Now) -> None:
        """Measures what the last epoch, or a part of it, did to the slices, under the lambda that holds now."""
        norms = now.slice_norms()
        after = now.by_original(norms)
        steps = self._steps_made()
        replayed = getattr(self.optimizer, "replays", 0) > self.replays
        last = self._rate_now() if replayed or self.last_rate is None else self.last_rate
        mean_rate = (last + (last if self.rate is None else self.rate)) / 2
        reach = steps * mean_rate * reach_per_rate(self.optimizer, self.group)
        if self.norms and 0 < reach < math.inf:
            pulls = now.by_original(pulls_of(norms, spares=True))
            for name, sides in after.items():
                if name not in self.norms:
                    continue  # an earlier version did not follow this layer
                moved = [(was - side) / reach for was, side in zip(self.norms[name], sides, strict=True)]
                fresh = [now.coefficient * pull - move for pull, move in zip(pulls[name], moved, strict=True)]
                known = self.resistance.get(name, (fresh[0], fresh[1]))
                first, second = (
                    torch.where(old.isnan(), new, old.lerp(new, SMOOTHING))
                    for old, new in zip(known, fresh, strict=True)
                )
                self.resistance[name] = first, second
        if steps and now.passed > self.passed:
            self.steps_per_epoch = steps / (now.passed - self.passed)
        self.norms, self.rate, self.last_rate, self.passed = after, None, None, now.passed
        self.steps, self.calls, self.replays = 0, 0, getattr(self.optimizer, "replays", 0)

    def hop(self, now: Now, *, highest: bool = False) -> float:
        """How far the lasso moves a slice per step, and keeps a dying one hopping around zero, at the present rate, or
        at the highest that the optimizer tells of."""
        settings = groups_of(self.optimizer)[self.group]
        later = [float(settings[key]) for key in ("initial_lr", "max_lr") if highest and key in settings]
        return now.coefficient * max([self._rate_now(), *later]) * reach_per_rate(self.optimizer, self.group)

    def reach(self, now: Now, epochs: float) -> float:
        """The reach of the coming epochs; 0 before the first look."""
        whole = math.ceil(epochs - 1e-6)
        rates = rates_to_come(now.scheduler, self.optimizer, self.group, self.passed, whole)
        sum_of_rates = sum(rates) - (rates[-1] * (whole - epochs) if rates else 0.0)
        return self.steps_per_epoch * sum_of_rates * reach_per_rate(self.optimizer, self.group)

    def needs(self, now: Now, reach: float) -> list[Tensor]:
        """The lambda at which each channel of each space goes within a reach, 0 or more; infinite where it stays."""
        graph, norms = now.present.graph, now.slice_norms()
        pulls = pulls_of(norms)
        of_slices: dict[str, Sides] = {}
        for name, layer in graph.layers.items():
            sizes = graph.spaces[layer.input].size, graph.spaces[layer.output].size
            if name not in norms:
                of_slices[name] = tuple(
                    torch.full((size,), math.inf, dtype=torch.float32, device="cpu") for size in sizes
                )  # type: ignore[assignment]
                continue
            sides = []
            for side in (0, 1):
                resistance: Tensor | float = 0.0
                if name in self.resistance:
                    resistance = self.resistance[name][side][now.numbers(name, side)].nan_to_num(0.0)
                need = (norms[name][:2][side] / reach + resistance) / pulls[name][side]
                need = torch.where(pulls[name][side] > 0, need.clamp(min=0.0), math.inf).nan_to_num(math.inf, math.inf)
                # what a gated layer does not compute has gone
                whole = torch.zeros(sizes[side], dtype=torch.float32, device="cpu")
                sides.append(whole.index_copy_(0, graph.computed(name)[side], need.float()))
            of_slices[name] = sides[0], sides[1]
        needs = [
            torch.full_like(need, math.inf) if space.frozen and space.members is None else need
            for need, space in zip(largest_in_spaces(graph, of_slices), graph.spaces, strict=True)
        ]
        return everywhere(graph, as_they_go(graph, needs, now.round_to))

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self._steps_made(),
            "calls": self.calls,
            "rate": self.rate,
            "last_rate": self.last_rate,
            "passed": self.passed,
            "steps_per_epoch": self.steps_per_epoch,
            "norms": {name: list(sides) for name, sides in self.norms.items()},
            "resistance": {name: list(sides) for name, sides in self.resistance.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.calls = state["steps"], state["calls"]
        self.rate, self.last_rate = state["rate"], state["last_rate"]
        self.replays = getattr(self.optimizer, "replays", 0)
        self.passed, self.steps_per_epoch = state["passed"], state["steps_per_epoch"]
        self.norms = {name: (sides[0], sides[1]) for name, sides in state["norms"].items()}
        self.begun = bool(self.norms)
        self.resistance = {name: (sides[0], sides[1]) for name, sides in state["resistance"].items()}


def pulls_of(norms: dict[str, SliceNorms], *, spares: bool = False) -> dict[str, Sides]:
    """How strongly a lasso of lambda 1 pulls at each slice along itself, by layer; see the top of this file. A layer's
    multiplier of lambda is in it.

    Args:
        spares: as it pulls now, at spared slices only through those that cross them; else as if none of them were
            spared, which tells what it would take for them to go.
    """
    pulls = {}
    for name, layer in norms.items():
        own, crossing = layer.factors(spares=spares), layer.factors()
        across_inputs, across_outputs = (
            (side * factors).sum() / side.square().sum() for side, factors in zip(layer[:2], crossing, strict=True)
        )
        pulls[name] = own[0] + layer.inputs * across_outputs, own[1] + layer.outputs * across_inputs
    return pulls


# -- where it leads ----------------------------------------------------------------------------------------------------


def flops_at(needs: Sequence[Tensor], flops: ShapeFlops, coefficient: float) -> tuple[float, float]:
    """Training and inference FLOPs per image if every channel whose need is at most lambda goes."""
    return flops.of_counts([int((need > coefficient).sum()) for need in needs])


def _without_spared(needs: list[Tensor], now: Now) -> list[Tensor]:
    """The needs, infinite for the channels that the lasso spares: they stay."""
    graph = now.present.graph
    for name, norms in now.slice_norms().items():
        if norms.spared is not None:
            spaces = graph.layers[name].input, graph.layers[name].output
            for space, computed, spared in zip(spaces, graph.computed(name), norms.spared, strict=True):
                needs[space][computed[spared]] = math.inf
    return needs


def forecast(course: Course, now: Now, *, epochs: float, threshold: float, dense: Flops) -> Forecast:
    """What is expected at the end of the training, if lambda stays as it is.

    Args:
        epochs: of the whole training.
        threshold: of the sparse test.
        dense: FLOPs per image of the dense network.
    """
    sides = [
        (side, used) for norms in now.slice_norms().values() for side, used in zip(norms[:2], norms[2:4], strict=True)
    ]
    sizes = torch.cat([torch.tensor([], dtype=torch.float32, device="cpu"), *(side for side, used in sides if used)])
    smallest, median = (float(sizes.min()), float(sizes.median())) if len(sizes) else (math.nan, math.nan)
    reach = course.reach(now, max(0.0, epochs - now.passed))
    needs = _without_spared(course.needs(now, max(reach, SHORTEST)), now)
    training, inference = flops_at(needs, now.shape_flops(), now.coefficient)
    return Forecast(
        now.passed, epochs, smallest, median, threshold, now.coefficient * reach,
        share(inference, dense.inference), share(training, dense.training), course.measured,
    )  # fmt: skip
