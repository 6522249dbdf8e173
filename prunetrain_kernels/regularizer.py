"""The group lasso of a whole model, and the coefficient that sets its strength (paper section 4.1)."""

import copy
import difflib
import math
import numbers
from collections.abc import Collection, Container, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.graph import ChannelGraph
from prunetrain_kernels.graph.gating import gateable_sides
from prunetrain_kernels.graph.prunable import frozen_share, prunable
from prunetrain_kernels.graph.spaces import Layer
from prunetrain_kernels.graph.trace import trace_channels
from prunetrain_kernels.inputs import ExampleInputs
from prunetrain_kernels.ops.group_lasso import (
    EPS,
    Groups,
    add_group_lasso_gradient_,
    group_lasso,
    slice_statistics,
    split_by_layer,
)
from prunetrain_kernels.ops.tables import channels_of


class Group(NamedTuple):
    """One penalised channel slice.

    Attributes:
        layer, side, channel: the layer's name, "in" or "out", and the number of the channel on that side.
        norm: sqrt(|slice|^2 + eps).
        max_abs: the largest |w| in the slice.
        multiplier: the factor of the norm in R(W); 0 where the slice is spared.
    """

    layer: str
    side: str
    channel: int
    norm: float
    max_abs: float
    multiplier: float = 1.0


class SliceNorms(NamedTuple):
    """Norms of the channel slices of a layer.

    Attributes:
        inputs, outputs: norms of the input slices (C,) and of the output slices (K,).
        inputs_pulled, outputs_pulled: whether the side has a lasso.
        multiplier: the layer's multiplier of lambda.
        spared: which of the input slices (C,) and output slices (K,) are spared, bool, or None for none.
    """

    inputs: Tensor
    outputs: Tensor
    inputs_pulled: bool
    outputs_pulled: bool
    multiplier: float
    spared: tuple[Tensor, Tensor] | None = None

    def factors(self, *, spares: bool = True) -> tuple[Tensor, Tensor]:
        """The factor of each norm in R(W), of inputs and outputs; `spares`: 0 for what is spared."""
        sides = []
        for i, (norms, pulled) in enumerate(zip(self[:2], self[2:4], strict=True)):
            factors = torch.full_like(norms, self.multiplier * pulled)
            sides.append(factors * ~self.spared[i] if spares and self.spared is not None else factors)
        return sides[0], sides[1]


