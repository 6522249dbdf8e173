"""Looks at a model without changing it: runs it, names the tensors it returns, and says how far two runs are apart.

The promise of everything here is: *the model is as it was.* Modes, buffers, plain attributes that a forward writes, the
state of the random number generators and the gradient mode are afterwards what they were before.
"""

import dataclasses
import operator
import random
import re
import sys
from collections import deque
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, fx, nn

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.inputs import ExampleInputs, call

P = ParamSpec("P")
R = TypeVar("R")

# The largest difference that rounding explains, as a share of the output's scale. Products are summed in another order
# when channels go, so a deep network in low precision moves by far more than one rounding.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-1, torch.bfloat16: 2e-1}
ROUNDING_TF32 = 1e-2  # fp32 on CUDA: cuDNN multiplies in TF32 unless told otherwise
ROUNDING_OTHER = 2e-1  # narrower types still

# What gives its parts one after the other, some of it only once.
ONE_BY_ONE = Iterator | KeysView | ValuesView | ItemsView

# Classes of parameters that are spread over processes: of FSDP2 and tensor parallelism, and of FSDP.
SHARDED = ("DTensor", "FlatParameter")

# How deep `named_tensors_in` looks into objects; what lies deeper is no output that anyone reads.
DEEPEST = 8


# Requests of a library to its own users, which make no sense in a message of this package that quotes it.
_REQUESTS = re.compile(
    r"[,;:]?\s*(if [^.]*, )?please (report|file (a|an) (bug|issue)|open an issue|submit a|leave a comment)\b[^.]*", re.I
)


def refuse_sharded(model: nn.Module) -> None:
    """Raises InputError for a network whose parameters are spread over processes, as `fully_shard` (FSDP2) and
    `FullyShardedDataParallel` spread them: no process has a whole slice to look at, or to cut."""
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ in SHARDED or type(parameter.data).__name__ in SHARDED:
            raise InputError(
                f"'{name}' is sharded over processes (FSDP), so its channels cannot be cut; train the network whole on "
                "every process, in DistributedDataParallel, or prune it first and shard what is left."
            )


