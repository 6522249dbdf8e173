"""Which calls of which operators show every kernel of the package, and what vector widths they promise.

`cases()` feeds the suite `kernels`; `reuse()` lists the calls that must share one binary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.offline import Case, Promise, Reuse
from prunetrain_kernels.ops import batch_norm_cooperative as cooperative
from prunetrain_kernels.ops.batch_norm_act import batch_norm_act
from prunetrain_kernels.ops.channel_index import ChannelIndex, channel_gather, channel_scatter, channel_scatter_add
from prunetrain_kernels.ops.conv2d import conv2d
from prunetrain_kernels.ops.group_lasso import Groups, add_group_lasso_gradient_, group_lasso, slice_statistics
from prunetrain_kernels.optim import SGD, ProximalSGD
from prunetrain_kernels.regularizer import GroupLasso

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}

FAMILIES = ("lasso", "sgd", "bn", "index", "conv")
LOADS, STORES, BOTH = Promise(load=16), Promise(store=16), Promise(load=16, store=16)


def cases() -> list[Case]:
    """Every operator in every dtype and layout, with every combination of flags that makes another kernel."""
    return [case for family in FAMILIES for case in cases_of(family)]


def cases_of(family: str) -> Iterator[Case]:
    """The cases of one of FAMILIES, one by one: each makes its tensors as it is asked for, on the default device."""
    makers = (_lasso_cases, _sgd_cases, _batch_norm_cases, _channel_index_cases, _convolution_cases)
    return dict(zip(FAMILIES, makers, strict=True))[family]()


def reuse() -> list[Reuse]:
    """Changes of shape, as a reconfiguration makes them, that must compile nothing."""
    return [*_lasso_reuse(), *_sgd_reuse(), *_batch_norm_reuse(), *_channel_index_reuse(), *_convolution_reuse()]


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def _activation(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, offset: int = 0, *, derive: bool = False
) -> Tensor:
    """Zeros; `offset` elements away from 16-byte alignment."""
    numel = torch.Size(shape).numel()
    strides = torch.empty(shape, device="meta").contiguous(memory_format=LAYOUTS[layout]).stride()
    return torch.zeros(numel + offset, dtype=dtype)[offset:].as_strided(shape, strides).requires_grad_(derive)


def _index(live: Sequence[int], channels: int) -> ChannelIndex:
    """Live channels where the other tensors are made: on the default device."""
    return ChannelIndex(live, channels, torch.get_default_device())


# -- group lasso, SGD --------------------------------------------------------------------------------------------------


def _four(dtype: torch.dtype) -> Promise:
    """Four elements a thread, whatever their size: what counts are master weights, which are fp32."""
    return Promise(load=4 * dtype.itemsize, store=4 * dtype.itemsize)


def _weights(dtype: torch.dtype, widths: tuple[int, int]) -> list[Tensor]:
    """Weights of a convolution in either layout, of one of 1 x 1, of a linear layer behind a flatten."""
    a, b = widths
    shapes = [(a, b, 3, 3), (b, a, 3, 3), (b, a, 1, 1), (10, 4 * b)]
    weights = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    weights[1] = weights[1].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    return weights


_GROUPS = [Groups(), Groups(), Groups(inputs=False), Groups(block=4, outputs=False)]


def _penalty(weights: list[Tensor]) -> None:
    group_lasso(weights, _GROUPS).backward()


def _add_gradient(weights: list[Tensor]) -> None:
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    add_group_lasso_gradient_(weights, _GROUPS, 0.1)


def _lasso_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        name, weights = _name(dtype), _weights(dtype, (64, 64))
        norms = {"_norms_kernel": Promise(load=4 * dtype.itemsize)}
        gradient = norms | {"_gradient_kernel": _four(dtype)}
        yield Case(f"slice_statistics {name}", dtype, partial(slice_statistics, weights, _GROUPS), norms)
        yield Case(f"group_lasso, backward {name}", dtype, partial(_penalty, weights), gradient)
        yield Case(f"add_group_lasso_gradient_ {name}", dtype, partial(_add_gradient, weights), gradient)


def _lasso_reuse() -> Iterator[Reuse]:
    def calls(widths: tuple[int, int], count: int) -> Callable[[], None]:
        def call() -> None:
            weights = _weights(torch.float32, widths)[:count]
            slice_statistics(weights, _GROUPS[:count])
            group_lasso(weights, _GROUPS[:count]).backward()
            for weight in weights:
                weight.grad = torch.zeros_like(weight)
            add_group_lasso_gradient_(weights, _GROUPS[:count], 0.2)

        return call

    yield Reuse(
        "group_lasso with 64 channels, then 61, 37, 1, then fewer layers",
        calls((64, 64), 4),
        (calls((61, 64), 4), calls((37, 61), 4), calls((1, 1), 4), calls((37, 64), 3), calls((64, 61), 1)),
    )


class _Network(nn.Module):
    """A convolution, batch norm and a linear layer: weights with slices, and parameters without."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 64, 3, padding=1)
        self.fc = nn.Linear(64 * 4, 10)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.conv2(self.bn(self.conv1(x))), 1))


