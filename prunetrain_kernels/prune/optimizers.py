"""Optimizers that follow a pruned model: what they hold is checked before anything is touched, then cut with it.

One optimizer, several in a list, and optimizers around optimizers (SAM, Lookahead, Accelerate's): each tensor that is
kept for a parameter and has its shape is cut once, wherever it is kept. What cannot follow is refused in words: at the
construction of `PruneTrain` as far as it can be known there, and before every reconfiguration.
"""

import contextlib
import copy
import random
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.probe import random_state
from prunetrain_kernels.prune.optimizer_holdings import (
    DEEPEST_OBJECT,
    FUNCTIONS,
    NOT_OPENED,
    Holdings,
    Kept,
    bound_in,
    class_containers,
    groups_of,
    holdings_of,
    is_optimizer,
    of_pytorch,
    params_of,
)

# Optimizers that cannot follow, by the name of their class or of one that they inherit from, and why.
SHARDED = "keeps its state in shards over processes, whose sizes are fixed when it is built"
MASTERS = "updates copies of the parameters in fp32 and writes them back"
NO_FOLLOWERS = {
    "ZeroRedundancyOptimizer": SHARDED,
    "OSS": SHARDED,
    "DistributedFusedAdam": SHARDED,
    "DeepSpeedZeroOptimizer": SHARDED,
    "DeepSpeedZeroOptimizer_Stage3": SHARDED,
    "FP16_Optimizer": MASTERS,
    "FP16_UnfusedOptimizer": MASTERS,
    "BF16_Optimizer": MASTERS,
    "SafeFP16Optimizer": MASTERS,
}
WAY_OUT = "Use an optimizer whose state has its parameters' shapes (SGD, Adam, AdamW, RMSprop, ...)."
# Shapes of the trial's parameters, by number of dimensions; sizes differ, so that no shape equals another by chance.
TRIAL_SHAPES = {0: (), 1: (11,), 2: (7, 5), 3: (7, 5, 3), 4: (7, 5, 3, 2), 5: (7, 5, 3, 2, 13)}


class OptimizerList(list[Optimizer]):
    """A list of optimizers, and in `holdings` what they keep, once `check_optimizers` has searched them."""

    holdings: Holdings | None = None


def as_list(optimizer: Optimizer | Sequence[Optimizer] | None) -> OptimizerList:
    """One optimizer, several, or none, as a list.

    Raises:
        InputError: something in it is no optimizer.
    """
    if optimizer is None:
        return OptimizerList()
    optimizers: list[Any] = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
    for one in optimizers:
        wraps = hasattr(one, "zero_grad") and any(map(is_optimizer, getattr(one, "__dict__", {}).values()))
        if not is_optimizer(one) and (isinstance(one, nn.Module) or not wraps):
            raise InputError(
                f"a {type(one).__name__} is no optimizer; pass a torch.optim optimizer, or a list of them."
            )
    return OptimizerList(optimizers)


def all_optimizers(optimizers: Optimizer | Sequence[Optimizer] | None) -> list[Any]:
    """The optimizers and those that they wrap, each once."""
    return holdings_of(as_list(optimizers)).optimizers


def groups_to_schedule(optimizers: Optimizer | Sequence[Optimizer] | None) -> list[dict[str, Any]]:
    """Every parameter group of the optimizers and of those that they wrap, each once: wrappers share them, mostly."""
    return list({id(g): g for o in all_optimizers(optimizers) for g in groups_of(o)}.values())


# -- what cannot follow ------------------------------------------------------------------------------------------------


def check_at_construction(
    model: nn.Module, optimizers: Sequence[Optimizer], also: Sequence[nn.Module] = ()
) -> OptimizerList:
    """Refuses, before any training, optimizers that could not follow a pruned model; returns the others.

    Most have no state yet. So each that is a plain optimizer takes a trial step on a copy of itself with tiny
    parameters of its own, after which the copy's state is checked; optimizer, model and random numbers stay as they
    are. An optimizer that cannot be tried so is checked again before each reconfiguration.

    Raises:
        InputError: as `check_optimizers`.
    """
    optimizers = as_list(list(optimizers))
    check_optimizers(model, optimizers, {id(p) for p in model.parameters()}, also)
    for optimizer in _holdings(optimizers).optimizers:
        trial = _trial(optimizer)
        for kept in trial.kept if trial is not None else ():
            if _misfit(kept, set(), 0):
                assert kept.parameter is not None
                raise InputError(
                    f"{_description(kept)} for a parameter of shape, say, {tuple(kept.parameter.shape)}; it cannot be "
                    f"sliced with the channels, so this optimizer cannot be used. {WAY_OUT}"
                )
    return optimizers


