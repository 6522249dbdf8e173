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

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import profiles
from bench.harness import Session, against_dense, attempt, both_directions, measure
from bench.profiles import ConvShape
from bench.suites.conv import columns_of, tensors
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.ops.channel_index import ChannelIndex, channel_scatter
from prunetrain_kernels.ops.conv2d import conv2d, triton_serves

DENSE, UNION = "dense", "union"
NAIVE, FUSED, TRITON = "gating (index_copy)", "gating (fused)", "gating (triton)"


@dataclass(frozen=True)
class Block:
    """The last convolution of a block: dense, with the stage's kept channels (union), with its own live ones (gating).

    `index`: positions of the live channels among the kept ones, [live] int64.
    """

    dense: ConvShape
    union: ConvShape
    gated: ConvShape
    index: Tensor


def blocks(profile: profiles.Profile, image: int) -> list[Block]:
    """Blocks whose last convolution is still there, from the first to the last.

    Raises:
        InputError: the profile's network has no residual blocks.
    """
    from prunetrain_kernels.graph import trace_channels
    from prunetrain_kernels.models import build

    model = build(profile.network, profile.classes)
    graph = trace_channels(model, (torch.zeros(2, 3, 32, 32),))
    masks = profiles.masks(profile, model, graph, image)
    last = [name for name in graph.layers if _is_last(model, name)]
    if not last:
        raise InputError(f"{profile.network} has no residual blocks; fig7 takes a ResNet's profile")
    shapes = {shape.name: shape for shape in profiles.conv_shapes(model, image)}
    found = []
    for name in last:
        if name in masks.removed:
            continue
        layer = graph.layers[name]
        kept_in, kept_out = masks.kept[layer.input], masks.kept[layer.output]
        live_in, live_out = masks.live[name]
        full = shapes[name]
        found.append(
            Block(
                full,
                replace(full, c=int(kept_in.sum()), k=int(kept_out.sum())),
                replace(full, c=int(live_in.sum()), k=int(live_out.sum())),
                live_out[kept_out].nonzero()[:, 0],
            )
        )
    return found


def _is_last(model: nn.Module, name: str) -> bool:
    block, _, conv = name.rpartition(".")
    names = {n for n, m in model.get_submodule(block).named_children() if isinstance(m, nn.Conv2d)} if block else set()
    return conv.startswith("conv") and name.startswith("layer") and conv == max(names)


def run(session: Session) -> None:
    image = 32 if session.quick else session.profile.image
    for block in blocks(session.profile, image):
        if session.wants(block.dense.name):
            attempt(session, block.dense.name, lambda block=block: _measure(session, block))  # type: ignore[misc]


def index_copy(y: Tensor, index: Tensor, channels: int) -> Tensor:
    """Channels at their place in a wider tensor of zeros, as one writes it in PyTorch."""
    wide = torch.zeros((y.shape[0], channels, *y.shape[2:]), dtype=y.dtype, device=y.device)
    return wide.contiguous(memory_format=torch.channels_last).index_copy(1, index, y)


def _measure(session: Session, block: Block) -> None:
    images, device, size = session.images(32), session.device, session.dtype.itemsize
    place = block.index.to(device)
    index = ChannelIndex(block.index, block.union.k, device)
    name = block.dense.name
    what: dict[str, Any] = {"layer": name, "dtype": session.dtype_name, "layout": "channels_last"}

    def conv(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, block.dense.stride, block.dense.padding)

    scatters: dict[str, Callable[[Tensor], Tensor]] = {
        NAIVE: lambda y: index_copy(y, place, block.union.k),
        FUSED: lambda y: channel_scatter(y, index),
    }

    def reference(y: Tensor) -> Tensor:
        wide = torch.zeros((images, block.union.k, *y.shape[2:]), dtype=torch.float64, device=device)
        return wide.index_copy(1, place, y)

    # provider and part -> function, float64 function, inputs, gradient of the output, FLOPs and elements of the forward
    cases: dict[tuple[str, str], tuple[Any, Any, list[Tensor], Tensor, float, float]] = {}
    label = session.profile.label
    for provider, shape in ((DENSE, block.dense), (UNION, block.union)):
        x, weight, dy = tensors(session, shape, images)
        cases[provider, "conv"] = (conv, conv, [x, weight], dy, shape.flops(images), shape.elements(images))
    live = block.gated
    x, weight, dy = tensors(session, live, images)
    wide_dy = tensors(session, block.union, images)[2]
    for provider, scatter in scatters.items():
        cases[provider, "conv"] = (conv, conv, [x, weight], dy, live.flops(images), live.elements(images))
        moved = live.output(images) + block.union.output(images)
        y = dy.detach().clone().requires_grad_()
        cases[provider, "reshape"] = (scatter, reference, [y], wide_dy, 0.0, moved)
        once = live.input(images) + live.c * live.k * live.r * live.s + block.union.output(images)
        cases[provider, "all"] = (
            lambda x, w, scatter=scatter: scatter(conv(x, w)),
            lambda x, w: reference(conv(x, w)),
            [x, weight], wide_dy, live.flops(images), once,
        )  # fmt: skip
    if triton_serves(device, session.dtype):
        cases[TRITON, "all"] = (
            lambda x, w: conv2d(x, w, block.dense.stride, block.dense.padding, output_index=index, backend="triton"),
            lambda x, w: reference(conv(x, w)),
            [x, weight], wide_dy, live.flops(images), live.elements(images) + block.union.output(images),
        )  # fmt: skip
    providers: dict[str, dict[str, Any]] = {"forward": {}, "backward": {}}
    references: dict[str, dict[str, list[Tensor]]] = {"forward": {}, "backward": {}}
    for (provider, part), (function, exact, inputs, gradient, flops, elements) in cases.items():
        key = f"{provider} {part}"
        shape = {DENSE: block.dense, UNION: block.union}.get(provider, live)
        wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
        result = exact(*wide)
        references["forward"][key] = [result.detach()]
        references["backward"][key] = list(torch.autograd.grad(result, wide, gradient.double()))
        both = both_directions(function, tuple(inputs), inputs, gradient, device)
        for direction, run_it, times in zip(providers, both, (1, 2), strict=True):
            providers[direction][key] = replace(
                run_it,
                what={
                    "provider": provider, "part": part, "mask_profile": "dense" if provider == DENSE else label,
                    **columns_of(shape, images, block.dense.c),
                },
                flops=times * flops,
                model_bytes=(1 if part == "reshape" else times) * elements * size,
            )  # fmt: skip
    baseline = f"{DENSE} conv"
    work = {f"{UNION} conv": block.union} | {f"{provider} all": live for provider in (NAIVE, FUSED, TRITON)}

    def compare(p50: Any) -> dict[str, dict[str, Any]]:
        whole = block.dense.flops(1)
        return {
            key: against_dense(shape.flops(1) / whole, p50[key] / p50[baseline])
            for key, shape in work.items()
            if key in p50 and baseline in p50
        }

    for direction, chosen in providers.items():
        measure(
            session, "fig7", chosen, references[direction], baseline, {**what, "direction": direction},
            compare=compare, shown=(baseline, *work),
        )  # fmt: skip
