"""Running a model without running it: shapes, layouts and autograd for real, numbers and memory for none.

Every cost in this folder comes from such a run. The model works on fake copies of its parameters and buffers
(`FakeTensorMode`), so its running statistics, its gradients and the random number generators stay as they are, and
ImageNet ResNet-50 takes a fraction of a second on any device. A model that decides by a tensor's values cannot run so;
it is run on true copies.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from prunetrain_kernels.errors import InputError

Result = TypeVar("Result")


@dataclass(frozen=True)
class DryRun:
    """A model beside the tensors it runs on: its parameters and buffers by name, and its inputs."""

    model: nn.Module
    state: dict[str, Tensor]
    inputs: tuple[Tensor, ...]

    def forward(self) -> object:
        """What the model returns on `inputs`.

        Raises:
            _Failed: the model failed; the message says how.
        """
        log = logging.getLogger("torch._subclasses.fake_tensor")
        was_disabled, log.disabled = log.disabled, True  # it would print what is raised below anyway
        try:
            return functional_call(self.model, self.state, self.inputs)
        except Exception as error:
            shapes = ", ".join(str(tuple(x.shape)) for x in self.inputs)
            what = " ".join(f"{type(error).__name__}: {error}".split())
            raise _Failed(
                f"{type(self.model).__name__} does not run on example inputs of shape {shapes}: {what}"
            ) from error
        finally:
            log.disabled = was_disabled


class _Failed(InputError):
    """The model's own forward failed."""


def dry_run(
    measure: Callable[[DryRun], Result],
    model: nn.Module,
    example_inputs: tuple[Tensor, ...],
    batch: int,
    training: bool,
) -> Result:
    """What `measure` makes of a run of `model` in train or eval mode on `batch` images shaped like the first example.

    All tensors are fake; if the model cannot run so, `measure` is called anew with true copies of them. The inputs must
    have the dtype the model takes: fake convolutions do not notice a wrong one. Gradients are recorded, whatever the
    caller's grad mode. Everything about the model is as before on return.

    Raises:
        InputError: `example_inputs` is no non-empty tuple of tensors whose dimension 0 is the batch, or the model does
            not run on them.
    """
    check_example_inputs(example_inputs)
    with torch.inference_mode(False), torch.enable_grad(), in_mode(model, training):
        with suppress(_Failed), FakeTensorMode(allow_non_fake_inputs=True) as fake:  # not all tensors are buffers
            fakes: dict[str, Tensor] = {name: fake.from_tensor(tensor) for name, tensor in named_tensors(model)}
            return measure(DryRun(model, fakes, tuple(repeated(fake.from_tensor(x), batch) for x in example_inputs)))
        devices = sorted({x.get_device() for x in example_inputs if x.is_cuda})
        with torch.random.fork_rng(devices=devices):
            copies = {
                name: tensor.detach().clone().requires_grad_(tensor.requires_grad)
                for name, tensor in named_tensors(model)
            }
            return measure(DryRun(model, copies, tuple(repeated(x, batch) for x in example_inputs)))


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """`model` in train or eval mode inside, each of its modules in its own mode again after."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_example_inputs(example_inputs: tuple[Tensor, ...]) -> None:
    """Raises InputError unless `example_inputs` is a non-empty tuple of tensors with at least one example each."""
    if not isinstance(example_inputs, tuple) or not example_inputs:
        raise InputError(
            f"example_inputs must be a tuple of tensors such as (x,), got {type(example_inputs).__name__}."
        )
    for x in example_inputs:
        if not isinstance(x, Tensor) or x.ndim == 0 or x.shape[0] == 0:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"Every example input must be a tensor with the batch as dimension 0, got {got}.")


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The model's parameters and buffers, each once."""
    return [*model.named_parameters(), *model.named_buffers()]


def repeated(x: Tensor, batch: int) -> Tensor:
    """`batch` copies of the first example of `x`, (N, ...) -> (batch, ...), in the layout of `x`."""
    memory_format = torch.contiguous_format
    for rank, channels_last in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.ndim == rank and x.is_contiguous(memory_format=channels_last) and not x.is_contiguous():
            memory_format = channels_last
    out = torch.empty((batch, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=memory_format)
    return out.copy_(x[:1].detach())


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in a tensor, or in any nesting of mappings, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def scalar_of(outputs: object) -> Tensor:
    """A scalar that every floating-point tensor in `outputs` enters: something to differentiate.

    Raises:
        InputError: there is no floating-point tensor in `outputs`.
    """
    sums = [tensor.sum() for tensor in tensors_in(outputs) if tensor.is_floating_point()]
    if not sums:
        raise InputError(f"The model returned no floating-point tensor, but {type(outputs).__name__}.")
    return sum(sums[1:], start=sums[0])


def parameter_gradients(state: dict[str, Tensor], loss: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of `loss` by the trainable tensors in `state`, in order (none if none); sets no `.grad`."""
    trainable = [tensor for tensor in state.values() if tensor.requires_grad]
    if not trainable or not loss.requires_grad:
        return ()
    return torch.autograd.grad(loss, trainable, allow_unused=True)