def check_optimizers(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    touched: set[int],
    also: Sequence[nn.Module] = (),
    holdings: Holdings | None = None,
) -> None:
    """Checks that everything the optimizers hold can follow, before anything is changed.

    Args:
        model: the network, whose trained parameters they must hold.
        optimizers: from `as_list`, which keeps the holdings for `slice_state` and `drop`.
        touched: ids of the parameters that will be cut or go.
        also: copies of the model that are pruned with it: an optimizer may hold them.
        holdings: what they hold at this moment, if the caller has searched them; it takes a while.

    Raises:
        InputError: none of them holds a certain parameter, or one of them keeps what cannot be cut.
    """
    if not optimizers:
        return
    if holdings is None:
        holdings = holdings_of(optimizers, model)
    if isinstance(optimizers, OptimizerList):
        optimizers.holdings = holdings
    for optimizer in holdings.optimizers:
        for base in type(optimizer).__mro__:
            if base.__name__ in NO_FOLLOWERS:
                raise InputError(
                    f"{type(optimizer).__name__} {NO_FOLLOWERS[base.__name__]}, so it cannot follow channels that are "
                    "pruned; use the optimizer inside it by itself (and torch.autocast for mixed precision)."
                )
    names = {id(p): name for name, p in model.named_parameters()}
    _check_held(model, holdings, names)
    if touched.isdisjoint(id(p) for o in holdings.optimizers for p in params_of(o)):
        return
    _check_copies(model, holdings, also)
    parameters = [p for o in holdings.optimizers for p in params_of(o) if id(p) in touched]
    shapes = {tuple(p.shape) for p in parameters}
    smallest = min((p.numel() for p in parameters if p.dim() > 1), default=0)
    for kept in holdings.kept:
        misfit = _misfit(kept, shapes, smallest)
        if misfit:
            target = ""
            if kept.parameter is not None:
                name, shape = names.get(id(kept.parameter), "?"), tuple(kept.parameter.shape)
                target = f" for the parameter '{name}' of shape {shape}"
            raise InputError(f"{_description(kept)}{target}; {misfit}, so nothing was pruned. {WAY_OUT}")


def _check_held(model: nn.Module, holdings: Holdings, names: dict[int, str]) -> None:
    """Raises InputError unless the optimizers hold every parameter that is trained, and wrapped ones hold no parameters
    but those of the optimizers around them."""
    outside = {id(p) for o in holdings.optimizers if id(o) not in holdings.wrapped for p in params_of(o)}
    held = outside | {id(p) for o in holdings.optimizers for p in params_of(o)}
    parameters = list(model.parameters())
    missing = [p for p in parameters if p.requires_grad and id(p) not in held]
    shapes = {p.shape for p in parameters if p.numel() > 1}
    smallest = min((p.numel() for p in parameters if p.dim() > 1), default=0)
    strangers = [(o, p) for o in holdings.optimizers for p in params_of(o) if id(p) not in names]
    strangers = [(o, p) for o, p in strangers if p.shape in shapes or p.numel() >= smallest > 0]
    writes_back = any(id(p) in holdings.mentioned for p in missing)
    wrapped = [o for o, p in strangers if id(o) in holdings.wrapped and (id(p) not in outside or writes_back)]
    if wrapped:
        raise InputError(
            f"the {type(wrapped[0]).__name__} inside another optimizer updates copies of the parameters (master "
            "weights in fp32, say), which cannot follow channels that are pruned; use it by itself, with "
            "torch.autocast for mixed precision."
        )
    if missing:
        raise InputError(
            f"the optimizer does not hold the model's parameter '{names[id(missing[0])]}' ({len(missing)} of "
            f"{len(names)} are missing); build it from model.parameters() of this very model, or pass all optimizers "
            "as a list."
        )


def _check_copies(model: nn.Module, holdings: Holdings, also: Sequence[nn.Module]) -> None:
    """Raises InputError if an optimizer holds a copy of the model that would not follow."""
    if not holdings.modules:
        return
    shapes = {name: p.shape for name, p in model.named_parameters()}
    follow = {id(p) for network in (model, *also) for p in network.parameters()}
    for module, optimizer, where in holdings.modules:
        inside = [m for m in module.modules() if {name: p.shape for name, p in m.named_parameters()} == shapes]
        if any(id(p) not in follow for m in inside for p in m.parameters()):
            raise InputError(
                f"{optimizer} keeps a copy of the model in its attribute '{where}', which would not follow channels "
                "that are pruned; pass that copy in `also=[...]`."
            )


