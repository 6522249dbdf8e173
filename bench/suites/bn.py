"""Batch norm with what follows it: time against the byte floor, bytes by hardware counters, the paper's savings.

Every distinct batch norm of a network (ImageNet ResNet-50), forward and backward, dense and with the profile's
channels. Floor: the two-pass count of design section 5, 3E + 5E, with the addition and ReLU behind it 4E + 6E and a bit
per element. A row `all layers` sums them, each as often as the network has it. Providers: eager as models/resnet.py
writes it, torch.compile (dense only: it compiles anew for every shape), ours.

`counted_bytes`, where Nsight Compute may read the counters, is what one call really moved. The rows of provider `model`
are the bytes of the whole network's batch norms in a training step; the paper saves 37, 33 and 5 % of them over the
training of ResNet-50 at its three strengths (section 5.1).
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import counters, profiles
from bench.harness import (
    COMPILED,
    EAGER,
    OURS,
    Provider,
    Session,
    against_roof,
    as_time,
    attempt,
    both_directions,
    compiled,
    measure,
)
from bench.roof import DTYPES
from prunetrain_kernels.cost import batch_norm_bytes as network_bytes
from prunetrain_kernels.ops.batch_norm_act import batch_norm_act

ALL = "all layers"
DIRECTIONS = ("forward", "backward")
PAPER_SAVINGS = {"0.25": 0.37, "0.2": 0.33, "0.1": 0.05}  # section 5.1, by penalty ratio
COUNTED = 4  # layers that are counted by hardware: each needs a process of its own


@dataclass(frozen=True)
class Layer:
    """A batch norm of the network: its activation for one image, what follows it, and how many there are of it."""

    channels: int
    side: int
    follows: str  # "BN", "BN+ReLU" or "BN+add+ReLU"
    count: int
    full: int  # channels in the dense network

    @property
    def name(self) -> str:
        return f"{self.follows} {self.full}x{self.side}x{self.side}"

    @property
    def has_relu(self) -> bool:
        return self.follows.endswith("ReLU")


def layers(model: nn.Module, image: int = 224, dense: nn.Module | None = None) -> list[Layer]:
    """A ResNet's distinct batch norms, the largest share of the bytes first."""
    full = {n: m.num_features for n, m in (dense or model).named_modules() if isinstance(m, nn.BatchNorm2d)}
    counts: Counter[tuple[int, int, str, int]] = Counter()
    last_of_block = {"bn1": "BN+ReLU", "bn2": "BN+ReLU", "bn3": "BN+add+ReLU"}
    if not any(name.endswith("bn3") for name in full):
        last_of_block["bn2"] = "BN+add+ReLU"  # basic blocks

    def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        follows = last_of_block.get(name.rsplit(".", 1)[-1], "BN+ReLU" if "features" in name else "BN")
        return lambda module, inputs, output: counts.update([(output.shape[1], output.shape[2], follows, full[name])])

    norms = [(n, m) for n, m in model.named_modules() if type(m) is nn.BatchNorm2d]
    handles = [module.register_forward_hook(note(name)) for name, module in norms]
    try:
        with torch.no_grad():
            state = {
                n: torch.empty_like(t, device="meta") for n, t in [*model.named_parameters(), *model.named_buffers()]
            }
            torch.func.functional_call(model, state, (torch.zeros(2, 3, image, image, device="meta"),))
    finally:
        for handle in handles:
            handle.remove()
    some = [Layer(channels, side, follows, count, whole) for (channels, side, follows, whole), count in counts.items()]
    return sorted(some, key=lambda layer: -layer.count * layer.channels * layer.side**2)


def layer_bytes(elements: int, size: int, follows: str, direction: str) -> float:
    """Two passes (design section 5): 3E + 5E; with add and ReLU 4E + 6E, and a bit per element once and twice."""
    if follows == "BN+add+ReLU":
        return elements * (4 * size + 1 / 8 if direction == "forward" else 6 * size + 2 / 8)
    return elements * size * (3 if direction == "forward" else 5)


def eager_batch_norm(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *, relu: bool
) -> Tensor:
    """Batch norm and what follows it, as models/resnet.py writes them."""
    y = F.batch_norm(x, mean, var, weight, bias, training=True)
    if residual is not None:
        y = residual + y
    return F.relu(y) if relu else y


def our_batch_norm(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *, relu: bool
) -> Tensor:
    return batch_norm_act(x, mean, var, weight, bias, training=True, residual=residual, relu=relu)


def run(session: Session) -> None:
    """Counts the bytes that pruning saves, then measures all layers, dense and with the profile's channels."""
    savings(session)
    profile = session.profile
    pruned = profiles.prune(profile)
    image = 32 if session.quick else profile.image
    dense = layers(pruned.dense, image)
    dense_sums = all_of(session, dense, "dense", [EAGER, OURS] + [COMPILED] * session.compile, {})
    all_of(session, layers(pruned.model, image, pruned.dense), profile.label, [EAGER, OURS], dense_sums)
    if session.device.type == "cuda" and session.counters:
        attempt(session, "hardware counters", lambda: count(session, dense[:COUNTED]))


