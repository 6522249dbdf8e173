"""Reconfiguration: rewrites a model and its optimizer, in place, to the kept channels (paper section 4.2).

In order: everything that could fail is checked; the sparse slices are set to zero; the output on the example inputs is
noted; parameters, buffers and optimizer state are sliced and dead branches replaced; the output is measured again. If
it moved by more than rounding can explain, all of it is undone and an error is raised: a wrong guess never trains on.

Parameter objects keep their identity: `param.data` is replaced and `param.grad` cleared, so optimizers, schedulers and
whoever else holds a parameter hold the right one. Every optimizer state tensor of a parameter's shape is sliced with
it, whatever the optimizer is called.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from prunetrain_kernels.compiled import eagerly, forget_compiled
from prunetrain_kernels.errors import PruneTrainError
from prunetrain_kernels.graph.gating import batch_norm_behind
from prunetrain_kernels.graph.keep import Keep
from prunetrain_kernels.graph.spaces import expand
from prunetrain_kernels.graph.trace import buffers_restored
from prunetrain_kernels.nn.batch_norm import BatchNormAct2d
from prunetrain_kernels.nn.gated_conv import GatedConv2d, gate_, gating_of, pair, restore_gating_, unpair
from prunetrain_kernels.ops.channel_index import ChannelIndex
from prunetrain_kernels.prune.also import copies_of, inputs_for, unwrapped
from prunetrain_kernels.prune.branches import ConstantConv, replacements, swap_in
from prunetrain_kernels.prune.optimizers import as_list, check_optimizers, drop, slice_state

# An output that moves by more than this share of its scale is no rounding; such a reconfiguration is undone.
LARGEST_MOVE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-1, torch.bfloat16: 2e-1}
LARGEST_MOVE_TF32 = 1e-2  # fp32 on CUDA: cuDNN multiplies in TF32 unless told otherwise


@dataclass(frozen=True)
class LayerChange:
    """Channels of one layer's spaces before and after.

    Attributes:
        kept_in, kept_out: the kept ones in their new order, as they were numbered before.
        live_in, live_out: how many of them it computes: all, unless it is gated.
        form: how it is computed from now on, "union" or a form of gating, where there was a choice; and why.
    """

    name: str
    kind: str
    in_before: int
    in_after: int
    out_before: int
    out_after: int
    kept_in: Tensor
    kept_out: Tensor
    removed: bool
    live_in: int
    live_out: int
    form: str = ""


@dataclass(frozen=True)
class Reconfiguration:
    """What a reconfiguration did.

    Attributes:
        layers: every convolution and linear layer.
        removed: layers and batch norms that went with dead branches.
        branches: dead branches removed.
        max_abs_dy: largest difference of the output on the example inputs (evaluation mode) that pruning made, after
            the sparse slices had been set to zero.
        max_abs_dy_zeroing: the same for setting them to zero.
        scale: largest absolute output before.
        seconds: wall time of the whole reconfiguration.
        parameters_before, parameters_after: number of weights.
        changed: whether any channel or layer went, moved or came back.
        also_max_abs_dy: for each copy in `also`, how far its output moved: by what it, but not the model, still
            computed in the channels that went.
    """

    layers: tuple[LayerChange, ...]
    removed: tuple[str, ...]
    branches: int
    max_abs_dy: float
    max_abs_dy_zeroing: float
    scale: float
    seconds: float
    parameters_before: int
    parameters_after: int
    changed: bool
    also_max_abs_dy: tuple[float, ...] = ()

    def __str__(self) -> str:
        """One line, then one line per layer that changed."""
        head = (
            f"parameters {self.parameters_before:,} -> {self.parameters_after:,}, {self.branches} branches removed, "
            f"max|dy| {self.max_abs_dy:.1e} of scale {self.scale:.1e}, {self.seconds:.2f} s"
        )
        lines = []
        for c in self.layers:
            text = f"in {c.in_before} -> {c.in_after}, out {c.out_before} -> {c.out_after}"
            if (c.live_in, c.live_out) != (c.in_after, c.out_after):
                text += f", computes {c.live_in} x {c.live_out}"
            text = "removed" if c.removed else text + (f" ({c.form})" if c.form else "")
            if c.removed or c.form or (c.in_before, c.out_before) != (c.in_after, c.out_after):
                lines.append(f"  {c.name}: {text}")
        return "\n".join([head, *lines])


@dataclass(frozen=True)
class _Slicing:
    """One tensor of a module and what to keep of it: (dimension, feature indices) pairs; -1 for a feature of zeros."""

    module: str
    tensor: Tensor
    cuts: tuple[tuple[int, Tensor], ...]

    def of(self, tensor: Tensor, sent: "_Sent") -> Tensor:
        layout = memory_format(tensor)
        for dim, index in self.cuts:
            there, absent = sent(index, tensor.device)
            tensor = tensor.index_select(dim, there)
            if absent is not None:
                tensor.index_fill_(dim, absent, 0)
        return tensor.contiguous(memory_format=layout)


class _Sent:
    """Indices on the devices where they are used, each sent once: layers that share channels share their index."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, torch.device], tuple[Tensor, Tensor | None]] = {}
        self.alive: list[Tensor] = []  # or another index might get its id

    def __call__(self, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """The index, and where in it features of zeros are, None for nowhere."""
        key = (id(index), device)
        if key not in self.known:
            absent = (index < 0).nonzero().flatten()
            self.known[key] = (index.clamp(min=0).to(device), absent.to(device) if len(absent) else None)
            self.alive.append(index)
        return self.known[key]


def memory_format(tensor: Tensor) -> torch.memory_format:
    """channels_last for a tensor that is stored so and not also the plain way, as 1x1 weights are."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim(), torch.contiguous_format)
    if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format


def reconfigure(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    keep: Keep,
    also: Sequence[nn.Module] = (),
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

    Returns:
        What changed, and how far the output moved.

    Raises:
        InputError: the model is not the one `keep` was chosen for; the optimizer does not hold the model's parameters,
            or holds state that cannot be sliced; a copy is not like the model. Nothing has been touched then.
        PruneTrainError: the output moved by more than rounding, or a copy fails; everything has been undone.
    """
    start = time.perf_counter()
    model, _ = unwrapped(model)
    keep.graph.check(model)
    optimizers = as_list(optimizer)
    copies = [copy.network for copy in copies_of(model, also)]
    models = [model, *copies]
    slicings = [slicing for each in models for slicing in _slicings(each, keep)]
    stand_ins: list[dict[str, nn.Module]] = []
    for each in models:
        stand_ins.append({})
        for branch in keep.branches:
            stand_ins[-1].update(replacements(each, branch))
    gone = set().union(*(parameters_that_go(each, new) for each, new in zip(models, stand_ins, strict=True)))
    check_optimizers(model, optimizers, {id(s.tensor) for s in slicings if isinstance(s.tensor, nn.Parameter)} | gone)

    before = _count(model)
    undo: list[Callable[[], None]] = []
    try:
        prunes = bool(slicings or stand_ins[0])
        regates = _regates(model, keep)
        first = second = third = None
        also_before: list[list[Tensor]] = []
        also_after: list[list[Tensor]] = []
        if prunes or regates or any(masks.inputs.any() or masks.outputs.any() for masks in keep.sparse.values()):
            first = _outputs(model, keep)
            _zero_slices(model, keep, undo)
            second = _outputs(model, keep)
        if prunes or regates:
            also_inputs = [inputs_for(copy, model, keep.graph.example_inputs) for copy in copies]
            also_before = [_outputs(copy, keep, x) for copy, x in zip(copies, also_inputs, strict=True)]
        if prunes:
            _slice_all(slicings, optimizers, undo)
            for each, new in zip(models, stand_ins, strict=True):
                _replace(each, new, undo)
            drop(optimizers, gone, undo)
            for each in models:
                _tell_the_truth(each, keep, undo)
        if prunes or regates:
            for each in models:
                _gate(each, keep, undo)
            third = _outputs_after(model, keep)
            also_after = [_outputs_after(copy, keep, x) for copy, x in zip(copies, also_inputs, strict=True)]
        scale = _largest(second) if second is not None else 0.0
        moved = _distance(second, third) if third is not None and second is not None else 0.0
        zeroing = _distance(first, second) if first is not None and second is not None else 0.0
        allowed = _largest_move(second) * max(scale, 1e-6)
        if moved > allowed:
            raise PruneTrainError(
                f"pruning moved the model's output by {moved:.1e} (scale {scale:.1e}), so it was undone; the model "
                "computes something with its channels that tracing did not see, please report it with the model."
            )
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    if prunes or regates:
        forget_compiled()
    return Reconfiguration(
        layers=_changes(keep),
        removed=tuple(name for branch in keep.branches for name in branch.layers),
        branches=len(keep.branches),
        max_abs_dy=moved,
        max_abs_dy_zeroing=zeroing,
        scale=scale,
        seconds=time.perf_counter() - start,
        parameters_before=before,
        parameters_after=_count(model),
        changed=prunes or regates,
        also_max_abs_dy=tuple(_distance(a, b) for a, b in zip(also_before, also_after, strict=True)),
    )


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# -- what would be done ------------------------------------------------------------------------------------------------


def _slicings(model: nn.Module, keep: Keep) -> Iterable[_Slicing]:
    """Every parameter and buffer that loses channels, or has them in another order, or gets some back."""
    graph, modules = keep.graph, dict(model.named_modules())
    moved = [
        not torch.equal(kept, torch.arange(s.size, device="cpu"))
        for kept, s in zip(keep.channels, graph.spaces, strict=True)
    ]
    for layer in graph.layers.values():
        module = modules[layer.name]
        bias = module._parameters.get("bias")
        if layer.name in keep.removed:
            # the constant that stays has the kept channels
            if layer.name in {branch.last for branch in keep.branches} and moved[layer.output] and bias is not None:
                yield _Slicing(layer.name, bias, ((0, keep.channels[layer.output]),))
            continue
        now, then = graph.computed(layer.name), keep.live[layer.name]
        sizes = graph.spaces[layer.input].size, graph.spaces[layer.output].size
        inputs, outputs = (_places(a, b, size) for a, b, size in zip(now, then, sizes, strict=True))
        dim_in, dim_out = layer.dims
        cuts = () if outputs is None else ((dim_out, outputs),)
        if inputs is not None:
            cuts = (*cuts, (dim_in, expand(inputs, layer.block)))
        if cuts:
            yield _Slicing(layer.name, module._parameters["weight"], cuts)  # type: ignore[arg-type]
        if outputs is not None and bias is not None:  # a layer with a bias has all its outputs, before and after
            yield _Slicing(layer.name, bias, ((0, outputs),))
    for follower in graph.followers.values():
        if follower.name in keep.removed or not moved[follower.space]:
            continue
        index = expand(keep.channels[follower.space], follower.block)
        module = modules[follower.name]
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None and tensor.dim() > 0:
                yield _Slicing(follower.name, tensor, ((follower.dim, index),))


def _places(now: Tensor, then: Tensor, size: int) -> Tensor | None:
    """Where the channels `then` stand among those `now` computed, -1 for one that was not; None if nothing changes."""
    if torch.equal(now, then):
        return None
    if torch.equal(now, torch.arange(size, device="cpu")):
        return then  # the very tensor, which others have too
    places = torch.full((size,), -1, device="cpu")
    places[now] = torch.arange(len(now), device="cpu")
    return places[then]


def parameters_that_go(model: nn.Module, stand_ins: dict[str, nn.Module]) -> set[int]:
    """Those of the modules that are replaced, and of none that stays."""
    replaced = {id(model.get_submodule(name)) for name in stand_ins}
    remaining = [module for module in model.modules() if id(module) not in replaced]
    staying = {id(p) for module in (*stand_ins.values(), *remaining) for p in module.parameters(recurse=False)}
    return {id(p) for name in stand_ins for p in model.get_submodule(name).parameters()} - staying


def _changes(keep: Keep) -> tuple[LayerChange, ...]:
    graph, result = keep.graph, []
    for layer in graph.layers.values():
        removed = layer.name in keep.removed
        kept_in, kept_out = keep.channels[layer.input], keep.channels[layer.output]
        if removed:
            kept_in, kept_out = kept_in[:0], kept_out[:0]
        result.append(
            LayerChange(
                layer.name,
                layer.kind,
                graph.spaces[layer.input].size,
                len(kept_in),
                graph.spaces[layer.output].size,
                len(kept_out),
                kept_in,
                kept_out,
                removed,
                0 if removed else len(keep.live[layer.name][0]),
                0 if removed else len(keep.live[layer.name][1]),
                str(keep.choices[layer.name]) if layer.name in keep.choices else "",
            )
        )
    return tuple(result)


# -- doing it, each step with its undoing ------------------------------------------------------------------------------


def set_data(tensor: Tensor, data: Tensor) -> None:
    """Gives a parameter or buffer new data of another shape; the object stays the same and its `.grad` is cleared.

    Autograd remembers a leaf's shape in its gradient accumulator, which lives on as long as any graph does, such as
    that of the `loss` variable a training loop still holds; the next backward would then refuse the new shape. A change
    of dtype makes PyTorch forget the accumulator, so the data go through one.
    """
    tensor.grad = None
    if isinstance(tensor, nn.Parameter):
        other = torch.float16 if data.dtype == torch.float32 else torch.float32  # not float64: MPS has none
        tensor.data = torch.empty(0, dtype=other, device=data.device)
    tensor.data = data


def _zero_slices(model: nn.Module, keep: Keep, undo: list[Callable[[], None]]) -> None:
    """Sets the sparse slices to zero."""
    modules = dict(model.named_modules())
    for layer in keep.graph.layers.values():
        masks = keep.sparse[layer.name]
        if not (masks.inputs.any() or masks.outputs.any()):
            continue
        weight = modules[layer.name].weight
        before = weight.data
        own_in, own_out = keep.graph.computed(layer.name)
        inputs = expand(masks.inputs[own_in].nonzero().flatten(), layer.block).to(before.device)
        outputs = masks.outputs[own_out].nonzero().flatten().to(before.device)
        undo.append(lambda weight=weight, before=before: setattr(weight, "data", before))  # type: ignore[misc]
        dim_in, dim_out = layer.dims
        weight.data = before.clone().index_fill_(dim_in, inputs, 0).index_fill_(dim_out, outputs, 0)


def _slice_all(slicings: list[_Slicing], optimizers: list[Optimizer], undo: list[Callable[[], None]]) -> None:
    sent = _Sent()
    for slicing in slicings:
        tensor = slicing.tensor
        old_data = tensor.data
        slice_state(optimizers, tensor, lambda value, slicing=slicing: slicing.of(value, sent), undo)  # type: ignore[misc]
        undo.append(lambda tensor=tensor, old=old_data, grad=tensor.grad: _restore(tensor, old, grad))  # type: ignore[misc]
        set_data(tensor, slicing.of(old_data, sent))


def _restore(tensor: Tensor, data: Tensor, grad: Tensor | None) -> None:
    set_data(tensor, data)
    tensor.grad = grad


def _replace(model: nn.Module, stand_ins: dict[str, nn.Module], undo: list[Callable[[], None]]) -> None:
    if stand_ins:
        before = {name: model.get_submodule(name) for name in stand_ins}

        def back() -> None:
            swap_in(model, before)

        undo.append(back)
        swap_in(model, stand_ins)


def _tell_the_truth(model: nn.Module, keep: Keep, undo: list[Callable[[], None]]) -> None:
    """Module attributes such as `out_channels` say what the tensors are."""
    spaces = {layer.name: (layer.output, 1) for layer in keep.graph.layers.values()}
    spaces |= {follower.name: (follower.space, follower.block) for follower in keep.graph.followers.values()}
    for name, (space, block) in spaces.items():
        module = model.get_submodule(name)
        told = sizes_told_by(module)
        for attribute in size_without_tensor(module):
            told[attribute] = len(keep.channels[space]) * block
        for attribute, value in told.items():
            before = getattr(module, attribute)
            undo.append(lambda m=module, a=attribute, v=before: setattr(m, a, v))  # type: ignore[misc]
            setattr(module, attribute, value)


def _regates(model: nn.Module, keep: Keep) -> bool:
    """Whether some layer will be gated that is not, or the other way round, or by another backend."""
    for name in keep.graph.layers:
        conv, choice = model.get_submodule(name), keep.choices.get(name)
        then = (choice.form.backend or None,) if choice is not None and choice.form.gated else ()
        now = (conv.backend,) if isinstance(conv, GatedConv2d) else ()
        if name not in keep.removed and now != then:
            return True
    return False


def _pair_again(conv: GatedConv2d, batch_norm: BatchNormAct2d) -> None:
    """As `pair`, while sizes may not be what they were yet."""
    conv.paired = True
    batch_norm.__dict__["_places_of"] = (conv,)


def _gate(model: nn.Module, keep: Keep, undo: list[Callable[[], None]]) -> None:
    """Convolutions whose weights hold their live channels by now become gated ones, or plain ones again; and what
    places their outputs."""
    graph, modules = keep.graph, dict(model.named_modules())
    for module in modules.values():
        if isinstance(module, BatchNormAct2d) and module.places_of is not None:
            undo.append(lambda module=module, conv=module.places_of: _pair_again(conv, module))  # type: ignore[misc]
            unpair(module)
    for layer in graph.layers.values():
        conv = modules[layer.name]
        choice = keep.choices.get(layer.name)
        gates = choice is not None and choice.form.gated
        if not isinstance(conv, nn.Conv2d) or not (gates or isinstance(conv, GatedConv2d)):
            continue
        state = gating_of(conv)
        undo.append(lambda conv=conv, state=state: restore_gating_(conv, state))  # type: ignore[misc]
        kept = keep.channels[layer.input], keep.channels[layer.output]
        inputs, outputs = (
            None if len(own) == len(all_) else ChannelIndex(torch.isin(all_, own).nonzero().flatten(), len(all_))
            for own, all_ in zip(keep.live[layer.name], kept, strict=True)
        )
        backend = choice.form.backend or None if choice else None
        gate_(conv, len(kept[0]), len(kept[1]), inputs, outputs, backend)
        behind = batch_norm_behind(graph, modules, layer.name)
        if isinstance(conv, GatedConv2d) and outputs is not None and behind is not None:
            batch_norm = modules[behind]
            if isinstance(batch_norm, BatchNormAct2d):
                undo.append(lambda batch_norm=batch_norm: unpair(batch_norm))  # type: ignore[misc]
                pair(conv, batch_norm)


def size_without_tensor(module: nn.Module) -> list[str]:
    """Size attributes of a module that it may have no tensor to tell by."""
    if isinstance(module, ConstantConv):
        return ["out_channels"]
    if isinstance(module, nn.modules.batchnorm._NormBase) and not sizes_told_by(module):
        return ["num_features"]
    return []


def sizes_told_by(module: nn.Module) -> dict[str, int]:
    """The size attributes of a module as its tensors have them."""
    weight = module._parameters.get("weight")
    if isinstance(module, GatedConv2d):
        return {}  # of whole spaces, which its weight does not know
    if isinstance(module, nn.modules.conv._ConvNd) and weight is not None:
        if module.groups > 1 and module.groups == module.in_channels:  # depthwise: a group for each channel
            groups = weight.shape[0] if module.transposed else weight.shape[0] * module.groups // module.out_channels
            outputs = weight.shape[1] * groups if module.transposed else weight.shape[0]
            return {"out_channels": outputs, "in_channels": groups, "groups": groups}
        if module.transposed:
            return {"out_channels": weight.shape[1] * module.groups, "in_channels": weight.shape[0]}
        return {"out_channels": weight.shape[0], "in_channels": weight.shape[1] * module.groups}
    if isinstance(module, nn.Linear) and weight is not None:
        return {"out_features": weight.shape[0], "in_features": weight.shape[1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": module.weight.shape[0]}
    if isinstance(module, nn.GroupNorm):
        alike = weight is not None and module.num_groups == module.num_channels
        return {"num_channels": weight.shape[0], "num_groups": weight.shape[0]} if alike and weight is not None else {}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        running = module._buffers.get("running_mean")
        sized = weight if weight is not None else running
        return {} if sized is None else {"num_features": sized.shape[0]}
    return {}


# -- measuring ---------------------------------------------------------------------------------------------------------


@contextmanager
def evaluating(model: nn.Module):  # type: ignore[no-untyped-def]
    """Evaluation mode, no gradients, no autocast; modes, buffers and random state are as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.get_device() for p in model.parameters() if p.is_cuda})
    parameter = next(model.parameters(), None)
    kind = parameter.device.type if parameter is not None else "cpu"
    try:
        model.eval()
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=devices),
            torch.autocast(kind, enabled=False),
            buffers_restored(model),
        ):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _outputs(model: nn.Module, keep: Keep, inputs: tuple[Tensor, ...] | None = None) -> list[Tensor]:
    inputs = keep.graph.example_inputs if inputs is None else inputs
    with evaluating(model), eagerly(model):
        return [leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]


def _outputs_after(model: nn.Module, keep: Keep, inputs: tuple[Tensor, ...] | None = None) -> list[Tensor]:
    try:
        return _outputs(model, keep, inputs)
    except Exception as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise PruneTrainError(
            f"the pruned model fails on the example inputs ({why}), "
            "so pruning was undone; the model does something with its channels that tracing did not see, please report "
            "it with the model."
        ) from error


def _largest(tensors: list[Tensor]) -> float:
    return max((float(t.abs().max()) for t in tensors if t.numel()), default=0.0)


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference; infinite where shapes differ or only one is NaN."""
    largest = 0.0
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape:
            return float("inf")
        if x.numel():
            same = (x == y) | (x.isnan() & y.isnan())  # also two infinities, whose difference is NaN
            gap = (x.double() - y.double()).abs().masked_fill_(same, 0)
            largest = max(largest, float(gap.nan_to_num_(nan=float("inf"), posinf=float("inf")).max()))
    return largest


def _largest_move(outputs: list[Tensor] | None) -> float:
    first = outputs[0] if outputs else torch.empty(0, device="cpu")
    if first.is_cuda and first.dtype == torch.float32:
        return LARGEST_MOVE_TF32
    return LARGEST_MOVE.get(first.dtype, LARGEST_MOVE_TF32)