class GroupLasso:
    """R(W) of a model (paper Eq. 2): one norm per input channel and one per output channel of every layer.

    All convolutions and linear layers that tracing finds are penalised, except for channels that can never go (those of
    the network's input and output, and of spaces that are frozen), depthwise convolutions, biases and normalisation
    parameters, and layers inside submodules that tracing could not enter (`graph.opaque` lists those). In a convolution
    with groups, an input group of the lasso is one channel of every group, `W[:, c]` of its (K, C / groups, ...)
    weight. The paper has no such convolutions.

    Layers may differ in strength: with `coefficients={"layer3": 2.0, "stem.conv": 0.0}` R(W) becomes the sum over the
    layers of a multiplier times their norms, an extension beyond the paper. Another is `sparing`: slices that have no
    lasso for the time being.

    It reads the model's present weights at every call, so it stays valid after a reconfiguration.

    Args:
        model: any module that `trace_channels` can follow.
        example_inputs: as for `trace_channels`.
        graph: the model's channel graph, if it is at hand already.
        eps: added to every squared norm.
        policy: "union", "gating" or "auto", that of the reconfigurations. Under the latter two a convolution can
            leave out channels that its space keeps, so slices of frozen spaces count too, where it can be gated.
        may_be_empty: whether a network of which nothing can go is no error; R(W) is 0 then.
        coefficients: multipliers of lambda by name. A name is that of a layer, or that of a module and then stands for
            all layers in it ("" for the whole model). Of several names that cover a layer the longest counts; a layer
            that none covers has 1. A layer with a multiplier of 0 is left out, as if it were not penalised.

    Raises:
        TraceError: the model cannot be traced.
        InputError: there is nothing to penalise, or nothing that could ever go; a multiplier that is negative or not
            finite; a name that covers no layer with a lasso.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        *,
        graph: ChannelGraph | None = None,
        eps: float = EPS,
        coefficients: Mapping[str, float] | None = None,
        policy: str = "union",
        may_be_empty: bool = False,
    ) -> None:
        self.model = model
        self.eps = eps
        self._gates = policy != "union"
        self._coefficients = {} if coefficients is None else _checked(coefficients)
        graph = graph or trace_channels(model, example_inputs)
        names = self._take_up(graph)
        if not names:
            raise InputError("the model has no channels to penalise: it has one layer only, or none that was traced.")
        for name in self._coefficients:
            if not any(_covers(name, layer) for layer in names):
                raise InputError(_unknown(name, names))
        if not self._groups and all(_multiplier(name, self._coefficients) for name in names):
            if may_be_empty:
                return
            raise InputError(
                f"nothing of {type(model).__name__} can be pruned, so there is nothing to penalise: "
                f"{prunable(graph).reasons()}; print(trace_channels(model, example_inputs)) lists all channels."
            )
        if not self._groups:
            raise InputError(
                "`coefficients` leaves out every layer that has a lasso; give at least one a multiplier above 0, or "
                "train without a lasso."
            )

    def _take_up(self, graph: ChannelGraph) -> list[str]:
        """Finds the groups in a graph; names of the layers that have any, those with a multiplier of 0 included."""
        self._groups: dict[str, Groups] = {}
        self._path: dict[str, list[str]] = {}
        self._sides: dict[str, tuple[str, str]] = {}
        self._multipliers: dict[str, float] = {}
        self._spared: dict[str, tuple[Tensor, Tensor]] = {}
        self._kept_factors: tuple[Any, Tensor | None] = (None, None)
        names = []
        for layer in graph.layers.values():
            inner = not graph.spaces[layer.input].is_input, not graph.spaces[layer.output].is_output
            if not any(inner) or layer.name in graph.excluded:
                continue
            names.append(layer.name)
            multiplier = _multiplier(layer.name, self._coefficients)
            sides = self._pulled(graph, layer, inner)
            if multiplier and any(sides):
                # for `Groups` the weight's first dimension is the output
                inputs, outputs = reversed(sides) if layer.transposed else sides
                self._groups[layer.name] = Groups(layer.block, inputs=inputs, outputs=outputs)
                self._sides[layer.name] = ("out", "in") if layer.transposed else ("in", "out")
                self._path[layer.name] = layer.name.split(".") if layer.name else []
                self._multipliers[layer.name] = multiplier
        return names

    def _pulled(self, graph: ChannelGraph, layer: Layer, inner: tuple[bool, bool]) -> tuple[bool, bool]:
        """Whether a layer's input and output slices have a lasso: those that can go, or be gated.

        Args:
            inner: whether its spaces are others than the network's own input and output.
        """
        free = [frozen_share(graph, space) < 1 for space in (layer.input, layer.output)]
        gated = gateable_sides(graph, self.model.get_submodule(layer.name), layer) if self._gates else (False, False)
        sides = [ok and (can_go or gates) for ok, can_go, gates in zip(inner, free, gated, strict=True)]
        return sides[0], sides[1]

    @property
    def coefficients(self) -> dict[str, float]:
        """The multipliers by name, as they were given."""
        return dict(self._coefficients)

    def after(self, graph: ChannelGraph) -> "GroupLasso":
        """The same lasso, with the same multipliers, for the model in the new shape that `graph` describes.

        Layers that were removed are no error; if none is left, R(W) is 0.
        """
        lasso = copy.copy(self)
        lasso._take_up(graph)
        return lasso

    @property
    def is_empty(self) -> bool:
        """Whether no layer has a group."""
        return not self._groups

    def weights(self) -> tuple[list[nn.Parameter], list[Groups]]:
        """The model's present weights, and which of their groups are penalised; removed layers are left out."""
        pairs = [(self._weight(name), groups) for name, groups in self._groups.items()]
        present = [(weight, groups) for weight, groups in pairs if weight is not None]
        return [weight for weight, _ in present], [groups for _, groups in present]

    def sparing(self, spared: Mapping[str, tuple[Tensor, Tensor]]) -> "GroupLasso":
        """The same lasso without the slices that are spared.

        Args:
            spared: by layer, which of its input slices (C,) and output slices (K,) are spared, bool, on the CPU.
        """
        lasso = copy.copy(self)
        lasso._spared = {name: sides for name, sides in spared.items() if name in self._groups}
        lasso._kept_factors = (None, None)
        return lasso

    def factors(self) -> list[tuple[Tensor, Tensor]] | None:
        """Of each weight that `weights` gives the factors of its norms, in their order: those of the C input slices and
        of the K output slices, fp64, on the CPU. None where all are 1."""
        if not self._spared and set(self._multipliers.values()) <= {1.0}:
            return None
        factors = []
        for name, weight, group in zip(self._present(), *self.weights(), strict=True):
            multiplier = self._multipliers[name]
            sizes = channels_of(weight, group.block)
            sides = [torch.full((n,), multiplier, dtype=torch.float64, device="cpu") for n in sizes]
            spared = self._spared.get(name)
            if spared is not None:
                of_weight = reversed(spared) if self._sides[name] == ("out", "in") else spared
                sides = [side * ~mask for side, mask in zip(sides, of_weight, strict=True)]
            factors.append((sides[0], sides[1]))
        return factors

    def _flat_factors(self, weights: Sequence[Tensor], groups: Sequence[Groups]) -> Tensor | None:
        """`factors`, as the operators take them; kept while the weights have the same shapes."""
        if not self._spared and set(self._multipliers.values()) <= {1.0}:
            return None
        wide = any(w.dtype == torch.float64 for w in weights)
        key = ([(w.shape, g.block) for w, g in zip(weights, groups, strict=True)], wide, weights[0].device)
        if self._kept_factors[0] != key:
            flat = torch.cat([side for pair in self.factors() or () for side in pair])
            flat = flat.to(weights[0].device, torch.float64 if wide else torch.float32)
            self._kept_factors = key, flat
        return self._kept_factors[1]

    def _present(self) -> list[str]:
        """Names of the layers with a lasso that have not been removed."""
        return [name for name in self._groups if self._weight(name) is not None]

    def _weight(self, name: str) -> nn.Parameter | None:
        module: nn.Module | None = self.model
        for part in self._path[name]:  # get_submodule takes three times as long, and every step asks for all
            module = None if module is None else module._modules[part]
        return None if module is None else module._parameters.get("weight")

    def penalty(self) -> Tensor:
        """R(W): a scalar tensor with autograd, in fp32 (fp64 for fp64 weights)."""
        weights, groups = self.weights()
        if not weights:
            return self._nothing()
        return group_lasso(weights, groups, self.eps, self._flat_factors(weights, groups))

    def add_gradient_(self, coefficient: float | Tensor, only: Container[int] | None = None) -> Tensor:
        """Adds coefficient * dR/dW into every weight's `.grad` and returns R(W); records no graph.

        Args:
            coefficient: lambda.
            only: `id`s of weights: only these get a gradient, and R(W) is that of these alone.
        """
        weights, groups = self.weights()
        flat = self._flat_factors(weights, groups) if weights else None
        if only is not None:
            chosen = [i for i, weight in enumerate(weights) if id(weight) in only]
            if flat is not None:
                parts = split_by_layer(flat, weights, [group.block for group in groups])
                flat = torch.cat([torch.empty_like(flat[:0]), *(side for i in chosen for side in parts[i])])
            weights, groups = [weights[i] for i in chosen], [groups[i] for i in chosen]
        if not weights:
            return self._nothing()
        return add_group_lasso_gradient_(weights, groups, coefficient, self.eps, flat)

    def _nothing(self) -> Tensor:
        return torch.zeros((), device=next((p.device for p in self.model.parameters()), torch.device("cpu")))

    def slice_norms(self) -> dict[str, "SliceNorms"]:
        """Norms of the channel slices of every layer that has a lasso, with eps, on the CPU, by layer."""
        weights, groups = self.weights()
        names, norms_of_weights = self._present(), slice_statistics(weights, groups, self.eps)[0]
        norms_of: dict[str, SliceNorms] = {}
        for name, group, norms in zip(names, groups, norms_of_weights, strict=True):
            (first, second), used = (norms[0].cpu(), norms[1].cpu()), (group.inputs, group.outputs)
            if self._sides[name] == ("out", "in"):
                first, second, used = second, first, (used[1], used[0])
            norms_of[name] = SliceNorms(first, second, *used, self._multipliers[name], self._spared.get(name))
        return norms_of

    def groups(self) -> list[Group]:
        """Every penalised group, in the order of the layers; `pandas.DataFrame(lasso.groups())` makes a table of it."""
        table: list[Group] = []
        names = self._present()
        statistics = slice_statistics(*self.weights(), self.eps)
        for name, norms, sizes in zip(names, *statistics, strict=True):
            used_sides = (self._groups[name].inputs, self._groups[name].outputs)
            for side, used, norm, size in zip(self._sides[name], used_sides, norms, sizes, strict=True):
                if used:
                    factors = [self._multipliers[name]] * len(norm)
                    if name in self._spared:
                        spared = self._spared[name][("in", "out").index(side)]
                        factors = [0.0 if spares else self._multipliers[name] for spares in spared.tolist()]
                    rows = zip(norm.tolist(), size.tolist(), factors, strict=True)
                    table += [Group(name, side, channel, *row) for channel, row in enumerate(rows)]
        return table


