"""Reconfiguration: rewrites a model and its optimizer, in place, to the kept channels (paper section 4.2).

In four steps. *Plan*: what becomes of every tensor, module and optimizer. *Check*: everything that could not follow is
refused before anything is touched. *Apply*: the sparse slices are set to zero, parameters, buffers and optimizer state
are cut, dead branches replaced. *Measure*: the outputs on the example inputs `as_given`, then `zeroed`, then `pruned`.
Where zeroing moved them further than the user allows, or cutting by more than rounding, all of it is undone and an
error raised: a wrong guess never trains on.

All that happens from the first change on is one transaction (`undo.py`): whatever is raised inside, all is put back.

Parameter objects keep their identity: `param.data` is replaced and `param.grad` cleared, so optimizers, schedulers and
whoever else holds a parameter hold the right one. Every optimizer state tensor of a parameter's shape is sliced with
it, whatever the optimizer is called.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunetrain_kernels.compiled import eagerly, forget_compiled
from prunetrain_kernels.graph.gating import batch_norm_behind
from prunetrain_kernels.graph.heads import HEADS, head_sizes
from prunetrain_kernels.graph.keep import Keep
from prunetrain_kernels.graph.told import TOLD, note_told, set_attribute, told_value
from prunetrain_kernels.inputs import ExampleInputs
from prunetrain_kernels.nn.batch_norm import BatchNormAct2d
from prunetrain_kernels.nn.gated_conv import GatedConv2d, gate_, pair, unpair
from prunetrain_kernels.ops.channel_index import ChannelIndex
from prunetrain_kernels.probe import Difference, difference, makes_trainable, outputs_of, refuse_sharded
from prunetrain_kernels.prune.also import copies_of, inputs_for, unwrapped
from prunetrain_kernels.prune.branches import parameters_that_go, replacements, swap_in
from prunetrain_kernels.prune.changes import LayerChange, Reconfiguration, layer_changes
from prunetrain_kernels.prune.measure import (
    UNMOVED,
    ZEROING_TOLERANCE,
    Comparison,
    Outputs,
    check_cutting,
    check_tolerance,
    check_zeroing,
    comparison_of,
    failure_after_pruning,
    zeroing_difference,
)
from prunetrain_kernels.prune.optimizer_holdings import Holdings
from prunetrain_kernels.prune.optimizers import (
    all_optimizers,
    as_list,
    check_optimizers,
    drop,
    slice_state,
    state_of,
)
from prunetrain_kernels.prune.original_sizes import note_original_sizes
from prunetrain_kernels.prune.slices import (
    DeviceIndices,
    Slicing,
    is_momentum,
    set_data,
    sizes_for,
    sizes_told_by,
    slicings_of,
    sparse_features,
)
from prunetrain_kernels.prune.undo import AllOrNothing

__all__ = ["LayerChange", "Reconfiguration", "reconfigure", "reconfiguring"]


@makes_trainable
def reconfigure(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    keep: Keep,
    also: Sequence[nn.Module] = (),
    *,
    zeroing_tolerance: float = ZEROING_TOLERANCE,
    keep_momentum: bool = False,
) -> Reconfiguration:
    """Prunes `model` and `optimizer` in place to the kept channels, and copies of the model with them.

    Args:
        model: the model that `keep` was chosen for. Where `torch.compile` is in use, what it has compiled is forgotten
            and compiled anew in the next step.
        optimizer: the optimizer (or several) that holds the model's parameters; None for a model that is not trained.
        keep: from `ChannelGraph.keep`.
        also: copies of the model that follow it, such as an EMA: `AveragedModel(model)` or a deep copy, wrapped or not,
            on any device. They lose the same channels and branches, whatever is in them, and keep their parameter
            objects; all are changed, or none and the model neither.
        zeroing_tolerance: the share of an output's scale by which setting the sparse slices to zero may move it on the
            example inputs; 0.01 is 1 %, `math.inf` allows everything.
        keep_momentum: leave the optimizer's momentum of slices that are set to zero but kept, because another layer
            needs their channels, as it is: they then move away from zero again. By default it is zeroed with them
            (paper section 1); second moments and step sizes, which move no weight, stay.

    Returns:
        What changed, and how far the outputs moved.

    Raises:
        InputError: the model is not the one `keep` was chosen for; the optimizer does not hold the model's parameters,
            or holds state that cannot be sliced; a copy is not like the model; the model returns nothing that can be
            compared; a tolerance below 0. Nothing has been touched then.
        ZeroingError: zeroing moved an output by more than the tolerance; everything has been undone.
        PruneTrainError: cutting moved an output by more than rounding, or changed its shape, or a copy fails;
            everything has been undone.
    """
    plan = planned(model, optimizer, keep, also, zeroing_tolerance=zeroing_tolerance, keep_momentum=keep_momentum)
    with AllOrNothing(plan.models, plan.optimizers) as change:
        done = carry_out(plan, change)
        change.done = True
    return done


@contextmanager
def reconfiguring(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    keep: Keep,
    also: Sequence[nn.Module] = (),
    *,
    zeroing_tolerance: float = ZEROING_TOLERANCE,
    keep_momentum: bool = False,
) -> Iterator[Reconfiguration]:
    """`reconfigure` that lasts only if the `with` block ends well: whatever is raised inside it, `KeyboardInterrupt`
    and `MemoryError` too, undoes the reconfiguration to the last bit. So the pruned model can be tried before it is
    accepted. Arguments and errors are those of `reconfigure`."""
    plan = planned(model, optimizer, keep, also, zeroing_tolerance=zeroing_tolerance, keep_momentum=keep_momentum)
    with AllOrNothing(plan.models, plan.optimizers) as change:
        yield carry_out(plan, change)
        change.done = True


# -- plan and check ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A reconfiguration that is decided, but not begun.

    Attributes:
        model, copies: the network, and those that follow it.
        zeroings: weights with sparse slices, and (dimension, indices) of these.
        slicings: the part to keep of each tensor of all of them.
        stand_ins: for the model and each copy, the modules that replace dead branches, by name.
        gone: ids of the parameters that go with the branches.
        prunes: some tensor is cut or some module replaced.
        changes: that, or some layer is computed in another form.
        zeroing_tolerance: as of `reconfigure`.
        seconds: that planning took.
    """

    model: nn.Module
    copies: list[nn.Module]
    optimizers: list[Optimizer]
    keep: Keep
    zeroings: list[tuple[Tensor, list[tuple[int, Tensor]]]]
    slicings: list[Slicing]
    stand_ins: list[dict[str, nn.Module]]
    gone: set[int]
    prunes: bool
    changes: bool
    zeroing_tolerance: float
    seconds: float

    @property
    def models(self) -> list[nn.Module]:
        return [self.model, *self.copies]


