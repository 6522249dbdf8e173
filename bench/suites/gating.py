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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import profiles, rows
from bench.harness import Provider, Session, against_dense, as_time, attempt, measure, prepared
from bench.profiles import ConvShape
from bench.roof import DTYPES, V100
from bench.suites.blocks import Layer, distinct, layers
from bench.suites.conv import columns_of
from bench.timing import check
from prunetrain_kernels.cost.convolution import Convolution, Form, RoofCost, flops, traffic
from prunetrain_kernels.graph.gating import choose_form
from prunetrain_kernels.ops.batch_norm_act import batch_norm_act
from prunetrain_kernels.ops.channel_index import ChannelIndex
from prunetrain_kernels.ops.conv2d import conv2d, triton_serves

DENSE, UNION, UNION_EAGER, NAIVE = "dense", "union", "union (eager)", "gating (naive)"
SELECTED, EXPANDED, TRITON, RUN = "gating (selected)", "gating (expanded)", "gating (triton)", "gating (triton, run)"
AUTO, NO_INDEX = "auto", "no index"
SUMMED = ("model_bytes", "flops", "v100_projection_us")
BACKEND = {SELECTED: "naive", EXPANDED: "expanded", TRITON: "triton", RUN: "triton"}


def count(profile: profiles.Profile, images: int, dtype: str) -> list[dict[str, Any]]:
    """Rows with bytes and FLOPs of every layer in every form, without running any: mode "model", device "none"."""
    common = {
        **rows.environment(torch.device("cpu")), "device": "none", "threads": None, "suite": "gating", "count": 1,
        "part": "all", "direction": "step", "dtype": dtype, "layout": "channels_last", "size": "full", "mode": "model",
        "mask_profile": profile.label,
    }  # fmt: skip
    lines = []
    for layer in layers(profile, profile.image):
        conv = layer.convolution(images, DTYPES[dtype].itemsize)
        gated = _gated(conv)
        ways = {UNION: (conv, Form())}
        ways |= {name: (conv, replace(gated, backend=BACKEND[name])) for name in (SELECTED, EXPANDED, TRITON)}
        ways[NAIVE] = (replace(conv, places=False), replace(gated, backend="naive"))
        for provider, (placed, form) in ways.items():
            form = form if form.gated else Form()
            size, work = bytes_of_step(placed, form, residual=layer.residual), 3 * flops(placed, form)
            lines.append(
                {
                    **common, "layer": layer.dense.name, "provider": provider,
                    **columns_of(layer.live if form.gated else layer.union, images, layer.dense.c),
                    "model_bytes": int(size), "flops": int(work),
                    "v100_projection_us": V100.microseconds(size, work, dtype),
                }
            )  # fmt: skip
    return lines


