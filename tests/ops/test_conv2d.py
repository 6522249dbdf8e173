"""conv2d: every backend against float64, over index sets, shapes, layouts and dtypes, forward and backward."""

import importlib
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from exact import assert_as_exact
from fences import fenced, layout
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.ops.channel_index import ChannelIndex
from prunetrain_kernels.ops.conv2d import (
    BACKENDS,
    Maps,
    Side,
    _conv2d,
    conv2d,
    conv2d_by_maps,
    conv2d_input_gradient,
    conv2d_reference,
    conv2d_weight_gradient,
    default_backend,
    triton_serves,
)

module = importlib.import_module("prunetrain_kernels.ops.conv2d")  # the package exports the function of that name
t0 = pytest.mark.t0
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)


def places(kind: str, live: int, channels: int, device: torch.device) -> ChannelIndex | None:
    if kind == "plain":
        assert live == channels
        return None
    if kind == "run":
        return ChannelIndex(range(channels - live, channels), channels, device)
    assert kind == "some"
    return ChannelIndex(
        torch.randperm(channels, generator=torch.Generator().manual_seed(live))[:live], channels, device
    )


class Case(NamedTuple):
    """Channels, in and out: which, how many live, how many in all; the kernel; images, height, width."""

    inputs: tuple[str, int, int]
    outputs: tuple[str, int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    x: tuple[int, int, int] = (2, 7, 5)

    def __str__(self) -> str:
        ins, outs = ("".join(map(str, side)) for side in (self.inputs, self.outputs))
        return f"{ins}-{outs}-k{self.kernel[0]}{self.kernel[1]}-s{self.stride[0]}{self.stride[1]}"


ONE = (1, 1)
CASES = [
    Case(("plain", 8, 8), ("plain", 64, 64)),
    Case(("plain", 3, 3), ("plain", 8, 8), stride=(2, 2)),
    Case(("plain", 65, 65), ("plain", 37, 37), ONE, padding=(0, 0), x=(1, 9, 7)),
    Case(("some", 37, 65), ("plain", 8, 8), x=(1, 5, 3)),
    Case(("plain", 8, 8), ("some", 37, 64), ONE, (2, 2), (0, 0)),
    Case(("some", 8, 37), ("some", 3, 8), (5, 5), (1, 1), (2, 2), (1, 6, 5)),
    Case(("run", 8, 64), ("run", 8, 65), stride=(2, 2)),
    Case(("run", 37, 64), ("some", 1, 3), padding=(0, 0)),
    Case(("some", 1, 3), ("run", 65, 65), (1, 3), (2, 1), (0, 1)),
    Case(("some", 64, 64), ("some", 8, 8), ONE, padding=(1, 1)),
    Case(("some", 8, 9), ("some", 5, 7), (3, 3), (3, 4), (0, 2), (2, 8, 11)),  # more classes than taps
    Case(("plain", 1, 1), ("plain", 1, 1), (3, 3), (2, 2), (1, 1), (1, 1, 1)),
    Case(("run", 0, 8), ("some", 3, 8)),
    Case(("some", 3, 8), ("run", 0, 8)),
    Case(("plain", 8, 8), ("plain", 8, 8), (3, 3), x=(3, 11, 9)),  # three tiles of pixels, the last cut
    Case(("plain", 8, 8), ("plain", 3, 3), (4, 8), padding=(0, 1), x=(1, 4, 8)),  # more taps than a word has bits
    Case(("some", 5, 9), ("plain", 8, 8), (3, 2), x=(20, 2, 1)),  # many images in a step
]
NOTHING = [case for case in CASES if case.inputs[1] == 0 or case.outputs[1] == 0]


def output_shape(case: Case) -> tuple[int, int, int, int]:
    p, q = (
        (size + 2 * pad - taps) // step + 1
        for size, pad, taps, step in zip(case.x[1:], case.padding, case.kernel, case.stride, strict=True)
    )
    return case.x[0], case.outputs[2], p, q


def exact(
    x: Tensor, weight: Tensor, base: Tensor | None, inputs: ChannelIndex | None, outputs: ChannelIndex | None,
    case: Case,
) -> Tensor:  # fmt: skip
    """In float64, from a weight written out in full."""
    ins = list(range(case.inputs[2])) if inputs is None else inputs.index.tolist()
    outs = list(range(case.outputs[2])) if outputs is None else outputs.index.tolist()
    full = torch.zeros(case.outputs[2], case.inputs[2], *case.kernel, dtype=torch.float64, device=x.device)
    full[torch.tensor(outs, dtype=torch.long)[:, None], torch.tensor(ins, dtype=torch.long)] = weight
    y = F.conv2d(x, full, None, case.stride, case.padding)
    return y if base is None else y + base


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    base: Tensor | None
    dy: Tensor
    inputs: ChannelIndex | None
    outputs: ChannelIndex | None


def prepare(
    case: Case, dtype: torch.dtype, device: torch.device, where: str = "channels_last", base: bool = False
) -> Inputs:
    (n, h, w), shape = case.x, output_shape(case)
    x = layout(fenced(random(n, case.inputs[2], h, w, dtype=dtype, device=device)), where)
    weight = fenced(random(case.outputs[1], case.inputs[1], *case.kernel, dtype=dtype, device=device, seed=2))
    return Inputs(
        x,
        weight,
        layout(random(*shape, dtype=dtype, device=device, seed=3), where) if base else None,
        layout(random(*shape, dtype=dtype, device=device, seed=4), where),
        places(*case.inputs, device),
        places(*case.outputs, device),
    )


Found = dict[str, Tensor]


def call(given: Inputs, case: Case, backend: str | None, moments: bool = True) -> Found:
    leaves = [None if t is None else t.detach().requires_grad_() for t in given[:3]]
    x, weight, base = leaves
    assert x is not None
    assert weight is not None
    y = conv2d(
        x, weight, case.stride, case.padding, input_index=given.inputs, output_index=given.outputs, base=base,
        moments=moments, backend=backend,
    )  # fmt: skip
    found: Found = {}
    if moments:
        assert isinstance(y, tuple)
        y, found["mean"], found["var"] = y
        assert not found["mean"].requires_grad
    assert isinstance(y, Tensor)
    used = [t for t in leaves if t is not None]
    gradients = torch.autograd.grad(y, used, given.dy)
    return found | {"y": y.detach()} | dict(zip(("dx", "dweight", "dbase"), gradients, strict=False))


def expected(given: Inputs, case: Case) -> Found:
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in given[:3]]
    y = exact(*leaves, given.inputs, given.outputs, case)  # type: ignore[arg-type]
    used = [t for t in leaves if t is not None]
    gradients = torch.autograd.grad(y, used, given.dy.double(), materialize_grads=True)
    return {"y": y.detach()} | dict(zip(("dx", "dweight", "dbase"), gradients, strict=False))


