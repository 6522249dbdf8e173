"""The cuts of tensors: what a reconfiguration keeps of each parameter and buffer, and which part it sets to zero."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunetrain_kernels.graph.heads import told_sizes
from prunetrain_kernels.graph.keep import Keep
from prunetrain_kernels.graph.spaces import Layer, expand
from prunetrain_kernels.graph.told import noted
from prunetrain_kernels.nn.gated_conv import GatedConv2d
from prunetrain_kernels.prune.branches import ConstantConv

# Names in PyTorch's optimizers for state that moves a weight on without a gradient.
MOMENTUM = frozenset({"momentum_buffer", "exp_avg"})


@dataclass(frozen=True)
class Slicing:
    """One tensor of a module and the part of it to keep.

    Attributes:
        cuts: (dimension, feature indices) pairs; -1 for a feature of zeros. Empty where the tensor stays as it is.
        zeros: (dimension, feature indices *after* the cuts) of the sparse slices that stay: another layer needs their
            channels. The tensor is zero there, and its momentum is to become zero.
    """

    module: str
    tensor: Tensor
    cuts: tuple[tuple[int, Tensor], ...]
    zeros: tuple[tuple[int, Tensor], ...] = ()

    def cut(self, tensor: Tensor, indices: "DeviceIndices") -> Tensor:
        """The kept part of a tensor of this shape: a parameter, a buffer, or optimizer state."""
        layout = memory_format(tensor)
        for dim, index in self.cuts:
            kept, absent = indices(index, tensor.device)
            tensor = tensor.index_select(dim, kept)
            if absent is not None:
                tensor.index_fill_(dim, absent, 0)
        return tensor.contiguous(memory_format=layout)

    def zeroed(self, state: Tensor, indices: "DeviceIndices") -> Tensor:
        """A copy of a tensor that is cut already, with zeros where the parameter was set to zero."""
        state = state.clone(memory_format=torch.preserve_format)
        for dim, index in self.zeros:
            state.index_fill_(dim, indices(index, state.device)[0], 0)
        return state

    def with_momentum(self) -> "Slicing":
        """This slicing, but without zeros, so that momentum stays."""
        return dataclasses.replace(self, zeros=())


def is_momentum(name: str, state: Tensor) -> bool:
    """Whether an optimizer's state of a parameter's shape moves the parameter by itself: momentum, slow copies.

    What is nowhere negative is the size of gradients, or of steps: second moments, Rprop's steps. It moves nothing by
    itself, and set to zero it would do harm: Adam's steps would be up to six times as long for a while, because its
    correction for a start from zero is over, and Rprop's of length zero.
    """
    if not (state.is_floating_point() or state.is_complex()):
        return False
    return name in MOMENTUM or state.is_complex() or bool((state < 0).any())


class DeviceIndices:
    """Indices on the devices where they are used, each copied once: layers that share channels share their index."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, torch.device], tuple[Tensor, Tensor | None]] = {}
        self.alive: list[Tensor] = []  # or another index might get its id

    def __call__(self, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """An index on a device, and the positions in it of features of zeros; None if there are none."""
        key = (id(index), device)
        if key not in self.known:
            absent = (index < 0).nonzero().flatten()
            self.known[key] = (index.clamp(min=0).to(device), absent.to(device) if len(absent) else None)
            self.alive.append(index)
        return self.known[key]


def slicings_of(model: nn.Module, keep: Keep) -> Iterator[Slicing]:
    """The slicing of every parameter and buffer that loses channels, gets them in another order, gets some back, or
    keeps zeros."""
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
                yield Slicing(layer.name, bias, ((0, keep.channels[layer.output]),))
            continue
        now, then = graph.computed(layer.name), keep.live[layer.name]
        sizes = graph.spaces[layer.input].size, graph.spaces[layer.output].size
        inputs, outputs = (_positions(a, b, size) for a, b, size in zip(now, then, sizes, strict=True))
        dim_in, dim_out = layer.dims
        cuts = () if outputs is None else ((dim_out, outputs),)
        if inputs is not None:
            cuts = (*cuts, (dim_in, expand(inputs, layer.block)))
        zeros = _zeros_that_stay(layer, keep)
        if cuts or zeros:
            yield Slicing(layer.name, module._parameters["weight"], cuts, zeros)  # type: ignore[arg-type]
        if outputs is not None and bias is not None:  # a layer with a bias has all its outputs, before and after
            yield Slicing(layer.name, bias, ((0, outputs),))
    for follower in graph.followers.values():
        if follower.name in keep.removed or not moved[follower.space]:
            continue
        index = expand(keep.channels[follower.space], follower.block)
        for tensor in follower.tensors(modules[follower.module]).values():
            yield Slicing(follower.module, tensor, ((follower.dim, index),))


def _zeros_that_stay(layer: Layer, keep: Keep) -> tuple[tuple[int, Tensor], ...]:
    """The sparse slices of a layer's weight among those that it will compute, as in `Slicing.zeros`.

    Only its weight is meant. The batch norm behind a channel of zeros makes a constant of it that other layers read, so
    to zero its parameters too (the paper's section 1 speaks of them) would change the network's function; where nothing
    reads the channel it goes, and they with it.
    """
    masks, zeros = keep.sparse[layer.name], []
    for dim, mask, live in zip(layer.dims, (masks.inputs, masks.outputs), keep.live[layer.name], strict=True):
        index = mask[live].nonzero().flatten()
        if len(index):
            zeros.append((dim, expand(index, layer.block) if dim == layer.dims[0] else index))
    return tuple(zeros)


def _positions(now: Tensor, then: Tensor, size: int) -> Tensor | None:
    """The positions of the channels `then` among the channels `now`, -1 for a missing one; None if nothing changes."""
    if torch.equal(now, then):
        return None
    if torch.equal(now, torch.arange(size, device="cpu")):
        return then  # the same object, which other layers have too
    positions = torch.full((size,), -1, device="cpu")
    positions[now] = torch.arange(len(now), device="cpu")
    return positions[then]


def sparse_features(layer: Layer, keep: Keep) -> tuple[Tensor, Tensor]:
    """The indices of a weight's present sparse slices along `layer.dims`, on the CPU."""
    masks = keep.sparse[layer.name]
    computed_in, computed_out = keep.graph.computed(layer.name)
    inputs = expand(masks.inputs[computed_in].nonzero().flatten(), layer.block)
    return inputs, masks.outputs[computed_out].nonzero().flatten()


# -- tensors and sizes -------------------------------------------------------------------------------------------------


def memory_format(tensor: Tensor) -> torch.memory_format:
    """channels_last for a tensor that is stored so and is not contiguous as well, as 1x1 weights are."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim(), torch.contiguous_format)
    if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format


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


def size_without_tensor(module: nn.Module) -> list[str]:
    """The size attributes of a module that none of its tensors tells."""
    return [*sizes_for(module, 0), *told_sizes(module), *noted(module)]


def sizes_for(module: nn.Module, channels: int) -> dict[str, int]:
    """The size attributes, with so many channels, of a module none of whose tensors tells them."""
    if isinstance(module, ConstantConv):
        return {"out_channels": channels}
    if isinstance(module, nn.modules.batchnorm._NormBase) and not sizes_told_by(module):
        return {"num_features": channels}
    if isinstance(module, nn.GroupNorm) and not module.affine:
        return group_norm_sizes(module, channels)
    return {}


def group_norm_sizes(module: nn.GroupNorm, channels: int) -> dict[str, int]:
    """The size attributes of a GroupNorm with so many channels, of which each group has as many as before."""
    return {"num_channels": channels, "num_groups": module.num_groups * channels // module.num_channels}


def sizes_told_by(module: nn.Module) -> dict[str, int]:
    """The size attributes of a module that its tensors tell, by name."""
    weight = module._parameters.get("weight")
    if isinstance(module, GatedConv2d):
        return {}  # these are of whole spaces, which its weight does not know
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
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": module.weight.shape[1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": module.weight.shape[0]}
    if isinstance(module, nn.GroupNorm):
        return {} if weight is None else group_norm_sizes(module, weight.shape[0])
    if isinstance(module, nn.modules.batchnorm._NormBase):
        running = module._buffers.get("running_mean")
        sized = weight if weight is not None else running
        return {} if sized is None else {"num_features": sized.shape[0]}
    return {}
