"""Running a model without running it: shapes, layouts and autograd for real, numbers and memory for none.

Every cost in this folder comes from such a run. The model works on fake copies of its parameters, buffers and tensor
attributes (`FakeTensorMode`), so its running statistics, its gradients and the random number generators stay as they
are, and ImageNet ResNet-50 takes a fraction of a second on any device. A model that decides by a tensor's values cannot
run so; it is run on true copies.
"""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.inputs import (
    ExampleInputs,
    call,
    checked_inputs,
    images_in,
    mapped,
    of_batch,
    shapes_of,
    tensors_in,
)
from prunetrain_kernels.probe import (
    attributes_of,
    first_line,
    in_mode,
    named_tensors_in,
    random_state,
    restore_attributes,
)

Result = TypeVar("Result")


@dataclass(frozen=True)
class DryRun:
    """A model beside the tensors it runs on: its parameters and buffers by name, and its inputs."""

    model: nn.Module
    state: dict[str, Tensor]
    inputs: ExampleInputs

    @property
    def images(self) -> int:
        """How many examples the inputs hold."""
        return images_in(self.inputs)

    def forward(self) -> object:
        """What the model returns on `inputs`, by operators that can be counted: PyTorch's attention in one piece, which
        it takes in evaluation mode, cannot."""
        fast = torch.backends.mha.get_fastpath_enabled()
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            return call(self.model, self.inputs)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

    def backward(self, outputs: object) -> None:
        """Computes what the gradients of every floating-point tensor in `outputs` need; they stay in the copies."""
        backward(scalar_of(outputs), self.state.values())


def dry_run(
    measure: Callable[[DryRun], Result],
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    training: bool,
    amp: torch.dtype | None = None,
) -> Result:
    """The result of `measure` on a run of `model`, in train or eval mode, on inputs like `example_inputs`.

    All tensors are fake; if `measure` fails on these, it is called again with true copies. The inputs must have the
    dtype the model takes: fake convolutions do not notice a wrong one. Gradients are recorded, and operations are cast
    to `amp` (None: not at all), whatever the caller's modes. Everything about the model is as before on return.

    Raises:
        InputError: `example_inputs` have another form than `inputs.py` says, or `measure` fails on true copies, too.
    """
    example_inputs = check_example_inputs(example_inputs)
    with ExitStack() as stack:
        for context in (
            torch.inference_mode(mode=False),
            torch.enable_grad(),
            in_mode(model, training=training),
            training_autocast(model, amp),
            quiet(),
        ):
            stack.enter_context(context)
        for copied in (_fakes, _true_copies):
            try:
                with copied(model, example_inputs) as run:
                    return run_on(run, measure)
            except Exception as error:
                failed = error
    raise refusal(model, example_inputs, failed, training=training) from failed


def refusal(model: nn.Module, inputs: ExampleInputs, error: Exception, *, training: bool) -> InputError:
    """The error that tells a user that the model failed on these inputs; an InputError stays as it is."""
    if isinstance(error, InputError):
        return error
    mode = "training" if training else "evaluation"
    return InputError(
        f"{type(model).__name__} does not run on example inputs of shape {shapes_of(inputs)} in {mode} mode: "
        f"{type(error).__name__}: {first_line(error)}."
    )


def training_run(
    measure: Callable[[DryRun], Result],
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    amp: torch.dtype | None = None,
) -> Result:
    """`dry_run` in training mode; a model that refuses one image is run on two copies of it.

    Batch norm in training refuses one value per channel.

    Raises:
        InputError: as for `dry_run`.
    """
    example_inputs = check_example_inputs(example_inputs)
    try:
        return dry_run(measure, model, example_inputs, training=True, amp=amp)
    except InputError:
        if images_in(example_inputs) != 1:
            raise
        return dry_run(measure, model, of_batch(example_inputs, 2), training=True, amp=amp)


class _Whole(nn.Module):
    """A module whose forward pass is a whole measurement, so that gradients, too, are computed on the copies.

    Otherwise, what `torch.utils.checkpoint` computes again in the backward pass would read the true parameters.
    """

    def __init__(self, run: DryRun, measure: Callable[[DryRun], Any]) -> None:
        super().__init__()
        self.model = run.model
        self.measure = lambda: measure(run)

    def forward(self) -> Any:
        return self.measure()


def run_on(run: DryRun, measure: Callable[[DryRun], Result]) -> Result:
    """The result of `measure` on the run, while the tensors in `run.state` stand in for the model's own."""
    state = {f"model.{name}": tensor for name, tensor in run.state.items()}
    return functional_call(_Whole(run, measure), state, ())


