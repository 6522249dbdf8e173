"""Example inputs: what a model is called with, in one form everywhere.

    (x,)  (x, mask)                        a tuple holds the positional arguments
    {"pixel_values": x, "labels": y}       a dict holds keyword arguments
    ([image, image], [target, target])     inside, a list has one entry for each example
    ((small, large), {"mask": m})          inside, tuples and dicts hold tensors whose dimension 0 is the batch

Tensors may be nested in any of these; numbers, strings, bools and None among them are passed on as they are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunetrain_kernels.errors import InputError

ExampleInputs = tuple[Any, ...] | dict[str, Any]

HOW = "example_inputs must be a tuple of tensors, the model's positional arguments, such as (x,), or a dict of its "
HOW += 'keyword arguments, such as {"pixel_values": x}'
PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


def checked_inputs(example_inputs: Any, error: type[InputError] = InputError) -> ExampleInputs:
    """The example inputs, in new containers; one tensor alone, or a list, counts as positional arguments.

    Raises:
        InputError: (or `error`) they have another form, or no tensor in them.
    """
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, tuple | list | Mapping):
        raise error(f"{HOW}, not {_described(example_inputs)}.")
    if isinstance(example_inputs, Mapping):
        odd = [name for name in example_inputs if not isinstance(name, str)]
        if odd:
            raise error(f"{HOW}; the keys of the dict are names of arguments, not {odd[0]!r}.")
        example_inputs = dict(example_inputs)
    else:
        example_inputs = tuple(example_inputs)
    leaves = list(_leaves(example_inputs, ""))
    for place, value in leaves:
        if not isinstance(value, (Tensor, *PLAIN)):
            raise error(f"{HOW}; example_inputs{place} is {_described(value)}: turn it into a tensor.")
    if not any(isinstance(value, Tensor) for _, value in leaves):
        raise error(f"{HOW}; there is no tensor in it.")
    inputs: ExampleInputs = mapped(example_inputs, lambda x: x)
    return inputs


def _described(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """What is in nested tuples, lists and mappings, each with the place where it is."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _leaves(part, f"{place}[{name!r}]")
    elif isinstance(value, tuple | list):
        for i, part in enumerate(value):
            yield from _leaves(part, f"{place}[{i}]")
    else:
        yield place, value


