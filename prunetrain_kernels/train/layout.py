"""Networks that must not be trained in channels_last on a CPU, and how a run leaves that layout."""

import warnings

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from prunetrain_kernels.train.distributed import rebuild_buckets

SAFE_CHANNELS = 8
WARNING = "in channels_last writes beyond its memory"  # words of `warn_of_layout`, by which it can be filtered


def unsafe_in_channels_last(model: nn.Module) -> list[str]:
    """Convolutions that corrupt the heap when they are trained in channels_last on a CPU: strided, 1x1, few channels.

    In torch 2.13 (oneDNN, AVX2) the weight gradient of a 1x1 convolution with stride 2 and fewer than 8 input channels
    writes beyond its memory if input or weight is channels_last. Networks are rarely built so, but pruned to it.
    """
    return [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
        and m.weight.device.type == "cpu"
        and m.kernel_size == (1, 1)
        and max(m.stride) > 1
        and m.weight.shape[1] < SAFE_CHANNELS  # of a gated one: it may be given its live channels only
    ]


def warn_of_layout(model: nn.Module) -> bool:
    """Warns if the CPU's convolutions would corrupt memory in the layout that the model is in; whether it did."""
    unsafe = unsafe_in_channels_last(model)
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    in_use = any(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in weights)
    if not unsafe or not in_use:
        return False
    warnings.warn(
        f"'{unsafe[0]}' is left with fewer than {SAFE_CHANNELS} input channels: on a CPU PyTorch's gradient of "
        f"such a strided 1x1 convolution {WARNING}; go on in contiguous format: "
        "model.to(memory_format=torch.contiguous_format), and the images likewise.",
        stacklevel=3,
    )
    return True


def leave_channels_last(model: nn.Module, ddp: DistributedDataParallel | None) -> str:
    """Has a model in channels_last go on in contiguous format where a CPU would corrupt memory.

    Returns:
        A line for the log that says so, or "" where the model may stay as it is.
    """
    unsafe = unsafe_in_channels_last(model)
    if not unsafe:
        return ""
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    if ddp is not None:
        rebuild_buckets(ddp)
    return (
        f"{unsafe[0]} has fewer than {SAFE_CHANNELS} input channels, for which PyTorch's strided 1x1 "
        "convolution is unsafe in channels_last on a CPU: going on in contiguous format"
    )
