"""Every distinct convolution of a network, forward and backward: dense, pruned, and pruned to multiples of 8.

This is channel union: a pruned layer is an ordinary smaller convolution, by cuDNN (oneDNN on a CPU). What it shows is
whether time falls as fast as FLOPs, and what odd channel counts cost. Floor: max(each tensor once, FLOPs), the backward
pass being both gradients. `flops_ratio`, `time_ratio` and `eta` compare with the dense layer.
"""

from collections import Counter
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import profiles
from bench.harness import EAGER, Provider, Session, against_dense, attempt, both_directions, measure
from bench.profiles import ConvShape

ROUND_TO = 8
DENSE = "dense"


def run(session: Session) -> None:
    """Measures every distinct layer: dense, pruned, and pruned to multiples of ROUND_TO."""
    profile = session.profile
    image = 32 if session.quick else profile.image
    pruned = profiles.prune(profile)
    rounded = profiles.prune(profile, round_to=ROUND_TO)
    dense = {shape.name: shape for shape in profiles.conv_shapes(pruned.dense, image)}
    variants = {
        f"{profile.label}": {s.name: s for s in profiles.conv_shapes(pruned.model, image)},
        f"{profile.label} rounded to {ROUND_TO}": {s.name: s for s in profiles.conv_shapes(rounded.model, image)},
    }
    # layers of the same dense and pruned shapes are one measurement; the first one's name stands for them
    groups: Counter[tuple[ConvShape | None, ...]] = Counter()
    names: dict[tuple[ConvShape | None, ...], str] = {}
    for name, shape in dense.items():
        key = tuple(_nameless(s) for s in (shape, *(variant.get(name) for variant in variants.values())))
        groups[key] += 1
        names.setdefault(key, name)
    for key, count in groups.items():
        name = names[key]
        if session.wants(name):
            shapes = dict(zip((DENSE, *variants), key, strict=True))
            attempt(
                session,
                name,
                lambda name=name, shapes=shapes, count=count: _measure(session, name, shapes, count),  # type: ignore[misc]
            )


def _nameless(shape: ConvShape | None) -> ConvShape | None:
    return replace(shape, name="") if shape is not None else None


def columns_of(shape: ConvShape, images: int, c_full: int) -> dict[str, object]:
    return {
        "n": images, "h": shape.h, "w": shape.w, "c_full": c_full, "c_live": shape.c, "k": shape.k, "r": shape.r,
        "s": shape.s, "stride": shape.stride,
    }  # fmt: skip


def tensors(session: Session, shape: ConvShape, images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Input and weight that need gradients, and a gradient of the output; channels_last."""
    torch.manual_seed(0)

    def made(*size: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(size, device=session.device, dtype=session.dtype) * scale
        return x.contiguous(memory_format=torch.channels_last)

    fan_in = shape.c * shape.r * shape.s
    return (
        made(images, shape.c, shape.h_in, shape.w_in).requires_grad_(),
        made(shape.k, shape.c, shape.r, shape.s, scale=fan_in**-0.5).requires_grad_(),
        made(images, shape.k, shape.h, shape.w),
    )


def _measure(session: Session, name: str, shapes: dict[str, ConvShape | None], count: int) -> None:
    images = session.images(32)
    sizes = {label: shape for label, shape in shapes.items() if shape is not None}
    directions: dict[str, dict[str, Provider]] = {"forward": {}, "backward": {}}
    references: dict[str, dict[str, list[Tensor]]] = {"forward": {}, "backward": {}}
    full = sizes[DENSE]
    for label, shape in sizes.items():
        x, weight, dy = tensors(session, shape, images)
        arguments = (x, weight, None, shape.stride, shape.padding)
        both = both_directions(F.conv2d, arguments, [x, weight], dy, session.device)
        wide = [x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
        y = F.conv2d(wide[0], wide[1], None, shape.stride, shape.padding)
        references["forward"][label] = [y.detach()]
        references["backward"][label] = list(torch.autograd.grad(y, wide, dy.double()))
        for direction, provider, times in zip(directions, both, (1, 2), strict=True):
            directions[direction][label] = replace(
                provider,
                what={"provider": EAGER, "mask_profile": label, **columns_of(shape, images, full.c)},
                flops=times * shape.flops(images),
                model_bytes=times * shape.elements(images) * session.dtype.itemsize,
            )
    what = {"layer": name, "count": count, "dtype": session.dtype_name, "layout": "channels_last"}
    for direction, providers in directions.items():
        measure(
            session, "conv", providers, references[direction], DENSE, what={**what, "direction": direction},
            compare=lambda p50: {
                label: against_dense(sizes[label].flops(1) / full.flops(1), p50[label] / p50[DENSE])
                for label in p50
                if DENSE in p50
            },
        )  # fmt: skip