def torchs(given: Inputs, case: Case) -> Found:
    """By PyTorch's own operators, in the dtype at hand, from the full weight."""
    x, weight, base = (None if t is None else t.detach().requires_grad_() for t in given[:3])
    assert x is not None
    assert weight is not None
    ins, outs = (None if i is None else i.index.long() for i in (given.inputs, given.outputs))
    live = F.conv2d(x if ins is None else x[:, ins], weight, None, case.stride, case.padding)
    y = live
    if outs is not None:
        y = torch.zeros(output_shape(case), dtype=x.dtype, device=x.device).index_copy(1, outs, live)
    y = y if base is None else y + base
    gradients = torch.autograd.grad(y, [t for t in (x, weight, base) if t is not None], given.dy)
    return {"y": y.detach()} | dict(zip(("dx", "dweight", "dbase"), gradients, strict=False))


def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records every launch, so that a test of kernels cannot pass by the reference."""
    seen: list[str] = []
    true_launch = module.launch
    monkeypatch.setattr(module, "launch", lambda *a, **k: (seen.append(a[0].__name__), true_launch(*a, **k))[1])
    return seen


KERNELS = ["_forward_kernel", "_input_gradient_kernel", "_weight_gradient_kernel"]


def in_the_interpreter_without_bf16(backend: str | None, dtype: torch.dtype, device: torch.device) -> None:
    if backend == "triton" and dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter computes bf16 wrongly; PRUNETRAIN_TEST_DEVICE=cuda runs this")


def assert_close(given: Inputs, case: Case, found: Found) -> None:
    right = expected(given, case)
    theirs = right if case in NOTHING else torchs(given, case)
    for name, value in right.items():
        assert found[name].dtype == given.x.dtype
        assert found[name].shape == value.shape
        if value.numel():
            assert_as_exact(found[name], theirs[name], value, 1e-6)
    if "mean" not in found:
        return
    live = list(range(case.outputs[2])) if given.outputs is None else given.outputs.index.tolist()
    y = found["y"] if given.base is None else call(given._replace(base=None), case, "naive", False)["y"]
    if given.base is None or given.x.dtype != torch.float16:  # else another rounding of y than the one at hand
        y = y.double()[:, live]
        assert torch.allclose(found["mean"].double(), y.mean((0, 2, 3)), rtol=1e-5, atol=2e-6)
        assert torch.allclose(found["var"].double(), y.var((0, 2, 3), correction=0), rtol=2e-5, atol=1e-9)
    assert found["mean"].dtype == found["var"].dtype == torch.float32


@t0
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(
    case: Case, backend: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_interpreter_without_bf16(backend, dtype, device)
    if case.x == (1, 1, 1) and dtype == torch.bfloat16 and backend != "triton" and torch.cpu._is_amx_tile_supported():
        pytest.skip(
            "oneDNN's bf16 weight gradient of one pixel reads memory that nothing has written, on CPUs with AMX"
        )
    seen = launches(monkeypatch)
    given = prepare(case, dtype, device)
    found = call(given, case, backend)
    assert_close(given, case, found)
    if backend == "triton" and case not in NOTHING:
        assert [name for name in seen if name in KERNELS] == KERNELS
    else:
        assert not set(seen) & set(KERNELS)


@t0
@pytest.mark.parametrize("where", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", [0, 5, 6])
def test_with_a_base_in_every_layout(number: int, backend: str, where: str, device: torch.device) -> None:
    case = CASES[number]
    given = prepare(case, torch.float32, device, where, base=True)
    assert given.base is not None
    before = given.base.clone()
    assert_close(given, case, call(given, case, backend))
    assert torch.equal(given.base, before)


@t0
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_with_a_base_rounds_twice(backend: str, device: torch.device) -> None:
    """The convolution is rounded, as everything that takes it sees it, and then the sum: the same in every form."""
    case = CASES[4]
    given = prepare(case, torch.float16, device, base=True)
    found = call(given, case, backend, False)["y"]
    assert given.base is not None
    without = call(given._replace(base=None), case, backend, False)["y"]
    assert torch.equal(found, (given.base.float() + without.float()).half())


@t0
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", NOTHING, ids=str)
def test_nothing_live_with_a_base(case: Case, backend: str, device: torch.device) -> None:
    given = prepare(case, torch.float32, device, base=True)
    found = call(given, case, backend)
    assert torch.equal(found["y"], given.base)
    assert found["dx"].eq(0).all()
    assert found["mean"].eq(0).all()
    assert found["mean"].shape == (case.outputs[1],)


@t0
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [1, 5, 6, 10])
def test_small_tiles(number: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of everything, and pixels split over several programs of the weight's gradient."""
    in_the_interpreter_without_bf16("triton", dtype, device)
    monkeypatch.setattr(module, "_INTERPRETED", module._Tile(32, 16, 16, 4, 1))
    monkeypatch.setattr(module, "_SHORTEST_SPLIT", 16)
    case = CASES[number]._replace(x=(2, 7, 5) if number != 5 else (2, 5, 4))
    given = prepare(case, dtype, device)
    assert_close(given, case, call(given, case, "triton"))


