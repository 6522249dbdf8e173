"""Bytes one training iteration needs, as a straight line over the batch (paper Sec. 4.3, Fig. 9)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from prunetrain_kernels.cost.dry_run import (
    DryRun,
    backward,
    check_example_inputs,
    dry_run,
    named_tensors,
    on_copies,
    quiet,
    refusal,
    run_on,
    scalar_of,
    training_autocast,
)
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.inputs import ExampleInputs, images_in, of_batch, tensors_in
from prunetrain_kernels.probe import in_mode, named_tensors_in

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None


@dataclass(frozen=True)
class MemoryModel:
    """Bytes of one training iteration: `fixed + per_image * batch`."""

    fixed: int
    per_image: float

    def bytes(self, batch: int) -> int:
        """Bytes of an iteration with `batch` images."""
        return round(self.fixed + self.per_image * batch)


def step_memory(
    model: nn.Module,
    example_inputs: ExampleInputs,
    optimizer: Optimizers = None,
    batches: tuple[int, int] | None = None,
    *,
    amp: torch.dtype | None = None,
) -> MemoryModel:
    """Bytes that one training iteration of `model` needs, measured at two batch sizes.

    On CUDA, `measure_step_memory_cuda`: the peak of two real steps. Elsewhere the sum of: parameters and buffers, one
    gradient per trainable parameter, the optimizer's state, the input batch, and what autograd saves in a forward pass
    in train mode (a dry run; every storage counts once, and parameters are not counted again). That leaves out what
    the loss function saves, and what lives for one operator only: workspaces, gradients of activations.

    The optimizer's state is the bytes of its state tensors. For parameters that have no state yet (before the first
    step), and if no optimizer is given, it is predicted: one copy of the parameter for momentum (`optimizer=None` means
    SGD with momentum), none for SGD without, two for Adam and its variants (three with amsgrad).

    Args:
        model: any module on any device; nothing about it changes.
        example_inputs: what the model is called with (`inputs.py`); dimension 0 of the first tensor counts images. For
            another size the given images are repeated, in every input with as many entries along dimension 0.
        optimizer: the one that trains the model, or a list of several.
        batches: two batch sizes of 2 or more; by default, and where a model refuses them, as many images as are given
            and twice as many (or half). On CUDA choose them close to the batch in use (`batches_near`): the peak of a
            small batch lies at the end of the backward pass, that of a large one at its beginning.
        amp: dtype of the training's autocast, or None: under it most of what is saved is of that dtype.

    Raises:
        InputError: the model cannot be run on these inputs.
        torch.OutOfMemoryError: on CUDA, if a step does not fit.
    """
    example_inputs = check_example_inputs(example_inputs)
    if any(tensor.is_cuda for _, tensor in named_tensors(model)):
        return _first_that_runs(
            lambda pair: measure_step_memory_cuda(model, example_inputs, optimizer=optimizer, batches=pair, amp=amp),
            example_inputs,
            batches,
        )
    resident = _state_bytes(model) + _optimizer_bytes(model, optimizer)
    trainable = _bytes(p for p in model.parameters() if p.requires_grad)

    def line(pair: tuple[int, int]) -> MemoryModel:
        saved = [
            dry_run(_activation_bytes, model, of_batch(example_inputs, batch), training=True, amp=amp) for batch in pair
        ]
        return _line(pair, [resident + trainable + activations for activations in saved])

    return _first_that_runs(line, example_inputs, batches)


def _first_that_runs(
    line: Callable[[tuple[int, int]], MemoryModel],
    example_inputs: ExampleInputs,
    batches: tuple[int, int] | None,
) -> MemoryModel:
    """The result of `line` for the wanted pair of batch sizes, or else for the first pair that the model runs on.

    Raises:
        InputError: the model runs on none of them; the error is that of the first pair.
    """
    images = images_in(example_inputs)
    pairs = [(images, 2 * images), (2 * images, 4 * images)]
    if images > 1:
        pairs[1] = (images // 2, images)
    if batches is not None:
        _check_batches(batches)
        pairs = [batches, *(pair for pair in pairs if pair != batches)]
    first: InputError | None = None
    for pair in pairs:
        try:
            return line(pair)
        except InputError as error:
            first = first or error
    assert first is not None
    raise first


def batches_near(model: nn.Module, example_inputs: ExampleInputs, size: int) -> tuple[int, int]:
    """Two sizes for `step_memory` close to a batch of `size` images.

    Where the example inputs are several, but fewer, the sizes are multiples of their number: a batch may consist of
    pairs, or of the frames of clips, which are no examples by themselves. On CUDA no size exceeds `size`, because a
    step of more images may not fit.
    """
    images = images_in(example_inputs)
    copies = size // images
    if images > 1 and copies > 1:
        return copies // 2 * images, copies * images
    if images == 1 or any(tensor.is_cuda for _, tensor in named_tensors(model)):
        return max(2, size // 2), max(3, size)
    return images, 2 * images


def measure_step_memory_cuda(
    model: nn.Module,
    example_inputs: ExampleInputs,
    loss_fn: Callable[[object], Tensor] | None = None,
    optimizer: Optimizers = None,
    batches: tuple[int, int] = (16, 32),
    *,
    amp: torch.dtype | None = None,
) -> MemoryModel:
    """Bytes one training iteration needs, from the CUDA allocator's peak in real forward and backward passes.

    The peak above what was allocated before (activations, gradients, inputs, workspaces), plus parameters, buffers and
    optimizer state. At either batch size one unmeasured pass comes first, in which cuDNN and cuBLAS settle.
    Parameters, their `.grad`, buffers, modes and random number generators are as before; the allocator's own peak
    statistics (`torch.cuda.max_memory_allocated`) start anew.

    Args:
        model: a module on one CUDA device.
        example_inputs: as for `step_memory`; on the model's device.
        loss_fn: from the model's output to a scalar; default, the sum of the output.
        optimizer: as for `step_memory`.
        batches: two batch sizes of 1 or more, close to the batch in use.
        amp: as for `step_memory`.

    Raises:
        InputError: bad `batches` or `example_inputs`, a model that is not on one CUDA device, or that does not run.
        torch.OutOfMemoryError: a step does not fit.
    """
    if len(batches) != 2 or min(batches) < 1 or batches[0] == batches[1]:
        raise InputError(f"batches must be two different batch sizes, got {batches}.")
    example_inputs = check_example_inputs(example_inputs)
    device = _cuda_device(model)
    resident = _state_bytes(model) + _optimizer_bytes(model, optimizer)
    peaks = []
    with (
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        in_mode(model, training=True),
        training_autocast(model, amp),
        quiet(),
        torch.random.fork_rng(devices=[device], device_type="cuda"),
        on_copies(model, _in_place_of) as state,
    ):
        for batch in batches:
            _real_step(model, state, example_inputs, batch, loss_fn)
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            _real_step(model, state, example_inputs, batch, loss_fn)
            torch.cuda.synchronize(device)
            peaks.append(resident + torch.cuda.max_memory_allocated(device) - before)
    return _line(batches, peaks)


def _in_place_of(tensor: Tensor) -> Tensor:
    """A parameter on the same memory, because no forward or backward pass writes to it; a copy of any other tensor."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _cuda_device(model: nn.Module) -> torch.device:
    devices = {tensor.device for _, tensor in named_tensors(model)}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        raise InputError(f"The model must be on one CUDA device, but is on {', '.join(sorted(map(str, devices)))}.")
    return devices.pop()