@contextmanager
def _fakes(model: nn.Module, example_inputs: ExampleInputs) -> Iterator[DryRun]:
    inputs = mapped(example_inputs, Tensor.detach)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:  # not all tensors of a model are known to it

        def copy(tensor: Tensor) -> Tensor:
            if tensor.requires_grad and not tensor.is_leaf:
                return torch.empty_like(tensor, requires_grad=True)
            fake_copy: Tensor = fake.from_tensor(tensor)
            fake_copy.grad = None
            return fake_copy

        with on_copies(model, copy) as state:
            yield DryRun(model, state, mapped(inputs, fake.from_tensor))


@contextmanager
def _true_copies(model: nn.Module, example_inputs: ExampleInputs) -> Iterator[DryRun]:
    def copy(tensor: Tensor) -> Tensor:
        values = tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(values, requires_grad=tensor.requires_grad)
        return values.requires_grad_(tensor.requires_grad)

    restore_random_state = random_state()
    devices = sorted({t.get_device() for t in (*tensors_in(example_inputs), *model.parameters()) if t.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices), on_copies(model, copy) as state:
            yield DryRun(model, state, mapped(example_inputs, lambda x: x.detach().clone()))
    finally:
        restore_random_state()


@contextmanager
def on_copies(model: nn.Module, copy: Callable[[Tensor], Tensor]) -> Iterator[dict[str, Tensor]]:
    """Copies of parameters and buffers by name, for `functional_call`; tensors in other attributes are replaced by
    copies inside and restored afterwards.

    Parameters that the model also holds outside of its tables, in a list for example, keep their `.grad`, too.
    """
    modules = list(model.modules())
    attributes = [(module, attributes_of(module)) for module in modules]
    gradients = [(p, p.grad) for p in model.parameters()]
    state = {name: copy(tensor) for name, tensor in named_tensors(model)}
    copies = {id(tensor): state[name] for name, tensor in named_tensors(model)}
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        for module, before in attributes:
            for name, (value, _) in before.items():
                if isinstance(value, Tensor):
                    if id(value) not in copies:
                        copies[id(value)] = copy(value)
                    vars(module)[name] = copies[id(value)]
        yield state
    finally:
        for module, before in attributes:
            restore_attributes(module, before)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def training_autocast(model: nn.Module, amp: torch.dtype | None) -> AbstractContextManager[Any]:
    """The autocast under which the model is trained, on its device: to `amp`, or none, whatever the caller has set.

    Raises:
        InputError: the device's kind has no autocast to `amp`.
    """
    kind = next((tensor.device.type for _, tensor in named_tensors(model)), "cpu")
    if not torch.amp.is_autocast_available(kind):
        if amp is None:
            return nullcontext()
        raise InputError(f"PyTorch has no automatic mixed precision on the device '{kind}'; leave amp out.")
    return torch.autocast(kind, dtype=amp, enabled=amp is not None)


def autocast_around(model: nn.Module) -> torch.dtype | None:
    """The dtype of the autocast that is active where this is called, for the model's device; None where none is."""
    kind = next((tensor.device.type for _, tensor in named_tensors(model)), "cpu")
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the warnings of a model, or of fake tensors, while costs are counted: the training will give them."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, log.disabled = log.disabled, True  # it would print errors that are raised anyway
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = was_disabled


def check_example_inputs(example_inputs: Any) -> ExampleInputs:
    """The example inputs in the form of `inputs.py`; raises InputError unless there is at least one example."""
    inputs = checked_inputs(example_inputs)
    images_in(inputs)
    return inputs


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The model's parameters and buffers, each once."""
    return [*model.named_parameters(), *model.named_buffers()]


def scalar_of(outputs: object) -> Tensor:
    """The sum of all floating-point (or complex) tensors in `outputs`: a scalar to differentiate.

    Raises:
        InputError: there is no floating-point tensor in `outputs`.
    """
    sums = []
    for tensor in named_tensors_in(outputs).values():
        if tensor.is_complex():
            sums.append(torch.view_as_real(tensor.resolve_conj()).sum())
        elif tensor.is_floating_point():
            sums.append(tensor.sum())
    if not sums:
        raise InputError(f"The model returned no floating-point tensor, but {type(outputs).__name__}.")
    return sum((each.to(sums[0].device) for each in sums[1:]), start=sums[0])


def backward(loss: Tensor, copies: Iterable[Tensor]) -> None:
    """`loss.backward()`, if there is anything to differentiate; sets `.grad` of `copies` alone.

    `torch.autograd.grad` would set none, but torch.utils.checkpoint in its reentrant form refuses it.
    """
    if not loss.requires_grad:
        return
    copied = {id(tensor) for tensor in copies}
    others = [(leaf, leaf.grad) for leaf in _leaves(loss) if id(leaf) not in copied]
    try:
        for leaf, _ in others:
            leaf.grad = None
        loss.backward()
    finally:
        for leaf, gradient in others:
            leaf.grad = gradient


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """The tensors whose `.grad` a backward pass of `loss` sets."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            yield leaf
        waiting += [following for following, _ in node.next_functions]