def planned(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    keep: Keep,
    also: Sequence[nn.Module],
    *,
    zeroing_tolerance: float,
    keep_momentum: bool,
    holdings: Holdings | None = None,
) -> Plan:
    """The plan of a reconfiguration; raises InputError where something cannot follow, as `reconfigure`.

    Args:
        holdings: what the optimizers hold at this moment, if the caller has searched them.
    """
    start = time.perf_counter()
    check_tolerance(zeroing_tolerance)
    model, _ = unwrapped(model)
    refuse_sharded(model)
    keep.graph.check(model)
    optimizers = as_list(optimizer)
    copies = [copy.network for copy in copies_of(model, also)]
    slicings = [slicing for network in (model, *copies) for slicing in slicings_of(network, keep)]
    if keep_momentum:
        slicings = [slicing.with_momentum() for slicing in slicings if slicing.cuts]
    stand_ins = [
        {name: new for branch in keep.branches for name, new in replacements(network, branch).items()}
        for network in (model, *copies)
    ]
    gone = set().union(
        *(parameters_that_go(network, new) for network, new in zip((model, *copies), stand_ins, strict=True))
    )
    prunes = any(slicing.cuts for slicing in slicings) or bool(stand_ins[0])
    cut = {id(s.tensor) for s in slicings if s.cuts and isinstance(s.tensor, nn.Parameter)}
    check_optimizers(model, optimizers, cut | gone, copies, holdings)
    return Plan(
        model=model,
        copies=copies,
        optimizers=optimizers,
        keep=keep,
        zeroings=_zeroings(model, keep),
        slicings=slicings,
        stand_ins=stand_ins,
        gone=gone,
        prunes=prunes,
        changes=prunes or _regates(model, keep),
        zeroing_tolerance=zeroing_tolerance,
        seconds=time.perf_counter() - start,
    )


def _zeroings(model: nn.Module, keep: Keep) -> list[tuple[Tensor, list[tuple[int, Tensor]]]]:
    """The weights with sparse slices, as in `Plan`."""
    modules, zeroings = dict(model.named_modules()), []
    for layer in keep.graph.layers.values():
        weight = modules[layer.name]._parameters["weight"]
        assert weight is not None
        slices = [(dim, i.to(weight.device)) for dim, i in zip(layer.dims, sparse_features(layer, keep), strict=True)]
        slices = [(dim, indices) for dim, indices in slices if len(indices)]
        if slices:
            zeroings.append((weight, slices))
    return zeroings