def mapped(inputs: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same in new containers, with what `function` makes of each tensor, in the order of `tensors_in`."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {name: mapped(part, function) for name, part in inputs.items()}
    if isinstance(inputs, tuple) and hasattr(inputs, "_fields"):
        return type(inputs)(*(mapped(part, function) for part in inputs))
    if isinstance(inputs, tuple):
        return tuple(mapped(part, function) for part in inputs)
    return [mapped(part, function) for part in inputs] if isinstance(inputs, list) else inputs


def tensors_in(inputs: Any) -> list[Tensor]:
    """All tensors of example inputs, from the first to the last."""
    return [value for _, value in _leaves(inputs, "") if isinstance(value, Tensor)]


def named_inputs(names: Sequence[str], inputs: ExampleInputs) -> list[tuple[str, bool]]:
    """A name for each tensor of `tensors_in`, of the argument that it is in, and whether it lies in a list.

    Args:
        names: of the model's positional arguments; for further ones a number does.
    """
    arguments = inputs if isinstance(inputs, dict) else {_name(names, i): part for i, part in enumerate(inputs)}
    named: list[tuple[str, bool]] = []

    def collect(value: Any, name: str, *, listed: bool) -> None:
        if isinstance(value, Tensor):
            named.append((name, listed))
        elif isinstance(value, Mapping):
            for key, part in value.items():
                collect(part, f"{name}_{key}", listed=listed)
        elif isinstance(value, tuple | list):
            for i, part in enumerate(value):
                collect(part, f"{name}_{i}", listed=listed or isinstance(value, list))

    for name, value in arguments.items():
        collect(value, name, listed=False)
    return named


def _name(names: Sequence[str], number: int) -> str:
    return names[number] if number < len(names) else f"input_{number}"


def arguments_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the keyword arguments of a call of the model."""
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})


def call(model: nn.Module | Callable[..., Any], inputs: Any) -> Any:
    """What the model returns on the inputs."""
    positional, keywords = arguments_of(inputs)
    return model(*positional, **keywords)


def shapes_of(inputs: Any) -> str:
    """The shapes of all tensors, in words."""
    return ", ".join(str(tuple(x.shape)) for x in tensors_in(inputs))


# -- batches -----------------------------------------------------------------------------------------------------------


def _counts(inputs: Any) -> Iterator[int]:
    """The numbers of examples in the tensors that have dimensions, and in the lists that hold tensors."""
    if isinstance(inputs, Tensor):
        if inputs.dim():
            yield len(inputs)
    elif isinstance(inputs, list):
        if tensors_in(inputs):
            yield len(inputs)
    elif isinstance(inputs, tuple | Mapping):
        for part in inputs.values() if isinstance(inputs, Mapping) else inputs:
            yield from _counts(part)


def images_in(inputs: ExampleInputs) -> int:
    """How many examples there are: dimension 0 of the first tensor, or the length of the list that it is in.

    Raises:
        InputError: the first tensor is a number, or there are no examples in it.
    """
    first = tensors_in(inputs)[0]
    count = next(_counts(inputs), 0)
    if not count or (first.dim() == 0 and not _begins_with_list(inputs)):
        raise InputError(
            f"The first example input must have the batch as dimension 0, got shape {tuple(first.shape)}: costs are "
            "counted per image."
        )
    return count


def _begins_with_list(inputs: Any) -> bool:
    """Whether the first tensor lies in a list."""
    while not isinstance(inputs, Tensor):
        if isinstance(inputs, list):
            return True
        parts = inputs.values() if isinstance(inputs, Mapping) else inputs
        inputs = next(part for part in parts if tensors_in(part))
    return False


def batches_in(inputs: Any) -> list[int]:
    """The different numbers of examples that tensors and lists have, the first one's first; only one, if all of them
    belong to one batch."""
    return list(dict.fromkeys(_counts(inputs)))


def of_batch(inputs: ExampleInputs, batch: int) -> ExampleInputs:
    """The inputs with `batch` images: the given images repeated in order.

    Tensors with as many entries along dimension 0 as there are images, and lists of that length, are resized; others
    stay as they are.
    """
    images = images_in(inputs)

    def resized(value: Any) -> Any:
        if isinstance(value, Tensor):
            return _repeated(value, batch) if value.ndim and len(value) == images else value.detach()
        if isinstance(value, list) and tensors_in(value):
            value = mapped(value, Tensor.detach)
            return [value[i % images] for i in range(batch)] if len(value) == images else value
        return _of_parts(value, resized)

    result: ExampleInputs = resized(inputs)
    return result


def _of_parts(value: Any, function: Callable[[Any], Any]) -> Any:
    """A tuple or dict of what `function` makes of the parts; anything else as it is."""
    if isinstance(value, Mapping):
        return {name: function(part) for name, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(function, value))
    return tuple(map(function, value)) if isinstance(value, tuple) else value


def first_of(inputs: ExampleInputs, size: int) -> ExampleInputs:
    """The first `size` examples, in new memory; a single number is for all of them."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:size].clone() if value.dim() else value
        if isinstance(value, list):
            return mapped(value[:size] if tensors_in(value) else value, Tensor.clone)
        return _of_parts(value, cut)

    result: ExampleInputs = cut(inputs)
    return result


def _repeated(x: Tensor, batch: int) -> Tensor:
    """(N, ...) -> (batch, ...), in the layout of `x`."""
    memory_format = torch.contiguous_format
    for rank, channels_last in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.ndim == rank and x.is_contiguous(memory_format=channels_last) and not x.is_contiguous():
            memory_format = channels_last
    out = torch.empty((batch, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=memory_format)
    return out.copy_(torch.cat([x.detach()] * -(-batch // x.shape[0]))[:batch])