@t0
@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_of_a_large_mean(backend: str, device: torch.device) -> None:
    """mean / std = 1e3, over several tiles."""
    case = Case(("plain", 8, 8), ("some", 3, 5), ONE, padding=(0, 0), x=(3, 11, 9))
    given = prepare(case, torch.float32, device)
    x = (1e3 + given.x).contiguous(memory_format=torch.channels_last)
    found = call(
        given._replace(x=x, weight=given.weight.abs() / given.weight.abs().sum(1, keepdim=True)), case, backend
    )
    assert given.outputs is not None
    y = found["y"].double()[:, given.outputs.index.tolist()]
    var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    assert (mean / var.sqrt()).min() > 1e3
    assert torch.allclose(found["mean"].double(), mean, rtol=1e-6)
    assert torch.allclose(found["var"].double(), var, rtol=1e-4)


@t0
@pytest.mark.parametrize("backend", ["triton", "naive"])
def test_channels_that_are_not_read_may_hold_anything(backend: str, device: torch.device) -> None:
    """NaN in the channels of x, and of dy, outside the indices goes nowhere."""
    case = CASES[5]
    given = prepare(case, torch.float32, device)
    clean = call(given, case, backend)
    assert given.inputs is not None
    assert given.outputs is not None
    x, dy = given.x.clone(), given.dy.clone()
    x[:, given.inputs.inverse < 0] = math.nan
    dy[:, given.outputs.inverse < 0] = math.nan
    dirty = call(given._replace(x=x, dy=dy), case, backend)
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)


