"""Whole layers under channel union and under every form of channel gating: one training step of one convolution.

The first and the last convolution of each residual block, each with what follows it in the network (batch norm, the sum
of the residual behind the last one, ReLU), forward and backward in one call. A block's first convolution reads the
stage's channels, its last one writes them, and each has its own live ones among them.

    dense               the layer before pruning, by PyTorch's operators
    union (eager)       all channels that the spaces keep, by PyTorch's operators
    union               the same, and the fused batch norm
    gating (naive)      the paper's: index_select, convolution, index_copy, then PyTorch's batch norm, sum and ReLU
    gating (selected)   index_select, convolution; the fused batch norm places the outputs
    gating (expanded)   live weights expanded with zeros on the input's side; the fused batch norm places the outputs
    gating (triton)     the implicit GEMM, by index, with the batch norm's statistics in its epilogue; likewise
    gating (triton, run)  the same where live channels are ranges, as reconfiguration orders them, without an index
    auto                whichever `policy="auto"` chooses by its closed form on this session's roof

Part `conv` is the convolution alone, forward and backward: "no index" is the library's convolution of a tensor that has
the live channels only, which is what gating would cost if finding channels were free; the forms stand beside it.
Bytes and FLOPs are those of `cost/convolution.py`. The mode of a row without a time is "model".
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import profiles, rows
from bench.harness import Provider, Session, against_dense, attempt, measure, prepared
from bench.profiles import ConvShape
from bench.roof import DTYPES, V100
from bench.suites.conv import columns_of
from prunetrain_kernels.cost.convolution import Convolution, Form, RoofCost, flops, traffic
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.graph.gating import choose_form
from prunetrain_kernels.ops.batch_norm_act import batch_norm_act
from prunetrain_kernels.ops.channel_index import ChannelIndex
from prunetrain_kernels.ops.conv2d import conv2d, triton_serves

DENSE, UNION, UNION_EAGER, NAIVE = "dense", "union", "union (eager)", "gating (naive)"
SELECTED, EXPANDED, TRITON, RUN = "gating (selected)", "gating (expanded)", "gating (triton)", "gating (triton, run)"
AUTO, NO_INDEX = "auto", "no index"
BACKEND = {SELECTED: "naive", EXPANDED: "expanded", TRITON: "triton", RUN: "triton"}


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
        """As the package's cost model sees it, behind a batch norm that can place channels."""
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
    from prunetrain_kernels.graph import trace_channels
    from prunetrain_kernels.models import build

    model = build(profile.network, profile.classes)
    graph = trace_channels(model, (torch.zeros(2, 3, 32, 32),))
    masks = profiles.masks(profile, model, graph, image)
    shapes = {shape.name: shape for shape in profiles.conv_shapes(model, image)}
    found = []
    for name, full in shapes.items():
        block, _, conv = name.rpartition(".")
        last = max((n.rpartition(".")[2] for n in shapes if n.startswith(f"{block}.conv")), default="")
        if not block.startswith("layer") or conv not in ("conv1", last) or name in masks.removed:
            continue
        layer, (live_in, live_out) = graph.layers[name], masks.live[name]
        kept_in, kept_out = masks.kept[layer.input], masks.kept[layer.output]
        found.append(
            Layer(
                full,
                replace(full, c=int(kept_in.sum()), k=int(kept_out.sum())),
                replace(full, c=int(live_in.sum()), k=int(live_out.sum())),
                live_in[kept_in].nonzero()[:, 0],
                live_out[kept_out].nonzero()[:, 0],
                conv == last,
            )
        )
    if not found:
        raise InputError(f"{profile.network} has no residual blocks; gating takes a ResNet's profile")
    return found


