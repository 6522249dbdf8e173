"""Copies of a model that are pruned with it: an EMA, a teacher that must follow (`also=` of `reconfigure`).

A copy is a model of the same architecture with parameters of its own. It may be wrapped, as in
`torch.optim.swa_utils.AveragedModel`, `DistributedDataParallel` or `torch.compile`'s module: only the network inside
counts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from prunetrain_kernels.compiled import is_compiled_module
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.inputs import ExampleInputs, mapped
from prunetrain_kernels.nn.gated_conv import describe_gating
from prunetrain_kernels.prune.branches import describe_stand_ins

# The names by which wrappers hold the module inside: AveragedModel and DataParallel, torch.compile's OptimizedModule.
WRAPPED_AS = ("module", "_orig_mod")


@dataclass(frozen=True)
class Copy:
    """A copy of the model.

    Attributes:
        module: the module that the user passed, perhaps a wrapper.
        network: the network inside.
        prefix: what the wrapper's `state_dict` puts before the network's names ("module.", say).
    """

    module: nn.Module
    network: nn.Module
    prefix: str


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """The network inside PyTorch's own wrappers, and the prefix of its names in the outermost one's `state_dict`."""
    prefix = ""
    while isinstance(model, DistributedDataParallel | nn.DataParallel | AveragedModel) or is_compiled_module(model):
        name = "_orig_mod" if is_compiled_module(model) else "module"
        model, prefix = model.get_submodule(name), f"{prefix}{name}."
    return model, prefix


def copies_of(model: nn.Module, also: Sequence[nn.Module]) -> list[Copy]:
    """The copies in `also`, each of which can be pruned like `model`.

    Raises:
        InputError: one of them is no module, has another architecture or shape, or shares parameters with another one
            or with the model.
    """
    if isinstance(also, nn.Module) or not all(isinstance(module, nn.Module) for module in also):
        raise InputError(
            "`also` takes a list of modules of the model's architecture, such as [AveragedModel(model)]; averages kept "
            "as plain tensors cannot follow the model's channels."
        )
    copies = [_copy_of(model, module, number) for number, module in enumerate(also)]
    owners = {id(p): "the model" for p in (*model.parameters(), *model.buffers())}
    for number, copy in enumerate(copies):
        for name, tensor in (*copy.network.named_parameters(), *copy.network.named_buffers()):
            if id(tensor) in owners:
                raise InputError(
                    f"also[{number}] shares '{name}' with {owners[id(tensor)]}; it must be a copy with tensors of its "
                    "own (copy.deepcopy(model), or AveragedModel(model))."
                )
        owners |= {id(t): f"also[{number}]" for t in (*copy.network.parameters(), *copy.network.buffers())}
    return copies


def _copy_of(model: nn.Module, module: nn.Module, number: int) -> Copy:
    """The copy of the model that a module is or wraps; raises InputError if there is none."""
    names = {name for name, _ in model.named_modules()}
    for network, prefix in _unwrappings(module):
        if {name for name, _ in network.named_modules()} == names:
            difference = _difference(model, network)
            if difference:
                raise InputError(f"also[{number}] is not like the model: {difference}; {_WAY_OUT}")
            return Copy(module, network, prefix)
    *_, (inside, _) = _unwrappings(module)
    odd = min({name for name, _ in inside.named_modules()} ^ names)
    where = "the model has and it has not" if odd in names else "it has and the model has not"
    raise InputError(f"also[{number}] is not like the model: '{odd}' is a module that {where}; {_WAY_OUT}")


_WAY_OUT = "copy the model (copy.deepcopy, AveragedModel), and pass every copy in `also` from the first pruning on."


def _unwrappings(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """A module, the module that it wraps, and so on, each with the prefix of its names."""
    prefix = ""
    yield model, prefix
    while [name for name, _ in model.named_children()] in [[name] for name in WRAPPED_AS]:
        [(name, model)] = model.named_children()
        prefix += f"{name}."
        yield model, prefix


def _difference(model: nn.Module, copy: nn.Module) -> str:
    """Why a copy cannot be pruned like the model, in words; empty if it can."""
    copied_modules = dict(copy.named_modules())
    for name, module in model.named_modules():
        if type(copied_modules[name]) is not type(module):
            return (
                f"'{name}' is a {type(copied_modules[name]).__name__} there and a {type(module).__name__} in the model"
            )
    for kind, in_model, in_copy in (
        ("parameter", dict(model.named_parameters()), dict(copy.named_parameters())),
        ("buffer", dict(model.named_buffers()), dict(copy.named_buffers())),
    ):
        for name in (*in_model, *in_copy):
            shape, copy_shape = (tuple(t[name].shape) if name in t else "absent" for t in (in_model, in_copy))
            if shape != copy_shape:
                return f"the {kind} '{name}' is {copy_shape} there and {shape} in the model"
    if describe_gating(model) != describe_gating(copy) or describe_stand_ins(model) != describe_stand_ins(copy):
        return "it computes other channels"
    return ""


def inputs_for(copy: nn.Module, model: nn.Module, inputs: ExampleInputs) -> ExampleInputs:
    """The model's example inputs for a copy that may be on another device, or of another dtype."""
    of_copy, of_model = (next(network.parameters(), torch.empty(0, device="cpu")) for network in (copy, model))

    def moved(x: Tensor) -> Tensor:
        return x.to(of_copy.device, of_copy.dtype if x.dtype == of_model.dtype else x.dtype)

    inputs_of_copy: ExampleInputs = mapped(inputs, moved)
    return inputs_of_copy
