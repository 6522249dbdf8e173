"""Which channels are live: from a real run, or synthetic and labelled so.

    paper, paper:0.2     synthetic: every space keeps the same share of its channels, such that the network is left with
                         the inference FLOPs that the paper's Tab. 1 gives for that ratio (0.25 if none is named)
    uniform:0.5          synthetic: every space keeps this share
    runs/a/channels.csv  a run of `prunetrain train`: its network, and what its last reconfiguration kept; with the
                         run's slices.npz beside it, also which output channels of each layer are above the threshold

Synthetic profiles draw channels at random (seed 0). In a space that several layers share, each of them has
LIVE_OF_UNION of the kept channels live, which is what gating could leave out.
"""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunetrain_kernels.cost.dry_run import dry_run
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.graph import ChannelGraph, trace_channels
from prunetrain_kernels.models import MODELS, build
from prunetrain_kernels.prune import reconfigure

NETWORK = "imagenet_resnet50"
PAPER_INFERENCE_FLOPS = {"0.25": 0.47, "0.2": 0.56, "0.1": 0.88}  # Tab. 1, ImageNet ResNet-50, by penalty ratio
# Puts union 3 to 5 points of the dense inference FLOPs above gating for the three paper profiles; the paper finds 1-6 %
# (section 4.2).
LIVE_OF_UNION = 0.9


@dataclass(frozen=True)
class Profile:
    """Live channels of a network.

    Attributes:
        label: for the column mask_profile.
        network: a name in `prunetrain_kernels.models.MODELS`.
        image: side of the network's images, pixels.
        classes: logits.
        share: of the channels that every space keeps; None for a real run.
        target: inference FLOPs of dense that determine the share instead.
        run: what a real run kept: {layer: (kept inputs, kept outputs, removed)}.
        outputs: {layer: (kept, live)} masks over the dense layer's output channels, where the run recorded them.
        folder: the run's.
    """

    label: str
    network: str = NETWORK
    image: int = 224
    classes: int = 1000
    share: float | None = None
    target: float | None = None
    run: Mapping[str, tuple[int, int, bool]] | None = None
    outputs: Mapping[str, tuple[Tensor, Tensor]] | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class Masks:
    """`kept` channels of each space, and of each layer its live (input, output) channels: boolean, over the dense ones.

    `removed` layers compute nothing any more.
    """

    kept: tuple[Tensor, ...]
    live: Mapping[str, tuple[Tensor, Tensor]]
    removed: frozenset[str] = frozenset()


def dense(network: str = NETWORK, image: int = 224, classes: int = 1000) -> Profile:
    return Profile("dense", network, image, classes, share=1.0)


def parse(text: str) -> Profile:
    """A profile by its name or file; see the top of this file.

    Raises:
        InputError: no such profile, or a file that is no run's.
    """
    kind, _, value = text.partition(":")
    if kind == "dense" and not value:
        return dense()
    if kind == "paper":
        ratio = value or "0.25"
        if ratio not in PAPER_INFERENCE_FLOPS:
            raise InputError(f"the paper has no ratio {ratio}; --profile takes paper:0.25, paper:0.2 or paper:0.1")
        return Profile(f"paper:{ratio} (synthetic)", target=PAPER_INFERENCE_FLOPS[ratio])
    if kind == "uniform":
        try:
            share = float(value)
        except ValueError:
            share = math.nan
        if not 0 < share <= 1:
            raise InputError(f"--profile uniform:SHARE takes a share between 0 and 1, not '{value}'")
        return Profile(f"uniform:{share:g} (synthetic)", share=share)
    return _of_run(Path(text))


def for_network(profile: Profile, network: str, image: int, classes: int) -> Profile:
    """A synthetic profile for another network.

    Raises:
        InputError: a real run's profile belongs to the network that was trained.
    """
    if profile.run is not None and profile.network != network:
        raise InputError(f"the profile is of a {profile.network}, not of a {network}; use uniform:SHARE instead")
    if profile.run is not None:
        return profile
    return Profile(profile.label, network, image, classes, profile.share, profile.target)