def savings(session: Session) -> None:
    """Bytes of all batch norms in a training step, by model: the three paper profiles, and the session's."""
    chosen = {f"paper:{ratio}": saved for ratio, saved in PAPER_SAVINGS.items()}
    lines: list[dict[str, Any]] = []
    everything: list[tuple[profiles.Profile, float | None]] = [(profiles.parse(n), s) for n, s in chosen.items()]
    if session.profile.label not in {profile.label for profile, _ in everything}:
        everything.append((session.profile, None))
    images = session.images(256)
    size = session.dtype.itemsize
    for profile, paper in everything:
        pruned = profiles.prune(profile)
        example = (torch.zeros(2, 3, profile.image, profile.image),)
        full, left = (network_bytes(m, example, images) * size // 4 for m in (pruned.dense, pruned.model))
        if not lines:
            lines.append(_model_row(session, profile.network, "dense", images, full))
        lines.append(_model_row(session, profile.network, profile.label, images, left))
        beside = f"; the paper's ResNet-50 saved {paper:.0%} over its training" if paper is not None else ""
        print(
            f"  {profile.label:<34} {left / 1e9:.2f} of {full / 1e9:.2f} GB a step: {1 - left / full:.0%} saved{beside}"
        )
    session.write("bn", lines)


def _model_row(session: Session, network: str, label: str, images: int, size: int) -> dict[str, Any]:
    row = {"layer": network, "provider": "model", "direction": "step", "dtype": session.dtype_name, "n": images,
           "mask_profile": label, "mode": "model"}  # fmt: skip
    return row | against_roof(session, None, size, 0, session.dtype_name)


def all_of(
    session: Session, chosen: Sequence[Layer], label: str, names: Sequence[str], dense: dict[tuple[str, str], float]
) -> dict[tuple[str, str], float]:
    """Every layer, then their sum; returns microseconds of the sum by (provider, direction)."""
    images = session.images(256)
    session.modes.clear()
    sums: dict[tuple[str, str], float] = dict.fromkeys(((n, d) for n in names for d in DIRECTIONS), 0.0)
    model_bytes = dict.fromkeys(DIRECTIONS, 0.0)
    whole = set(names)
    wanted = [layer for layer in chosen if session.wants(layer.name)]
    print(f"  -- {label}")
    for layer in wanted:
        key = f"{layer.name} {label}"
        attempt(session, key, lambda layer=layer: _measure(session, layer, label, names, images))  # type: ignore[misc]
        for direction in DIRECTIONS:
            elements = images * layer.channels * layer.side**2
            size = layer_bytes(elements, session.dtype.itemsize, layer.follows, direction)
            model_bytes[direction] += layer.count * size
            for name in names:
                time_of = session.p50.pop((layer.name, name, direction), None)
                if time_of is None:
                    whole.discard(name)  # a sum over some of the layers would mislead
                else:
                    sums[name, direction] += layer.count * time_of
    if len(wanted) < len(chosen):
        return {}
    lines = []
    for name in names:
        if name not in whole:
            print(f"  {name} has no sum: not all of its layers were measured")
            continue
        for direction, size in model_bytes.items():
            p50 = sums[name, direction]
            session.p50[ALL if label == "dense" else f"{ALL} {label}", name, direction] = p50
            before = dense.get((name, direction))
            lines.append(
                {
                    "layer": ALL, "count": sum(layer.count for layer in chosen), "provider": name,
                    "direction": direction, "dtype": session.dtype_name, "layout": "channels_last", "n": images,
                    "mask_profile": label, "mode": "sum of " + "+".join(sorted(session.modes)), "p50_us": p50,
                    "time_ratio": p50 / before if before else None,
                    **against_roof(session, p50, size, 0, session.dtype_name),
                }
            )  # fmt: skip
            shown = f", {p50 / before:.0%} of dense" if before else ""
            print(f"  {ALL:<34} {direction:<9} {name} {as_time(p50)} ({lines[-1]['ratio_to_roof']:.0%}){shown}")
    session.write("bn", lines)
    if label == "dense":
        session.p50["bytes", "model", "both"] = sum(model_bytes.values())
    return {key: value for key, value in sums.items() if key[0] in whole}


def _arguments(
    layer: Layer, images: int, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Any, ...], list[Tensor], Tensor]:
    """Arguments of the functions above, those of them that need gradients, and a gradient of the output."""
    torch.manual_seed(0)
    shape = (images, layer.channels, layer.side, layer.side)

    def activation() -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)

    x, dy = activation() * 2 + 1, activation()
    residual = activation().requires_grad_() if "add" in layer.follows else None
    x.requires_grad_()
    weight = torch.rand(layer.channels, device=device).add_(0.5).requires_grad_()
    bias = torch.randn(layer.channels, device=device).requires_grad_()
    mean, var = torch.zeros(layer.channels, device=device), torch.ones(layer.channels, device=device)
    inputs = [x, weight, bias] + ([residual] if residual is not None else [])
    return (x, mean, var, weight, bias, residual), inputs, dy