def _misfit(kept: Kept, shapes: set[tuple[int, ...]], smallest: int) -> str:
    """Why a tensor cannot follow, in words; empty if it can, or need not.

    Args:
        kept: what an optimizer keeps.
        shapes: the shapes of the parameters that change.
        smallest: the fewest elements of any of these with two or more dimensions; a tensor as large that nothing ties
            to a parameter may be many of them in one.
    """
    tensor, parameter = kept.tensor, kept.parameter
    if tensor is None:
        return "a note of a shape that changes cannot be rewritten"
    if tensor.numel() <= 1:
        return ""
    if parameter is None:
        large = 0 < smallest <= tensor.numel() and (tensor.is_floating_point() or tensor.is_complex())
        if tuple(tensor.shape) in shapes or large:
            return "nothing says which parameter it belongs to, so it cannot be sliced with the channels"
        return ""
    if tensor.shape != parameter.shape:
        return "it cannot be sliced with the channels"
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__} cannot be sliced with the channels"
    return ""


def _description(kept: Kept) -> str:
    """The beginning of a sentence that says what an optimizer keeps."""
    article = "an" if kept.where.startswith("a") else "a"
    if kept.tensor is not None:
        shape = f"of shape {tuple(kept.tensor.shape)}"
    else:
        shape = f"that notes the shape {tuple(kept.parameter.shape) if kept.parameter is not None else ()}"
    return f"{kept.optimizer} keeps {article} {kept.where} {shape}"


# -- a trial -----------------------------------------------------------------------------------------------------------


