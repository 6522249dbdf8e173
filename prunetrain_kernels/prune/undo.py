"""All or nothing: a change of networks, their optimizers and other objects that lasts only if it is declared done.

with AllOrNothing([model], [optimizer], objects=[prunetrain]) as change:
    ...                 # anything, which may fail anywhere
    change.done = True  # one assignment: before it all is put back, after it nothing

What everything is, is noted before the first change, and putting it back does not ask how far the change had come. So
`KeyboardInterrupt` and `MemoryError` at any line, even inside a library's context manager, leave no half state. Notes
hold references: of what a change replaces, the old stays until the change is over, and nothing is copied but buffers.
"""

import operator
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules import module
from torch.utils import _python_dispatch

from prunetrain_kernels.probe import outside_inference_mode, random_state
from prunetrain_kernels.prune.optimizer_holdings import Holdings, groups_of, holdings_of, params_of
from prunetrain_kernels.prune.slices import set_data

Step = Callable[[], None]


class AllOrNothing:
    """The networks, optimizers and objects that change together, as they are when it is made.

    Args:
        networks: modules with all that they contain: tensors, modes, hooks, attributes.
        optimizers: with those that they wrap, their groups and what they keep.
        objects: others whose attributes may change, and the lists and dicts among these.
        copying: what optimizers keep is copied too, for a change that may write into it.

    Attributes:
        done: to be set when the change is to last.
        holdings: what the optimizers keep; None without optimizers.

    Inside, `torch.inference_mode()` around it is off: a parameter that is made in it could not be trained any more.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        optimizers: Sequence[Any] = (),
        objects: Iterable[Any] = (),
        *,
        copying: bool = False,
    ) -> None:
        modules = list({id(m): m for network in networks for m in network.modules()}.values())
        tensors = [t for m in modules for table in (m._parameters, m._buffers) for t in table.values() if t is not None]
        self.done = False
        self._steps: list[Step] = [_ambient({t.get_device() for t in tensors if t.is_cuda})]
        self._steps += [_attributes(thing) for thing in (*modules, *objects)]
        self._steps += [_tensor(t) for t in {id(t): t for t in tensors}.values()]
        self._steps += [_values(b) for m in modules for b in m._buffers.values() if b is not None]
        self.holdings = holdings_of(optimizers, next(iter(networks), None)) if optimizers else None
        self._steps += [] if self.holdings is None else _optimizer_steps(self.holdings, copying=copying)

    def __enter__(self) -> Self:
        self._outside = outside_inference_mode()
        self._outside.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        try:
            if not self.done:
                self.put_back()
        finally:
            self._outside.__exit__(None, None, None)

    def when_undone(self, step: Step) -> None:
        """Has a step run after everything is put back, if it is."""
        self._steps.append(step)

    def put_back(self) -> None:
        """Puts everything back. A step that fails is tried once more, and leaves none of the others out."""
        failed: BaseException | None = None
        for step in self._steps:
            try:
                step()
            except BaseException as error:
                failed = error
                try:
                    step()
                except BaseException as again:
                    failed = again
        if failed is not None:
            raise failed


# -- notes, each a function that puts back what it has noted -----------------------------------------------------------


def _attributes(thing: Any) -> Step:
    """The class of an object, its attributes, and what is in those that are lists, dicts and sets."""
    kind, attributes = type(thing), vars(thing)
    before = dict(attributes)
    containers = [value for value in before.values() if type(value) in _CONTAINERS]
    empty = [container for container in containers if not container]  # PyTorch's tables of hooks, most of them
    contents = [(container, _content(container)) for container in containers if container]

    def put_back() -> None:
        if type(thing) is not kind:
            thing.__class__ = kind
        if not _same(attributes, before):
            _refill(attributes, before)
        for container in empty:
            if container:
                container.clear()
        for container, content in contents:
            if not _same(container, content):
                _refill(container, content)

    return put_back


_CONTAINERS = frozenset((list, dict, set, OrderedDict, defaultdict, deque))


def _content(container: Any) -> Any:
    return dict(container) if isinstance(container, dict | Mapping) else list(container)


def _same(container: Any, content: Any) -> bool:
    """Whether a container has the same objects in the same order as were noted."""
    if len(container) != len(content) or not all(map(operator.is_, container, content)):
        return False
    return not isinstance(content, dict) or all(map(operator.is_, container.values(), content.values()))


def _refill(container: Any, content: Any) -> None:
    """Gives a container its noted content, in the noted order; it stays the same object."""
    if isinstance(container, list):
        container[:] = content
        return
    container.clear()
    (container.extend if isinstance(container, deque) else container.update)(content)


def _tensor(tensor: Tensor) -> Step:
    """A parameter's or buffer's place in memory, its shape and its gradient."""
    data, grad = tensor.data, tensor.grad

    def put_back() -> None:
        if not _same_place(tensor.data, data):
            set_data(tensor, data)
        if tensor.grad is not grad:
            tensor.grad = grad

    return put_back


def _same_place(a: Tensor, b: Tensor) -> bool:
    alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and a.layout == b.layout
    if not alike or a.layout != torch.strided:
        return False
    return a.stride() == b.stride() and a.data_ptr() == b.data_ptr()


def _values(tensor: Tensor) -> Step:
    """A tensor's numbers, which something may write over."""
    before = tensor.detach().clone()

    def put_back() -> None:
        with torch.no_grad():
            if not torch.equal(tensor, before):  # autograd refuses a backward over a buffer written meanwhile
                tensor.copy_(before)

    return put_back