def _measure(session: Session, layer: Layer, label: str, names: Sequence[str], images: int) -> None:
    functions = {EAGER: eager_batch_norm, OURS: our_batch_norm}
    if COMPILED in names:
        functions[COMPILED] = compiled(session, eager_batch_norm)
    measure_layer(session, "bn", layer, label, functions={name: functions[name] for name in names}, images=images)


def measure_layer(
    session: Session,
    suite: str,
    layer: Layer,
    label: str,
    *,
    functions: Mapping[str, Callable[..., Tensor]],
    images: int,
    more: Mapping[str, Any] | None = None,
) -> None:
    """One layer, forward and backward, by each of some functions as `eager_batch_norm`; `more` are further columns."""
    (x, mean, var, weight, bias, residual), inputs, dy = _arguments(layer, images, session.dtype, session.device)
    what = {
        "layer": layer.name, "count": layer.count, "dtype": session.dtype_name, "layout": "channels_last", "n": images,
        "h": layer.side, "w": layer.side, "c_full": layer.full, "c_live": layer.channels, "mask_profile": label,
        **(more or {}),
    }  # fmt: skip
    forward: dict[str, Provider] = {}
    backward: dict[str, Provider] = {}
    for name, function in functions.items():
        arguments = (x, mean.clone(), var.clone(), weight, bias, residual)
        forward[name], backward[name] = both_directions(
            partial(function, relu=layer.has_relu), arguments, inputs, dy, session.device
        )
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    zeros = torch.zeros(layer.channels, device=session.device, dtype=torch.float64)
    added = wide[3] if residual is not None else None
    y = eager_batch_norm(wide[0], zeros, zeros + 1, wide[1], wide[2], added, relu=layer.has_relu)
    references = torch.autograd.grad(y, wide, dy.double())
    for providers, expected, direction in ((forward, [y.detach()], "forward"), (backward, references, "backward")):
        size = layer_bytes(x.numel(), session.dtype.itemsize, layer.follows, direction)
        measure(session, suite, providers, expected, EAGER, what={**what, "direction": direction}, model_bytes=size)


# -- hardware counters -------------------------------------------------------------------------------------------------


def count(session: Session, chosen: Sequence[Layer]) -> None:
    """Bytes that one call of each provider moves, counted by the GPU, for the layers that move most."""
    for layer in chosen:
        for direction in DIRECTIONS:
            lines = []
            for name in (EAGER, OURS):
                images = session.images(256)
                what = [str(layer.channels), str(layer.side), layer.follows, str(images), session.dtype_name]
                try:
                    size = counters.dram_bytes("bench.suites.bn", [*what, name, direction])
                except counters.NoCounters as error:
                    print(f"  bytes were not counted by hardware: {error}")
                    return
                elements = images * layer.channels * layer.side**2
                least = layer_bytes(elements, session.dtype.itemsize, layer.follows, direction)
                lines.append(
                    {
                        "layer": layer.name, "count": layer.count, "provider": name, "direction": direction,
                        "dtype": session.dtype_name, "layout": "channels_last", "n": images, "h": layer.side,
                        "w": layer.side, "c_full": layer.full, "c_live": layer.channels, "mask_profile": "dense",
                        "mode": "model", "counted_bytes": size,
                        **against_roof(session, None, least, 0, session.dtype_name),
                    }
                )  # fmt: skip
                print(f"  {layer.name:<34} {direction:<9} {name} moved {size / least:.2f} x the two-pass bytes")
            session.write("bn", lines)


def main() -> int:
    """One call of one provider, for Nsight Compute to count; `count` starts it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    for name, kind in (("channels", int), ("side", int), ("follows", str), ("images", int), ("dtype", str)):
        parser.add_argument(name, type=kind)
    parser.add_argument("provider", choices=(EAGER, OURS))
    parser.add_argument("direction", choices=DIRECTIONS)
    options = parser.parse_args()
    layer = Layer(options.channels, options.side, options.follows, 1, options.channels)
    device = torch.device("cuda")
    arguments, inputs, dy = _arguments(layer, options.images, DTYPES[options.dtype], device)
    function = partial({EAGER: eager_batch_norm, OURS: our_batch_norm}[options.provider], relu=layer.has_relu)
    forward, backward = both_directions(function, arguments, inputs, dy, device)
    chosen = forward if options.direction == "forward" else backward
    backward.outputs()
    chosen.run()
    with counters.counted():
        chosen.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