def _trial(optimizer: Any) -> Holdings | None:
    """The holdings of a copy of an optimizer after a step on tiny parameters; None if it cannot be tried."""
    if hasattr(type(optimizer), "follows_by_itself") or not isinstance(optimizer, Optimizer):
        return None
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return None  # a step may wait for other processes
    devices = sorted({p.get_device() for p in params_of(optimizer) if p.is_cuda})
    put_back = random_state()
    try:
        for make in (_tiny_copy, _whole_copy):
            with (
                contextlib.suppress(Exception),  # about the trial, not about the user's network
                torch.random.fork_rng(devices=devices),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                copied = make(optimizer)
                if copied is not None:
                    return _stepped(copied)
        return None
    finally:
        put_back()


def _tiny_copy(optimizer: Optimizer) -> Any | None:
    """A copy of an optimizer with groups of tiny parameters and no state; None if it has other attributes than plain
    values, or its class has containers that a step of the copy may fill, as constants are not."""
    if not all(value and _is_plain(value) for value in class_containers(optimizer).values()):
        return None
    generator = torch.Generator(device="cpu").manual_seed(0)
    groups: list[dict[str, Any]] = []
    lists: dict[int, list[Tensor]] = {}
    for group in optimizer.param_groups:
        like = {p.dim(): p for p in group["params"] if p.dim() in TRIAL_SHAPES}
        params: list[Tensor] = []
        for dims, p in sorted(like.items()):
            values = torch.randn(TRIAL_SHAPES[dims], generator=generator, device="cpu")
            params.append(nn.Parameter(values.to(p.device, p.dtype)))
            params[-1].grad = torch.ones_like(params[-1])
        lists[id(group["params"])] = params
        options = {key: copy.deepcopy(value) for key, value in group.items() if key not in ("params", "param_names")}
        groups.append({**options, "params": params})
    attributes: dict[str, Any] = {}
    for name, value in vars(optimizer).items():
        if id(value) in lists:
            attributes[name] = lists[id(value)]
        elif name not in of_pytorch():
            if not _is_plain(value):
                return None
            attributes[name] = copy.deepcopy(value)
        elif name.endswith("_hooks"):
            attributes[name] = OrderedDict()
        elif name != "step":
            attributes[name] = value
    copied = object.__new__(type(optimizer))
    copied.__dict__.update(attributes | {"state": defaultdict(dict), "param_groups": groups})
    return copied


def _whole_copy(optimizer: Optimizer) -> Any | None:
    """A copy of an optimizer with copies of its parameters and of all that it keeps, for one that keeps masks or
    schedules from its construction on; None if it wraps another, or has attributes that cannot be copied safely."""
    own = {id(p) for p in params_of(optimizer)}
    attributes = {n: v for n, v in vars(optimizer).items() if n != "step" and not n.endswith("_hooks")}
    if not all(value and _is_plain(value) for value in class_containers(optimizer).values()):
        return None
    if not all(_can_be_copied(v, own) for n, v in attributes.items() if n not in ("state", "param_groups")):
        return None
    memo: dict[int, Any] = {}
    copied = object.__new__(type(optimizer))
    hooks: dict[str, Any] = {n: OrderedDict() for n in vars(optimizer) if n.endswith("_hooks")}
    copied.__dict__.update(hooks | {n: copy.deepcopy(v, memo) for n, v in attributes.items()})
    for parameter in params_of(copied):
        parameter.grad = torch.ones_like(parameter)
    return copied


def _can_be_copied(value: Any, own: set[int], depth: int = 0) -> bool:
    """Whether a value is plain, tensors, or an object of these, which no other object shares; no optimizer of the
    parameters whose ids are `own`, and no module."""
    if isinstance(value, Mapping):
        return all(_can_be_copied(part, own, depth + 1) for part in value.values())
    if isinstance(value, list | tuple | set):
        return all(_can_be_copied(part, own, depth + 1) for part in value)
    if isinstance(value, Tensor) or _is_plain(value):
        return True
    if isinstance(value, nn.Module) or depth > DEEPEST_OBJECT or type(value).__module__.startswith("torch.distributed"):
        return False
    if isinstance(value, Optimizer) and not own.isdisjoint(id(p) for p in params_of(value)):
        return False
    held = {n: v for n, v in getattr(value, "__dict__", {}).items() if n != "step" and not n.endswith("_hooks")}
    return bool(held) and all(_can_be_copied(part, own, depth + 1) for part in held.values())


def _is_plain(value: Any) -> bool:
    """Whether a value, and all in it, can be copied without side effects."""
    if isinstance(value, Mapping):
        return all(_is_plain(part) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    if isinstance(value, FUNCTIONS):  # a copy of a function shares what it holds with it
        return not isinstance(value, MethodType) and all(isinstance(v, NOT_OPENED) for v in bound_in(value).values())
    return isinstance(value, (*NOT_OPENED, random.Random))


def _stepped(optimizer: Any) -> Holdings:
    """The holdings of an optimizer after a step, with a closure where it needs one."""

    def closure() -> Tensor:
        return sum((p.detach().square().sum() for p in params_of(optimizer)), torch.zeros((), device="cpu"))

    step = type(optimizer).step
    try:
        step(optimizer)
    except TypeError:
        step(optimizer, closure)
    return holdings_of([optimizer])


# -- cutting -----------------------------------------------------------------------------------------------------------


def slice_state(optimizers: Sequence[Optimizer], tensor: Tensor, cut: Callable[[Tensor], Tensor]) -> None:
    """Cuts every tensor that is kept for a parameter and has its shape; call it while the parameter has its old shape.

    The tensors stay the same objects, as parameters do: whoever holds one holds the right one.
    """
    for kept in _holdings(optimizers).of(tensor):
        with torch.no_grad():
            kept.data = cut(kept)  # the object itself, by which `cut` may know which state it is


def state_of(optimizer: Any, parameter: Tensor) -> Mapping[str, Any]:
    """What an optimizer keeps in its state for a parameter, by name; empty where the state names nothing: some keep one
    tensor or object for each parameter."""
    state = getattr(optimizer, "state", None)
    entry = state.get(parameter) if isinstance(state, Mapping) else None
    return entry if isinstance(entry, Mapping) else {}


def drop(optimizers: Sequence[Optimizer], gone: set[int]) -> None:
    """Takes removed parameters, and what is kept for them, out of the optimizers; an empty group stays, because
    schedulers count it.

    Raises:
        InputError: an optimizer keeps something for them in a tuple.
    """
    if not gone:
        return
    holdings = _holdings(optimizers)
    for entries, parameters in holdings.beside:
        paired = any(entry is not p for entry, p in zip(entries, parameters, strict=True))
        if not isinstance(entries, list) and paired and not gone.isdisjoint(map(id, parameters)):
            raise InputError(
                f"an optimizer keeps tensors for its parameters in a {type(entries).__name__}, from which those of "
                "removed layers cannot be taken; keep them in a list or in `state`."
            )
    lists = {id(g["params"]): (g["params"], g["params"]) for o in holdings.optimizers for g in groups_of(o)}
    lists |= {
        id(entries): (entries, parameters)
        for entries, parameters in holdings.beside
        if isinstance(entries, list) and id(entries) not in lists
    }
    for entries, parameters in lists.values():
        before = list(entries)
        remaining = [entry for entry, p in zip(before, list(parameters), strict=True) if id(p) not in gone]
        if len(remaining) < len(before):
            # The list stays the same object: some optimizers keep a reference to it.
            entries[:] = remaining
    mappings = {id(mapping): mapping for mapping, _, parameter in holdings.keyed if id(parameter) in gone}
    keys = {id(mapping): [] for mapping in mappings.values()}  # type: dict[int, list[Any]]
    for mapping, key, parameter in holdings.keyed:
        if id(parameter) in gone:
            keys[id(mapping)].append(key)
    for mapping in mappings.values():
        for key in keys[id(mapping)]:
            mapping.pop(key, None)


def _holdings(optimizers: Sequence[Optimizer]) -> Holdings:
    """What the optimizers keep: as `check_optimizers` has noted it, or from a new search."""
    known = optimizers.holdings if isinstance(optimizers, OptimizerList) else None
    return holdings_of(optimizers) if known is None else known
