"""Layer removal: stand-ins for a branch that no longer depends on its input (paper section 4.1, "Layer removal").

When every weight of the convolution before a merge is zero, the branch adds the same value to every pixel: what its
batch norm makes of a constant. The convolutions in front of it then have no effect and go, with their parameters. The
constant stays, exactly, in training and evaluation mode: the batch norm keeps its parameters and running statistics and
is evaluated on one constant pixel instead of the whole map. It is not folded into a neighbour's shift: two shifts that
get the same gradient move their sum twice as far in a step as a single one would go, so folding changes the training.

A branch whose last convolution is alive stays, even if an earlier one is all zero: what a constant map gives behind a
padded convolution differs at the borders, so it is no constant per channel.

The user's `forward` is not rewritten; the modules it calls are replaced by ones that cost next to nothing:

    conv1 -> RemovedLayer          zeros of one channel, with the map's size
    bn1   -> RemovedLayer
    conv2 -> ConstantConv          its bias (or zero) on every pixel, a view without memory
    bn2   -> ConstantBatchNorm     (1, C, 1, 1), or the full map where the merge writes into it

A fused batch norm (`nn.BatchNormAct2d`) is called with what follows it, `bn2(x, residual, relu=True)`; its stand-ins
take the same arguments, so one checkpoint serves fused and plain models.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prunetrain_kernels.errors import CheckpointError
from prunetrain_kernels.graph.channels import Channels
from prunetrain_kernels.graph.dead import DeadBranch
from prunetrain_kernels.graph.flow import Flow
from prunetrain_kernels.graph.rules import expand_sum_and_relu, register_expansion, register_rule
from prunetrain_kernels.prune.original_sizes import pass_on_note

Geometry = dict[str, list[int]]


def _geometry(module: nn.Module) -> Geometry:
    """A convolution's effect on the size of a map, one entry per spatial dimension; empty for other modules."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return {}
    dims = len(module.kernel_size)
    if module.padding == "same":
        return {}
    padding = [0] * dims if module.padding == "valid" else [int(p) for p in module.padding]
    return {
        "kernel": list(module.kernel_size),
        "stride": list(module.stride),
        "padding": padding,
        "dilation": list(module.dilation),
    }


def _map_size(size: torch.Size, geometry: Geometry) -> list[int]:
    """The size of a map after a convolution of this geometry."""
    if not geometry:
        return list(size)
    columns = zip(size, geometry["kernel"], geometry["stride"], geometry["padding"], geometry["dilation"], strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in columns]


class RemovedLayer(nn.Module):
    """Stand-in for a convolution or batch norm whose output no longer matters: zeros (N, 1, H', W')."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        relu: bool | None = None,  # noqa: FBT001 - as BatchNormAct2d
    ) -> Tensor:
        # Nothing reads these zeros but layers that are gone too, so a residual would change nothing.
        # A fresh tensor, never a view of x: what follows may work in place.
        return x.new_zeros((x.shape[0], 1, *_map_size(x.shape[2:], self.geometry)))

    def extra_repr(self) -> str:
        return "one channel of zeros"


class ConstantConv(nn.Module):
    """Stand-in for a convolution whose weights are all zero: its bias, or zero, on every pixel.

    Args:
        channels: number of output channels C.
        geometry: effect of the convolution on the size of a map.
        bias: the convolution's own bias parameter (C,), or None.
        full: give every pixel its own memory; else a view (N, C, H', W') without memory, or (1, C, 1, 1) where
            `collapse` says that nothing needs the map's size.
    """

    constant_over_pixels = True
    bias: nn.Parameter | None

    def __init__(
        self, channels: int, geometry: Geometry, bias: nn.Parameter | None, *, full: bool, collapse: bool
    ) -> None:
        super().__init__()
        self.out_channels = channels
        self.geometry = geometry
        self.full = full
        self.collapse = collapse
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        size = _map_size(x.shape[2:], self.geometry)
        ones = [1] * len(size)
        # A copy of the bias: a view of a parameter that was made without gradients has no gradient function, on which
        # the hooks of those who count or watch modules (FlopCounterMode) insist.
        value = x.new_zeros(1, self.out_channels, *ones) if self.bias is None else self.bias.clone().view(1, -1, *ones)
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            value = value.to(torch.get_autocast_dtype(kind))  # as the convolution would
        if self.full:
            return value.expand(x.shape[0], -1, *size).clone()
        return value if self.collapse else value.expand(x.shape[0], -1, *size)

    def extra_repr(self) -> str:
        return f"{self.out_channels} channels, the same on every pixel"


class ConstantBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Stand-in for a batch norm whose input (N, C, ...) is the same on every pixel: it is computed on one of them.

    It has the parameters, running statistics and count of batches of the batch norm it replaces, in training and
    evaluation mode.

    Args:
        full: give back (N, C, ...) with its own memory, because the merge writes into it; else (1, C, 1, ...).
        relu: whether a call that does not say applies a ReLU, as in the `BatchNormAct2d` it replaces.
    """

    constant_over_pixels = True

    def __init__(self, num_features: int, *, full: bool = False, relu: bool = False, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.full = full
        self.relu = relu

    def _check_input_dim(self, input: Tensor) -> None:
        return

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        relu: bool | None = None,  # noqa: FBT001 - as BatchNormAct2d
    ) -> Tensor:
        ones = [1] * (input.dim() - 2)
        pixel = input[(slice(0, 1), slice(None), *[slice(0, 1)] * len(ones))]
        # Two equal values: batch norm refuses a single one in training mode, and their variance is the true one, zero.
        value = super().forward(pixel.expand(2, -1, *ones))[:1]
        if residual is not None:
            value = value + residual
        elif self.full:
            value = value.expand_as(input).clone()
        return F.relu(value) if (self.relu if relu is None else relu) else value

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, the same on every pixel"