def count(profile: profiles.Profile, images: int, dtype: str, path: Path) -> int:
    """Bytes and FLOPs of every layer in every form, without running any; returns the number of rows written to `path`.

    Rows: mode "model", device "none".
    """
    common = {
        **rows.environment(torch.device("cpu")), "device": "none", "threads": None, "suite": "gating", "count": 1,
        "part": "all", "direction": "step", "dtype": dtype, "layout": "channels_last", "size": "full", "mode": "model",
        "mask_profile": profile.label,
    }  # fmt: skip
    found = []
    for layer in layers(profile, profile.image):
        conv = layer.convolution(images, DTYPES[dtype].itemsize)
        gated = Form(conv.in_live < conv.in_full, conv.out_live < conv.out_full)
        ways = {UNION: (conv, Form())}
        ways |= {name: (conv, replace(gated, backend=BACKEND[name])) for name in (SELECTED, EXPANDED, TRITON)}
        ways[NAIVE] = (replace(conv, places=False), replace(gated, backend="naive"))
        for provider, (placed, form) in ways.items():
            form = form if form.gated else Form()
            size, work = bytes_of_step(placed, form, layer.residual), 3 * flops(placed, form)
            found.append(
                {
                    **common, "layer": layer.dense.name, "provider": provider,
                    **columns_of(layer.live if form.gated else layer.union, images, layer.dense.c),
                    "model_bytes": int(size), "flops": int(work),
                    "v100_projection_us": V100.microseconds(size, work, dtype),
                }
            )  # fmt: skip
    rows.append(path, found)
    return len(found)


def run(session: Session) -> None:
    image = 32 if session.quick else session.profile.image
    for layer in layers(session.profile, image):
        if session.wants(layer.dense.name):
            attempt(session, layer.dense.name, lambda layer=layer: _measure(session, layer))  # type: ignore[misc]


def bytes_of_step(conv: Convolution, form: Form, residual: bool) -> float:
    """Of the convolution and what follows it: `traffic`, and what every form moves of the batch norm's output: written,
    its gradient read twice; with a residual that is read, and its gradient written."""
    output = conv.batch * conv.map_out[0] * conv.map_out[1] * conv.out_full * conv.itemsize
    return sum(traffic(conv, form)) + (5 if residual else 3) * output


def _some(session: Session, *size: int, scale: float = 1.0) -> Tensor:
    x = torch.randn(size, device=session.device, dtype=session.dtype) * scale
    return x.contiguous(memory_format=torch.channels_last) if len(size) == 4 else x