def _optimizer_steps(holdings: Holdings, *, copying: bool) -> list[Step]:
    """All that the optimizers, and those that they wrap, hold."""
    containers: list[Any] = [mapping for mapping, _, _ in holdings.keyed] + [entries for entries, _ in holdings.beside]
    tensors: list[Tensor] = []
    for optimizer in holdings.optimizers:
        for group in groups_of(optimizer):
            containers += [group, group["params"]]
            tensors += [
                value for value in group.values() if isinstance(value, Tensor)
            ]  # a rate that is scaled in place
        state = getattr(optimizer, "state", None)
        containers += [state, *state.values()] if isinstance(state, MutableMapping) else []
    containers = [c for c in {id(c): c for c in containers}.values() if isinstance(c, MutableMapping | list)]
    kept = [each.tensor for each in holdings.kept if each.tensor is not None]
    steps = [_attributes(optimizer) for optimizer in holdings.optimizers]
    steps += [_container(container) for container in containers]
    steps += [_tensor(p) for optimizer in holdings.optimizers for p in params_of(optimizer)]
    steps += [_kept(tensor) for tensor in kept]
    return steps + [_values(tensor) for tensor in (*tensors, *(kept if copying else ()))]


def _container(container: Any) -> Step:
    content = _content(container)

    def put_back() -> None:
        if not _same(container, content):
            _refill(container, content)

    return put_back


def _kept(tensor: Tensor) -> Step:
    """The place in memory of what an optimizer keeps."""
    data = tensor.data

    def put_back() -> None:
        if not _same_place(tensor.data, data):
            tensor.data = data

    return put_back


def _ambient(devices: set[int]) -> Step:
    """What PyTorch keeps for the whole thread: gradient mode, autocast, modes that see every operation, hooks on every
    module, and the random number generators of PyTorch, Python and NumPy."""
    grad, random_numbers, put_generators_back = torch.is_grad_enabled(), torch.get_rng_state(), random_state()
    on_devices = [(device, torch.cuda.get_rng_state(device)) for device in sorted(devices)]
    kinds = ("cpu", "cuda") if devices else ("cpu",)
    casts = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
    cached, nesting = torch.is_autocast_cache_enabled(), _autocast_nesting()
    stacks = [(length, length(), pop) for length, pop in _STACKS]
    flags = {name: value for name, value in vars(_python_dispatch).items() if name.startswith("_is_in_")}
    patched = {name: vars(nn.Module)[name] for name in ("__call__", "__getattr__")}  # by torch.fx, while it traces
    hooks = [_container(value) for name, value in vars(module).items() if name in _HOOKS_OF_ALL_MODULES]

    def put_back() -> None:
        for step in hooks:
            step()
        for length, before, pop in stacks:
            while length() > before:
                pop()
        vars(_python_dispatch).update(flags)
        for name, method in patched.items():
            if vars(nn.Module)[name] is not method:
                setattr(nn.Module, name, method)
        torch.set_grad_enabled(grad)
        for kind, enabled, dtype in casts:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(cached)
        while _autocast_nesting() > nesting:
            torch.autocast_decrement_nesting()
        torch.set_rng_state(random_numbers)
        for device, state in on_devices:
            torch.cuda.set_rng_state(state, device)
        put_generators_back()

    return put_back


# Modes of FLOP counters, fake tensors and tracers; an interrupt at their exit leaves them on the stack.
_STACKS: tuple[tuple[Callable[[], int], Callable[[], Any]], ...] = (
    (torch._C._len_torch_dispatch_stack, lambda: torch._C._pop_torch_dispatch_stack(None)),
    (torch._C._len_torch_function_stack, torch._C._pop_torch_function_stack),
)

# Of `torch.nn.modules.module`; a FLOP counter's tracker registers some while it counts.
_HOOKS_OF_ALL_MODULES = frozenset(
    name for name, value in vars(module).items() if name.startswith("_global_") and isinstance(value, dict)
)


def _autocast_nesting() -> int:
    """How many autocasts are open: what PyTorch's count is, which it tells only while it counts."""
    depth: int = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return depth - 1