def _of_run(path: Path) -> Profile:
    import pandas as pd

    path = path / "channels.csv" if path.is_dir() else path
    try:
        table = pd.read_csv(path)
        config: dict[str, Any] = json.loads((path.parent / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"--profile {path}: neither paper, uniform:SHARE nor a channels.csv with its config.json beside it: {error}"
        ) from error
    columns = {"reconfiguration", "layer", "in_kept", "out_kept", "removed"}
    if not columns <= set(table) or not len(table) or config.get("model") not in MODELS:
        raise InputError(f"--profile {path} is not of one of the package's networks: {', '.join(MODELS)}")
    last = table[table["reconfiguration"] == table["reconfiguration"].max()]
    run = {
        str(row.layer): (int(row.in_kept), int(row.out_kept), bool(row.removed)) for row in last.itertuples(index=False)
    }
    network = str(config["model"])
    image = config.get("crop") or config.get("image_size") or (224 if network.startswith("imagenet") else 32)
    outputs = _recorded(path.parent / "slices.npz", float(config.get("threshold", 1e-4)))
    classes = config.get("classes") or (1000 if network.startswith("imagenet") else 10)
    label = f"{path.parent.name} ({network})"
    return Profile(label, network, int(image), int(classes), run=run, outputs=outputs, folder=path.parent)


def _recorded(path: Path, threshold: float) -> dict[str, tuple[Tensor, Tensor]] | None:
    try:
        with np.load(path, allow_pickle=False) as archive:
            last = {name.removeprefix("layer/"): archive[name][-1] for name in archive.files if name != "epochs"}
    except (OSError, ValueError, KeyError, IndexError):
        return None
    return {
        name: (torch.from_numpy(np.isfinite(values)), torch.from_numpy(values >= threshold))
        for name, values in last.items()
    }


# -- masks -------------------------------------------------------------------------------------------------------------


def masks(profile: Profile, model: nn.Module, graph: ChannelGraph, image: int | None = None) -> Masks:
    """Kept and live channels of a dense model's spaces and layers.

    Raises:
        InputError: a run's profile of a network with other layers.
    """
    if profile.run is not None:
        return _real(profile, graph)
    share = profile.share
    if share is None:
        assert profile.target is not None
        share = _share_for(profile.target, model, graph, image or profile.image)
    generator = torch.Generator().manual_seed(0)

    def some(among: Tensor, part: float) -> Tensor:
        """A random part of the channels of a mask, at least one."""
        channels = among.nonzero()[:, 0]
        count = max(1, round(part * len(channels)))
        chosen = channels[torch.randperm(len(channels), generator=generator)[:count]]
        return torch.zeros_like(among).index_fill_(0, chosen, value=True)

    every = [torch.ones(space.size, dtype=torch.bool) for space in graph.spaces]
    kept = [
        mask if space.frozen or share == 1 else some(mask, share)
        for space, mask in zip(graph.spaces, every, strict=True)
    ]
    shared = [len(space.producers) > 1 and not space.frozen and share < 1 for space in graph.spaces]
    live = {
        name: tuple(
            some(kept[space], LIVE_OF_UNION) if shared[space] else kept[space] for space in (layer.input, layer.output)
        )
        for name, layer in graph.layers.items()
    }
    return Masks(tuple(kept), live)  # type: ignore[arg-type]


def _real(profile: Profile, graph: ChannelGraph) -> Masks:
    assert profile.run is not None
    if set(profile.run) != set(graph.layers):
        raise InputError(f"the profile {profile.label} names other layers than the network {profile.network} has")
    removed = frozenset(name for name, (_, _, gone) in profile.run.items() if gone)
    kept = []
    for space in graph.spaces:
        producers = [name for name in space.producers if name not in removed]
        consumers = [name for name in space.consumers if name not in removed]
        counts = [profile.run[name][1] for name in producers] + [profile.run[name][0] for name in consumers]
        recorded = [profile.outputs[n][0] for n in producers if profile.outputs and n in profile.outputs]
        if recorded:
            mask = torch.stack(recorded).any(0)
        else:  # which ones is not known: the first ones
            mask = torch.arange(space.size) < (max(counts) if counts else space.size)
        if len(mask) != space.size:
            raise InputError(f"the profile {profile.label} has other channel counts than {profile.network}")
        kept.append(mask)
    live = {}
    for name, layer in graph.layers.items():
        out = kept[layer.output]
        if profile.outputs and name in profile.outputs and not graph.spaces[layer.output].frozen:
            out = out & profile.outputs[name][1]
        live[name] = (kept[layer.input], out if bool(out.any()) else kept[layer.output])
    return Masks(tuple(kept), live, removed)


def _share_for(target: float, model: nn.Module, graph: ChannelGraph, image: int) -> float:
    """The share of every space's channels that leaves `target` of the inference FLOPs; by bisection."""
    pixels = {shape.name: shape.h * shape.w for shape in conv_shapes(model, image)}
    taps = {name: model.get_submodule(name).weight[0, 0].numel() for name in graph.layers}  # type: ignore[union-attr,index]

    def flops(share: float) -> float:
        size = [space.size if space.frozen else max(1, round(share * space.size)) for space in graph.spaces]
        return sum(
            size[layer.input] * size[layer.output] * pixels.get(name, 1) * taps[name]
            for name, layer in graph.layers.items()
        )

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if flops(middle) < target * flops(1.0) else (low, middle)
    return high


# -- networks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvShape:
    """A convolution: channels `c` -> `k`, taps `r` x `s`, output `h` x `w` pixels, input `h_in` x `w_in` pixels."""

    name: str
    c: int
    k: int
    r: int
    s: int
    stride: int
    padding: int
    h: int
    w: int
    h_in: int
    w_in: int

    def flops(self, images: int) -> float:
        """FLOPs of the forward pass; either gradient costs the same."""
        return 2.0 * images * self.c * self.k * self.r * self.s * self.h * self.w

    def elements(self, images: int) -> float:
        """Input, weight and output: what must move in any direction."""
        return self.input(images) + self.c * self.k * self.r * self.s + self.output(images)

    def input(self, images: int) -> float:
        return float(images * self.c * self.h_in * self.w_in)

    def output(self, images: int) -> float:
        return float(images * self.k * self.h * self.w)


def conv_shapes(model: nn.Module, image: int, in_channels: int = 3) -> list[ConvShape]:
    """Every convolution of a model in the order of its forward pass, for square images."""
    shapes: list[ConvShape] = []

    def note(name: str) -> Any:
        def hook(module: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            k, c, r, s = module.weight.shape
            stride, padding = module.stride[0], module.padding[0]
            assert isinstance(padding, int)
            shapes.append(
                ConvShape(
                    name, c, k, r, s, stride, padding, *map(int, output.shape[2:]), *map(int, inputs[0].shape[2:])
                )
            )

        return hook

    handles = [m.register_forward_hook(note(n)) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    try:
        image_like = torch.zeros(2, in_channels, image, image, device=next(model.parameters()).device)
        dry_run(lambda run: run.forward(), model, (image_like,), training=model.training)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


@dataclass(frozen=True)
class Pruned:
    """A network with only the kept channels of a profile, and what it was before.

    `name_of` a layer is the same in both; `masks` are over the dense network's channels.
    """

    model: nn.Module
    dense: nn.Module
    masks: Masks


def prune(profile: Profile, image: int | None = None, round_to: int = 1, seed: int = 0) -> Pruned:
    """Builds a profile's network and prunes it to the kept channels, by the package's own reconfiguration.

    Args:
        image: side of the images that FLOPs are counted for; the profile's own if left out.
        round_to: keep a few more channels so that counts are multiples of this.
    """
    torch.manual_seed(seed)
    model = build(profile.network, profile.classes)
    original = copy.deepcopy(model)
    example = (torch.zeros(2, 3, max(32, min(image or profile.image, 64)), max(32, min(image or profile.image, 64))),)
    graph = trace_channels(model, example)
    channels = masks(profile, model, graph, image)
    with torch.no_grad():
        for name, layer in graph.layers.items():
            weight = model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight[~channels.kept[layer.output]] = 0
            columns = ~channels.kept[layer.input].repeat_interleave(layer.block)
            weight[:, columns] = 0
            if name in channels.removed:
                weight.zero_()
    reconfigure(model, None, graph.keep(model, threshold=0.0, round_to=round_to))
    return Pruned(model, original, channels)