def _measure(session: Session, layer: Layer) -> None:
    torch.manual_seed(0)
    images, device = session.images(32), session.device
    conv = layer.convolution(images, session.dtype.itemsize)
    gated = Form(conv.in_live < conv.in_full, conv.out_live < conv.out_full)
    inputs, outputs = (
        ChannelIndex(places, full, device)
        for places, full in ((layer.inputs, conv.in_full), (layer.outputs, conv.out_full))
    )
    both = inputs, outputs
    runs = (
        ChannelIndex(range(inputs.live), inputs.channels, device),
        ChannelIndex(range(outputs.live), outputs.channels, device),
    )

    def tensors(shape: ConvShape, wide_in: int, wide_out: int) -> list[Tensor]:
        """x, weight, residual, and the batch norm's weight and bias."""
        x = _some(session, images, wide_in, shape.h_in, shape.w_in)
        weight = _some(session, shape.k, shape.c, shape.r, shape.s, scale=(shape.c * shape.r * shape.s) ** -0.5)
        made = [x, weight, _some(session, images, wide_out, shape.h, shape.w)]
        made += [torch.rand(wide_out, device=device) + 0.5, torch.rand(wide_out, device=device)]
        return [t.requires_grad_() for t in made]

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, layer.dense.stride, layer.dense.padding)

    def by(backend: str, index: tuple[ChannelIndex, ChannelIndex], moments: bool = False) -> Callable[..., Any]:
        def compute(x: Tensor, weight: Tensor) -> Any:
            return conv2d(
                x, weight, layer.dense.stride, layer.dense.padding,
                input_index=index[0] if gated.gates_input else None, backend=backend, moments=moments,
            )  # fmt: skip

        return compute

    def eager(y: Tensor, r: Tensor, gamma: Tensor, beta: Tensor, relu: bool = True) -> Tensor:
        wide = gamma.to(y.dtype) if y.dtype == torch.float64 else gamma
        y = F.batch_norm(y, None, None, wide, beta.to(wide.dtype), True)
        y = y + r if layer.residual else y
        return F.relu(y) if relu else y

    def fused(y: Any, r: Tensor, gamma: Tensor, beta: Tensor, index: ChannelIndex | None = None) -> Tensor:
        y, statistics = (y[0], y[1:]) if isinstance(y, tuple) else (y, None)
        residual = r if layer.residual else None
        return batch_norm_act(
            y, None, None, gamma, beta, training=True, residual=residual, relu=True, scatter=index,
            statistics=statistics,
        )  # fmt: skip

    def naive(x: Tensor, weight: Tensor) -> Any:
        return conv2d(
            x, weight, layer.dense.stride, layer.dense.padding, backend="naive",
            input_index=inputs if gated.gates_input else None, output_index=outputs if gated.gates_output else None,
        )  # fmt: skip

    def placed(provider: str, index: tuple[ChannelIndex, ChannelIndex]) -> Callable[..., Tensor]:
        convolve = by(BACKEND[provider], index, moments=provider in (TRITON, RUN))
        return lambda x, w, r, g, b: fused(convolve(x, w), r, g, b, index[1] if gated.gates_output else None)

    def exact(index: tuple[ChannelIndex, ChannelIndex] | None, relu: bool = True) -> Callable[..., Tensor]:
        def compute(x: Tensor, weight: Tensor, r: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
            if index is None:
                return eager(plain(x, weight), r, gamma, beta, relu)
            y = plain(x.index_select(1, index[0].index.long()), weight)
            wide = y.new_zeros((images, conv.out_full, *y.shape[2:])).index_copy(1, index[1].index.long(), y)
            return eager(wide, r, gamma, beta, relu)

        return compute

    # provider: what it computes, by which live channels, with which shapes, in which form
    whole: dict[str, tuple[Callable[..., Tensor], tuple[ChannelIndex, ChannelIndex] | None, ConvShape, Form | None]] = {
        DENSE: (lambda x, w, r, g, b: eager(plain(x, w), r, g, b), None, layer.dense, None),
        UNION_EAGER: (lambda x, w, r, g, b: eager(plain(x, w), r, g, b), None, layer.union, Form()),
        UNION: (lambda x, w, r, g, b: fused(plain(x, w), r, g, b), None, layer.union, Form()),
    }
    if gated.gated:
        whole[NAIVE] = (lambda x, w, r, g, b: eager(naive(x, w), r, g, b), both, layer.live,
                        replace(gated, backend="naive"))  # fmt: skip
        offered = [SELECTED, EXPANDED] if gated.gates_input else [EXPANDED]
        if triton_serves(device, session.dtype):
            offered += [TRITON, RUN]
        for provider in offered:
            index = runs if provider == RUN else both
            used = replace(gated, backend=BACKEND[provider])
            whole[provider] = (placed(provider, index), index, layer.live, used)
        # what `auto` would choose, measured by itself
        names = {whole[provider][3]: provider for provider in (UNION, *offered) if provider != RUN}
        roof_cost = RoofCost(session.roof, session.dtype_name)
        as_here = replace(conv, places=device.type == "cuda")  # on a CPU the batch norm places channels in other passes
        choice = choose_form(as_here, [form for form in names if form is not None], roof_cost)
        whole[AUTO] = whole[names[choice.form]]

    shapes = {DENSE: (layer.dense.c, layer.dense.k)}
    dense_conv = replace(
        conv, in_full=layer.dense.c, out_full=layer.dense.k, in_live=layer.dense.c, out_live=layer.dense.k
    )
    arguments: dict[tuple[ConvShape, int, int], list[Tensor]] = {}
    providers: dict[str, Provider] = {}
    references: dict[str, list[Tensor]] = {}
    for provider, (function, live, shape, form) in whole.items():
        wide = shapes.get(provider, (conv.in_full, conv.out_full))
        given = arguments.setdefault((shape, *wide), tensors(shape, *wide))
        cost, counted = (dense_conv, Form()) if form is None else (conv, form)
        cost = replace(cost, places=provider != NAIVE)
        dy = _dy(exact(live, relu=False), given, kink=True)
        providers[provider] = _step(function, given, dy, layer.residual, device)
        references[provider] = _reference(exact(live), given, dy, layer.residual)
        providers[provider] = replace(
            providers[provider],
            what={
                "mask_profile": "dense" if provider == DENSE else session.profile.label,
                **columns_of(shape, images, layer.dense.c),
            },
            flops=3 * flops(cost, counted),
            model_bytes=bytes_of_step(cost, counted, layer.residual),
        )  # fmt: skip
    what = {"layer": layer.dense.name, "dtype": session.dtype_name, "layout": "channels_last", "direction": "step"}

    def compare(p50: Any) -> dict[str, dict[str, Any]]:
        if DENSE not in p50:
            return {}
        full = providers[DENSE].flops or 1.0
        return {name: against_dense((providers[name].flops or 0) / full, p50[name] / p50[DENSE]) for name in p50}

    measure(session, "gating", providers, references, DENSE, what, compare=compare)
    if gated.gated:
        _convolutions(session, layer, conv, gated, by, (both, runs), what)


def _convolutions(
    session: Session,
    layer: Layer,
    conv: Convolution,
    gated: Form,
    by: Callable[..., Callable[..., Tensor]],
    index: tuple[tuple[ChannelIndex, ChannelIndex], tuple[ChannelIndex, ChannelIndex]],
    what: dict[str, Any],
) -> None:
    """Part `conv`: the convolution alone, of a wide input to its live outputs, beside the one that needs no index."""
    shape, images = layer.live, conv.batch
    weight = _some(session, shape.k, shape.c, shape.r, shape.s, scale=(shape.c * shape.r * shape.s) ** -0.5)
    weight.requires_grad_()
    wide, narrow = (_some(session, images, c, shape.h_in, shape.w_in).requires_grad_() for c in (conv.in_full, shape.c))

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, None, shape.stride, shape.padding)

    offered: dict[str, tuple[Callable[..., Tensor], Tensor, ChannelIndex | None]] = {NO_INDEX: (plain, narrow, None)}
    names = [SELECTED, EXPANDED] if gated.gates_input else []
    if triton_serves(session.device, session.dtype):
        names += [TRITON, RUN] if gated.gates_input else [TRITON]
    for name in names:
        chosen = index[name == RUN]
        offered[name] = (by(BACKEND[name], chosen), wide, chosen[0] if gated.gates_input else None)
    providers, references = {}, {}
    for name, (function, x, places) in offered.items():
        form = Form() if name == NO_INDEX else replace(gated, backend=BACKEND[name])
        alone = replace(conv, in_full=conv.in_live, out_full=conv.out_live) if name == NO_INDEX else conv
        own = traffic(alone, form).own

        def reference(x: Tensor, w: Tensor, places: ChannelIndex | None = places) -> Tensor:
            return plain(x if places is None else x.index_select(1, places.index.long()), w)

        dy = _dy(reference, [x, weight])
        providers[name] = replace(
            _step(function, [x, weight], dy, False, session.device),
            what={"part": "conv", "mask_profile": session.profile.label, **columns_of(shape, images, layer.dense.c)},
            flops=3 * flops(alone, form), model_bytes=own,
        )  # fmt: skip
        references[name] = _reference(reference, [x, weight], dy, False)
    measure(session, "gating", providers, references, NO_INDEX, what)


