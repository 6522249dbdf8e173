"""The first and the last convolution of each residual block: dense, under union, and of its live channels."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench import profiles
from bench.profiles import ConvShape
from prunetrain_kernels.cost.convolution import Convolution
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.graph import trace_channels
from prunetrain_kernels.models import build


@dataclass(frozen=True)
class Layer:
    """One convolution: dense, under union, its own live channels, and their places among those that are kept.

    `residual`: whether a sum follows its batch norm. `inputs`, `outputs`: [live] int64.
    """

    dense: ConvShape
    union: ConvShape
    live: ConvShape
    inputs: Tensor
    outputs: Tensor
    residual: bool

    def convolution(self, images: int, itemsize: int) -> Convolution:
        """The layer as the package's cost model sees it, behind a batch norm that can place channels."""
        s = self.union
        return Convolution(
            images, (s.h_in, s.w_in), (s.h, s.w), (s.r, s.s), (s.stride, s.stride), (s.padding, s.padding), (1, 1),
            s.c, self.live.c, s.k, self.live.k, itemsize, places=True,
        )  # fmt: skip


def layers(profile: profiles.Profile, image: int) -> list[Layer]:
    """First and last convolutions of the blocks that are still there, in the network's order.

    Raises:
        InputError: the profile's network has no residual blocks.
    """
    model = build(profile.network, profile.classes)
    graph = trace_channels(model, (torch.zeros(2, 3, 32, 32),))
    masks = profiles.masks(profile, model, graph, image)
    shapes = {shape.name: shape for shape in profiles.conv_shapes(model, image)}
    convolutions = []
    for name, full in shapes.items():
        block, _, conv = name.rpartition(".")
        last = max((n.rpartition(".")[2] for n in shapes if n.startswith(f"{block}.conv")), default="")
        if not block.startswith("layer") or conv not in ("conv1", last) or name in masks.removed:
            continue
        layer, (live_in, live_out) = graph.layers[name], masks.live[name]
        kept_in, kept_out = masks.kept[layer.input], masks.kept[layer.output]
        convolutions.append(
            Layer(
                full,
                replace(full, c=int(kept_in.sum()), k=int(kept_out.sum())),
                replace(full, c=int(live_in.sum()), k=int(live_out.sum())),
                live_in[kept_in].nonzero()[:, 0],
                live_out[kept_out].nonzero()[:, 0],
                conv == last,
            )
        )
    if not convolutions:
        raise InputError(f"{profile.network} has no residual blocks; take a ResNet's profile")
    return convolutions


def distinct(chosen: list[Layer]) -> list[Layer]:
    """Of layers whose dense convolutions have one shape the first: 12 of ResNet-50's 32, or 4 of its 16 last ones."""
    first: dict[ConvShape, Layer] = {}
    for layer in chosen:
        first.setdefault(replace(layer.dense, name=""), layer)
    return list(first.values())