# -- multipliers by name -----------------------------------------------------------------------------------------------


def _checked(coefficients: Mapping[str, float]) -> dict[str, float]:
    """A copy with numbers of Python's own. Raises InputError where something is no name or no multiplier."""
    if not isinstance(coefficients, Mapping):
        raise InputError(
            f"`coefficients` must map names of layers or modules to multipliers, as {{'layer3': 2.0}} does, and not be "
            f"a {type(coefficients).__name__}."
        )
    for name, value in coefficients.items():
        if not isinstance(name, str):
            raise InputError(f"`coefficients` takes names of layers or modules as keys, not {name!r}; give the name.")
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= torch.finfo(torch.float32).max:
            raise InputError(
                f"the lasso's multiplier of {name!r} must be a finite number, 0 or more, not {value!r}; 0 leaves the "
                "layer out, 1 is the strength of layers that have none."
            )
    return {name: float(value) for name, value in coefficients.items()}


def _covers(name: str, layer: str) -> bool:
    """Whether a layer has this name or lies in the module of this name."""
    return name in ("", layer) or layer.startswith(f"{name}.")


def _multiplier(layer: str, coefficients: Mapping[str, float]) -> float:
    names = [name for name in coefficients if _covers(name, layer)]
    return coefficients[max(names, key=len)] if names else 1.0