def _regates(model: nn.Module, keep: Keep) -> bool:
    """Whether some layer will be gated that is not, or the other way round, or by another backend."""
    for name in keep.graph.layers:
        conv, choice = model.get_submodule(name), keep.choices.get(name)
        then = (choice.form.backend or None,) if choice is not None and choice.form.gated else ()
        now = (conv.backend,) if isinstance(conv, GatedConv2d) else ()
        if name not in keep.removed and now != then:
            return True
    return False


# -- apply and measure -------------------------------------------------------------------------------------------------


def carry_out(plan: Plan, change: AllOrNothing) -> Reconfiguration:
    """Does what was planned, inside a `change` that has noted the plan's models and optimizers before."""
    start, before, keep = time.perf_counter(), _count(plan.model), plan.keep
    moves = _apply_and_measure(plan)
    if plan.changes:
        change.when_undone(forget_compiled)  # what is compiled from now on is of a shape that will be gone
        forget_compiled()
    return Reconfiguration(
        layers=layer_changes(keep),
        removed=tuple(name for branch in keep.branches for name in branch.layers),
        branches=len(keep.branches),
        max_abs_dy=moves.cutting.largest,
        max_abs_dy_zeroing=moves.zeroing.largest,
        scale=moves.scale,
        seconds=plan.seconds + time.perf_counter() - start,
        parameters_before=before,
        parameters_after=_count(plan.model),
        changed=plan.changes,
        also_max_abs_dy=tuple(moved.largest for moved in moves.also),
        compared=str(moves.comparison or ""),
    )


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@dataclass(frozen=True)
class _Moves:
    """The differences that a reconfiguration made in the outputs, and the scale of the model's before.

    Attributes:
        comparison: what was compared; None for nothing.
        also: the differences in the outputs of the copies.
    """

    comparison: Comparison | None = None
    scale: float = 0.0
    zeroing: Difference = UNMOVED
    cutting: Difference = UNMOVED
    also: tuple[Difference, ...] = ()


def _apply_and_measure(plan: Plan) -> _Moves:
    """Carries the plan out; raises where it moves the outputs too far."""
    # Slices that are all zeros already, as after a proximal step, need no copy of the weight and no second measurement.
    zeroes = any(_has_nonzeros(weight, slices) for weight, slices in plan.zeroings)
    if not (plan.changes or zeroes):
        _forget_momentum(plan)
        return _Moves()
    model, inputs = plan.model, plan.keep.graph.example_inputs
    comparison, as_given = comparison_of(model, inputs, alike_in_both_modes=plan.keep.graph.alike_in_both_modes)
    zeroed, zeroing = as_given, difference(as_given, as_given)
    scale = zeroing.scale
    if zeroes:
        _zero_slices(plan)
        zeroed = _outputs_after(model, comparison, inputs)
        zeroing = zeroing_difference(as_given, zeroed)
        check_zeroing(zeroing, plan.zeroing_tolerance)
    if not plan.changes:
        _forget_momentum(plan)
        return _Moves(comparison, scale, zeroing)
    copies_inputs = [inputs_for(copy, model, inputs) for copy in plan.copies]
    copies_before = [_evaluated(copy, x) for copy, x in zip(plan.copies, copies_inputs, strict=True)]
    for network in plan.models:
        note_original_sizes(network)
    if plan.prunes:
        _slice_all(plan)
        for network, new in zip(plan.models, plan.stand_ins, strict=True):
            swap_in(network, new)
        drop(plan.optimizers, plan.gone)
        for network in plan.models:
            _set_sizes(network, plan.keep)
    for network in plan.models:
        _gate(network, plan.keep)
    _forget_momentum(plan)
    pruned = _outputs_after(model, comparison, inputs)
    copies_after = [
        _outputs_after(copy, Comparison(evaluation=True), x) for copy, x in zip(plan.copies, copies_inputs, strict=True)
    ]
    also = tuple(difference(a, b) for a, b in zip(copies_before, copies_after, strict=True))
    return _Moves(comparison, scale, zeroing, check_cutting(zeroed, pruned), also)


def _evaluated(model: nn.Module, inputs: ExampleInputs) -> Outputs:
    with eagerly(model):
        return outputs_of(model, inputs)


