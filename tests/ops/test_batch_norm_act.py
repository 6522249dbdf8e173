"""Batch norm with residual, ReLU and scatter against the formulas in float64, by every backend.

The cases of all of them are tier T0: see tests/conftest.py.
"""

import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fences import fenced, layout
from torch import Tensor

from bench import launches
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.ops import batch_norm_passes as passes
from prunetrain_kernels.ops.batch_norm_act import (
    batch_norm_act,
    batch_norm_apply,
    batch_norm_backward_apply,
    batch_norm_backward_sums,
    batch_norm_statistics,
    batch_norm_update_running_,
    merge_statistics,
)
from prunetrain_kernels.ops.channel_index import ChannelIndex
from prunetrain_kernels.ops.layout import matrix

t0 = pytest.mark.t0
T0_BACKENDS = ("kernels", "cooperative", "native", "reference")
EPS = 1e-5
module = sys.modules["prunetrain_kernels.ops.batch_norm_act"]  # the package's attribute of that name is the function


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    layout: str = "contiguous"
    residual: str = "none"  # none, same, scatter
    relu: bool = True
    training: bool = True
    dtype: torch.dtype = torch.float32
    affine: bool = True
    offset: int = 0  # elements that tensors are out of line
    mean: float = 0.5
    live: int | None = None  # with scatter: channels of x; those of the shape are the residual's

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape)), self.layout, self.residual, str(self.dtype).removeprefix("torch.")]
        parts += [name for name in ("relu", "training", "affine") if getattr(self, name)]
        return "-".join(parts + ([f"live{self.live}"] if self.live is not None else []))


