"""Fig. 7: the last convolution of each residual block, channel gating against channel union.

    dense      the convolution before pruning
    union      the pruned convolution: it writes all channels that the stage keeps, and needs no index
    gating     the convolution of this layer's own live channels, and a scatter of them into the stage's channels:
               "gating (index_copy)" as one writes it in PyTorch, into zeros; "gating (fused)" by `ops.channel_scatter`,
               which writes every element once; "gating (triton)" is the implicit GEMM that writes the channels to their
               places itself, into zeros, where Triton has tensor cores to run it on

Gating's time is measured whole (part `all`) and stacked as the paper draws it: convolution (`conv`) and scatter
(`reshape`). The backward pass gathers, then computes both gradients. The layer's input needs no selection: it comes
from the block's own second convolution, whose dead channels nobody else reads. Floor: each tensor once, or the FLOPs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import profiles
from bench.harness import Provider, Session, against_dense, attempt, both_directions, measure
from bench.profiles import ConvShape
from bench.suites.blocks import Layer, distinct, layers
from bench.suites.conv import columns_of, tensors
from prunetrain_kernels.ops.channel_index import ChannelIndex, channel_scatter
from prunetrain_kernels.ops.conv2d import conv2d, triton_serves

DENSE, UNION = "dense", "union"
NAIVE, FUSED, TRITON = "gating (index_copy)", "gating (fused)", "gating (triton)"


def blocks(profile: profiles.Profile, image: int) -> list[Layer]:
    """The last convolution of each block that is still there, from the first block to the last.

    Raises:
        InputError: the profile's network has no residual blocks.
    """
    return [layer for layer in layers(profile, image) if layer.residual]


def run(session: Session) -> None:
    image = 32 if session.quick else session.profile.image
    chosen = blocks(session.profile, image)
    for block in distinct(chosen) if session.few else chosen:
        if session.wants(block.dense.name):
            attempt(session, block.dense.name, lambda block=block: _measure(session, block))  # type: ignore[misc]


def index_copy(y: Tensor, index: Tensor, channels: int) -> Tensor:
    """Channels at their place in a wider tensor of zeros, as one writes it in PyTorch."""
    wide = torch.zeros((y.shape[0], channels, *y.shape[2:]), dtype=y.dtype, device=y.device)
    return wide.contiguous(memory_format=torch.channels_last).index_copy(1, index, y)


@dataclass(frozen=True)
class Work:
    """One function that is timed forward and backward.

    Attributes:
        function, exact: of the inputs, in the session's dtype and in float64.
        inputs, gradient: tensors, and the gradient of the output.
        shape: of the convolution, for the columns of the row.
        flops, elements: of the forward pass; backward has twice as many of each, a scatter once the elements.
    """

    function: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    inputs: list[Tensor]
    gradient: Tensor
    shape: ConvShape
    flops: float
    elements: float


def _work(session: Session, block: Layer) -> dict[tuple[str, str], Work]:
    """The functions that are timed of a block, by provider and part."""
    images, device, live = session.images(32), session.device, block.live
    place, index = block.outputs.to(device), ChannelIndex(block.outputs, block.union.k, device)
    stride, padding = block.dense.stride, block.dense.padding

    def conv(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, stride, padding)

    def scattered(y: Tensor) -> Tensor:
        wide = torch.zeros((images, block.union.k, *y.shape[2:]), dtype=torch.float64, device=device)
        return wide.index_copy(1, place, y)

    def both(x: Tensor, weight: Tensor) -> Tensor:
        return scattered(conv(x, weight))

    def alone(shape: ConvShape, x: Tensor, weight: Tensor, dy: Tensor) -> Work:
        return Work(conv, conv, [x, weight], dy, shape, shape.flops(images), shape.elements(images))

    work = {(name, "conv"): alone(shape, *tensors(session, shape, images))
            for name, shape in ((DENSE, block.dense), (UNION, block.union))}  # fmt: skip
    x, weight, dy = tensors(session, live, images)
    wide_dy = tensors(session, block.union, images)[2]
    written = block.union.output(images)
    scatters: dict[str, Callable[[Tensor], Tensor]] = {
        NAIVE: lambda y: index_copy(y, place, block.union.k),
        FUSED: lambda y: channel_scatter(y, index),
    }
    for name, scatter in scatters.items():
        work[name, "conv"] = alone(live, x, weight, dy)
        y = dy.detach().clone().requires_grad_()
        work[name, "reshape"] = Work(scatter, scattered, [y], wide_dy, live, 0.0, live.output(images) + written)
        once = live.input(images) + live.c * live.k * live.r * live.s + written

        def whole(x: Tensor, weight: Tensor, scatter: Callable[[Tensor], Tensor] = scatter) -> Tensor:
            return scatter(conv(x, weight))

        work[name, "all"] = Work(whole, both, [x, weight], wide_dy, live, live.flops(images), once)
    if triton_serves(device, session.dtype):

        def gemm(x: Tensor, weight: Tensor) -> Any:
            return conv2d(x, weight, stride, padding, output_index=index, backend="triton")

        elements = live.elements(images) + written
        work[TRITON, "all"] = Work(gemm, both, [x, weight], wide_dy, live, live.flops(images), elements)
    return work


def _measure(session: Session, block: Layer) -> None:
    """Measures both directions of one block, all providers and parts side by side."""
    images, size = session.images(32), session.dtype.itemsize
    providers: dict[str, dict[str, Provider]] = {"forward": {}, "backward": {}}
    references: dict[str, dict[str, list[Tensor]]] = {"forward": {}, "backward": {}}
    for (provider, part), work in _work(session, block).items():
        key = f"{provider} {part}"
        wide = [tensor.detach().double().requires_grad_() for tensor in work.inputs]
        result = work.exact(*wide)
        references["forward"][key] = [result.detach()]
        references["backward"][key] = list(torch.autograd.grad(result, wide, work.gradient.double()))
        both = both_directions(work.function, tuple(work.inputs), work.inputs, work.gradient, session.device)
        for direction, run_it, times in zip(providers, both, (1, 2), strict=True):
            providers[direction][key] = replace(
                run_it,
                what={
                    "provider": provider, "part": part,
                    "mask_profile": "dense" if provider == DENSE else session.profile.label,
                    **columns_of(work.shape, images, block.dense.c),
                },
                flops=times * work.flops,
                model_bytes=(1 if part == "reshape" else times) * work.elements * size,
            )  # fmt: skip
    baseline = f"{DENSE} conv"
    whole = {f"{UNION} conv": block.union} | {f"{provider} all": block.live for provider in (NAIVE, FUSED, TRITON)}

    def compare(p50: Mapping[str, float]) -> dict[str, dict[str, Any]]:
        dense = block.dense.flops(1)
        return {
            key: against_dense(shape.flops(1) / dense, p50[key] / p50[baseline])
            for key, shape in whole.items()
            if key in p50 and baseline in p50
        }

    what = {"layer": block.dense.name, "dtype": session.dtype_name, "layout": "channels_last"}
    for direction, chosen in providers.items():
        measure(
            session, "fig7", chosen, references[direction], baseline, what={**what, "direction": direction},
            compare=compare, shown=(baseline, *whole),
        )  # fmt: skip