def _outputs_after(model: nn.Module, comparison: Comparison, inputs: ExampleInputs) -> Outputs:
    """The outputs of a changed model; raises PruneTrainError where it does not run any more."""
    try:
        return comparison.outputs(model, inputs)
    except (MemoryError, torch.OutOfMemoryError):  # says nothing about the model
        raise
    except Exception as error:
        raise failure_after_pruning(error) from error


def _has_nonzeros(weight: Tensor, slices: list[tuple[int, Tensor]]) -> bool:
    """Whether some slices of a weight have anything but zeros."""
    return any(bool(weight.detach().index_select(dim, indices).any()) for dim, indices in slices)


def _zero_slices(plan: Plan) -> None:
    """Sets the sparse slices to zero."""
    for weight, slices in plan.zeroings:
        after = weight.data.clone()
        for dim, indices in slices:
            after.index_fill_(dim, indices, 0)
        weight.data = after


def _slice_all(plan: Plan) -> None:
    """Cuts every tensor, and the optimizers' state with it."""
    indices = DeviceIndices()
    for slicing in plan.slicings:
        if not slicing.cuts:
            continue
        tensor = slicing.tensor
        slice_state(plan.optimizers, tensor, lambda state, slicing=slicing: slicing.cut(state, indices))  # type: ignore[misc]
        set_data(tensor, slicing.cut(tensor.data, indices))


def _forget_momentum(plan: Plan) -> None:
    """Sets the momentum of slices that were set to zero and stay to zero."""
    indices = DeviceIndices()
    for slicing in plan.slicings:
        if not slicing.zeros:
            continue
        entries = (state_of(optimizer, slicing.tensor) for optimizer in all_optimizers(plan.optimizers))
        names = {id(state): name for entry in entries for name, state in entry.items()}

        def forgotten(state: Tensor, slicing: Slicing = slicing, names: dict[int, str] = names) -> Tensor:
            return slicing.zeroed(state, indices) if is_momentum(names.get(id(state), ""), state) else state

        slice_state(plan.optimizers, slicing.tensor, forgotten)


def _set_sizes(model: nn.Module, keep: Keep) -> None:
    """Sets module attributes such as `out_channels` to the sizes of the tensors."""
    spaces = {layer.name: (layer.output, 1) for layer in keep.graph.layers.values()}
    followers = keep.graph.followers.values()
    spaces |= {follower.module: (follower.space, follower.block) for follower in followers if follower.kind != TOLD}
    heads = {follower.module for follower in followers if follower.kind == HEADS}
    for name, (space, block) in spaces.items():
        module, kept = model.get_submodule(name), len(keep.channels[space])
        if name in heads:
            sizes = head_sizes(module, keep.graph.spaces[space].size, kept)
        else:
            sizes = sizes_told_by(module) | sizes_for(module, kept * block)
        for attribute, value in sizes.items():
            setattr(module, attribute, value)
    for name, told in keep.graph.told_sizes(lambda space: len(keep.channels[space])).items():
        module = model.get_submodule(name)
        for attribute, value in told.items():
            if value != told_value(module, attribute):
                note_told(module, attribute)
                set_attribute(module, attribute, value)


def _gate(model: nn.Module, keep: Keep) -> None:
    """Makes convolutions, whose weights have only their live channels by now, gated or plain; and lets the batch norms
    behind gated ones place their outputs."""
    graph, modules = keep.graph, dict(model.named_modules())
    for module in modules.values():
        if isinstance(module, BatchNormAct2d) and isinstance(module.places_of, GatedConv2d):
            unpair(module)
    for layer in graph.layers.values():
        conv = modules[layer.name]
        choice = keep.choices.get(layer.name)
        gates = choice is not None and choice.form.gated
        if not isinstance(conv, nn.Conv2d) or not (gates or isinstance(conv, GatedConv2d)):
            continue
        kept = keep.channels[layer.input], keep.channels[layer.output]
        inputs, outputs = (
            None if len(live) == len(side) else ChannelIndex(torch.isin(side, live).nonzero().flatten(), len(side))
            for live, side in zip(keep.live[layer.name], kept, strict=True)
        )
        backend = choice.form.backend or None if choice else None
        gate_(conv, len(kept[0]), len(kept[1]), inputs, outputs, backend=backend)
        behind = batch_norm_behind(graph, modules, layer.name)
        if isinstance(conv, GatedConv2d) and outputs is not None and behind is not None:
            batch_norm = modules[behind]
            if isinstance(batch_norm, BatchNormAct2d):
                pair(conv, batch_norm)