@dataclass
class Problem:
    """Tensors of a case, and its map."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    dy: Tensor
    scatter: ChannelIndex | None

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, self.weight, self.bias, self.residual) if t is not None]


def exact(case: Case, p: Problem) -> tuple[Tensor, Tensor]:
    """(y, its value before the ReLU) in float64, from the formulas."""
    wide = [None if t is None else t.double() for t in (p.x, p.weight, p.bias, p.residual)]
    x, weight, bias, residual = wide
    over = [d for d in range(x.dim()) if d != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    mean, var = p.running_mean.double().view(shape), p.running_var.double().view(shape)
    if case.training:
        mean = x.mean(over, keepdim=True)
        var = (x - mean).square().mean(over, keepdim=True)
    y = (x - mean) / (var + EPS).sqrt()
    if weight is not None:
        y = y * weight.view(shape) + bias.view(shape)
    if p.scatter is not None:
        inverse = p.scatter.inverse.tolist()
        parts = [residual[:, c] + (y[:, i] if i >= 0 else 0) for c, i in enumerate(inverse)]
        y = torch.stack(parts, 1)
    elif residual is not None:
        y = y + residual
    return (torch.where(y <= 0, 0, y) if case.relu else y), y.detach()


def by_torch(case: Case, p: Problem) -> Tensor:
    """The same by PyTorch's own operators, in the case's dtype."""
    mean, var = p.running_mean.clone(), p.running_var.clone()
    y = p.x
    if y.numel() > 0:  # PyTorch refuses to normalise no channels
        y = F.batch_norm(y, mean, var, p.weight, p.bias, case.training, 0.1, EPS)
    if p.scatter is not None:
        y = p.residual.index_add(1, p.scatter.index.long(), y)
    elif p.residual is not None:
        y = y + p.residual
    return F.relu(y) if case.relu else y


def ours(case: Case, p: Problem) -> Tensor:
    mean, var = p.running_mean.clone(), p.running_var.clone()
    options: dict[str, Any] = {"residual": p.residual, "relu": case.relu, "scatter": p.scatter}
    return batch_norm_act(p.x, mean, var, p.weight, p.bias, training=case.training, eps=EPS, **options)


def problem(case: Case, device: torch.device) -> Problem:
    random = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    def stored(value: Tensor) -> Tensor:
        value = layout(value.to(device, case.dtype), case.layout)
        return value if case.layout == "sliced" else fenced(value, case.offset)

    channels = case.shape[1]
    scatter = None
    x_shape = list(case.shape)
    if case.residual == "scatter":
        live = channels // 2 if case.live is None else case.live
        scatter = ChannelIndex(torch.randperm(channels, generator=random)[:live], channels).to(device)
        x_shape[1] = live
    live = x_shape[1]
    x = stored(normal(*x_shape) * 1.5 + case.mean)
    residual = None if case.residual == "none" else stored(normal(*case.shape))
    weight, bias = ((normal(live) + 0.5).to(device), normal(live).to(device)) if case.affine else (None, None)
    statistics = (normal(live) + case.mean).to(device), (normal(live).square() + 0.5).to(device)
    p = Problem(x, weight, bias, residual, *statistics, torch.zeros(()), scatter)
    dy = normal(*case.shape).to(device)
    if case.relu:  # where rounding decides the sign, any gradient is right
        dy = torch.where(exact(case, p)[1].abs() < 1e-2, 0, dy)
    p.dy = stored(dy)
    return p


def results(function: Any, case: Case, p: Problem, dtype: torch.dtype | None = None) -> list[Tensor]:
    """y, then the gradients of x, weight, bias and residual, those that there are."""
    fresh = {}
    for name in ("x", "weight", "bias", "residual"):
        value = getattr(p, name)
        fresh[name] = None if value is None else value.detach().to(dtype or value.dtype).requires_grad_()
    q = replace(p, **fresh)
    y = function(case, q)
    y = y[0] if isinstance(y, tuple) else y
    return [y.detach(), *torch.autograd.grad(y, q.leaves(), p.dy.to(y.dtype), materialize_grads=True)]


def errors(got: list[Tensor], true: list[Tensor]) -> list[float]:
    return [(g.double() - t).abs().max().item() if t.numel() else 0.0 for g, t in zip(got, true, strict=True)]


def check(case: Case, device: torch.device, roundings: float = 2) -> None:
    p = problem(case, device)
    true = results(exact, case, p, torch.float64)
    got = results(ours, case, p)
    eager = results(by_torch, case, p)
    for g, e in zip(got, eager, strict=True):
        assert g.dtype == e.dtype
        assert g.shape == e.shape
        assert g.isfinite().all()
    if case.layout == "channels_last":
        assert got[0].is_contiguous(memory_format=torch.channels_last)
        assert got[1].is_contiguous(memory_format=torch.channels_last)
        assert p.residual is None or got[-1].is_contiguous(memory_format=torch.channels_last)
    for g, error, allowed in zip(got, errors(got, true), errors(eager, true), strict=True):
        scale = g.abs().max().item() if g.numel() else 0.0
        # PyTorch's sums and rstd on the CPU are float64, ours fp32
        share = roundings if g.dtype == torch.float32 else 0.5
        assert error <= 2 * allowed + share * torch.finfo(g.dtype).eps * scale


CASES = [
    Case((2, 1, 5, 5)),
    Case((1, 3, 3, 5), "channels_last", "same"),
    Case((9, 3, 5, 5), residual="same"),  # a last row cut short
    Case((2, 8, 16, 17), "channels_last", "same"),  # several chunks of rows
    Case((3, 8, 4, 4), "sliced", "same", training=False),
    Case((2, 37, 3, 3), "channels_last", "same", dtype=torch.float16),
    Case((3, 37, 3, 3), residual="none", training=False),
    Case((2, 37, 2, 4), residual="scatter"),
    Case((5, 37, 3, 1), "channels_last", "scatter", dtype=torch.float16, offset=1),
    Case((9, 5, 3, 3), residual="scatter", relu=False),
    Case((9, 5, 3, 3), "channels_last", "scatter", training=False),
    Case((2, 6, 3, 3), "channels_last", "scatter", live=1),
    Case((2, 6, 3, 3), residual="scatter", live=6),
    Case((2, 6, 3, 3), "channels_last", "scatter", live=0),
    Case((2, 6, 3, 3), "sliced", "scatter", relu=False, training=False, live=0),
    Case((4, 64, 1, 1), residual="same", relu=False),
    Case((9, 65), dtype=torch.float16),
    Case((3, 65, 2, 2), "channels_last", relu=False, offset=3, dtype=torch.float16),
    Case((3, 64, 4), relu=True, affine=False, residual="same"),
    Case((2, 3, 2, 3, 2), relu=False, affine=False),
    Case((2, 1, 96, 97), relu=True, residual="none"),  # more slots than one step of the fold takes
    Case((20, 2, 24, 24), residual="same", dtype=torch.float16),  # the same in NCHW
    Case((7, 8, 3, 3), "channels_last", "same", offset=1, training=False, dtype=torch.float16),
    Case((2, 8, 3, 3), relu=False, dtype=torch.float16, residual="same"),
    Case((4, 3, 3, 3), "channels_last", "same", dtype=torch.bfloat16),
    Case((2, 12, 3, 3), "contiguous", "scatter", dtype=torch.bfloat16),
]


@t0
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients(case: Case, path: str, device: torch.device) -> None:
    if case.dtype == torch.bfloat16 and path in ("kernels", "cooperative") and device.type == "cpu":
        pytest.skip("Triton's interpreter truncates to bf16 where a GPU rounds; PRUNETRAIN_TEST_DEVICE=cuda runs this")
    check(case, device)


@t0
@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
def test_statistics_far_from_zero(name: str, path: str, device: torch.device) -> None:
    """mean / std = 1e3: E[x^2] - E[x]^2 in fp32 would have no digit left."""
    x = layout((torch.randn(4, 5, 9, 11, generator=torch.Generator().manual_seed(3)) + 1000).to(device), name)
    mean, var = batch_norm_statistics(fenced(x))
    true_var, true_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    # an ulp of 1000 is 6e-5; PyTorch's own sums on the CPU, the reference, lose a few
    assert (mean - true_mean).abs().max() < (1e-3 if path == "reference" else 1e-4)
    assert (var / true_var - 1).abs().max() < 1e-5
    case = Case(tuple(x.shape), name, mean=1000.0)
    check(case, device)
    p = problem(case, device)
    assert errors([ours(case, p)], [exact(case, p)[0]])[0] < (2e-3 if path == "reference" else 2e-4)


@t0
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("count", [2, 300])
def test_running_statistics(count: int, dtype: torch.dtype, path: str, device: torch.device) -> None:
    x = torch.randn(count, 7, generator=torch.Generator().manual_seed(5)).to(device) * 2 + 1
    start = torch.linspace(0.5, 2, 7, device=device).to(dtype), torch.linspace(2, 0.5, 7, device=device).to(dtype)
    x = x.to(dtype)
    got = start[0].clone(), start[1].clone()
    batch_norm_act(x, *got, training=True, momentum=0.3)
    var, mean = torch.var_mean(x.double(), 0)
    for g, s, new in zip(got, start, (mean, var), strict=True):
        true = 0.7 * s.double() + 0.3 * new
        assert g.dtype == dtype
        assert (g.double() / true - 1).abs().max() < torch.finfo(dtype).eps * (8 if path == "reference" else 2)
    again = got[0].clone(), got[1].clone()
    batch_norm_act(x, *again)
    assert torch.equal(torch.stack(again), torch.stack(got))  # eval leaves them alone
    view = torch.stack(start, 1)  # running statistics that are not contiguous
    batch_norm_act(x, view[:, 0], view[:, 1], training=True, momentum=0.3)
    assert torch.allclose(view, torch.stack(got, 1), rtol=1e-3 if dtype == torch.float16 else 1e-6)


@t0
@pytest.mark.kernels_only
@pytest.mark.parametrize("running", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (40, 37), (3, 8, 5, 5)], ids=str)
def test_the_fold_updates_running_statistics_as_their_own_launch_does(
    shape: tuple[int, ...], running: torch.dtype, device: torch.device
) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(6)).to(device) * 3 - 1).to(running)
    start = torch.linspace(-1, 1, shape[1], device=device).to(running), torch.ones(shape[1], device=device).to(running)
    folded, alone = [t.clone() for t in start], [t.clone() for t in start]
    with launches.counted() as counts:
        batch_norm_act(x, *folded, training=True, momentum=0.3)
    assert sum(counts.values()) == 3
    assert not any("update_running" in str(kernel) for kernel in counts)
    batch_norm_update_running_(*alone, *batch_norm_statistics(x), x.numel() // shape[1], 0.3)
    for a, b in zip(folded, alone, strict=True):
        # compiled, the two kernels may contract products and sums in other places
        assert torch.allclose(a, b, rtol=2 * torch.finfo(running).eps, atol=1e-7)
    assert not torch.equal(folded[0], start[0])


GAPPED = {
    "(N, C) transposed": lambda: torch.randn(8, 6).t(),
    "(N, C), every second column": lambda: torch.randn(6, 16)[:, ::2],
    "(N, C), the first columns": lambda: torch.randn(6, 11)[:, :8],
    "(N, C, 1), the first of two": lambda: torch.randn(6, 8, 2)[:, :, :1],
    "(N, C, 1) transposed": lambda: torch.randn(8, 6, 1).transpose(0, 1),
    "(N, C, 1, 1), every second channel": lambda: torch.randn(6, 16, 1, 1)[:, ::2],
    "(N, C, H, W), the first columns": lambda: torch.randn(2, 8, 3, 5)[..., :4],
}


@t0
@pytest.mark.parametrize("which", GAPPED)
def test_what_is_not_one_run_of_numbers(which: str, path: str, device: torch.device) -> None:
    """Input, residual and gradient that are views with gaps, or transposed: also where there is one pixel or none."""
    torch.manual_seed(3)
    x, residual, dy = (GAPPED[which]().to(device) for _ in range(3))
    leaves = x.requires_grad_(), residual.requires_grad_()
    of_ours = batch_norm_act(x, None, None, training=True, residual=residual)
    of_torch = F.batch_norm(x, None, None, training=True) + residual
    results = [(y, *torch.autograd.grad(y, leaves, dy)) for y in (of_ours, of_torch)]
    for ours, torchs in zip(*results, strict=True):
        assert torch.allclose(ours, torchs, rtol=1e-5, atol=1e-5)


def test_a_small_activation_is_split_into_more_programs() -> None:
    large, small = matrix(256 * 256 * 56 * 56, 256, 1), matrix(128 * 64 * 8 * 8, 64, 1)
    assert passes._apply_grid(large)[0] == passes._APPLY_ROWS
    rows, (programs,) = passes._apply_grid(small)
    assert rows == passes.TILE_ROWS
    assert programs == 256  # of 64 rows each there would be 64, fewer than a large GPU has multiprocessors


@t0
@pytest.mark.parametrize("residual", ["none", "same", "scatter"])
@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
def test_one_batch_in_two_parts(name: str, residual: str, path: str, device: torch.device) -> None:
    """As SyncBatchNorm would: statistics and sums reduced between the passes."""
    case = Case((5, 6, 3, 3), name, residual)
    p = problem(case, device)
    whole = results(ours, case, p)
    inverse = None if p.scatter is None else p.scatter.inverse
    cuts = [slice(0, 2), slice(2, 5)]
    parts = [batch_norm_statistics(p.x[c]) for c in cuts]
    counts = [p.x[c].numel() // p.x.shape[1] for c in cuts]
    mean, var, count = merge_statistics(
        torch.stack([m for m, _ in parts]), torch.stack([v for _, v in parts]), torch.tensor(counts)
    )
    assert count == sum(counts)
    ys, dxs, drs, sums = [], [], [], []
    masks = []
    for c in cuts:
        r = None if p.residual is None else p.residual[c]
        y, mask = batch_norm_apply(p.x[c], mean, var, p.weight, p.bias, r, inverse, EPS, True, True)
        masks.append(None if r is None else mask)
        ys.append(y)
        backward = (p.dy[c], p.x[c], mean, var, p.weight, p.bias, masks[-1], inverse)
        sums.append(torch.stack(batch_norm_backward_sums(*backward, EPS, True)))
    total = sums[0] + sums[1]
    for c, mask in zip(cuts, masks, strict=True):
        backward = (p.dy[c], p.x[c], mean, var, p.weight, p.bias, mask, inverse)
        dx, dr = batch_norm_backward_apply(*backward, *total, float(count), EPS, True, residual != "none")
        dxs.append(dx)
        drs.append(dr)
    got = [torch.cat(ys), torch.cat(dxs), total[1], total[0]]
    got += [] if residual == "none" else [torch.cat(drs)]
    for g, w in zip(got, whole, strict=True):
        assert torch.allclose(g, w, rtol=1e-5, atol=2e-6)


def test_merging_statistics() -> None:
    x = torch.randn(10, 4, dtype=torch.float64) + 100
    cuts = [x[:1], x[1:7], x[7:]]
    means = torch.stack([*(c.mean(0) for c in cuts), torch.full((4,), torch.nan)])  # the last part is empty
    variances = torch.stack([*(c.var(0, correction=0) for c in cuts), torch.full((4,), torch.nan)])
    mean, var, count = merge_statistics(means, variances, [1, 6, 3, 0])
    assert count == 10
    assert torch.allclose(mean, x.mean(0), rtol=1e-13)
    assert torch.allclose(var, x.var(0, correction=0), rtol=1e-10)


@t0
def test_nan_and_infinity_pass_as_in_torch(path: str, device: torch.device) -> None:
    for residual in ("none", "same", "scatter"):
        case = Case((2, 4, 3, 3), residual=residual, training=False)
        p = problem(case, device)
        p.x[0, 0, 0, 0], p.x[1, 0, 1, 1], p.x[0, 1, 0, 0] = torch.nan, torch.inf, -torch.inf
        if p.residual is not None:
            p.residual[0, 2, 0, 0], p.residual[0, 3, 2, 2] = torch.nan, torch.nan
        for got, eager in zip(results(ours, case, p), results(by_torch, case, p), strict=True):
            assert torch.equal(got.isnan(), eager.isnan())
            assert torch.allclose(got, eager, rtol=1e-4, atol=1e-4, equal_nan=True)
        case = replace(case, training=True)
        for got, eager in zip(results(ours, case, p), results(by_torch, case, p), strict=True):
            assert torch.equal(got.isnan(), eager.isnan())


@t0
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(("residual", "relu"), [("none", True), ("same", True), ("scatter", True), ("same", False)])
def test_gradcheck(residual: str, relu: bool, training: bool, path: str, device: torch.device) -> None:
    case = Case((3, 4, 2, 2), "channels_last" if relu else "contiguous", residual, relu, training, torch.float64)
    p = problem(case, device)
    names = [n for n in ("x", "weight", "bias", "residual") if getattr(p, n) is not None]
    leaves = [getattr(p, n).detach().double().requires_grad_() for n in names]
    dtype = {"running_mean": p.running_mean.double(), "running_var": p.running_var.double()}

    def function(*values: Tensor) -> Tensor:
        return ours(case, replace(p, **dict(zip(names, values, strict=True)), **dtype))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    true = exact(case, replace(p, **dict(zip(names, leaves, strict=True)), **dtype))[0]
    assert torch.allclose(function(*leaves), true, rtol=1e-7, atol=1e-7)


@t0
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_only_the_gradients_asked_for(wanted: str, training: bool, path: str, device: torch.device) -> None:
    case = Case((2, 4, 3, 3), residual="same", training=training)
    p = problem(case, device)
    every = dict(zip(("x", "weight", "bias", "residual"), results(ours, case, p)[1:], strict=True))
    leaf = getattr(p, wanted).requires_grad_()
    ours(case, p).backward(p.dy)
    assert torch.equal(leaf.grad, every[wanted])


@t0
def test_bytes_that_are_kept_and_not_written(path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((2, 3, 3, 3), residual="same")
    p = problem(case, device)
    saved: list[Tensor] = []
    p.x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        ours(case, p)
    large = [t for t in saved if t.numel() >= p.x.numel() // 8]
    assert [(t.dtype, t.numel()) for t in large] == [(torch.float32, 54), (torch.uint8, 7)]  # x and a bit per element
    _, mask = batch_norm_apply(p.x, p.running_mean, p.running_var, None, None, p.residual, None, EPS, True, False)
    assert mask.numel() == 0
    with torch.no_grad():
        launched = []
        returns = (p.x.clone(), p.x.new_empty(0))
        if path == "native":
            monkeypatch.setattr(module, "native_forward", lambda *_, **k: launched.append(k["record"]) or returns)
        monkeypatch.setattr(module, "apply_pass", lambda *_, **k: launched.append(k["record"]) or returns)
        batch_norm_act(p.x, None, None, residual=p.residual, relu=True, training=True)
    assert launched == [False]  # no mask where nobody will ask for a gradient


@t0
def test_the_residuals_gradient_is_that_of_the_sum(path: str, device: torch.device) -> None:
    case = Case((2, 3, 3, 3), residual="same", relu=False)
    p = problem(case, device)
    residual = p.residual.requires_grad_()
    seen = []
    residual.register_hook(lambda g: seen.append(g.data_ptr()))
    ours(case, p).backward(p.dy)
    assert seen == [p.dy.data_ptr()]  # not a copy


@t0
@pytest.mark.parametrize("residual", ["same", "scatter"])
def test_same_bits_again(residual: str, device: torch.device) -> None:
    case = Case((2, 16, 9, 9), "channels_last", residual, dtype=torch.float16)
    p = problem(case, device)
    first = results(ours, case, p)
    for _ in range(20 if device.type == "cuda" else 1):
        for a, b in zip(first, results(ours, case, p), strict=True):
            assert torch.equal(a, b)


@t0
@pytest.mark.parametrize("residual", ["none", "same", "scatter"])
def test_compiled(residual: str, path: str, device: torch.device) -> None:
    case = Case((3, 6, 3, 3), "channels_last", residual)
    p = problem(case, device)

    def function(*leaves: Tensor) -> Tensor:
        names = [n for n in ("x", "weight", "bias", "residual") if getattr(p, n) is not None]
        fields = dict(zip(names, leaves, strict=True))
        options: dict[str, Any] = {"relu": True, "training": True, "scatter": p.scatter}
        options["residual"] = fields.get("residual")
        mean, var = p.running_mean.clone(), p.running_var.clone()
        y = batch_norm_act(fields["x"] * 2, mean, var, fields["weight"], fields["bias"], **options)
        return y.sin() + mean.sum() + var.sum()

    outputs = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [t.detach().clone().requires_grad_() for t in p.leaves()]
        y = run(*leaves)
        y.backward(p.dy)
        assert y.stride() == p.dy.stride()
        outputs.append([y.detach(), *(t.grad for t in leaves)])
    for a, b in zip(*outputs, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = torch.nn.BatchNorm2d(4)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        bn = self.bn
        return batch_norm_act(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, residual=residual, relu=True)


@t0
def test_exported(path: str, device: torch.device) -> None:
    model = _Model().to(device).eval()
    x, residual = torch.randn(2, 2, 4, 3, 3, device=device)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x, residual), dynamic_shapes=({0: batch}, {0: batch}))
    more, other = torch.randn(2, 5, 4, 3, 3, device=device)
    assert torch.allclose(program.module()(more, other), model(more, other), atol=1e-6)


@t0
def test_operators_keep_their_contracts(path: str, device: torch.device) -> None:
    case = Case((3, 4, 3, 2), "channels_last", "scatter")
    p = problem(case, device)
    q = problem(Case((3, 4, 3, 2), "sliced", "same", dtype=torch.float16), device)
    for i, (t, inverse) in enumerate([(p, p.scatter.inverse), (q, None)]):
        x, residual = t.x.detach().requires_grad_(), t.residual.detach().requires_grad_()
        mean, var = batch_norm_statistics(t.x)
        _, mask = batch_norm_apply(t.x, mean, var, t.weight, t.bias, t.residual, inverse, EPS, True, True)
        affine = (t.weight.detach().requires_grad_(), t.bias.detach().requires_grad_())
        of = (t.dy, t.x, mean, var, t.weight, t.bias, mask, inverse)
        given = (mean, var) if i else (None, None)
        checks = [
            (module._batch_norm_act, (x, *given, *affine, residual, inverse, EPS, True, True)),
            (module._batch_norm_act_backward, (*of, EPS, True, True, i == 0, True, True, True)),
            (batch_norm_statistics, (t.x,)),
            (batch_norm_apply, (t.x, mean, var, t.weight, t.bias, t.residual, inverse, EPS, True, True)),
            (batch_norm_backward_sums, (*of, EPS, True)),
            (batch_norm_backward_apply, (*of, mean, var, 18.0, EPS, True, True)),
            (batch_norm_update_running_, (t.running_mean, t.running_var, mean, var, 18, 0.1)),
        ]
        for operator, arguments in checks if i == 0 else checks[:2]:
            torch.library.opcheck(operator, arguments)


@t0
def test_half_precision_modules_and_mixed_parameters(path: str, device: torch.device) -> None:
    """fp16 activations with fp32 parameters (autocast) and with fp16 ones (`model.half()`)."""
    case = Case((3, 4, 3, 3), "channels_last", "same", dtype=torch.float16)
    p = problem(case, device)
    halves = {n: getattr(p, n).half() for n in ("weight", "bias", "running_mean", "running_var")}
    mixed, half = results(ours, case, p), results(ours, case, replace(p, **halves))
    assert [g.dtype for g in half] == [torch.float16] * 5
    assert [g.dtype for g in mixed] == [torch.float16, torch.float16, torch.float32, torch.float32, torch.float16]
    for a, b in zip(mixed, half, strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=1e-2, atol=2e-2)
    # one parameter without the other
    p = problem(replace(case, dtype=torch.float32, relu=False), device)
    only = batch_norm_act(p.x, None, None, p.weight, None, training=True)
    both = batch_norm_act(p.x, None, None, p.weight, torch.zeros_like(p.bias), training=True)
    assert torch.allclose(only, both, atol=1e-6)
    shifted = batch_norm_act(p.x, None, None, None, p.bias, training=True)
    assert torch.allclose(shifted, F.batch_norm(p.x, None, None, None, p.bias, True), atol=1e-5)


@t0
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (1, 3, 0, 4), (0, 3)])
def test_an_empty_batch_or_plane_is_what_it_is_in_torch(
    shape: tuple[int, ...], residual: bool, training: bool, path: str, device: torch.device
) -> None:
    results = []
    for function in (batch_norm_act, F.batch_norm):
        mean, var = torch.full((3,), 0.5, device=device), torch.full((3,), 2.0, device=device)
        x, r = (torch.empty(shape, device=device, requires_grad=True) for _ in range(2))
        weight, bias = (torch.ones(3, device=device, requires_grad=True) for _ in range(2))
        y = function(x, mean, var, weight, bias, training=training)
        if residual:
            y = batch_norm_act(x, mean, var, weight, bias, training=training, residual=r, relu=True)
            y = y if function is batch_norm_act else F.relu(function(x, mean, var, weight, bias, training=training) + r)
        y.sum().backward()
        results.append((y.detach(), x.grad, weight.grad, bias.grad, r.grad if residual else x.grad, mean, var))
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b)


def test_layouts_of_residual_and_gradient_that_differ() -> None:
    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    residual = torch.randn(2, 4, 3, 3, requires_grad=True)
    y = batch_norm_act(x, None, None, residual=residual, relu=True, training=True)
    y.sum().backward()  # a gradient expanded from one number
    assert y.is_contiguous(memory_format=torch.channels_last)
    x2, r2 = x.detach().clone().requires_grad_(), residual.detach().clone().requires_grad_()
    F.relu(F.batch_norm(x2, None, None, training=True) + r2).sum().backward()
    assert torch.allclose(x.grad, x2.grad, atol=1e-5)
    assert torch.equal(residual.grad, r2.grad)


X = torch.zeros(2, 3, 4, 4)
C = torch.ones(3)
REFUSED = {
    "eval without statistics": (lambda: batch_norm_act(X, None, None), "running_mean and running_var"),
    "half of the statistics": (lambda: batch_norm_act(X, C, None, training=True), "both or neither"),
    "one value": (lambda: batch_norm_act(torch.zeros(1, 3), None, None, training=True), "more than 1 value"),
    "integers": (lambda: batch_norm_act(X.int(), C, C), "int32"),
    "a vector": (lambda: batch_norm_act(C, C, C), "dimensions"),
    "six dimensions": (lambda: batch_norm_act(X[None, None], C, C), "dimensions"),
    "weight's length": (lambda: batch_norm_act(X, C, C, torch.ones(4)), "weight has shape"),
    "weight's dtype": (lambda: batch_norm_act(X, C, C, C.half()), "weight is torch.float16"),
    "bias's device": (lambda: batch_norm_act(X, C, C, C, C.to("meta")), "bias is on meta"),
    "residual's dtype": (lambda: batch_norm_act(X, C, C, residual=X.half()), "float16 and the input torch.float32"),
    "residual's shape": (lambda: batch_norm_act(X, C, C, residual=X[:1]), "residual has shape"),
    "residual's device": (lambda: batch_norm_act(X, C, C, residual=X.to("meta")), "residual is on meta"),
    "scatter onto nothing": (lambda: batch_norm_act(X, C, C, scatter=ChannelIndex([0, 1, 2], 5)), "residual"),
    "scatter of others": (
        lambda: batch_norm_act(X, C, C, residual=torch.zeros(2, 5, 4, 4), scatter=ChannelIndex([0, 1], 5)),
        "scatter places 2 channels",
    ),
    "scatter to others": (
        lambda: batch_norm_act(X, C, C, residual=torch.zeros(2, 5, 4, 4), scatter=ChannelIndex([0, 1, 2], 6)),
        "residual has shape",
    ),
    "a mask not recorded": (
        lambda: batch_norm_backward_sums(X, X, C, C, None, None, torch.empty(0, dtype=torch.uint8), None, EPS, True),
        "record a mask",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as caught:
        function()
    assert isinstance(caught.value, ValueError)