def _unknown(name: str, layers: Collection[str]) -> str:
    """The message that no layer with a lasso has the name, and which names come nearest."""
    above = {".".join(parts[:end]) for parts in (layer.split(".") for layer in layers) for end in range(1, len(parts))}
    nearest = difflib.get_close_matches(name, [*layers, *sorted(above - set(layers))], n=3, cutoff=0.5)
    named = ", ".join(map(repr, nearest or list(layers)[:3]))
    return (
        f"`coefficients` names {name!r}, but no layer with a lasso has that name or lies in a module of that name; "
        f"{'the nearest that have one are' if nearest else 'the first that have one are'} {named}."
    )


def penalty_coefficient(ce_loss: float | Tensor, penalty: float | Tensor, ratio: float) -> float:
    """lambda such that lambda * R is `ratio` of the total loss (paper Eq. 3).

    ratio = lambda R / (l + lambda R), hence lambda = ratio / (1 - ratio) * l / R.

    Args:
        ce_loss: classification loss l of the very first forward pass: one positive number, of any shape.
        penalty: R(W_0) of the initial weights, likewise.
        ratio: share of the penalty in the total loss, 0 <= ratio < 1; the paper uses 0.1 to 0.25.

    Raises:
        InputError: a ratio outside [0, 1), a loss or penalty that is not one number, or not positive and finite; says
            what to do.
    """
    if not 0 <= ratio < 1:
        raise InputError(f"penalty_ratio must be from 0 up to, but not including, 1, not {ratio}; the paper uses 0.25.")
    loss, total = float(one_number(ce_loss, "the first loss")), float(one_number(penalty, "the penalty"))
    for value, advice in ((loss, _advice_on_loss), (total, _advice_on_penalty)):
        if not (math.isfinite(value) and value > 0):
            raise InputError(
                f"lambda cannot be set from a first loss of {loss:g} and a penalty of {total:g}; both must be positive "
                f"numbers, because the penalty is to be a share of their sum: {advice(value)}."
            )
    coefficient = ratio / (1 - ratio) * loss / total
    if not math.isfinite(coefficient):
        raise InputError(f"a first loss of {loss:g} and a penalty of {total:g} give no finite lambda; scale the loss.")
    return coefficient


def one_number(value: object, what: str) -> Tensor:
    """`value` as a tensor of one real number, shape (), without a graph.

    Raises:
        InputError: it is not one number, but one per image, complex, or no number at all; says what to do.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise InputError(
                f"{what} must be one number, but has the shape {tuple(value.shape)}; reduce it first (a loss per image "
                "by loss.mean(), as reduction='mean' does)."
            )
        if value.is_complex() or value.dtype == torch.bool:
            raise InputError(f"{what} must be a real number, not {value.dtype}; give its absolute value or real part.")
        return value.detach().reshape(())
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return torch.tensor(float(value), dtype=torch.float64, device="cpu")
    raise InputError(f"{what} must be a tensor of one number, not {type(value).__name__}; give the loss inside it.")


SET_IT = "set PruneTrain's `coefficient` to a lambda that you choose, before the first step"


def _advice_on_loss(loss: float) -> str:
    if not math.isfinite(loss):
        return "look for images, labels or weights that are not finite, or a loss that overflows in fp16"
    if loss == 0:
        return f"this batch has nothing to teach, so give another one first, or {SET_IT}"
    return f"add a constant to the loss that makes it positive, which leaves its gradient as it is, or {SET_IT}"


def _advice_on_penalty(penalty: float) -> str:
    return "initialise the weights, which are all 0" if penalty == 0 else "look for weights that are not finite"
