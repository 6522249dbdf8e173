"""Copies of a model that are pruned with it: an EMA, a teacher that must follow (`also=` of `reconfigure`).

A copy is a model of the same architecture with parameters of its own. It may be wrapped, as in
`torch.optim.swa_utils.AveragedModel`, `DistributedDataParallel` or `torch.compile`'s module: what counts is inside.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from prunetrain_kernels.compiled import is_compiled_module
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.nn.gated_conv import describe_gating
from prunetrain_kernels.prune.branches import describe_stand_ins

# What wrappers call the module inside: AveragedModel and DataParallel, torch.compile's OptimizedModule.
WRAPPED_AS = ("module", "_orig_mod")


@dataclass(frozen=True)
class Copy:
    """A copy as it was given, the network inside, and how the wrapper's `state_dict` names that ("module.", say)."""

    given: nn.Module
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
    """The networks in `also`, each of which can be pruned like `model`.

    Raises:
        InputError: one that is no module, of another architecture or shape, or that shares parameters with another.
    """
    if isinstance(also, nn.Module) or not all(isinstance(one, nn.Module) for one in also):
        raise InputError(
            "`also` takes a list of modules of the model's architecture, such as [AveragedModel(model)]; averages kept "
            "as plain tensors cannot follow the model's channels."
        )
    copies = [_copy_of(model, one, number) for number, one in enumerate(also)]
    taken = {id(p): "the model" for p in (*model.parameters(), *model.buffers())}
    for number, copy in enumerate(copies):
        for name, tensor in (*copy.network.named_parameters(), *copy.network.named_buffers()):
            if id(tensor) in taken:
                raise InputError(
                    f"also[{number}] shares '{name}' with {taken[id(tensor)]}; it must be a copy with tensors of its "
                    "own (copy.deepcopy(model), or AveragedModel(model))."
                )
        taken |= {id(t): f"also[{number}]" for t in (*copy.network.parameters(), *copy.network.buffers())}
    return copies


def _copy_of(model: nn.Module, given: nn.Module, number: int) -> Copy:
    names = {name for name, _ in model.named_modules()}
    for network, prefix in _layers(given):
        if {name for name, _ in network.named_modules()} == names:
            why = _difference(model, network)
            if why:
                raise InputError(f"also[{number}] is not like the model: {why}; {_WAY_OUT}")
            return Copy(given, network, prefix)
    *_, (inside, _) = _layers(given)
    odd = min({name for name, _ in inside.named_modules()} ^ names)
    where = "the model has and it has not" if odd in names else "it has and the model has not"
    raise InputError(f"also[{number}] is not like the model: '{odd}' is a module that {where}; {_WAY_OUT}")


_WAY_OUT = "copy the model (copy.deepcopy, AveragedModel), and pass every copy in `also` from the first pruning on."


def _layers(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The module, what it wraps, and so on, with the prefix of each."""
    prefix = ""
    yield model, prefix
    while [name for name, _ in model.named_children()] in [[name] for name in WRAPPED_AS]:
        [(name, model)] = model.named_children()
        prefix += f"{name}."
        yield model, prefix


def _difference(model: nn.Module, copy: nn.Module) -> str:
    """What keeps a copy from being pruned like the model, in words; nothing if nothing does."""
    theirs = dict(copy.named_modules())
    for name, module in model.named_modules():
        if type(theirs[name]) is not type(module):
            return f"'{name}' is a {type(theirs[name]).__name__} there and a {type(module).__name__} in the model"
    for kind, mine, its in (
        ("parameter", dict(model.named_parameters()), dict(copy.named_parameters())),
        ("buffer", dict(model.named_buffers()), dict(copy.named_buffers())),
    ):
        for name in (*mine, *its):
            here, there = (tuple(t[name].shape) if name in t else "absent" for t in (mine, its))
            if here != there:
                return f"the {kind} '{name}' is {there} there and {here} in the model"
    if describe_gating(model) != describe_gating(copy) or describe_stand_ins(model) != describe_stand_ins(copy):
        return "it computes other channels"
    return ""


def inputs_for(copy: nn.Module, model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The model's example inputs for a copy that may be on another device, or of another dtype."""
    theirs, mine = (next(network.parameters(), torch.empty(0, device="cpu")) for network in (copy, model))
    return tuple(x.to(theirs.device, theirs.dtype if x.dtype == mine.dtype else x.dtype) for x in inputs)