def _removed_rule(flow: Flow, node: fx.Node, name: str, module: nn.Module) -> bool:
    flow.set(node, Channels(flow.new_space(1, f"'{name}' was removed")))
    return True  # the module reads sizes only, so no channel of its input has to stay


def _constant_rule(flow: Flow, node: fx.Node, name: str, module: Any) -> bool:
    flow.make_constant(node, name, module.out_channels)
    return True


def _constant_batch_norm_rule(flow: Flow, node: fx.Node, name: str, module: Any) -> bool:
    value = flow.channels_of(node.args[0])
    if value is None or node.kwargs.keys() - {"relu"}:
        return False
    return flow.follow_value(node, name, "batch_norm", value)


register_rule(RemovedLayer, _removed_rule)
register_rule(ConstantConv, _constant_rule)
register_rule(ConstantBatchNorm, _constant_batch_norm_rule)
register_expansion(ConstantBatchNorm, lambda graph, node, module: expand_sum_and_relu(graph, node, relu=module.relu))


def _bias(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> nn.Parameter | None:
    return conv._parameters.get("bias")


def _options(norm: nn.modules.batchnorm._BatchNorm) -> dict[str, Any]:
    return {
        "eps": norm.eps,
        "momentum": norm.momentum,
        "affine": norm.affine,
        "track_running_stats": norm.track_running_stats,
        "relu": bool(getattr(norm, "relu", False)),
    }


def _constant_batch_norm(norm: nn.modules.batchnorm._BatchNorm, *, full: bool) -> ConstantBatchNorm:
    """The stand-in for a batch norm, with the same parameter and buffer objects."""
    stand_in = ConstantBatchNorm(norm.num_features, full=full, **_options(norm))
    for name in norm._parameters:
        stand_in.register_parameter(name, norm._parameters[name])
    for name in norm._buffers:
        stand_in.register_buffer(name, norm._buffers[name])
    return stand_in


def _swap(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts a module in another one's place under every name: a ModuleList may hold it too, say."""
    old = model.get_submodule(name)
    new.train(old.training)
    pass_on_note(old, new)
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new


def replacements(model: nn.Module, branch: DeadBranch) -> dict[str, nn.Module]:
    """The stand-ins for the modules of a dead branch, by name; nothing is changed yet."""
    result: dict[str, nn.Module] = {
        name: RemovedLayer(_geometry(model.get_submodule(name))) for name in branch.upstream
    }
    last = model.get_submodule(branch.last)
    assert isinstance(last, nn.Conv1d | nn.Conv2d | nn.Conv3d)  # the search for dead branches ends at convolutions only
    bare = branch.batch_norm is None
    result[branch.last] = ConstantConv(
        last.out_channels, _geometry(last), _bias(last), full=bare and branch.in_place, collapse=bare
    )
    if branch.batch_norm is not None:
        norm = model.get_submodule(branch.batch_norm)
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        result[branch.batch_norm] = _constant_batch_norm(norm, full=branch.in_place)
    return result


def parameters_that_go(model: nn.Module, stand_ins: dict[str, nn.Module]) -> set[int]:
    """The ids of the parameters that no module holds any more once the stand-ins have replaced the modules."""
    replaced = {id(model.get_submodule(name)) for name in stand_ins}
    remaining = [module for module in model.modules() if id(module) not in replaced]
    staying = {id(p) for module in (*stand_ins.values(), *remaining) for p in module.parameters(recurse=False)}
    return {id(p) for name in stand_ins for p in model.get_submodule(name).parameters()} - staying


def swap_in(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Puts modules into a model by name and returns the ones they replaced."""
    before = {name: model.get_submodule(name) for name in modules}  # all first: aliases are swapped together
    for name, module in modules.items():
        _swap(model, name, module)
    return before


# -- stand-ins in a checkpoint -----------------------------------------------------------------------------------------


def describe_stand_ins(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The stand-ins in a model as plain values, from which `restore_stand_ins` rebuilds them."""
    described: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, RemovedLayer):
            described[name] = {"kind": "removed", "geometry": module.geometry}
        elif isinstance(module, ConstantConv):
            described[name] = {
                "kind": "constant_conv",
                "geometry": module.geometry,
                "full": module.full,
                "collapse": module.collapse,
            }
        elif isinstance(module, ConstantBatchNorm):
            described[name] = {"kind": "constant_batch_norm", "full": module.full}
    return described


def restore_stand_ins(model: nn.Module, described: dict[str, dict[str, Any]]) -> dict[str, nn.Module]:
    """The modules for `swap_in` that turn a freshly built model's branches into the described stand-ins.

    Raises:
        CheckpointError: a named module is not there or is of another kind than the one that was replaced.
    """
    modules = dict(model.named_modules())
    result: dict[str, nn.Module] = {}
    for name, description in described.items():
        module = modules.get(name)
        kind = description["kind"]
        if kind == "removed" and module is not None:
            result[name] = RemovedLayer(description["geometry"])
        elif kind == "constant_conv" and isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            result[name] = ConstantConv(
                module.out_channels,
                description["geometry"],
                _bias(module),
                full=description["full"],
                collapse=description["collapse"],
            )
        elif kind == "constant_batch_norm" and isinstance(module, nn.modules.batchnorm._BatchNorm):
            result[name] = _constant_batch_norm(module, full=description["full"])
        else:
            raise CheckpointError(
                f"the checkpoint is of another network: it replaced '{name}' by a '{kind}', which this one cannot."
            )
    return result