def _real_step(
    model: nn.Module,
    state: dict[str, Tensor],
    example_inputs: ExampleInputs,
    batch: int,
    loss_fn: Callable[[object], Tensor] | None,
) -> None:
    def step(run: DryRun) -> None:
        backward((loss_fn or scalar_of)(run.forward()), ())

    inputs = of_batch(example_inputs, batch)
    try:
        run_on(DryRun(model, state, inputs), step)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise refusal(model, inputs, error, training=True) from error
    finally:
        for tensor in state.values():
            tensor.grad = None


def _activation_bytes(run: DryRun) -> int:
    """Bytes of the inputs and of everything that autograd saves in a forward pass, each storage once."""
    counted = {_storage(tensor)[0] for tensor in run.state.values()}
    held = []  # so that no identity is given out twice
    total = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        identity, size, holder = _storage(tensor)
        if identity not in counted:
            counted.add(identity)
            held.append(holder)
            total += size
        return tensor

    for x in tensors_in(run.inputs):
        count(x)
    with saved_tensors_hooks(count, lambda tensor: tensor):
        run.forward()
    return total


def _storage(tensor: Tensor) -> tuple[int, int, object]:
    """Identity and bytes of a tensor's storage, and what to hold for the identity to stay."""
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse tensors and some subclasses have none of their own
        return id(tensor), tensor.numel() * tensor.element_size(), tensor
    # the address of the storage object: fake tensors have no data pointer to go by
    return storage._cdata, storage.nbytes(), storage


def _state_bytes(model: nn.Module) -> int:
    return _bytes(tensor for _, tensor in named_tensors(model))


def _optimizer_bytes(model: nn.Module, optimizer: Optimizers) -> int:
    if optimizer is None:
        return _bytes(p for p in model.parameters() if p.requires_grad)
    total = 0
    counted: set[int] = set()
    for each in optimizer if isinstance(optimizer, list | tuple) else (optimizer,):
        state = getattr(each, "state", {})
        for group in getattr(each, "param_groups", ()):  # a wrapper may have none of its own
            copies = 2 + bool(group.get("amsgrad")) if "betas" in group else int(bool(group.get("momentum", 0)))
            for p in group["params"]:
                if state.get(p):
                    tensors = [t for t in named_tensors_in(state[p]).values() if id(t) not in counted]
                    counted |= {id(t) for t in tensors}
                    total += _bytes(tensors)
                elif p.requires_grad:
                    total += copies * _bytes([p])
    return total


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _check_batches(batches: tuple[int, int]) -> None:
    if len(batches) != 2 or min(batches) < 2 or batches[0] == batches[1]:
        raise InputError(f"batches must be two different batch sizes of 2 or more, got {batches}.")


def _line(batches: tuple[int, int], needed: list[int]) -> MemoryModel:
    per_image = (needed[1] - needed[0]) / (batches[1] - batches[0])
    return MemoryModel(fixed=round(needed[0] - per_image * batches[0]), per_image=per_image)
