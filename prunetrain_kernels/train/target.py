"""Lambda steered to a target: "half the FLOPs" instead of a penalty ratio.

At the end of every epoch, and at every reconfiguration, lambda becomes what the forecast (`forecast.py`) says is needed
for the network to have shrunk to the target by a given share of the training. It changes by a bounded factor each time,
so that a wrong forecast is corrected before it does harm. Half way there the lasso is *focused*: from then on it pulls
only at the channels that are forecast to go, and spares those that stay, which it would shrink too. Once the target is
met the lasso rests, and the remaining epochs fine-tune; the reconfiguration that meets it keeps as many sparse
channels, the largest, as it takes not to fall below. The paper has one constant lambda, for all channels alike; that
stays the default.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from prunetrain_kernels.cost import Flops, share
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.graph import Keep
from prunetrain_kernels.graph.dead import bypassed_spaces
from prunetrain_kernels.graph.keep import fewest_channels
from prunetrain_kernels.graph.sparse import everywhere
from prunetrain_kernels.train.forecast import DIVERGED, Course, Now, ShapeFlops, Sides, flops_at
from prunetrain_kernels.train.present import Present

BY = 0.25  # share of the training by which the target is to be met: the rest trains the smaller network
# Lambda is set for this share of the epochs that are left until then: what resists grows as slices become small, and a
# slice that produces a channel is held up until those that read it are gone.
PLANNED = 0.5
WITHIN = 0.01  # of the dense network's FLOPs: so near to the target the lasso may rest,
WITHIN_OF = 0.1  # but nearer where this share of the target, or of what is to go, is less
FOCUSED_FROM = 0.5  # of the time until the target is due: from then on channels that stay are spared
FLOOR = 0.5  # of the channels that uniform shrinking would leave: no space is planned to keep fewer, unless bypassed
FACTOR = 2.0  # lambda changes by at most this from one epoch to the next
LARGEST_RATIO = 0.9  # of lambda * R(W) in a total with the first loss: a lasso beyond that would drown the loss

TRAINING, INFERENCE = 0, 1  # places in a pair of FLOPs


@dataclass(frozen=True)
class Target:
    """What to shrink to.

    Attributes:
        inference: FLOPs of one inference at the end, as a share of the dense network's; None if not asked for.
        training: FLOPs of the whole training, as a share of what the dense network would take; None likewise.
        epochs: of the whole training.
        by: the share of them by which the network is to have its final shape, about.
        focus: whether the lasso spares the channels that are forecast to stay, from half of that time on.
    """

    inference: float | None
    training: float | None
    epochs: float
    by: float = BY
    focus: bool = True

    @property
    def share(self) -> float:
        return self.training if self.inference is None else self.inference  # type: ignore[return-value]

    @property
    def within(self) -> float:
        """How near to the target is near enough."""
        return min(WITHIN, WITHIN_OF * self.share, WITHIN_OF * (1 - self.share))

    @property
    def which(self) -> int:
        """The place, in a pair of FLOPs, of those that the target is about."""
        return TRAINING if self.inference is None else INFERENCE

    @property
    def name(self) -> str:
        return "training FLOPs of the whole run" if self.inference is None else "inference FLOPs"


def target_of(
    inference: float | None, training: float | None, epochs: float | None, by: float, *, focus: bool = True
) -> Target | None:
    """The target that PruneTrain's arguments ask for, or None.

    Raises:
        InputError: a number out of range, both targets, or none of the epochs that they need.
    """
    if epochs is not None and not (_is_number(epochs) and 0 < epochs < math.inf):
        raise InputError(f"epochs must be a positive number, the length of the whole training, not {epochs!r}.")
    if inference is None and training is None:
        return None
    if inference is not None and training is not None:
        raise InputError("give a target for inference or one for training, not both: each decides lambda by itself.")
    for name, value in (("target", inference), ("target_training", training)):
        if value is not None and not (_is_number(value) and 0 < value < 1):
            raise InputError(f"{name} must be a share of the dense network's FLOPs between 0 and 1, not {value!r}.")
    if not (_is_number(by) and 0 < by <= 1):
        raise InputError(f"target_by must be a share of the training, above 0 and up to 1, not {by!r}.")
    if epochs is None:
        raise InputError("a target needs the length of the training: give PruneTrain epochs=..., all of them together.")
    return Target(inference, training, float(epochs), by, bool(focus))


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def interval_of(interval: float | None, steered_epochs: float | None) -> float:
    """The interval as it was given, or the default: the paper's 10, or with a target a twentieth of the epochs.

    Args:
        steered_epochs: of the training, where there is a target.
    """
    if interval is not None:
        return interval
    return 10 if steered_epochs is None else max(1, round(steered_epochs / 20))


@dataclass
class Steering:
    """Lambda on its way to a target.

    Attributes:
        target: to be met.
        dense: FLOPs of the dense network.
        spent: FLOPs of the training so far, in epochs of the dense network; `counted`: until which epoch.
        first: the lambda that the training began with, None before.
        largest: lambda is not larger now; it may be once R(W) has fallen. `room`: lambda * R(W) is not larger.
        met: whether the target has been met.
        spares: by layer, which of the dense network's input and output slices the lasso spares (bool); empty for none.
    """

    target: Target
    dense: Flops
    spent: float = 0.0
    first: float | None = None
    largest: float = math.inf
    room: float | None = None
    met: bool = False
    spares: dict[str, Sides] = field(default_factory=dict)

    counted: float = 0.0

    @classmethod
    def towards(cls, target: Target, dense: Present, model: nn.Module, round_to: int = 1) -> "Steering":
        """Steering from a dense network.

        Raises:
            InputError: the target cannot be reached, or the FLOPs cannot be counted.
        """
        if dense.flops.unknown:
            raise InputError(f"a target needs FLOPs, which cannot be counted here: {dense.flops.unknown}.")
        steering = cls(target, dense.flops)
        steering.check_reachable(ShapeFlops.of(dense, model), round_to)
        return steering

    def count(self, now: Now) -> None:
        """Adds what the epochs until now have cost, with the network as it is."""
        self.spent += (now.passed - self.counted) * self.shares(now.flops)[TRAINING]
        self.counted = now.passed

    def would_meet(self, now: Now, keep: Keep) -> bool:
        """Whether the network would meet the target with these channels; `now` may be a little ahead."""
        then = dataclasses.replace(self)
        then.count(now)
        return then.is_met(now.shape_flops().of_keep(keep), now.passed)

    def enough(self, now: Now) -> Callable[[Keep], bool]:
        """Tells of a choice whether it keeps enough not to be below the target."""
        flops = now.shape_flops()
        return lambda keep: self.is_enough(flops.of_keep(keep), now.passed)

    # -- what to shrink to --------------------------------------------------------------------------------------

    def goal(self, passed: float, now: float | None = None) -> float:
        """The share of the dense network's FLOPs per image to shrink to.

        Args:
            passed: epochs trained.
            now: the present share, from which the network is to go down steadily until the target is due; None for
                what it would have to be from this moment on.
        """
        target = self.target
        if target.inference is not None:
            return target.inference
        assert target.training is not None
        left = max(1e-9, target.epochs - passed)
        down = 0.0 if now is None else min(left, max(0.0, target.by * target.epochs - passed))
        rest = target.training * target.epochs - self.spent - down * (now or 0.0) / 2
        return min(1.0, max(0.0, rest / (left - down / 2)))

    def shares(self, flops: tuple[float, float]) -> tuple[float, float]:
        """Training and inference FLOPs per image as shares of the dense network's."""
        return share(flops[TRAINING], self.dense.training), share(flops[INFERENCE], self.dense.inference)

    def is_met(self, flops: tuple[float, float], passed: float) -> bool:
        """Whether a network with these FLOPs per image is near enough to the target."""
        return self.shares(flops)[self.target.which] <= self.goal(passed) + self.target.within

    def is_enough(self, flops: tuple[float, float], passed: float) -> bool:
        """Whether a network with these FLOPs per image is not below the target."""
        return self.shares(flops)[self.target.which] >= min(self.goal(passed), 1.0) - 1e-9

    def check_reachable(self, flops: ShapeFlops, round_to: int = 1) -> None:
        """Raises InputError where even the smallest shape is above the target."""
        smallest = self.shares(flops.of_counts(fewest_channels(flops.graph, round_to)))
        least = smallest[self.target.which]
        if not least < self.target.share:
            raise InputError(
                f"{self.target.share:g} of the {self.target.name} cannot be reached: {least:.2g} are in channels "
                "that stay (see `print(prunetrain.graph)`); choose a target above that, or exclude or round less."
            )

    # -- lambda -------------------------------------------------------------------------------------------------

    def epochs_to_go(self, passed: float) -> float:
        """Epochs in which the target is to be met: until it is due, but not fewer than a twentieth of the training."""
        target = self.target
        least = max(1.0, target.epochs / 20)
        planned = (target.by * target.epochs - passed) * PLANNED
        return min(max(planned, least), max(target.epochs - passed, least))

    def steered(self, course: Course, now: Now, ratio: float, since: float = 1.0) -> float:
        """Lambda for the next epoch.

        Args:
            ratio: the penalty's share in the first loss, which lambda began with.
            since: epochs since it was steered last; in a part of one it changes by less.
        """
        if self.first is None:
            self.first = now.coefficient
            self.largest = now.coefficient * LARGEST_RATIO / (1 - LARGEST_RATIO) / (ratio / (1 - ratio))
            self.room = self.largest * now.penalty()
        elif self.room is not None:  # None in a state that an earlier version saved
            self.largest = max(self.largest, self.room / max(now.penalty(), 1e-30))
        reach = course.reach(now, self.epochs_to_go(now.passed))
        if not reach > 0:
            return now.coefficient
        which = self.target.which
        goal = self.goal(now.passed, self.shares(now.flops)[which])
        needs, flops = course.needs(now, reach), now.shape_flops()

        def is_small(then: tuple[float, float]) -> bool:
            return self.shares(then)[which] <= goal

        focuses = self.focuses(now.passed)
        if focuses:
            planned = with_floors(needs, now, FLOOR * math.sqrt(goal))
            if math.isfinite(smallest_coefficient(planned, flops, is_small)):
                needs = planned
        wanted = smallest_coefficient(needs, flops, is_small)
        if not focuses:
            self.spares = {}  # those of a state that another target has left
        elif math.isfinite(wanted):
            self.spares = _slices_of(now, [need > wanted for need in needs])
        factor = FACTOR ** min(1.0, since)
        return min(max(wanted, now.coefficient / factor), now.coefficient * factor, self.largest)

    def focuses(self, passed: float) -> bool:
        """Whether channels that are forecast to stay are spared."""
        return self.target.focus and passed >= FOCUSED_FROM * self.target.by * self.target.epochs

    def focused(self, present: Present) -> Present:
        """The same network, with a lasso that spares the slices that are to be spared."""
        masks = {
            name: (sides[0][present.slice_numbers(name, 0)], sides[1][present.slice_numbers(name, 1)])
            for name, sides in (self.spares if self.target.focus and not self.met else {}).items()
            if name in present.graph.layers and name in present.original.kept
        }
        return dataclasses.replace(present, lasso=present.lasso.sparing(masks))

    def after(self, present: Present, *, met: bool | None) -> Present:
        """`focused`, of the network that a reconfiguration has left.

        Args:
            met: whether it meets the target; None where the lasso rests already.
        """
        self.met = self.met if met is None else met
        return self.focused(present)

    def reached(self, now: Now) -> float:
        """The share that was reached, of what the target is about."""
        share_now = self.shares(now.flops)[self.target.which]
        if self.target.training is None:
            return share_now
        return (self.spent + share_now * max(0.0, self.target.epochs - now.passed)) / self.target.epochs

    def ends(self, before: float, now: Now) -> bool:
        """Whether the training has ended since the epoch `before`, and the target is not met."""
        return before < self.target.epochs - 1e-6 <= now.passed and self.falls_short(now)

    def falls_short(self, now: Now) -> bool:
        """Whether the target is not met, by more than two points."""
        return not self.met and self.reached(now) > self.target.share + 2 * self.target.within

    # -- what is told of it -------------------------------------------------------------------------------------

    def verdict(self, now: Now, *, proximal: bool = False) -> str:
        """One sentence at the end of the training: whether the target was met, and if not, why and what helps.

        Args:
            proximal: whether the lasso acts by the proximal step already.
        """
        target, reached = self.target, self.reached(now)
        asked = f"target of {100 * target.share:.4g}% of the {target.name}"
        if not self.falls_short(now):
            coarse = reached > target.share + 2 * target.within
            return f"{asked} met{' as nearly as whole channels allow' if coarse else ''}: {reached:.1%}"
        if now.has_diverged():
            return f"{asked} not met: {reached:.1%}, because weights are NaN or infinite; {DIVERGED}"
        strongest = now.coefficient >= self.largest * 0.999
        why = (
            "the lasso was as strong as it may be"
            if strongest
            else "the slices that are left did not come to zero in time"
        )
        ways = ["train for more epochs", "start with a larger penalty ratio", "take a larger threshold"]
        ways += [] if proximal else ["use the proximal step"]
        return f"{asked} not met: {reached:.1%}, because {why}; {', '.join(ways[:-1])}, or {ways[-1]}"

    def state_dict(self) -> dict[str, Any]:
        return {
            "target": (self.target.inference, self.target.training),
            "spent": self.spent,
            "first": self.first,
            "largest": self.largest,
            "room": self.room,
            "met": self.met,
            "counted": self.counted,
            "spares": {name: list(sides) for name, sides in self.spares.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a saved state, of another target too: that is then not met yet."""
        self.spent, self.first = state["spent"], state["first"]
        self.largest, self.counted = state["largest"], state["counted"]
        self.room = state.get("room")
        self.spares = {name: (sides[0], sides[1]) for name, sides in state.get("spares", {}).items()}
        same = tuple(state["target"]) == (self.target.inference, self.target.training)
        self.met = same and state["met"]


def with_floors(needs: Sequence[Tensor], now: Now, least: float) -> list[Tensor]:
    """The needs, infinite for those channels of each space that need most, as many as it is to keep at the least.

    A forecast that is made early ranks channels by little more than their first weights, and would have layers of few
    channels with hundreds beside them. What a merge bypasses may go altogether.

    Args:
        least: share of the dense network's channels.
    """
    graph, bypassed = now.present.graph, bypassed_spaces(now.present.graph, now.model)
    dense: dict[int, int] = {}
    for layer in graph.layers.values():
        if layer.name in now.original.dense_layers:
            sizes = now.original.dense_layers[layer.name][1:]
            dense |= dict(zip((layer.input, layer.output), sizes, strict=True))
    result = []
    for number, need in enumerate(needs):
        kept = min(len(need), math.ceil(least * dense.get(number, len(need))))
        floored = need
        if kept and number not in bypassed:
            floored = torch.where(need >= need.topk(kept).values[-1], math.inf, need)  # equals stay and go together
        result.append(floored)
    return everywhere(graph, result)


def _slices_of(now: Now, stay: Sequence[Tensor]) -> dict[str, Sides]:
    """The slices of channels that stay, in each layer, numbered by the dense network.

    A frozen space's slices are none of them: nothing pulls at them, or only for a gate to leave them out.

    Args:
        stay: one mask per space.
    """
    graph = now.present.graph
    slices: dict[str, Sides] = {}
    for name, layer in graph.layers.items():
        if name not in now.original.kept:
            continue
        sides = []
        for side, space in enumerate((layer.input, layer.output)):
            mask = torch.zeros(int(now.original.dense_layers[name][1 + side]), dtype=torch.bool, device="cpu")
            if not graph.spaces[space].frozen:
                mask[now.numbers(name, side)] = stay[space][graph.computed(name)[side]]
            sides.append(mask)
        slices[name] = sides[0], sides[1]
    return slices


def smallest_coefficient(needs: Sequence[Tensor], flops: ShapeFlops, is_small: Any) -> float:
    """The smallest lambda at which `is_small` is true of the FLOPs that are left; infinite where none is."""
    candidates = sorted({value for need in needs for value in need.tolist() if math.isfinite(value)})
    if not candidates or not is_small(flops_at(needs, flops, candidates[-1])):
        return math.inf
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_small(flops_at(needs, flops, candidates[middle])) else (middle + 1, high)
    return candidates[low]