def refuse_unusable(model: object) -> None:
    """Raises InputError for what is no network of PyTorch's modules that can be run and trained as it is."""
    if not isinstance(model, nn.Module):
        kind = "a class" if isinstance(model, type) else f"a {type(model).__name__}"
        raise InputError(f"the model must be a torch.nn.Module, not {kind}; make one first: model = MyNetwork().")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "a TorchScript module cannot be pruned; pass the module that it was made from, and script or trace that "
            "one when it is pruned."
        )
    if isinstance(model, fx.GraphModule) and "train" in vars(model):
        raise InputError(
            "a program of torch.export has one mode only, and cannot be pruned; pass the module that was exported, and "
            "export that one when it is pruned."
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
            raise InputError(
                f"'{name}' has no shape yet, because it is in a lazy module; call the model once, model(x), before."
            )
        if tensor.is_meta:
            raise InputError(
                f"'{name}' is on the device 'meta' and has no values; give the model some before: "
                "model.to_empty(device='cpu'), then its initialisation or load_state_dict."
            )
        if tensor.is_inference() and tensor.requires_grad:
            raise InputError(
                f"'{name}' was made in torch.inference_mode(), so autograd refuses it; make the model outside of it."
            )


def first_line(error: BaseException) -> str:
    """The first line of an exception's message without the full stop at its end; its class if it has no message.

    The messages of libraries may begin with empty lines, or be empty (`raise RuntimeError()`). What they ask the reader
    to report to them is left out.
    """
    name = type(error).__name__
    line = (str(error).strip() or name).splitlines()[0]
    return re.sub(r"\.(\s*\.)+", ".", _REQUESTS.sub("", line)).strip().rstrip(".: ") or name


def first_sentence(error: BaseException) -> str:
    """The first sentence of an exception's first line: some libraries put advice of their own behind it."""
    return re.split(r"(?<=[^.\s])\.\s+(?=[A-Z(])", first_line(error), maxsplit=1)[0]


def outside_inference_mode() -> AbstractContextManager[Any]:
    """Inside, tensors that are made can be trained, also where the caller is in `torch.inference_mode()`: those made
    there are refused by autograd for ever."""
    return torch.inference_mode(mode=False) if torch.is_inference_mode_enabled() else nullcontext()


def makes_trainable(function: Callable[P, R]) -> Callable[P, R]:
    """A function that runs `outside_inference_mode`, for one that makes tensors which are trained later."""

    @wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        with outside_inference_mode():
            return function(*args, **kwargs)

    return outside


# -- running a model ---------------------------------------------------------------------------------------------------


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restores the model and the random number generators afterwards, whatever is run inside.

    That is: each module's mode, its buffers (the same objects with the same values), its attributes where they were
    bound to other objects, the data of its parameters where they were bound anew (`p.data = ...`, as momentum encoders
    do), and the generators of PyTorch (on the CPU and the model's devices), Python and NumPy.
    """
    modules = list(model.modules())
    attributes = [(module, attributes_of(module)) for module in modules]
    buffers = [(m, name, b, b.clone()) for m in modules for name, b in m._buffers.items() if b is not None]
    tensors = (t for m in modules for table in (m._parameters, m._buffers) for t in table.values())
    devices = sorted({t.get_device() for t in tensors if t is not None and t.is_cuda})
    parameters = [(p, p.detach()) for m in modules for p in m._parameters.values() if p is not None]
    restore_random_state, restore_generators = random_state(), _generators_of(modules)
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        restore_random_state()
        restore_generators()
        for module, before in attributes:
            restore_attributes(module, before)
        for parameter, data in parameters:
            if parameter.data_ptr() != data.data_ptr() or parameter.shape != data.shape:
                parameter.data = data
        with torch.no_grad():
            for module, name, buffer, values in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, values):  # autograd refuses a backward over a buffer written meanwhile
                    buffer.copy_(values)


# Tables of a module that are PyTorch's own: what a forward may write are the others.
_OF_PYTORCH = frozenset(vars(nn.Module()))
_CONTAINERS = frozenset((list, dict, set))
# What most attributes are; asking whether a value is a `torch.Generator` takes Python code of PyTorch's.
_NO_GENERATORS = frozenset((list, dict, set, tuple, str, bool, int, float, type(None)))


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """A module's attributes by name, each with a copy of its content if it is a list, dict or set (else None), for
    `restore_attributes`; PyTorch's own tables are not among them."""
    values = {name: value for name, value in vars(module).items() if name not in _OF_PYTORCH}
    return {name: (v, v.copy() if type(v) in _CONTAINERS else None) for name, v in values.items()}


def restore_attributes(module: nn.Module, before: Mapping[str, Any]) -> list[str]:
    """Undoes changes of a module's attributes since `attributes_of`; returns the names of those that had changed."""
    attributes = vars(module)
    changed = list(attributes.keys() - _OF_PYTORCH - before.keys())
    for name in changed:
        del attributes[name]
    for name, (value, content) in before.items():
        content_changed = content is not None and not _same_content(value, content)
        if attributes.get(name, changed) is not value or content_changed:
            changed.append(name)
            attributes[name] = value
            if content_changed and isinstance(value, list):
                value[:] = content
            elif content_changed:
                value.clear()
                value.update(content)
    return changed


def _same_content(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(operator.is_, _flat(a), _flat(b)))


def _flat(container: Any) -> list[Any]:
    return [*container.keys(), *container.values()] if isinstance(container, dict) else list(container)


def random_state() -> Callable[[], None]:
    """A function that puts the generators of Python and NumPy back into their present states."""
    python_state = random.getstate()
    numpy = sys.modules.get("numpy.random")
    numpy_state = numpy.get_state() if numpy is not None else None

    def restore() -> None:
        random.setstate(python_state)
        if numpy is not None:
            numpy.set_state(numpy_state)

    return restore


def _generators_of(modules: Sequence[nn.Module]) -> Callable[[], None]:
    """A function that puts the generators in the modules' attributes back into their present states."""
    states: list[tuple[Any, Any]] = []
    for value in (v for m in modules for name, v in vars(m).items() if name not in _OF_PYTORCH):
        if type(value) in _NO_GENERATORS:
            continue
        if isinstance(value, torch.Generator):
            states.append((value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            states.append((value.setstate, value.getstate()))
        elif hasattr(value, "bit_generator"):  # NumPy's
            states.append((partial(setattr, value.bit_generator, "state"), value.bit_generator.state))

    def restore() -> None:
        for set_state, state in states:
            set_state(state)

    return restore


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """`model` in training or evaluation mode inside, each of its modules in its own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, mode in modes:
            attributes = vars(module)
            if "training" in attributes:  # by setattr it would take as long as a small layer's forward
                attributes["training"] = mode
            else:  # TorchScript keeps it elsewhere
                module.training = mode


@contextmanager
def looking(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """In a mode, without gradients and without autocast; the model is as it was afterwards (`unchanged`)."""
    parameter = next(model.parameters(), None)
    kind = parameter.device.type if parameter is not None else "cpu"
    with (
        unchanged(model),
        in_mode(model, training=training),
        torch.no_grad(),
        torch.autocast(kind, enabled=False),
    ):
        yield


def outputs_of(
    model: nn.Module, inputs: ExampleInputs, *, training: bool = False, other_chance: bool = False
) -> dict[str, Tensor]:
    """The tensors that the model returns on the inputs, by name, in evaluation (default) or training mode; detached.

    Every call starts from the same state of the random number generators, so that two calls draw the same numbers.
    With `other_chance` a call draws other numbers, which shows whether the outputs depend on chance.

    Raises:
        Exception: whatever the model raises.
    """
    with looking(model, training=training):
        if other_chance:
            _draw(model)
        return {name: tensor.detach() for name, tensor in named_tensors_in(call(model, inputs)).items()}


def _draw(model: nn.Module) -> None:
    """Advances every generator that a forward may draw from; by odd counts, because some draw numbers in pairs."""
    for device in {torch.device("cpu"), *(p.device for p in model.parameters())}:
        torch.rand(1001, device=device)
    for _ in range(101):
        random.random()
    if (numpy := sys.modules.get("numpy.random")) is not None:
        numpy.random(101)


# -- outputs by name ---------------------------------------------------------------------------------------------------


def named_tensors_in(value: object) -> dict[str, Tensor]:
    """The tensors in any structure that a model may return, by their place in it: "", "[0].logits", "['boxes']".

    Looked into are lists, tuples and named tuples, mappings (also Hugging Face's `ModelOutput`) and their views,
    iterators and generators (which are used up by it), dataclasses, and other objects that hold tensors in their
    attributes (such as detectron2's `Instances`), but no modules, classes and functions. A tensor that is held twice is
    named once.
    """
    tensors: dict[str, Tensor] = {}
    _collect(value, "", tensors, {}, 0)
    return tensors


def _collect(value: object, name: str, tensors: dict[str, Tensor], seen: dict[int, object], depth: int) -> None:
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | type | nn.Module):
        return
    if depth > DEEPEST or id(value) in seen or (callable(value) and not dataclasses.is_dataclass(value)):
        return
    seen[id(value)] = value  # held, so that no identity is given out twice
    if isinstance(value, Tensor):
        if value.is_nested:
            value = value.unbind()
        else:
            tensors[name] = _plain(value)
            return
    for step, part in _parts(value):
        _collect(part, name + step, tensors, seen, depth + 1)


def _plain(tensor: Tensor) -> Tensor:
    """The tensor with one number for each element, unlike a sparse or a quantized tensor."""
    if tensor.is_quantized:
        return tensor.dequantize()
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def _parts(value: object) -> Iterator[tuple[str, object]]:
    """The objects that a container or object holds, each after the step that leads there: "[0]", ".logits"."""
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from ((f".{field}", getattr(value, field)) for field in value._fields)
    elif isinstance(value, list | tuple | deque | ONE_BY_ONE):
        yield from ((f"[{i}]", part) for i, part in enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((f".{field.name}", getattr(value, field.name, None)) for field in dataclasses.fields(value))
    else:
        yield from ((f".{name}", part) for name, part in held_by(value).items())


def held_by(value: object) -> dict[str, Any]:
    """An object's attributes by name, those in slots too."""
    slots = [slot for cls in type(value).__mro__ for slot in _slots(cls)]
    names = dict.fromkeys([*slots, *getattr(value, "__dict__", ())])
    return {name: getattr(value, name, None) for name in names}


def _slots(cls: type) -> Sequence[str]:
    slots = cls.__dict__.get("__slots__", ())
    return [s for s in ((slots,) if isinstance(slots, str) else tuple(slots)) if not s.startswith("__")]


# -- how far apart -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """How far two runs of a model are apart.

    Attributes:
        largest: largest absolute difference over what is finite in both; infinite where the structure, a shape, an
            integer, a bool, or the pattern of what is not finite differs.
        scale: largest finite absolute value of the floating-point outputs of the first run.
        excess: the largest quotient of a tensor's difference and what rounding explains for it; above 1, rounding
            does not explain it.
        where: the name of the tensor with that quotient; "" where nothing differs.
        compared: elements that were compared; 0 means that nothing is known.
        share: largest difference of a tensor as a share of its scale.
    """

    largest: float
    scale: float
    excess: float
    where: str
    compared: int
    share: float = 0.0

    @property
    def is_rounding(self) -> bool:
        """Whether rounding explains it."""
        return self.excess <= 1.0


def difference(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, smallest_scale: float = 1e-6
) -> Difference:
    """How far `after` is from `before`, tensor by tensor of the same name.

    Integers and bools are compared exactly. Of floating-point tensors what is finite in both is compared, and the
    patterns of the rest (NaN, +inf, -inf) must be equal. Each tensor is judged by its own scale, with the table of this
    file for its dtype and device, but at least by a thousandth of the scale of all of them: next to logits of 10 an
    auxiliary output of 1e-9 may well be rounding. No scale counts as smaller than `smallest_scale`.
    """
    scale = max((_scale(t) for t in before.values()), default=0.0)
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())[0]
        return Difference(torch.inf, scale, torch.inf, odd, sum(t.numel() for t in before.values()), torch.inf)
    largest = excess = share = 0.0
    where, compared = "", 0
    for name, x in before.items():
        gap, count = _gap(x, after[name])
        compared += count
        largest = max(largest, gap)
        if gap == 0:
            continue
        of_scale = gap / max(_scale(x), 1e-3 * scale, smallest_scale)
        share = max(share, of_scale)
        if of_scale / rounding_of(x) > excess:
            excess, where = of_scale / rounding_of(x), name
    return Difference(largest, scale, excess, where, compared, share)


def rounding_of(tensor: Tensor) -> float:
    """The share of its scale that rounding may move an output by."""
    if tensor.is_cuda and tensor.dtype == torch.float32:
        return ROUNDING_TF32
    real = tensor.real.dtype if tensor.is_complex() else tensor.dtype
    return ROUNDING.get(real, ROUNDING_OTHER)


def _scale(tensor: Tensor) -> float:
    """Largest finite absolute value of a floating-point tensor, 0 of any other."""
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return 0.0
    if tensor.is_floating_point() and tensor.dtype not in ROUNDING:
        tensor = tensor.float()
    magnitude = tensor.detach().abs()
    if magnitude.dtype not in ROUNDING:
        magnitude = magnitude.float()
    return float(magnitude.nan_to_num(nan=0.0, posinf=0.0).max())


def _gap(x: Tensor, y: Tensor) -> tuple[float, int]:
    """Largest difference of two tensors, and how many elements could be compared."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return torch.inf, x.numel()
    if not x.numel():
        return 0.0, 0
    if x.is_complex():
        x, y = torch.view_as_real(x.resolve_conj()), torch.view_as_real(y.resolve_conj())
    if not x.is_floating_point():
        return (0.0 if torch.equal(x, y) else torch.inf), x.numel()
    wide = torch.float64 if x.device.type != "mps" else torch.float32
    x, y = x.to(wide), y.to(wide)  # of the narrowest types, such as float8, PyTorch compares nothing
    same = (x == y) | (x.isnan() & y.isnan())  # also two infinities, whose difference is NaN
    gaps = (x - y).abs().masked_fill_(same, 0)
    finite = int(torch.isfinite(x).sum())
    return float(gaps.nan_to_num_(nan=torch.inf, posinf=torch.inf).max()), finite
