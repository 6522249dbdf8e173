"""A pruned network as plain PyTorch modules, for `torch.export` and for machines without this package.

    plain = to_dense(model, example_inputs)
    torch.export.export(plain.eval(), example_inputs)  # or `export_program`, which writes and checks a file

Every module that the package put into a model has a plain counterpart that computes the same:

    GatedConv2d                    nn.Conv2d over its whole spaces, zeros where nothing was computed
    fused batch norm (`fuse`)      nn.BatchNorm2d, and the module's own forward again
    SyncBatchNorm                  the nn.BatchNorm it was
    ConstantConv                   nn.Conv of the one channel that the removed layers give, weights zero
    ConstantBatchNorm              its nn.BatchNorm
    RemovedLayer                   nn.Conv to one channel, weights zero; nn.Identity for a batch norm

So a removed branch costs a few channels of arithmetic again: one where it had hundreds. A gated network has, as a plain
one, the FLOPs of the union network.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.inputs import ExampleInputs, call, checked_inputs
from prunetrain_kernels.nn.batch_norm import BatchNormAct2d
from prunetrain_kernels.nn.gated_conv import GatedConv2d, gate_, unpair
from prunetrain_kernels.nn.sync_batch_norm import SyncBatchNorm, make_plain
from prunetrain_kernels.probe import first_line, looking, makes_trainable
from prunetrain_kernels.prune.branches import ConstantBatchNorm, ConstantConv, RemovedLayer, swap_in

CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
BATCH_NORMS = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@makes_trainable
def to_dense(model: nn.Module, example_inputs: ExampleInputs | None = None) -> nn.Module:
    """A copy of `model` in which nothing of this package is left: union channels, plain modules, its own forwards.

    The copy computes the same in training and evaluation mode, to rounding; the model itself is not changed. Parameter
    names are those of the network as it was built. A `BatchNormAct2d` that applies a ReLU by itself was no batch norm
    before: the network was built with it, and keeps it.

    Args:
        model: pruned or not, gated or not, fused or not.
        example_inputs: a tuple of its positional arguments, or a dict of its keyword arguments; needed if branches were
            removed: what replaces these does not know its input.

    Raises:
        InputError: the model does not run on the example inputs, or they are needed and missing.
    """
    plain = copy.deepcopy(model)
    for module in plain.modules():
        instance_forward = vars(module).get("forward")
        if getattr(instance_forward, "computes_the_same", False):
            del module.__dict__["forward"]
        if isinstance(module, BatchNormAct2d):
            unpair(module)
    for module in list(plain.modules()):
        if isinstance(module, GatedConv2d):
            _fill_up(module)
    stand_ins: dict[str, nn.Module] = {
        name: module
        for name, module in plain.named_modules()
        if isinstance(module, RemovedLayer | ConstantConv | ConstantBatchNorm)
    }
    if stand_ins:
        inputs = _inputs_of(plain, stand_ins, example_inputs)
        swap_in(plain, {n: _plain(m, inputs[n]) for n, m in stand_ins.items() if n in inputs})
    for module in plain.modules():
        if type(module) is BatchNormAct2d and not module.relu:
            module.__dict__.pop("relu", None)
            module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
        elif isinstance(module, SyncBatchNorm):
            make_plain(module)
    return plain


def _fill_up(conv: GatedConv2d) -> None:
    """Turns a gated convolution into a plain one, in place."""
    weight = conv.weight.detach()
    for dim, side, channels in ((0, "output", conv.out_channels), (1, "input", conv.in_channels)):
        maps = conv.maps(side)
        if maps is not None:
            shape = [channels if d == dim else size for d, size in enumerate(weight.shape)]
            weight = weight.new_zeros(shape).index_copy_(dim, maps.index.long(), weight)
    channels_last = conv.weight.is_contiguous(memory_format=torch.channels_last) and not conv.weight.is_contiguous()
    gate_(conv, conv.in_channels, conv.out_channels, None, None)
    if channels_last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)


def _inputs_of(
    model: nn.Module, modules: dict[str, nn.Module], example_inputs: ExampleInputs | None
) -> dict[str, Tensor]:
    """The inputs of the named modules on the example inputs."""
    if example_inputs is None:
        raise InputError(
            f"'{next(iter(modules))}' stands in for a removed layer, and does not know its input; pass example_inputs."
        )
    inputs: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda m, arguments, name=name: inputs.update({name: arguments[0]}))  # type: ignore[misc]
        for name, module in modules.items()
    ]
    try:
        with looking(model):
            call(model, checked_inputs(example_inputs))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{type(model).__name__} does not run on example_inputs: {first_line(error)}.") from error
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _plain(module: nn.Module, x: Tensor) -> nn.Module:
    """The counterpart of a stand-in whose input is `x`."""
    if isinstance(module, ConstantBatchNorm):
        return _plain_batch_norm(module, x.dim())
    assert isinstance(module, RemovedLayer | ConstantConv)
    if isinstance(module, RemovedLayer) and not module.geometry and x.shape[1] == 1:
        return nn.Identity()  # a batch norm, or a convolution that keeps the size of the map, behind another one
    outputs = module.out_channels if isinstance(module, ConstantConv) else 1
    geometry: dict[str, Any] = module.geometry or {"kernel": [1] * (x.dim() - 2)}
    conv = CONVOLUTIONS[x.dim()](
        x.shape[1],
        outputs,
        geometry["kernel"],
        geometry.get("stride", 1),
        geometry.get("padding", 0),
        geometry.get("dilation", 1),
        bias=isinstance(module, ConstantConv) and module.bias is not None,
        device="meta",  # where nothing is initialised, which would draw random numbers
        dtype=x.dtype,
    ).to_empty(device=x.device)
    nn.init.zeros_(conv.weight)
    conv.weight.requires_grad = False  # a removed branch is not to grow again
    if isinstance(module, ConstantConv) and module.bias is not None:
        conv.bias = module.bias
    return conv


def _plain_batch_norm(module: ConstantBatchNorm, dims: int) -> nn.Module:
    """The batch norm that a stand-in replaced, with the same parameter and buffer objects, for inputs of `dims`
    dimensions."""
    options = {name: getattr(module, name) for name in ("eps", "momentum", "affine", "track_running_stats")}
    plain = BATCH_NORMS[dims](module.num_features, **options)
    for name, parameter in module._parameters.items():
        plain.register_parameter(name, parameter)
    for name, buffer in module._buffers.items():
        plain.register_buffer(name, buffer)
    return plain