def _dy(function: Callable[..., Tensor], given: list[Tensor], kink: bool = False) -> Tensor:
    """A gradient of what `function` gives; with a `kink` at zero behind it, none near there: rounding decides the side
    that a value falls on, and either gradient is right."""
    with torch.no_grad():
        y = function(*(tensor.detach().double() for tensor in given))
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator).to(device=y.device, dtype=given[0].dtype)
    if kink:
        dy = dy.masked_fill_(y.abs() < 1e-2, 0)
    return dy.contiguous(memory_format=torch.channels_last)


def _used(given: list[Tensor], residual: bool) -> list[Tensor]:
    return given if residual or len(given) < 3 else [*given[:2], *given[3:]]


def _step(
    function: Callable[..., Tensor], given: list[Tensor], dy: Tensor, residual: bool, device: torch.device
) -> Provider:
    """Forward and backward in one call."""
    wanted = _used(given, residual)

    def step() -> tuple[Tensor, tuple[Tensor, ...]]:
        y = function(*given)
        return y, torch.autograd.grad(y, wanted, dy)

    def results() -> list[Tensor]:
        with prepared(device):
            y, gradients = step()
        return [y.detach(), *gradients]

    return Provider(step, results)


def _reference(function: Callable[..., Tensor], given: list[Tensor], dy: Tensor, residual: bool) -> list[Tensor]:
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    y = function(*wide)
    return [y.detach(), *torch.autograd.grad(y, _used(wide, residual), dy.double())]
