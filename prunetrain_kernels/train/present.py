"""What is known of a network in its present shape: its channels, its lasso and its FLOPs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunetrain_kernels.compiled import eagerly
from prunetrain_kernels.cost import Flops, FlopTable, flop_table
from prunetrain_kernels.graph import ChannelGraph, Keep, trace_channels
from prunetrain_kernels.graph.gating import ConvolutionCost, cost_of
from prunetrain_kernels.graph.keep import restricted
from prunetrain_kernels.inputs import ExampleInputs
from prunetrain_kernels.nn import FuseReport, GatedConv2d
from prunetrain_kernels.nn import fuse as fuse_model
from prunetrain_kernels.prune.also import inputs_for
from prunetrain_kernels.prune.measure import comparison_of
from prunetrain_kernels.prune.undo import AllOrNothing
from prunetrain_kernels.regularizer import GroupLasso
from prunetrain_kernels.train.original import OriginalChannels


@dataclass(frozen=True)
class Limits:
    """What the user has said must stay: arguments of `restricted`."""

    exclude: tuple[str, ...] = ()
    min_channels: int = 1

    def on(self, graph: ChannelGraph) -> ChannelGraph:
        """The graph with these limits."""
        return restricted(graph, self.exclude, self.min_channels)

    def on_again(self, graph: ChannelGraph) -> ChannelGraph:
        """The same for a network that may have lost layers since."""
        layers = [*graph.layers, *graph.followers]
        names = [name for name in self.exclude if any(f"{layer}.".startswith(f"{name}.") for layer in layers)]
        return restricted(graph, names, self.min_channels)


@dataclass(frozen=True)
class Present:
    """All that goes with the shape of a network. A value: another shape is another `Present`, made by `look_again`.

    Attributes:
        graph, lasso: of its channels.
        original: which of the dense network's channels they are.
        flops: per image.
        flop_table: gives the FLOPs of smaller shapes; None where it cannot.
        trained: parameters that got gradients when the table was made, which decides what is computed for them.
        limits: on what may go.
    """

    graph: ChannelGraph
    lasso: GroupLasso
    original: OriginalChannels
    flops: Flops
    flop_table: FlopTable | None
    trained: frozenset[str]
    limits: Limits

    @property
    def example_inputs(self) -> ExampleInputs:
        return self.graph.example_inputs

    def slice_numbers(self, name: str, side: int) -> Tensor:
        """The original numbers of a layer's present input (0) or output (1) slices, int64, on the CPU."""
        return self.original.kept[name][side][self.graph.computed(name)[side]]


def fuse_all(model: nn.Module, copies: Sequence[nn.Module], example_inputs: ExampleInputs) -> FuseReport:
    """Fuses a model and its copies in place; returns what was swapped in the model."""
    fused = fuse_model(model, example_inputs)
    for copy in copies:
        fuse_model(copy, inputs_for(copy, model, example_inputs))
    return fused


def look_first(
    model: nn.Module,
    example_inputs: ExampleInputs,
    amp: torch.dtype | None,
    cost: ConvolutionCost | str,
    choice: dict[str, Any],
    *,
    limits: Limits | None = None,
    coefficients: Mapping[str, float] | None = None,
) -> Present:
    """Traces and counts a model as it is given; refuses, before any training, what cannot be chosen by.

    Args:
        cost: as of `ChannelGraph.keep`; `choice`: its threshold, relative, policy and round_to.
        coefficients: the lasso's multipliers by name, as for `GroupLasso`.
    """
    limits = limits or Limits()
    graph = limits.on(trace_channels(model, example_inputs))
    if choice["policy"] == "auto":
        cost_of(cost, model)  # refuses an unknown name
    graph.keep(model, **choice)
    comparison_of(model, graph.example_inputs, alike_in_both_modes=graph.alike_in_both_modes)  # refuses if of nothing
    lasso = GroupLasso(
        model,
        graph.example_inputs,
        graph=graph,
        coefficients=coefficients,
        policy=choice["policy"],
        may_be_empty=True,
    )
    return look(model, graph, amp, lasso, limits)


def look(model: nn.Module, graph: ChannelGraph, amp: torch.dtype | None, lasso: GroupLasso, limits: Limits) -> Present:
    """Counts a network that has been traced, and takes it for the dense one. It must run uncompiled (`eagerly`)."""
    counts = count_flops(model, graph.example_inputs, amp)
    return Present(graph, lasso, OriginalChannels.of_graph(graph), *counts, limits)


def look_again(model: nn.Module, before: Present, amp: torch.dtype | None, keep: Keep | None = None) -> Present:
    """Finds and counts the channels of a model whose shape has changed since `before`; its lasso keeps the multipliers.

    Args:
        keep: what the model has kept since, which spares the tracing and often the counting; None if that is not known.

    Returns:
        What is known now, but for `original`, which is still that of `before`.
    """
    with eagerly(model):
        if keep is not None and keep.graph is before.graph:
            graph = keep.graph_after()
        else:
            graph = before.limits.on_again(trace_channels(model, before.example_inputs))
        lasso = before.lasso.after(graph)
        gated = any(isinstance(module, GatedConv2d) for module in model.modules())
        same = keep is not None and not gated and trained_parameters(model) == before.trained
        if not same or before.flop_table is None:  # a gated layer may compute more than its weight holds
            # all is put back: counting that fails makes a cost unknown, and may leave changes of its own behind
            with AllOrNothing([model]):
                return replace(look(model, graph, amp, lasso, before.limits), original=before.original)
        return replace(before, graph=graph, lasso=lasso, flops=before.flop_table.flops(model))


def count_flops(
    model: nn.Module, example_inputs: ExampleInputs, amp: torch.dtype | None
) -> tuple[Flops, FlopTable | None, frozenset[str]]:
    """FLOPs per image, a table that gives those of smaller shapes, and the names of the parameters that get gradients.

    The model is run dry, which takes longer than all the rest; the table spares that next time."""
    return *flop_table(model, example_inputs, amp=amp), trained_parameters(model)


def trained_parameters(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that get gradients."""
    return frozenset(name for name, p in model.named_parameters() if p.requires_grad)