def _step(
    optimizer_class: type[SGD], width: int, dtype: torch.dtype, *, lasso: bool, scaled: bool = False
) -> Callable[[], None]:
    """Two steps of an optimizer: the first measures the norms, the second finds them."""
    model = _Network(width, torch.float32)
    regularizer = GroupLasso(model, (torch.zeros(1, 3, 2, 2),)) if lasso else None
    model.to(dtype)
    optimizer = optimizer_class(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    if regularizer is not None:
        optimizer.regularize_with(regularizer, 0.1)

    def run() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        if scaled:  # as torch.amp.GradScaler does
            vars(optimizer).update(grad_scale=torch.ones(()), found_inf=torch.zeros(()))
        for _ in range(2):
            optimizer.step()

    return run


def _sgd_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        name, update = _name(dtype), {"_sgd_kernel": _four(dtype)}
        proximal = update | {"_soft_threshold_kernel": _four(dtype)}
        yield Case(f"SGD {name}", dtype, _step(SGD, 64, dtype, lasso=False), update)
        yield Case(f"SGD + lasso {name}", dtype, _step(SGD, 64, dtype, lasso=True), update)
        yield Case(f"ProximalSGD {name}", dtype, _step(ProximalSGD, 64, dtype, lasso=True), proximal)
    single = torch.float32  # what weights are where gradients are scaled
    update = {"_sgd_kernel": _four(single)}
    proximal = update | {"_soft_threshold_kernel": _four(single)}
    yield Case("SGD, GradScaler fp32", single, _step(SGD, 64, single, lasso=False, scaled=True), update)
    yield Case("SGD + lasso, GradScaler fp32", single, _step(SGD, 64, single, lasso=True, scaled=True), update)
    yield Case(
        "ProximalSGD, GradScaler fp32", single, _step(ProximalSGD, 64, single, lasso=True, scaled=True), proximal
    )


def _sgd_reuse() -> Iterator[Reuse]:
    for optimizer in (SGD, ProximalSGD):
        yield Reuse(
            f"{optimizer.__name__} + lasso of a layer of 64 channels, then 61, 37, 1",
            _step(optimizer, 64, torch.float32, lasso=True),
            tuple(_step(optimizer, width, torch.float32, lasso=True) for width in (61, 37, 1)),
        )


# -- batch norm with what follows it -----------------------------------------------------------------------------------


def _batch_norm(
    channels: int,
    dtype: torch.dtype,
    layout: str,
    *,
    training: bool = True,
    relu: bool = False,
    residual: bool = False,
    live: Sequence[int] | None = None,
    padded: bool = False,
    statistics: bool = False,
    parameters: torch.dtype | None = torch.float32,
    batch: int = 8,
    side: int = 14,
    offset: int = 0,
    together: bool = False,
) -> Callable[[], None]:
    """Forward and backward; x has the `live` channels, `padded` for parameters of all, None for no affine ones;
    `together`: in one launch each, if there is a plan for it."""
    width = channels if live is None else len(live)
    scatter = None if live is None else _index(live, channels)

    def run() -> None:
        x = _activation((batch, width, side, side), dtype, layout, offset, derive=True)
        full = (batch, channels, side, side)
        r = _activation(full, dtype, layout, offset, derive=True) if residual else None
        count = channels if padded else width
        mean, var = torch.zeros(count), torch.ones(count)
        moments = (torch.zeros(width), torch.ones(width)) if statistics else None
        weight, bias = (
            (None, None)
            if parameters is None
            else (torch.zeros(count, dtype=parameters, requires_grad=True) for _ in range(2))
        )
        options: dict[str, Any] = {"training": training, "residual": r, "relu": relu}
        with _cooperative(together):
            y = batch_norm_act(x, mean, var, weight, bias, **options, scatter=scatter, statistics=moments)
            y.backward(_activation(full, dtype, layout, offset))

    return run


@contextmanager
def _cooperative(together: bool) -> Iterator[None]:  # noqa: FBT001
    before, cooperative.ENABLED = cooperative.ENABLED, together
    try:
        yield
    finally:
        cooperative.ENABLED = before


def _run(live: int, first: int = 0) -> range:
    """Live channels that need no map."""
    return range(first, first + live)


def _apart(live: int) -> Sequence[int]:
    """Live channels that need one, unless there is one or none."""
    return range(live)[::-1]


def _batch_norm_cases() -> Iterator[Case]:
    always = {"_statistics_kernel": LOADS, "_apply_kernel": BOTH, "_sums_kernel": LOADS}
    always |= {"_fold_statistics_kernel": Promise(no_division=True), "_fold_sums_kernel": Promise(no_division=True)}
    dense = always | {"_gradient_kernel": BOTH}
    evaluated = {"_apply_kernel": BOTH, "_gradient_kernel": BOTH}
    flags: dict[str, dict[str, Any]] = {
        "BN": {},
        "BN + ReLU": {"relu": True},
        "BN + add": {"residual": True},
        "BN + add + ReLU": {"residual": True, "relu": True},
    }
    for dtype in DTYPES:
        for layout in LAYOUTS:
            what = f"{_name(dtype)} {layout}"
            for name, chosen in flags.items():
                yield Case(f"{name} {what}", dtype, _batch_norm(64, dtype, layout, **chosen), dense)
            # x and dx are at the mercy of the map there; the residual, y, dy and the residual's gradient are not
            run = _batch_norm(64, dtype, layout, live=_apart(32), residual=True, relu=True)
            yield Case(f"BN + scatter + add + ReLU {what}", dtype, run, dense)
            run = _batch_norm(64, dtype, layout, live=_apart(32), residual=True)
            yield Case(f"BN + scatter + add {what}", dtype, run, dense | {"_gradient_kernel": LOADS})
            yield from _gated_batch_norm_cases(dtype, layout)
        for name, chosen in flags.items():
            run = _batch_norm(64, dtype, "NHWC", training=False, **chosen)
            yield Case(f"{name} {_name(dtype)}, eval", dtype, run, evaluated)
    both: dict[str, Any] = {"residual": True, "relu": True}
    half = torch.float16
    yield Case("BN + ReLU fp16, no affine", half, _batch_norm(64, half, "NHWC", relu=True, parameters=None), dense)
    yield Case(
        "BN + ReLU fp16, fp16 parameters", half, _batch_norm(64, half, "NHWC", relu=True, parameters=half), dense
    )
    yield Case("BN + add + ReLU fp16, misaligned", half, _batch_norm(64, half, "NHWC", offset=1, **both))
    yield from _cooperative_cases()


def _cooperative_cases() -> Iterator[Case]:
    """Small activations: of each size of a tile, of planes, of a number of channels that is no multiple of 8, gated."""
    whole = Promise(load=8, store=8, no_division=True)  # of 16-bit elements four at a time, by intention
    both = {"_forward_kernel": whole, "_backward_kernel": whole}
    placed = {name: Promise(no_division=True) for name in both}
    flags: dict[str, dict[str, Any]] = {" + ReLU": {"relu": True}, " + add + ReLU": {"residual": True, "relu": True}}
    shapes: dict[str, dict[str, Any]] = {
        "8 x 64": {"channels": 64}, "64 x 32, 16 x 16": {"channels": 32, "batch": 64, "side": 16},
        "128 x 16, 32 x 32": {"channels": 16, "batch": 128, "side": 32}, "8 x 37": {"channels": 37},
    }  # fmt: skip
    some = [(torch.float16, "NHWC", name, shape) for name in flags for shape in shapes]
    some += [(torch.float16, "NCHW", " + add + ReLU", "64 x 32, 16 x 16")]
    some += [(torch.float32, "NHWC", " + add + ReLU", shape) for shape in ("8 x 64", "64 x 32, 16 x 16")]
    some += [(torch.bfloat16, "NHWC", " + add + ReLU", "128 x 16, 32 x 32")]
    for dtype, layout, name, shape in some:
        run = _batch_norm(dtype=dtype, layout=layout, together=True, **flags[name], **shapes[shape])
        # where the largest tiles are not, the largest of these takes three launches
        promised = {} if shape.startswith("128") else both
        yield Case(f"cooperative BN{name} {_name(dtype)} {layout}, {shape}", dtype, run, promised)
    for place, live in {"map": _apart(32), "run": _run(29, 3), "run of vectors": _run(32, 16)}.items():
        for padded in (False, True):
            run = _batch_norm(
                64, torch.float16, "NHWC", live=live, padded=padded, residual=True, relu=True, together=True, batch=40
            )  # fmt: skip
            what = "gated" if padded else "scatter"
            yield Case(f"cooperative BN + add + ReLU fp16, {what} by {place}", torch.float16, run, placed)
    half = torch.float16
    run = _batch_norm(64, half, "NHWC", relu=True, parameters=None, together=True)
    yield Case("cooperative BN + ReLU fp16, no affine", half, run, both)


def _gated_batch_norm_cases(dtype: torch.dtype, layout: str) -> Iterator[Case]:
    """Behind a gated convolution: parameters of all 64 channels, x of 32, or of 29."""
    what = f"{_name(dtype)} {layout}"
    places = {"map": _apart(32), "run": _run(29, 3), "run of vectors": _run(32, 16)}
    flags: dict[str, dict[str, Any]] = {
        "BN": {},
        "BN + ReLU": {"relu": True},
        "BN + add + ReLU": {"residual": True, "relu": True},
    }
    if layout == "NCHW":  # one run is as another there: bounds are those of maps, of 14 x 14 pixels
        places["run"] = _run(32, 3)
    for place, live in places.items():
        free = place == "run of vectors"
        for name, chosen in flags.items():
            passes = {"_apply_kernel": BOTH if free else STORES, "_sums_kernel": LOADS}
            passes["_gradient_kernel"] = BOTH if free else BOTH if "add" in name else LOADS
            for of, training in (("", True), (", eval", False)):
                if not training and dtype != torch.float16:
                    continue
                run = _batch_norm(64, dtype, layout, live=live, padded=True, training=training, **chosen)
                yield Case(f"gated {name} {what}, {place}{of}", dtype, run, passes)
        run = _batch_norm(64, dtype, layout, live=live, padded=True, statistics=True, **flags["BN + ReLU"])
        yield Case(f"gated BN + ReLU {what}, {place}, statistics given", dtype, run)
        run = _batch_norm(64, dtype, layout, live=live, residual=True, relu=True)
        yield Case(f"BN + scatter + add + ReLU {what}, {place}", dtype, run)


def _batch_norm_reuse() -> Iterator[Reuse]:
    def calls(channels: int, layout: str, live: int, batch: int = 8, side: int = 14) -> Callable[[], object]:
        half = torch.float16
        chosen: list[dict[str, Any]] = [{}, {"relu": True}, {"residual": True, "relu": True}]
        chosen += [{"training": False, "relu": True}]
        for places in (_apart(live), _run(live, channels - live)):
            chosen += [{"live": places, "residual": True, "relu": True}, {"live": places, "padded": True, "relu": True}]
        return lambda: [_batch_norm(channels, half, layout, batch=batch, side=side, **some)() for some in chosen]

    def first(layout: str) -> Callable[[], object]:
        """A run with vectors, one without, and no channel that is not live; then shapes whose channels have up to 128,
        256 and more slots, for which a fold has a tile each."""
        some = [calls(64, layout, 32), calls(64, layout, 31, side=13), calls(64, layout, 64)]
        some += [calls(64, layout, 16, batch=1, side=10), calls(40, layout, 20, batch=48, side=7)]
        some += [calls(16, layout, 8, batch=32, side=28)]
        return lambda: [call() for call in some]

    for layout in LAYOUTS:
        yield Reuse(
            f"batch norm {layout} with 64 channels, then 61, 37, 1, then other batches and sides",
            first(layout),
            (
                calls(61, layout, 31),
                calls(37, layout, 37),
                calls(1, layout, 1),
                calls(64, layout, 16, batch=1, side=9),
                calls(37, layout, 1, batch=48, side=7),
            ),
        )

    def together(channels: int, batch: int = 8) -> Callable[[], object]:
        return _batch_norm(
            channels, torch.float16, "NHWC", residual=True, relu=True, batch=batch, together=True
        )  # fmt: skip

    yield Reuse(
        "cooperative batch norm with 64 channels, then fewer in a tile of 64, then another batch",
        together(64),
        (together(56), together(40), together(64, batch=6)),
    )


# -- channel_gather, channel_scatter, channel_scatter_add --------------------------------------------------------------


def _channel_index_calls(
    channels: int, live: int, dtype: torch.dtype, layout: str, batch: int = 4, side: int = 14, offset: int = 0
) -> dict[str, Callable[[], object]]:
    """The three operators; gather and scatter are each other's backward, and the sum's is a gather."""
    index = _index(range(live), channels)

    def full() -> Tensor:
        return _activation((batch, channels, side, side), dtype, layout, offset, derive=True)

    def part() -> Tensor:
        return _activation((batch, live, side, side), dtype, layout, offset, derive=True)

    def both(out: Tensor) -> None:
        out.backward(torch.zeros_like(out))

    return {
        "channel_gather": lambda: both(channel_gather(full(), index)),
        "channel_scatter": lambda: both(channel_scatter(part(), index)),
        "channel_scatter_add": lambda: channel_scatter_add(full(), part(), index),
    }


def _channel_index_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for layout in LAYOUTS:
            for name, run in _channel_index_calls(64, 32, dtype, layout).items():
                # the gathered side is at the mercy of the index; output and addend are not
                promise = BOTH if name == "channel_scatter_add" else STORES
                yield Case(f"{name} {_name(dtype)} {layout}", dtype, run, {"_channel_map_kernel": promise})
    for name, run in _channel_index_calls(64, 32, torch.float16, "NHWC", offset=1).items():
        yield Case(f"{name} fp16 NHWC, misaligned", torch.float16, run)


def _channel_index_reuse() -> Iterator[Reuse]:
    def calls(channels: int, live: int, layout: str, batch: int = 4, side: int = 14) -> Callable[[], object]:
        return lambda: [
            run() for run in _channel_index_calls(channels, live, torch.float16, layout, batch, side).values()
        ]

    for layout in LAYOUTS:
        yield Reuse(
            f"channel operators {layout} with 64 channels, then 61, 37, 1, then other batches and sides",
            calls(64, 32, layout),
            (
                calls(61, 31, layout),
                calls(37, 37, layout),
                calls(1, 1, layout),
                calls(64, 61, layout, batch=1),
                calls(37, 5, layout, batch=7, side=9),
            ),
        )


# -- convolution -------------------------------------------------------------------------------------------------------


def _convolution(
    channels: tuple[int, int],
    dtype: torch.dtype,
    *,
    inputs: Sequence[int] | None = None,
    outputs: Sequence[int] | None = None,
    taps: int = 3,
    stride: int = 1,
    moments: bool = False,
    base: bool = False,
    batch: int = 8,
    side: int = 14,
) -> Callable[[], None]:
    """Forward and both gradients, `inputs` of the first and `outputs` of the second number of channels being live."""
    live = [full if some is None else len(some) for full, some in zip(channels, (inputs, outputs), strict=True)]
    index = [
        None if some is None else _index(some, full) for full, some in zip(channels, (inputs, outputs), strict=True)
    ]

    def run() -> None:
        x = _activation((batch, channels[0], side, side), dtype, "NHWC", derive=True)
        weight = _activation((live[1], live[0], taps, taps), dtype, "NHWC", derive=True)
        out = (side - 1) // stride + 1
        full = (batch, channels[1], out, out)
        added = _activation(full, dtype, "NHWC") if base else None
        y = conv2d(
            x, weight, stride, taps // 2, input_index=index[0], output_index=index[1], base=added, moments=moments,
            backend="triton",
        )  # fmt: skip
        y = y[0] if isinstance(y, tuple) else y
        y.backward(_activation(full, dtype, "NHWC"))

    return run


def _convolution_cases() -> Iterator[Case]:
    names = ("_forward_kernel", "_input_gradient_kernel", "_weight_gradient_kernel")
    vectors = {name: Promise(load=16, mma=True) for name in names}
    tensor_cores = {name: Promise(mma=True) for name in names}
    odd, half = (37, 29), 32
    ways: list[tuple[str, tuple[int, int], dict[str, Any], dict[str, Promise]]] = [
        ("", (128, 128), {}, vectors),
        (", 1x1, moments", (128, 64), {"taps": 1, "moments": True}, vectors),
        (", stride 2", (64, 128), {"stride": 2}, vectors),
        (", few channels", (16, 16), {}, tensor_cores),
        (", odd channels", odd, {"moments": True}, tensor_cores),
        (", runs", (128, 128), {"inputs": _run(64, 32), "outputs": _run(64, 64)}, vectors),
        (", odd runs", (128, 128), {"inputs": _run(61, 3), "outputs": _run(37, 5)}, tensor_cores),
        (", input index", (128, 128), {"inputs": _apart(64), "moments": True}, tensor_cores),
        (", output index", (128, 128), {"outputs": _apart(64)}, tensor_cores),
        (", both indices", (64, 64), {"inputs": _apart(half), "outputs": _apart(half)}, tensor_cores),
        (", output index, added to a base", (64, 64), {"outputs": _apart(half), "base": True}, tensor_cores),
    ]
    for dtype in DTYPES:
        for name, channels, options, promises in ways:
            if dtype == torch.float32:  # wgmma takes TF32 one way round only: this operand is turned as it is loaded
                promises = promises | {"_weight_gradient_kernel": Promise(mma=True)}
            yield Case(f"conv2d {_name(dtype)}{name}", dtype, _convolution(channels, dtype, **options), promises)


def _convolution_reuse() -> Iterator[Reuse]:
    half = torch.float16

    def calls(*shapes: tuple[int, int, int, int], **options: Any) -> Callable[[], object]:
        """Some channels are live of `all`, on either side; the index is ascending with gaps."""

        def run() -> None:
            for all_in, live_in, all_out, live_out in shapes:
                inputs, outputs = range(0, 2 * live_in, 2), range(0, 2 * live_out, 2)
                assert 2 * live_in <= all_in + 1
                assert 2 * live_out <= all_out + 1
                _convolution((all_in, all_out), half, inputs=inputs, outputs=outputs, moments=True, **options)()

        return run

    yield Reuse(
        "conv2d by index, of 40 and 48 live channels, then other multiples of 8, other batches and sides",
        calls((128, 40, 128, 48)),
        (calls((96, 40, 104, 48)), calls((128, 48, 96, 40)), calls((104, 40, 128, 48), batch=3, side=9)),
    )
    yield Reuse(
        "conv2d by index, of 41 and 47 live channels, then 45, 37, 33 of others",
        calls((128, 41, 128, 47)),
        (calls((97, 45, 103, 37)), calls((83, 33, 99, 47)), calls((99, 41, 127, 39), batch=2, side=11)),
    )
    yield Reuse(
        "conv2d of all channels, 37 and 61, then 35, 45, 61 and other sides",
        _convolution((37, 61), half),
        (
            _convolution((35, 45), half),
            _convolution((61, 37), half),
            _convolution((43, 59), half, batch=5, side=7),
        ),
    )
