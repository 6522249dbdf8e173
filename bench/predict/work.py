"""The work that times are predicted for: every kernel family, on the shapes of three networks, as launches.

The operators themselves are called, on tensors without memory, while nothing runs (`offline.offline`): so grids, flags
and tiles are those that the launchers choose. Layers and columns are those of the suites that measure the same, so that
a prediction and a measurement of one thing have one key (`rows.WHAT`).

    bn       every distinct batch norm, forward and backward
    sgd      all parameters of the network: SGD, the lasso inside, ProximalSGD (weights are fp32)
    lasso    the penalty's value; value and gradient
    gather   channel_gather, _scatter, _scatter_add of half the channels
    conv     by index, half the channels live on the side that gating indexes: forward, input and weight gradient
    fig7     ResNet-50's last convolutions of the blocks, of the paper profile's live channels, batch 32
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bench import offline, profiles
from bench.launches import Launched, noted
from bench.predict import machine_code
from bench.predict.formula import Launch
from bench.predict.machines import Machine
from bench.roof import DTYPES
from bench.suites import bn, fig7, lasso, sgd
from bench.suites.blocks import Layer, distinct
from bench.suites.conv import columns_of
from prunetrain_kernels.graph import trace_channels
from prunetrain_kernels.models import build
from prunetrain_kernels.ops.channel_index import ChannelIndex, channel_gather, channel_scatter, channel_scatter_add
from prunetrain_kernels.ops.conv2d import conv2d
from prunetrain_kernels.ops.tables import Fold
from prunetrain_kernels.optim import SGD, ProximalSGD
from prunetrain_kernels.regularizer import GroupLasso

FAMILIES = ("bn", "sgd", "lasso", "gather", "conv", "fig7")
BY_INDEX = "triton by index"  # the provider of suite `conv` here, whose measured rows are cuDNN's
FIG7_IMAGES = 32

# Bytes for each parameter that a kernel reaches through a table of addresses; docstrings of ops/sgd.py, group_lasso.py
# and group_soft_threshold.py. All others move each of their tensor arguments once.
BYTES_PER_PARAMETER = {
    "sgd._sgd_kernel": 20,
    "group_lasso._norms_kernel": 4,
    "group_lasso._gradient_kernel": 12,
    "group_soft_threshold._soft_threshold_kernel": 8,
}


@dataclass(frozen=True)
class Network:
    """A network, its images and its batch; `dtypes` are those of activations that it is trained in."""

    title: str
    name: str
    image: int
    classes: int
    batch: int
    dtypes: tuple[str, ...]


NETWORKS = (
    Network("ResNet-50", "imagenet_resnet50", 224, 1000, 256, ("fp16", "bf16")),
    Network("ResNet-32", "resnet32", 32, 10, 128, ("fp16", "fp32")),
    Network("VGG-13", "vgg13", 32, 10, 128, ("fp16", "fp32")),
)


@dataclass(frozen=True)
class Work:
    """One call of an operator: columns of `rows.WHAT`; the bytes and FLOPs that it must move and compute; launches."""

    network: str
    what: dict[str, Any]
    bytes: float
    flops: float = 0.0
    launches: list[Launch] = field(default_factory=list)

    @property
    def launched(self) -> int:
        """How many launches these are: one before a barrier and one after it are one."""
        return sum(not launch.after_barrier for launch in self.launches)


def all_work(machine: Machine, network: Network, family: str) -> Iterator[Work]:
    """The work of one family and network, compiled for that machine."""
    makers: dict[str, Callable[[Machine, Network], Iterator[Work]]] = {
        "bn": _batch_norms, "sgd": _updates, "lasso": _penalties, "gather": _channel_maps, "conv": _convolutions,
        "fig7": _last_convolutions,
    }  # fmt: skip
    return makers[family](machine, network)


# -- what is launched --------------------------------------------------------------------------------------------------


@cache
def _code(kernel: Any, arch: int) -> machine_code.Code:
    return machine_code.read(kernel, arch)


def launches(call: Callable[[], object], machine: Machine, parameters: int = 0) -> list[Launch]:
    """What calling an operator launches on this machine; `parameters` are how many its tables of addresses reach."""
    with offline.offline(machine.arch), noted() as notes:
        call()
    known: set[tuple[int, Any]] = set()
    work: list[Launch] = []
    for note in notes:
        tensors: dict[tuple[int, Any], int]
        tensors = {(t.untyped_storage()._cdata, t.storage_offset()): t.nbytes
                   for t in note.arguments.values() if isinstance(t, Tensor)}  # fmt: skip
        size = sum(tensors.values()) + parameters * BYTES_PER_PARAMETER.get(note.kernel, 0)
        again = sum(nbytes for key, nbytes in tensors.items() if key in known)
        # last passes of a batch norm run backwards: as much of what is read again is still there as fits beside the
        # rest of what this pass moves. In the same order either all is there or nothing.
        share = (
            min(1.0, machine.l2 / size) if note.kernel.startswith("batch_norm_passes") else float(size <= machine.l2)
        )
        known |= set(tensors)
        code = _code(note.compiled, machine.arch)
        work += _beside(note, "before")
        if code.before:
            work += _around_the_barrier(note, code, size - again * share)
            continue
        work.append(Launch(note.kernel, note.programs, size, again * share, _tile_flops(note), code, _asked(note)))
        work += _beside(note, "after")
    return work


# What a cooperative kernel reads before its barrier.
_READ_FIRST = {"_forward_kernel": ("x", "residual"), "_backward_kernel": ("dy", "x", "mask")}


def _around_the_barrier(note: Launched, code: machine_code.Code, size: float) -> list[Launch]:
    """A cooperative launch as two, of which the second folds the slots of each program's columns."""
    a = note.arguments
    read = sum(a[name].nbytes for name in _READ_FIRST[note.kernel.rpartition(".")[2]] if a[name] is not None)
    columns = 1 if a["PLANES"] else a["COLUMNS"]
    parts = a["chunks"] * (a["across"] if a["PLANES"] else 1 << a["group_bits"])
    turns = -(-parts // a["FOLD"])
    slots = a["slots"].element_size() * 2 * note.programs * columns
    first = replace(code, straight=code.before, loop=None)
    second = replace(code, straight=code.straight - code.before)
    return [
        Launch(note.kernel, note.programs, read, code=first),
        Launch(
            note.kernel, note.programs, size - read, code=second, asked=slots * turns * a["FOLD"],
            shared=slots * parts, after_barrier=True,
        ),
    ]  # fmt: skip


def _asked(note: Launched) -> float:
    """Bytes that a loop asks for whether they are there or not: of channels by index, as many as are written; of the
    lasso's slots, as many as turns of FOLD_ELEMENTS."""
    a = note.arguments
    if note.kernel == "slots._fold_kernel":
        turns = sum(Fold(*program).turns for program in a["folds"].tolist())
        return float(turns * a["ELEMENTS"] * a["sums"].element_size() * (2 if a["MAXIMA"] else 1))
    return a["out"].nbytes * (3 if a["ADD"] else 2) if note.kernel == "channel_index._channel_map_kernel" else 0.0


def _tile_flops(note: Launched) -> float:
    """FLOPs of a convolution's kernel, of whole tiles: also those that reach over an edge."""
    if not note.kernel.startswith("conv2d"):
        return 0.0
    a = note.arguments
    step = 2.0 * a["TILE_M"] * a["TILE_N"] * a["TILE_K"]
    if note.kernel.endswith("_weight_gradient_kernel"):
        return note.programs * step * (a["split"] // a["TILE_K"])
    if note.kernel.endswith("_forward_kernel"):
        return note.programs * step * a["taps_h"] * a["taps_w"] * -(-a["channels"] // a["TILE_K"])
    taps = a["taps_h"] * a["taps_w"]  # each belongs to one class of pixels
    return note.grid[0] * step * taps * -(-a["filters"] // a["TILE_K"])


def _beside(note: Launched, when: str) -> list[Launch]:
    """The operations of PyTorch around a convolution's kernel: zeros in channels that are not computed, and the sum of
    the parts of a weight's gradient."""
    a = note.arguments

    def torch_operation(name: str, size: float) -> Launch:
        return Launch(name, max(1, int(size) // 8192), size)

    if when == "before" and note.kernel.endswith("conv2d._forward_kernel") and a["y_channels"] > a["filters"]:
        return [torch_operation("fill", a["y"].nbytes)]
    if when == "before" and note.kernel.endswith("_input_gradient_kernel") and a["x_channels"] > a["channels"]:
        return [torch_operation("fill", a["dx"].nbytes)]
    if when == "after" and note.kernel.endswith("_weight_gradient_kernel"):
        slots = a["slots"]
        total = slots.nbytes / slots.shape[0]
        copied = torch_operation("copy", total * (1 + a["x"].element_size() / 4))
        return [torch_operation("sum", slots.nbytes + total)] * (slots.shape[0] > 1) + [copied]
    return []


def _activation(shape: tuple[int, ...], dtype: str, device: str = "meta") -> Tensor:
    """A channels_last tensor without memory, or one that nobody touches."""
    return torch.empty(shape, dtype=DTYPES[dtype], device=device, memory_format=torch.channels_last)


# -- families ----------------------------------------------------------------------------------------------------------


def _dtypes(machine: Machine, network: Network) -> list[str]:
    return [dtype for dtype in network.dtypes if dtype in machine.dtypes]


@cache
def _model(network: Network) -> nn.Module:
    return build(network.name, network.classes)


def _batch_norms(machine: Machine, network: Network) -> Iterator[Work]:
    layers = bn.layers(_model(network), network.image)
    for dtype in _dtypes(machine, network):
        yield from batch_norms_of(machine, network, layers, dtype)


def batch_norms_of(machine: Machine, network: Network, layers: Sequence[bn.Layer], dtype: str) -> Iterator[Work]:
    """Forward and backward of some batch norms, as suite `bn` measures them."""
    for layer in layers:
        elements = network.batch * layer.channels * layer.side**2
        for direction, call in _both_directions(layer, network.batch, dtype).items():
            what = {
                "suite": "bn", "layer": layer.name, "count": layer.count, "direction": direction, "dtype": dtype,
                "layout": "channels_last", "n": network.batch, "h": layer.side, "w": layer.side, "c_full": layer.full,
                "c_live": layer.channels, "mask_profile": "dense",
            }  # fmt: skip
            size = bn.layer_bytes(elements, DTYPES[dtype].itemsize, layer.follows, direction)
            yield Work(network.title, what, size, 0.0, launches(call, machine))


def _both_directions(layer: bn.Layer, images: int, dtype: str) -> dict[str, Callable[[], object]]:
    """Forward, as in a training step, and the backward of it."""
    shape = (images, layer.channels, layer.side, layer.side)
    vector = [torch.empty(layer.channels, device="meta") for _ in range(4)]
    x = _activation(shape, dtype).requires_grad_()
    residual = _activation(shape, dtype).requires_grad_() if "add" in layer.follows else None
    weight, bias = (t.requires_grad_() for t in vector[2:])
    inputs = [x, weight, bias] + ([] if residual is None else [residual])
    outputs: list[Tensor] = []

    def forward() -> None:
        mean, var = vector[:2]
        outputs.append(bn.our_batch_norm(x, mean, var, weight, bias, residual, relu=layer.has_relu))

    def backward() -> None:
        torch.autograd.grad(outputs[0], inputs, _activation(shape, dtype))

    return {"forward": forward, "backward": backward}


def _flat(suite: str, direction: str, count: int) -> dict[str, Any]:
    return {
        "suite": suite, "layer": sgd.LAYER, "count": 1, "direction": direction, "dtype": "fp32",
        "layout": "contiguous", "n": count, "mask_profile": "dense",
    }  # fmt: skip


def _lasso(network: Network) -> GroupLasso:
    model = _model(network)
    side = 64 if network.image > 64 else network.image
    return GroupLasso(model, (), graph=trace_channels(model, (torch.zeros(1, 3, side, side),)))


def _updates(machine: Machine, network: Network) -> Iterator[Work]:
    """The second step of each: the first measures the norms."""
    model = _model(network)
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    ways: dict[str, tuple[type[SGD], bool]] = {
        "SGD": (SGD, False), "SGD+lasso": (SGD, True), "ProximalSGD+lasso": (ProximalSGD, True),
    }  # fmt: skip
    for direction, (optimizer_class, with_lasso) in ways.items():
        optimizer = optimizer_class(parameters, sgd.LR, momentum=sgd.MOMENTUM, weight_decay=sgd.WEIGHT_DECAY)
        if with_lasso:
            optimizer.regularize_with(_lasso(network), sgd.COEFFICIENT)
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        with offline.offline(machine.arch):
            optimizer.step()
        bytes_each = sgd.BYTES_PER_PARAMETER + 8 * (optimizer_class is ProximalSGD)
        noted_launches = launches(lambda step=optimizer.step: step(), machine, count)  # type: ignore[misc]
        for parameter in parameters:
            parameter.grad = None
        yield Work(network.title, _flat("sgd", direction, count), bytes_each * count, 0.0, noted_launches)


def _penalties(machine: Machine, network: Network) -> Iterator[Work]:
    penalty = _lasso(network)
    weights = penalty.weights()[0]
    count = sum(p.numel() for p in weights)
    for weight in weights:
        weight.grad = torch.empty_like(weight)

    def value() -> None:
        with torch.no_grad():
            penalty.penalty()

    def both() -> None:
        penalty.add_gradient_(sgd.COEFFICIENT)

    ways = (("value", lasso.VALUE_BYTES, value), ("value+gradient", lasso.BOTH_BYTES, both))
    for direction, bytes_each, call in ways:
        what = _flat("lasso", direction, count)
        yield Work(network.title, what, bytes_each * count, 0.0, launches(call, machine, count))
    for weight in weights:
        weight.grad = None


def _channel_maps(machine: Machine, network: Network) -> Iterator[Work]:
    """Of a residual network the outputs of its stages, of another the outputs of its convolutions."""
    shapes = {(s.k, s.h) for s in profiles.conv_shapes(_model(network), network.image)
              if network.title.startswith("VGG") or s.name.endswith(_last_of_block(network))}  # fmt: skip
    for dtype in _dtypes(machine, network):
        for width, side in sorted(shapes):
            full = _activation((network.batch, width, side, side), dtype, "cpu")
            part = _activation((network.batch, width // 2, side, side), dtype, "cpu")
            index = ChannelIndex(list(range(0, width, 2)), width)
            calls: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...], float]] = {
                "channel_gather": (channel_gather, (full, index), 2 * part.nbytes),
                "channel_scatter": (channel_scatter, (part, index), part.nbytes + full.nbytes),
                "channel_scatter_add": (channel_scatter_add, (full, part, index), part.nbytes + 2 * full.nbytes),
            }
            for name, (operator, arguments, size) in calls.items():
                what = {
                    "suite": "gather", "layer": f"{name} {width}x{side}x{side}", "count": 1, "direction": "forward",
                    "dtype": dtype, "layout": "channels_last", "n": network.batch, "h": side, "w": side,
                    "c_full": width, "c_live": width // 2, "mask_profile": "uniform:0.5 (synthetic)",
                }  # fmt: skip
                noted_launches = launches(lambda f=operator, a=arguments: f(*a), machine)  # type: ignore[misc]
                yield Work(network.title, what, size, 0.0, noted_launches)


def _last_of_block(network: Network) -> str:
    return "conv3" if network.title == "ResNet-50" else "conv2"


def _convolutions(machine: Machine, network: Network) -> Iterator[Work]:
    """The first convolution of a block reads half of its input's channels by index, the last writes half of its
    output's; of a network without blocks every convolution reads half. None below sm_80: the kernel is not used there.
    """
    if machine.arch < 80:
        return
    dense: dict[profiles.ConvShape, str] = {}
    counts: dict[profiles.ConvShape, int] = {}
    for shape in profiles.conv_shapes(_model(network), network.image):
        if shape.c > 3 and shape.name.endswith(("conv1", _last_of_block(network)) if "Res" in network.title else ""):
            key = replace(shape, name=shape.name.rpartition(".")[2] if "Res" in network.title else "")
            dense.setdefault(key, shape.name)
            counts[key] = counts.get(key, 0) + 1
    for dtype in _dtypes(machine, network):
        for key, name in dense.items():
            inputs = not key.name.endswith(_last_of_block(network)) or "Res" not in network.title
            live = replace(key, c=key.c // 2) if inputs else replace(key, k=key.k // 2)
            index = ChannelIndex(list(range(0, key.c if inputs else key.k, 2)), key.c if inputs else key.k, "meta")
            places = {"input_index": index} if inputs else {"output_index": index}
            common = {
                "suite": "conv", "layer": name, "count": counts[key], "provider": BY_INDEX, "dtype": dtype,
                "layout": "channels_last", "mask_profile": f"{'input' if inputs else 'output'} uniform:0.5 (synthetic)",
                **columns_of(live, network.batch, key.c),
            }  # fmt: skip
            yield from _of_convolution(machine, network, common, (key, live), places)


def _of_convolution(
    machine: Machine, network: Network, common: dict[str, Any], sides: tuple[profiles.ConvShape, profiles.ConvShape],
    places: dict[str, ChannelIndex],
) -> Iterator[Work]:  # fmt: skip
    """Forward and both gradients, each by itself, of a convolution by its (full, live) shapes."""
    full, live = sides
    images, dtype = int(common["n"]), str(common["dtype"])
    size = DTYPES[dtype].itemsize
    # each tensor once, but by index x is read whole, and y and dx are written whole
    read_whole = full.input(images) - live.input(images)
    written_whole = full.output(images) if full.k > live.k else 0.0
    dx_whole = full.input(images) if full.c > live.c else 0.0
    extra = {"forward": read_whole + written_whole, "input gradient": dx_whole, "weight gradient": read_whole}
    for direction, elements in extra.items():
        x = _activation((images, full.c, full.h_in, full.w_in), dtype)
        weight = _activation((live.k, live.c, live.r, live.s), dtype)
        wanted = {"input gradient": x, "weight gradient": weight}.get(direction)
        if wanted is not None:
            wanted.requires_grad_()

        def forward(x: Tensor = x, weight: Tensor = weight) -> Tensor:
            options: dict[str, Any] = {**places, "backend": "triton"}
            y = conv2d(x, weight, full.stride, full.padding, **options)
            assert isinstance(y, Tensor)
            return y

        call: Callable[[], object] = forward
        if wanted is not None:
            with offline.offline(machine.arch):
                y = forward()
            dy = _activation(tuple(y.shape), dtype)
            call = lambda y=y, wanted=wanted, dy=dy: torch.autograd.grad(y, wanted, dy)  # type: ignore[misc]  # noqa: E731
        moved = (live.elements(images) + elements) * size
        what = {**common, "direction": direction}
        yield Work(network.title, what, moved, live.flops(images), launches(call, machine))


def _last_convolutions(machine: Machine, network: Network) -> Iterator[Work]:
    """As suite `fig7` measures them: ResNet-50 in fp16, one block of each dense shape. The scatter of "gating (fused)"
    everywhere, and "gating (triton)" where that kernel is used, from sm_80 on."""
    if network.title != "ResNet-50":
        return
    profile = profiles.parse("paper")
    size = DTYPES["fp16"].itemsize
    for block in distinct(fig7.blocks(profile, network.image)):
        live, full = block.live, replace(block.dense, c=block.live.c, k=block.union.k)
        common = {
            "suite": "fig7", "layer": block.dense.name, "count": 1, "dtype": "fp16", "layout": "channels_last",
            "mask_profile": profile.label, **columns_of(live, FIG7_IMAGES, block.dense.c),
        }  # fmt: skip
        whole = full.output(FIG7_IMAGES)
        yield from _scatter(machine, network, common | {"provider": fig7.FUSED, "part": "reshape"}, block, whole)
        if machine.arch < 80:
            continue
        by_kernel = common | {"provider": fig7.TRITON}
        places = {"output_index": ChannelIndex(block.outputs, full.k, "meta")}
        forward, *gradients = _of_convolution(machine, network, by_kernel, (full, live), places)
        moved = (whole + live.elements(FIG7_IMAGES)) * size
        yield replace(forward, bytes=moved)
        both = [launch for work in gradients for launch in work.launches]
        what = {**by_kernel, "direction": "backward"}
        yield Work(network.title, what, 2 * moved, 2 * live.flops(FIG7_IMAGES), both)


def _scatter(
    machine: Machine, network: Network, common: dict[str, Any], block: Layer, whole: float
) -> Iterator[Work]:  # fmt: skip
    """The scatter of a block's live channels, and the gather that is its backward."""
    shape = block.live
    index = ChannelIndex(block.outputs, block.union.k)
    part = _activation((FIG7_IMAGES, shape.k, shape.h, shape.w), "fp16", "cpu")
    wide = _activation((FIG7_IMAGES, block.union.k, shape.h, shape.w), "fp16", "cpu")
    moved = (whole + shape.output(FIG7_IMAGES)) * DTYPES["fp16"].itemsize
    calls = {"forward": lambda: channel_scatter(part, index), "backward": lambda: channel_gather(wide, index)}
    for direction, call in calls.items():
        yield Work(network.title, {**common, "direction": direction}, moved, 0.0, launches(call, machine))
