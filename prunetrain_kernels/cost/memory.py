"""Bytes one training iteration needs, as a straight line over the batch (paper Sec. 4.3, Fig. 9)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from prunetrain_kernels.cost.dry_run import (
    DryRun,
    check_example_inputs,
    dry_run,
    in_mode,
    named_tensors,
    parameter_gradients,
    repeated,
    scalar_of,
    tensors_in,
)
from prunetrain_kernels.errors import InputError


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
    example_inputs: tuple[Tensor, ...],
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    batches: tuple[int, int] = (16, 32),
) -> MemoryModel:
    """Bytes that one training iteration of `model` needs, measured at two batch sizes.

    On CUDA, `measure_step_memory_cuda`: the peak of two real steps. Elsewhere the sum of: parameters and buffers, one
    gradient per trainable parameter, the optimizer's state, the input batch, and what autograd saves in a forward pass
    in train mode (a dry run: every storage once, parameters not again). Left out there are what the loss function
    saves, and what lives for one operator only: workspaces, gradients of activations.

    The optimizer's state is that of its state tensors; for parameters without state yet (before the first step), and if
    no optimizer is given, it is predicted: one copy of the parameter for momentum (`optimizer=None` means SGD with
    momentum), none for SGD without, two for Adam and its kin (three with amsgrad).

    Args:
        model: any module on any device; nothing about it changes.
        example_inputs: the model's positional arguments, dimension 0 the batch (only the first example is used).
        optimizer: the one that trains the model, or several in a list.
        batches: two batch sizes of 2 or more. On CUDA choose them close to the batch in use: the peak of a small batch
            lies at the end of the backward pass, that of a large one at its beginning. Elsewhere any will do.

    Raises:
        InputError: the model cannot be run on these inputs.
        torch.OutOfMemoryError: on CUDA, if a step does not fit.
    """
    if any(tensor.is_cuda for _, tensor in named_tensors(model)):
        return measure_step_memory_cuda(model, example_inputs, optimizer=optimizer, batches=batches)
    _check_batches(batches)
    resident = _state_bytes(model) + _optimizer_bytes(model, optimizer)
    trainable = _bytes(p for p in model.parameters() if p.requires_grad)
    saved = [dry_run(_activation_bytes, model, example_inputs, batch, training=True) for batch in batches]
    needed = [resident + trainable + activations for activations in saved]
    return _line(batches, needed)


def measure_step_memory_cuda(
    model: nn.Module,
    example_inputs: tuple[Tensor, ...],
    loss_fn: Callable[[object], Tensor] | None = None,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    batches: tuple[int, int] = (16, 32),
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
        batches: two batch sizes of 2 or more, close to the batch in use.

    Raises:
        InputError: bad `batches` or `example_inputs`, or a model that is not on one CUDA device.
        torch.OutOfMemoryError: a step does not fit.
    """
    _check_batches(batches)
    check_example_inputs(example_inputs)
    device = _cuda_device(model)
    resident = _state_bytes(model) + _optimizer_bytes(model, optimizer)
    peaks = []
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        in_mode(model, training=True),
        torch.random.fork_rng(devices=[device], device_type="cuda"),
    ):
        # parameters themselves, but copies of buffers: nothing in a forward and backward pass writes to a parameter
        state = dict(model.named_parameters()) | {name: buffer.clone() for name, buffer in model.named_buffers()}
        for batch in batches:
            _real_step(model, state, example_inputs, batch, loss_fn)
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            _real_step(model, state, example_inputs, batch, loss_fn)
            torch.cuda.synchronize(device)
            peaks.append(resident + torch.cuda.max_memory_allocated(device) - before)
    return _line(batches, peaks)


def _cuda_device(model: nn.Module) -> torch.device:
    devices = {tensor.device for _, tensor in named_tensors(model)}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        raise InputError(f"The model must be on one CUDA device, but is on {', '.join(sorted(map(str, devices)))}.")
    return devices.pop()


def _real_step(
    model: nn.Module,
    state: dict[str, Tensor],
    example_inputs: tuple[Tensor, ...],
    batch: int,
    loss_fn: Callable[[object], Tensor] | None,
) -> None:
    inputs = tuple(repeated(x, batch) for x in example_inputs)
    parameter_gradients(state, (loss_fn or scalar_of)(functional_call(model, state, inputs)))


def _activation_bytes(run: DryRun) -> int:
    """Bytes of the inputs and of everything that autograd saves in a forward pass, each storage once."""
    counted = {_identity(tensor) for tensor in run.state.values()}
    storages = []  # held, so that no identity is given out twice
    total = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        if _identity(tensor) not in counted:
            counted.add(_identity(tensor))
            storages.append(tensor.untyped_storage())
            total += storages[-1].nbytes()
        return tensor

    for x in run.inputs:
        count(x)
    with saved_tensors_hooks(count, lambda tensor: tensor):
        run.forward()
    return total


def _identity(tensor: Tensor) -> int:
    # the address of the storage object: fake tensors have no data pointer to go by
    return tensor.untyped_storage()._cdata


def _state_bytes(model: nn.Module) -> int:
    return _bytes(tensor for _, tensor in named_tensors(model))


def _optimizer_bytes(
    model: nn.Module, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None
) -> int:
    if optimizer is None:
        return _bytes(p for p in model.parameters() if p.requires_grad)
    total, counted = 0, set()
    for one in optimizer if isinstance(optimizer, list | tuple) else (optimizer,):
        state = getattr(one, "state", {})
        for group in getattr(one, "param_groups", ()):  # a wrapper may have none but those inside
            copies = 2 + bool(group.get("amsgrad")) if "betas" in group else int(bool(group.get("momentum", 0)))
            for p in group["params"]:
                if state.get(p):
                    tensors = [t for t in tensors_in(state[p]) if id(t) not in counted]
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