@t0
def test_nan_goes_through(device: torch.device) -> None:
    case = CASES[0]
    given = prepare(case, torch.float32, device)
    x = given.x.clone()
    x[0, 3, 0, 0] = math.nan
    y = call(given._replace(x=x), case, "triton")["y"]
    assert y[0, :, :2, :2].isnan().all()
    assert not y[0, :, 2:].isnan().any()
    assert not y[1].isnan().any()


@t0
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twice_the_same(dtype: torch.dtype, device: torch.device) -> None:
    in_the_interpreter_without_bf16("triton", dtype, device)
    for case in (CASES[5], CASES[6]):
        given = prepare(case, dtype, device)
        one = call(given, case, "triton")
        for _ in range(1 if device.type == "cpu" else 20):
            other = call(given, case, "triton")
            assert all(torch.equal(one[name], other[name]) for name in one)


@t0
@pytest.mark.parametrize("backend", BACKENDS)
def test_misaligned(backend: str, device: torch.device) -> None:
    case = CASES[0]
    given = prepare(case, torch.float16, device)
    x, weight = (fenced(t.contiguous(memory_format=torch.channels_last), 3) for t in given[:2])
    assert_close(given, case, call(given._replace(x=x, weight=weight), case, backend))


@t0
def test_an_upstream_gradient_of_one_number(device: torch.device) -> None:
    """What `sum` sends back is expanded from one number, stored in no layout."""
    case = CASES[5]
    given = prepare(case, torch.float32, device)
    dy = torch.ones((), device=device).expand(output_shape(case))
    given = given._replace(dy=dy)
    assert_close(given, case, call(given, case, "triton"))


@t0
@pytest.mark.parametrize("number", [6, 11])
def test_opcheck(number: int, device: torch.device) -> None:
    _opcheck(CASES[number], device, "contiguous", number == 6)


@pytest.mark.parametrize("number", [5, 6, 11])
def test_opcheck_of_the_reference(number: int) -> None:
    for where, more in (("channels_last", False), ("contiguous", True)):
        _opcheck(CASES[number], CPU, where, more)


def _opcheck(case: Case, device: torch.device, where: str, more: bool) -> None:
    """`more`: with a base and moments."""
    given = prepare(case, torch.float32, device, where, base=more)
    x, weight, b = (None if t is None else t.detach().requires_grad_() for t in given[:3])
    assert x is not None
    assert weight is not None
    sides = [Side.of(None if i is None else Maps(i.index, i.inverse, i.first), 0) for i in given[4:]]
    four = [number for side in sides for number in (side.index, side.first)]
    numbers = [list(case.stride), list(case.padding)]
    torch.library.opcheck(_conv2d, (x, weight, b, *four, case.outputs[2], *numbers, more))
    x, weight = x.detach(), weight.detach()
    torch.library.opcheck(conv2d_input_gradient, (given.dy, weight, *four, list(x.shape), *numbers))
    torch.library.opcheck(conv2d_weight_gradient, (given.dy, x, *four, list(weight.shape), *numbers))