def sums(lines: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `count` summed over the layers, as text: a line per form, its bytes and FLOPs beside union's."""
    total = {line["provider"]: dict.fromkeys(SUMMED, 0.0) for line in lines}
    for line in lines:
        for column in SUMMED:
            total[line["provider"]][column] += line[column] or 0.0
    union = total[UNION]
    text = [f"{'form':<20} {'bytes':>10} {'of union':>9} {'FLOPs':>14} {'of union':>9} {'V100 projection':>16}"]
    for provider, value in total.items():
        size, work, time = (value[column] for column in SUMMED)
        text.append(
            f"{provider:<20} {size / 1e9:>7.2f} GB {size / union['model_bytes']:>9.1%} {work / 1e12:>8.3f} TFLOP "
            f"{work / union['flops']:>9.1%} {as_time(time):>16}"
        )
    return "\n".join(text)


def run(session: Session) -> None:
    image = 32 if session.quick else session.profile.image
    chosen = layers(session.profile, image)
    for layer in distinct(chosen) if session.few else chosen:
        if session.wants(layer.dense.name):
            attempt(session, layer.dense.name, lambda layer=layer: _measure(session, layer))  # type: ignore[misc]


def bytes_of_step(conv: Convolution, form: Form, *, residual: bool) -> float:
    """Bytes that the convolution and what follows it move: `traffic`, and what every form moves of the batch norm's
    output, which is written and its gradient read twice; a residual is read, and its gradient written."""
    output = conv.batch * conv.map_out[0] * conv.map_out[1] * conv.out_full * conv.itemsize
    return sum(traffic(conv, form)) + (5 if residual else 3) * output


def _gated(conv: Convolution) -> Form:
    """Gating on the sides of a layer where some channels are dead."""
    return Form(conv.in_live < conv.in_full, conv.out_live < conv.out_full)


# -- what is timed -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Indices:
    """The live channels of a layer's input and output; also as ranges, which reconfiguration puts them into."""

    scattered: tuple[ChannelIndex, ChannelIndex]
    ranges: tuple[ChannelIndex, ChannelIndex]

    def of(self, provider: str) -> tuple[ChannelIndex, ChannelIndex]:
        return self.ranges if provider == RUN else self.scattered


@dataclass(frozen=True)
class Piece:
    """One layer with what its functions need: batch, device, dtype, its form and its live channels."""

    layer: Layer
    conv: Convolution
    gated: Form
    index: Indices
    session: Session

    def plain(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution of all of x, by PyTorch."""
        return F.conv2d(x, weight, None, self.layer.dense.stride, self.layer.dense.padding)

    def by(
        self, backend: str, index: tuple[ChannelIndex, ChannelIndex], *, moments: bool = False
    ) -> Callable[[Tensor, Tensor], Any]:
        """The convolution to the live outputs, of the live inputs by index, by one of `conv2d`'s backends."""

        def compute(x: Tensor, weight: Tensor) -> Any:
            return conv2d(
                x, weight, self.layer.dense.stride, self.layer.dense.padding,
                input_index=index[0] if self.gated.gates_input else None, backend=backend, moments=moments,
            )  # fmt: skip

        return compute

    def naive(self, x: Tensor, weight: Tensor) -> Any:
        """Gating as the paper does it: index_select, convolution, index_copy."""
        inputs, outputs = self.index.scattered
        return conv2d(
            x, weight, self.layer.dense.stride, self.layer.dense.padding, backend="naive",
            input_index=inputs if self.gated.gates_input else None,
            output_index=outputs if self.gated.gates_output else None,
        )  # fmt: skip

    def eager(self, y: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, *, relu: bool = True) -> Tensor:
        """The operators behind the convolution, by PyTorch: batch norm, the residual's sum if there is one, ReLU."""
        wide = gamma.to(y.dtype) if y.dtype == torch.float64 else gamma
        y = F.batch_norm(y, None, None, wide, beta.to(wide.dtype), training=True)
        y = y + residual if self.layer.residual else y
        return F.relu(y) if relu else y

    def fused(
        self, y: Any, residual: Tensor, gamma: Tensor, beta: Tensor, scatter: ChannelIndex | None = None
    ) -> Tensor:
        """The same in one operator; `y` may be the convolution's output with its statistics, (y, mean, M2)."""
        y, statistics = (y[0], y[1:]) if isinstance(y, tuple) else (y, None)
        return batch_norm_act(
            y, None, None, gamma, beta, training=True, residual=residual if self.layer.residual else None, relu=True,
            scatter=scatter, statistics=statistics,
        )  # fmt: skip

    def placed(self, provider: str) -> Callable[..., Tensor]:
        """The whole layer in a gated form whose fused batch norm places the outputs."""
        index = self.index.of(provider)
        convolve = self.by(BACKEND[provider], index, moments=provider in (TRITON, RUN))
        scatter = index[1] if self.gated.gates_output else None
        return lambda x, weight, r, gamma, beta: self.fused(convolve(x, weight), r, gamma, beta, scatter)

    def exact(self, index: tuple[ChannelIndex, ChannelIndex] | None, *, relu: bool = True) -> Callable[..., Tensor]:
        """The whole layer by PyTorch's operators, for float64: of all channels, or of the live ones by index."""

        def compute(x: Tensor, weight: Tensor, r: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
            if index is None:
                return self.eager(self.plain(x, weight), r, gamma, beta, relu=relu)
            y = self.plain(x.index_select(1, index[0].index.long()), weight)
            wide = y.new_zeros((y.shape[0], self.conv.out_full, *y.shape[2:]))
            return self.eager(wide.index_copy(1, index[1].index.long(), y), r, gamma, beta, relu=relu)

        return compute


@dataclass(frozen=True)
class Way:
    """One way to compute the whole layer.

    Attributes:
        function: of x, weight, residual, and the batch norm's weight and bias.
        index: the live channels, or None where all of x's are computed.
        shape: of the convolution whose weight this way has.
        width: input and output channels of the tensors around the layer.
        form: what the cost model counts; None for the layer before pruning.
    """

    function: Callable[..., Tensor]
    index: tuple[ChannelIndex, ChannelIndex] | None
    shape: ConvShape
    width: tuple[int, int]
    form: Form | None


def _measure(session: Session, layer: Layer) -> None:
    """One layer: every way timed beside the others, then the convolutions alone."""
    torch.manual_seed(0)
    piece = _piece(session, layer)
    ways = _ways(piece)
    providers, references = _providers(piece, ways)
    what = {"layer": layer.dense.name, "dtype": session.dtype_name, "layout": "channels_last", "direction": "step"}

    def compare(p50: Mapping[str, float]) -> dict[str, dict[str, Any]]:
        if DENSE not in p50:
            return {}
        full = providers[DENSE].flops or 1.0
        return {name: against_dense((providers[name].flops or 0) / full, p50[name] / p50[DENSE]) for name in p50}

    # the pruned layer is another than the dense one, and so is PyTorch's error in it
    granted = check(providers[UNION_EAGER].outputs(), references[UNION_EAGER])
    measure(session, "gating", providers, references, DENSE, what=what, compare=compare, granted=granted)
    if piece.gated.gated:
        _convolutions(piece, what)


def _piece(session: Session, layer: Layer) -> Piece:
    conv = layer.convolution(session.images(32), session.dtype.itemsize)
    sides = ((layer.inputs, conv.in_full), (layer.outputs, conv.out_full))
    inputs, outputs = (ChannelIndex(live, full, session.device) for live, full in sides)
    first_in, first_out = (ChannelIndex(range(side.live), side.channels, session.device) for side in (inputs, outputs))
    return Piece(layer, conv, _gated(conv), Indices((inputs, outputs), (first_in, first_out)), session)


def _ways(piece: Piece) -> dict[str, Way]:
    """Every way by its provider's name: dense, under union, and in each form of gating that this device serves."""
    layer, conv = piece.layer, piece.conv
    kept = conv.in_full, conv.out_full

    def by_pytorch(x: Tensor, weight: Tensor, r: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return piece.eager(piece.plain(x, weight), r, gamma, beta)

    def by_us(x: Tensor, weight: Tensor, r: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return piece.fused(piece.plain(x, weight), r, gamma, beta)

    ways = {
        DENSE: Way(by_pytorch, None, layer.dense, (layer.dense.c, layer.dense.k), None),
        UNION_EAGER: Way(by_pytorch, None, layer.union, kept, Form()),
        UNION: Way(by_us, None, layer.union, kept, Form()),
    }
    if not piece.gated.gated:
        return ways

    def as_the_paper(x: Tensor, weight: Tensor, r: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return piece.eager(piece.naive(x, weight), r, gamma, beta)

    naive = replace(piece.gated, backend="naive")
    ways[NAIVE] = Way(as_the_paper, piece.index.scattered, layer.live, kept, naive)
    offered = _offered(piece)
    for provider in offered:
        form = replace(piece.gated, backend=BACKEND[provider])
        ways[provider] = Way(piece.placed(provider), piece.index.of(provider), layer.live, kept, form)
    ways[AUTO] = ways[_chosen(piece, ways, offered)]
    return ways


def _offered(piece: Piece) -> list[str]:
    """Providers of gating here: selecting needs an index on the input's side, Triton's forms need tensor cores."""
    offered = [SELECTED, EXPANDED] if piece.gated.gates_input else [EXPANDED]
    if triton_serves(piece.session.device, piece.session.dtype):
        offered += [TRITON, RUN]
    return offered


def _chosen(piece: Piece, ways: Mapping[str, Way], offered: Sequence[str]) -> str:
    """The provider of the form that `policy="auto"` chooses on this session's roof."""
    names = {ways[provider].form: provider for provider in (UNION, *offered) if provider != RUN}
    roof_cost = RoofCost(piece.session.roof, piece.session.dtype_name)
    # on a CPU the batch norm places channels in other passes
    here = replace(piece.conv, places=piece.session.device.type == "cuda")
    return names[choose_form(here, [form for form in names if form is not None], roof_cost).form]


def _providers(piece: Piece, ways: Mapping[str, Way]) -> tuple[dict[str, Provider], dict[str, list[Tensor]]]:
    """A provider for each way, and the results in float64. Ways of equal shapes share their tensors."""
    layer, conv = piece.layer, piece.conv
    before_pruning = replace(
        conv, in_full=layer.dense.c, out_full=layer.dense.k, in_live=layer.dense.c, out_live=layer.dense.k
    )
    arguments: dict[tuple[ConvShape, tuple[int, int]], list[Tensor]] = {}
    providers: dict[str, Provider] = {}
    references: dict[str, list[Tensor]] = {}
    for provider, way in ways.items():
        key = way.shape, way.width
        tensors = arguments[key] if key in arguments else arguments.setdefault(key, _arguments(piece, way))
        cost = replace(before_pruning if way.form is None else conv, places=provider != NAIVE)
        form = way.form or Form()
        dy = _dy(piece.exact(way.index, relu=False), tensors, kink=True)
        references[provider] = _reference(piece.exact(way.index), tensors, dy, residual=layer.residual)
        providers[provider] = replace(
            _step(way.function, tensors, dy, residual=layer.residual, device=piece.session.device),
            what={
                "mask_profile": "dense" if provider == DENSE else piece.session.profile.label,
                **columns_of(way.shape, conv.batch, layer.dense.c),
            },
            flops=3 * flops(cost, form),
            model_bytes=bytes_of_step(cost, form, residual=layer.residual),
        )  # fmt: skip
    return providers, references


def _some(session: Session, *size: int, scale: float = 1.0) -> Tensor:
    """Normal values in the session's dtype, channels_last if there are four dimensions."""
    x = torch.randn(size, device=session.device, dtype=session.dtype) * scale
    return x.contiguous(memory_format=torch.channels_last) if len(size) == 4 else x


def _weight(session: Session, shape: ConvShape) -> Tensor:
    return _some(session, shape.k, shape.c, shape.r, shape.s, scale=(shape.c * shape.r * shape.s) ** -0.5)


def _arguments(piece: Piece, way: Way) -> list[Tensor]:
    """x, weight, residual, and the batch norm's weight and bias, all requiring gradients."""
    session, shape, images, (wide_in, wide_out) = piece.session, way.shape, piece.conv.batch, way.width
    tensors = [
        _some(session, images, wide_in, shape.h_in, shape.w_in),
        _weight(session, shape),
        _some(session, images, wide_out, shape.h, shape.w),
        torch.rand(wide_out, device=session.device) + 0.5,
        torch.rand(wide_out, device=session.device),
    ]
    return [tensor.requires_grad_() for tensor in tensors]


def _convolutions(piece: Piece, what: Mapping[str, Any]) -> None:
    """Part `conv`: the convolution alone, of a wide input to its live outputs, beside the one that needs no index."""
    session, conv, shape = piece.session, piece.conv, piece.layer.live
    weight = _weight(session, shape).requires_grad_()
    wide, narrow = (
        _some(session, conv.batch, c, shape.h_in, shape.w_in).requires_grad_() for c in (conv.in_full, shape.c)
    )
    offered = _offered(piece)
    if not piece.gated.gates_input:  # without an index on the input's side only Triton's form is another convolution
        offered = [name for name in offered if name == TRITON]
    providers, references = {}, {}
    for name in (NO_INDEX, *offered):
        function: Callable[[Tensor, Tensor], Any] = piece.plain
        form, counted = Form(), replace(conv, in_full=conv.in_live, out_full=conv.out_live)
        x, places = narrow, None
        if name != NO_INDEX:
            index = piece.index.of(name)
            function = piece.by(BACKEND[name], index)
            form, counted = replace(piece.gated, backend=BACKEND[name]), conv
            x, places = wide, index[0] if piece.gated.gates_input else None

        def reference(x: Tensor, weight: Tensor, places: ChannelIndex | None = places) -> Tensor:
            return piece.plain(x if places is None else x.index_select(1, places.index.long()), weight)

        dy = _dy(reference, [x, weight])
        references[name] = _reference(reference, [x, weight], dy, residual=False)
        columns = columns_of(shape, conv.batch, piece.layer.dense.c)
        providers[name] = replace(
            _step(function, [x, weight], dy, residual=False, device=session.device),
            what={"part": "conv", "mask_profile": session.profile.label, **columns},
            flops=3 * flops(counted, form), model_bytes=traffic(counted, form).kernels,
        )  # fmt: skip
    measure(session, "gating", providers, references, NO_INDEX, what=what)


def _dy(function: Callable[..., Tensor], tensors: list[Tensor], *, kink: bool = False) -> Tensor:
    """A gradient of what `function` gives; with a `kink` at zero behind it, none near there: rounding decides the side
    that a value falls on, and either gradient is right."""
    with torch.no_grad():
        y = function(*(tensor.detach().double() for tensor in tensors))
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator).to(device=y.device, dtype=tensors[0].dtype)
    if kink:
        dy = dy.masked_fill_(y.abs() < 1e-2, 0)
    return dy.contiguous(memory_format=torch.channels_last)


def _used(tensors: list[Tensor], *, residual: bool) -> list[Tensor]:
    """The tensors that gradients are taken of: without a residual's sum, all but the residual."""
    return tensors if residual or len(tensors) < 3 else [*tensors[:2], *tensors[3:]]


def _step(
    function: Callable[..., Tensor], tensors: list[Tensor], dy: Tensor, *, residual: bool, device: torch.device
) -> Provider:
    """Forward and backward in one call."""
    wanted = _used(tensors, residual=residual)

    def step() -> tuple[Tensor, tuple[Tensor, ...]]:
        y = function(*tensors)
        return y, torch.autograd.grad(y, wanted, dy)

    def results() -> list[Tensor]:
        with prepared(device):
            y, gradients = step()
        return [y.detach(), *gradients]

    return Provider(step, results)


def _reference(function: Callable[..., Tensor], tensors: list[Tensor], dy: Tensor, *, residual: bool) -> list[Tensor]:
    """Output and gradients in float64."""
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    y = function(*wide)
    return [y.detach(), *torch.autograd.grad(y, _used(wide, residual=residual), dy.double())]