class Net(nn.Module):
    def __init__(self, case: Case, given: Inputs, backend: str | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(given.weight.detach())
        self.case, self.indices, self.backend = case, (given.inputs, given.outputs), backend

    def forward(self, x: Tensor) -> Tensor:
        ins, outs = self.indices
        found = conv2d(
            torch.sin(x), self.weight, self.case.stride, self.case.padding, input_index=ins, output_index=outs,
            moments=True, backend=self.backend,
        )  # fmt: skip
        assert isinstance(found, tuple)
        y, mean, _ = found
        return torch.cos(y) + mean.sum()


@t0
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend: str, device: torch.device) -> None:
    case = CASES[6]
    given = prepare(case, torch.float32, device)
    net = Net(case, given, backend)
    _compare(net, torch.compile(net, fullgraph=True, backend="aot_eager"), given.x)


@pytest.mark.parametrize("backend", [*BACKENDS, None])
def test_compiles_whole_on_a_cpu(backend: str | None) -> None:
    case = CASES[5]
    given = prepare(case, torch.float32, CPU)
    net = Net(case, given, backend)
    inductor = backend in ("triton", None)
    _compare(net, torch.compile(net, fullgraph=True, backend="inductor" if inductor else "aot_eager"), given.x)


def _compare(net: Net, compiled: Callable[[Tensor], Tensor], x: Tensor) -> None:
    results = []
    for run in (net, compiled):
        leaf = x.detach().requires_grad_()
        y = run(leaf)
        results.append((y, *torch.autograd.grad(y.sum(), [leaf, net.weight])))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exports_with_any_batch(backend: str) -> None:
    case = CASES[5]
    given = prepare(case, torch.float32, CPU)
    net = Net(case, given, backend)
    x = random(2, *given.x.shape[1:], dtype=torch.float32, device=CPU)
    program = torch.export.export(net, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2)}})
    larger = random(5, *given.x.shape[1:], dtype=torch.float32, device=CPU)
    assert torch.allclose(program.module()(larger), net(larger), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", [5, 8, 10])
def test_gradcheck(number: int, backend: str) -> None:
    case = CASES[number]._replace(x=(1, 4, 4), kernel=(2, 3), outputs=("some", 2, 3))
    case = case._replace(inputs=(case.inputs[0], 1 if case.inputs[0] == "some" else 3, 3))
    given = prepare(case, torch.float64, CPU, "contiguous", base=True)
    leaves = [t.detach().requires_grad_() for t in given[:3] if t is not None]

    def run(x: Tensor, weight: Tensor, base: Tensor) -> Tensor:
        found = conv2d(
            x, weight, case.stride, case.padding, input_index=given.inputs, output_index=given.outputs, base=base,
            backend=backend,
        )  # fmt: skip
        assert isinstance(found, Tensor)
        return found

    assert torch.autograd.gradcheck(run, leaves)
    if backend != "triton":
        assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("where", ["contiguous", "channels_last", "sliced"])
def test_reference_of_triton(where: str, dtype: torch.dtype) -> None:
    """What "triton" computes where there are no kernels; its result is channels_last there too."""
    for number in (4, 5, 6):
        case = CASES[number]
        given = prepare(case, dtype, CPU, where)
        found, right = call(given, case, "triton", False), expected(given, case)
        assert found["y"].is_contiguous(memory_format=torch.channels_last)
        assert found["dx"].is_contiguous(memory_format=torch.channels_last)
        theirs = torchs(given, case)
        for name, value in right.items():
            assert_as_exact(found[name], theirs[name], value, 1e-6)


@pytest.mark.parametrize("backend", ["expanded", "naive"])
def test_dilation(backend: str) -> None:
    x, weight = random(2, 6, 9, 9, dtype=torch.float32, device=CPU), torch.randn(3, 2, 3, 3)
    y = conv2d(x, weight, 1, 2, (2, 1), input_index=ChannelIndex([4, 1], 6), backend=backend)
    assert isinstance(y, Tensor)
    assert torch.allclose(y, F.conv2d(x[:, [4, 1]], weight, None, 1, 2, (2, 1)), atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_last_stays(backend: str) -> None:
    case = CASES[5]
    given = prepare(case, torch.float32, CPU)
    found = call(given, case, backend, False)
    assert found["y"].is_contiguous(memory_format=torch.channels_last)
    assert found["dx"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str) -> None:
    case = CASES[5]
    given = prepare(case, torch.float32, CPU, base=True)
    x, weight, base = (t.detach().requires_grad_() for t in given[:3] if t is not None)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv2d(
            x, weight, case.stride, case.padding, input_index=given.inputs, output_index=given.outputs, base=base,
            backend=backend,
        )  # fmt: skip
        assert isinstance(y, Tensor)
    assert y.dtype == torch.bfloat16
    right = exact(*(t.detach().bfloat16().double() for t in (x, weight, base)), given.inputs, given.outputs, case)
    assert torch.allclose(y.double(), right, rtol=2e-2, atol=2e-2)
    y.sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert conv2d(x.double(), weight.double(), backend=backend, input_index=given.inputs).dtype == torch.float64  # type: ignore[union-attr]


@pytest.mark.parametrize(("backend", "reads"), [("triton", 8), ("expanded", 37), ("naive", 8)])
def test_flops(backend: str, reads: int) -> None:
    """Live times live, but for the zeros that "expanded" multiplies by; each gradient as much as the forward."""
    case = CASES[5]._replace(stride=(2, 2))
    given = prepare(case, torch.float32, CPU)
    n, _, p, q = output_shape(case)
    one = 2 * n * p * q * 5 * 5 * 3 * reads
    with FlopCounterMode(display=False) as counter:
        x, weight = given.x.detach().requires_grad_(), given.weight.detach().requires_grad_()
        y = conv2d(x, weight, 2, 2, input_index=given.inputs, output_index=given.outputs, backend=backend)
        assert counter.get_total_flops() == one
        assert isinstance(y, Tensor)
        y.sum().backward()
    assert counter.get_total_flops() == 3 * one


def test_the_backend_that_is_chosen() -> None:
    gpu = torch.device("meta")  # chosen as on a GPU: by the share of channels alone
    assert default_backend(CPU, 32, 64) == default_backend(gpu, 32, 64) == "expanded"
    assert default_backend(CPU, 16, 64) == default_backend(gpu, 16, 64) == "naive"
    assert default_backend(CPU, 32, 64, taps=9) == "naive"
    assert default_backend(CPU, 48, 64, taps=9) == default_backend(gpu, 32, 64, taps=9) == "expanded"
    assert not triton_serves(CPU, torch.float16)
    x, weight = torch.randn(1, 4, 3, 3), torch.randn(2, 1, 1, 1)
    index = ChannelIndex([2], 4)
    x[:, 0] = math.nan
    assert not conv2d(x, weight, input_index=index).isnan().any()  # type: ignore[union-attr]  # naive at a quarter


@t0
def test_the_kernel_runs_where_it_is_named(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not by default: no GPU has measured it yet."""
    if device.type == "cuda" and not triton_serves(device, torch.float16):
        pytest.skip("the Triton convolution is for sm_80 and later: below, tl.dot has no tensor cores")
    assert triton_serves(device, torch.float16)
    assert triton_serves(device, torch.float32, (1, 1))
    assert not triton_serves(device, torch.float16, 2)
    assert not triton_serves(device, torch.float64)
    seen = launches(monkeypatch)
    x = random(1, 64, 3, 3, dtype=torch.float16, device=device)
    weight, index = random(8, 32, 1, 1, dtype=torch.float16, device=device), ChannelIndex(range(32), 64, device)
    by_default = conv2d(x, weight, input_index=index)
    assert seen == []
    named = conv2d(x, weight, input_index=index, backend="triton")
    assert seen == ["_forward_kernel"]
    torch.testing.assert_close(named, by_default, rtol=1e-2, atol=1e-2)


def test_only_the_gradients_that_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a gradient of x, as in a network's first layer, none is computed; without any, nothing is recorded."""
    calls: list[str] = []
    for name in ("_input_gradient", "_weight_gradient"):
        true = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, n=name, f=true: (calls.append(n), f(*a))[1])
    x, weight = torch.randn(1, 4, 3, 3), torch.randn(2, 4, 1, 1)
    assert not conv2d(x, weight, backend="triton").requires_grad  # type: ignore[union-attr]
    conv2d(x, weight.requires_grad_(), backend="triton").sum().backward()  # type: ignore[union-attr]
    assert calls == ["_weight_gradient"]
    calls.clear()
    y = conv2d(x.requires_grad_(), weight.detach(), backend="triton")
    torch.autograd.grad(y.sum(), x)  # type: ignore[union-attr]
    assert calls == ["_input_gradient"]


def test_by_maps() -> None:
    case = CASES[5]
    given = prepare(case, torch.float32, CPU)
    maps = [None if i is None else Maps(i.index, i.inverse, i.first) for i in given[4:]]
    numbers = (list(case.stride), case.padding, 1)
    for backend in BACKENDS:
        y = conv2d_by_maps(
            given.x, given.weight, *numbers, input_maps=maps[0], output_maps=maps[1], backend=backend
        )  # fmt: skip
        assert torch.equal(y, call(given, case, backend, False)["y"])  # type: ignore[arg-type]
    sides = [Side(m.index, 0, len(m.index), len(m.inverse)) for m in maps]  # type: ignore[union-attr]
    reference, mean, _ = conv2d_reference(
        given.x.double(), given.weight.double(), None, *sides,
        stride=case.stride, padding=case.padding, dilation=(1, 1), moments=False,
    )  # fmt: skip
    assert mean is None
    assert torch.allclose(reference, exact(given.x.double(), given.weight.double(), None, *given[4:], case))


def test_pixels_beyond_32_bits_are_refused() -> None:
    with pytest.raises(InputError, match="split the batch"):
        module._check_pixels(torch.Size((2**16, 1, 2**8, 2**8)))


X, W = torch.zeros(2, 4, 5, 5), torch.zeros(3, 4, 3, 3)
TWO = ChannelIndex([3, 1], 4)


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (lambda: conv2d(X[0], W), "x has 3 dimensions"),
        (lambda: conv2d(X, W[0]), "the weight has 3 dimensions|weight has 3 dimensions"),
        (lambda: conv2d(X, W[:, :2]), "x has 4 channels but the weight reads 2"),
        (lambda: conv2d(X, W, input_index=TWO), "input index lists 2 channels but the weight reads 4"),
        (lambda: conv2d(X[:, :3], W[:, :2], input_index=TWO), "x has 3 channels but the input index is into 4"),
        (lambda: conv2d(X, W, output_index=TWO), "output index lists 2 channels but the weight computes 3"),
        (lambda: conv2d(X, W.half()), "the weight is torch.float16 but x is torch.float32"),
        (lambda: conv2d(X.int(), W.int()), "got an input of torch.int32"),
        (lambda: conv2d(X, W, base=torch.zeros(2, 3, 5, 5)), r"the result is \(2, 3, 3, 3\)"),
        (lambda: conv2d(X, W, base=torch.zeros(2, 3, 3, 3).half()), "base is torch.float16"),
        (lambda: conv2d(X.to("meta"), W[:, :2], input_index=TWO), "index is on cpu but x is on meta"),
        (lambda: conv2d(X.to("meta"), W), "the weight is on cpu"),
        (lambda: conv2d(X, W, 0), "stride is 0"),
        (lambda: conv2d(X, W, 1, -1), "padding is -1"),
        (lambda: conv2d(X, W, 1, "same"), "padding is 'same'"),  # type: ignore[arg-type]
        (lambda: conv2d(X, W, (1, 2, 3)), r"stride is \(1, 2, 3\)"),
        (lambda: conv2d(X, W, dilation=3), "reaches over 7 pixels but the padded input has 5"),
        (lambda: conv2d(X, W[:, :, :0]), "at least one tap"),
        (lambda: conv2d(X, W, backend="cudnn"), "the backends are: triton, expanded, naive"),
        (lambda: conv2d(X, W, 1, 2, 2, backend="triton"), "has no dilation"),
    ],
)
def test_refuses(run: Callable[[], object], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        run()
    assert isinstance(caught.value, ValueError)
