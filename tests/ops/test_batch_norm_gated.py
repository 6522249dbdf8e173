"""Batch norm of all channels of a space behind a convolution that computes only its live ones.

The truth is PyTorch's batch norm, in float64, of the input with zeros in the channels that it lacks. "kernels" cases
are tier T0; "reference" ones see the operator as a user without a GPU does.
"""

import itertools
import sys
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fences import fenced, layout
from torch import Tensor

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.ops.batch_norm_act import (
    batch_norm_act,
    batch_norm_act_by_maps,
    batch_norm_apply,
    batch_norm_backward_apply,
    batch_norm_backward_sums,
    batch_norm_statistics,
    batch_norm_update_running_,
    merge_statistics,
)
from prunetrain_kernels.ops.channel_index import ChannelIndex, Maps, channel_scatter

by_kernels = [pytest.param(name, marks=pytest.mark.t0) for name in ("kernels", "cooperative")]
paths = pytest.mark.parametrize("path", [*by_kernels, "reference"])
module = sys.modules["prunetrain_kernels.ops.batch_norm_act"]  # the package's attribute of that name is the function
EPS, MOMENTUM = 1e-5, 0.3
LEAVES = ("x", "weight", "bias", "residual")


@dataclass(frozen=True)
class Case:
    channels: int
    live: str  # none, one, all, random, run, eights
    layout: str = "channels_last"
    training: bool = True
    residual: bool = False
    relu: bool = True
    affine: bool = True
    dtype: torch.dtype = torch.float32
    size: tuple[int, int, int] = (3, 3, 5)  # batch, height, width
    offset: int = 0

    def __str__(self) -> str:
        parts = [str(self.channels), self.live, self.layout, str(self.dtype).removeprefix("torch.")]
        return "-".join(parts + [n for n in ("training", "residual", "relu", "affine") if getattr(self, n)])


@dataclass
class Problem:
    """Tensors of a case: x of the live channels, parameters and running statistics of all."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    dy: Tensor
    index: ChannelIndex


def live_channels(case: Case, random: torch.Generator) -> list[int]:
    channels = case.channels
    half = max(channels // 2, 1)
    return {
        "none": [],
        "one": [channels // 2],
        "all": list(range(channels)),
        "random": torch.randperm(channels, generator=random)[:half].tolist(),
        "run": list(range(channels // 3, channels // 3 + half)),
        "eights": list(range(8, channels // 8 * 8 - 16)),
    }[case.live]


def problem(case: Case, device: torch.device) -> Problem:
    random = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    def stored(value: Tensor) -> Tensor:
        value = layout(value.to(device, case.dtype), case.layout)
        return value if case.layout == "sliced" else fenced(value, case.offset)

    batch, *side = case.size
    index = ChannelIndex(live_channels(case, random), case.channels, device)
    full = (batch, case.channels, *side)
    x = stored(normal(batch, index.live, *side) * 1.5 + 0.5)
    if case.layout == "channels_last" and index.live < 2:  # as a convolution makes them: strides tell the layout
        x = x.as_strided(x.shape, torch.empty(x.shape, memory_format=torch.channels_last).stride())
    residual = stored(normal(*full)) if case.residual else None
    weight, bias = (fenced((normal(case.channels) + shift).to(device)) for shift in (0.5, 0))
    affine = (weight, bias) if case.affine else (None, None)
    mean, var = normal(case.channels).to(device), (normal(case.channels).square() + 0.5).to(device)
    p = Problem(x, *affine, residual, mean, var, normal(*full), index)
    if case.relu:  # where rounding decides the sign, any gradient is right
        wide = of_dtype(p, torch.float64)
        before = exact(replace(case, relu=False), wide)[0].cpu()
        p.dy = torch.where(before.abs() < 1e-2, 0, p.dy)
    p.dy = stored(p.dy)
    return p


def of_dtype(p: Problem, dtype: torch.dtype) -> Problem:
    values = {f.name: getattr(p, f.name) for f in fields(p)}
    return Problem(**{n: v.to(dtype, copy=True) if isinstance(v, Tensor) else v for n, v in values.items()})


def exact(case: Case, p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """y and the running statistics afterwards, by PyTorch's batch norm of the input with zeros."""
    mean, var = p.running_mean.clone(), p.running_var.clone()
    y = F.batch_norm(channel_scatter(p.x, p.index), mean, var, p.weight, p.bias, case.training, MOMENTUM, EPS)
    y = y if p.residual is None else y + p.residual
    return (F.relu(y) if case.relu else y), mean, var


def ours(case: Case, p: Problem, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = p.running_mean.clone(), p.running_var.clone()
    options = {"training": case.training, "momentum": MOMENTUM, "eps": EPS, "relu": case.relu} | options
    y = batch_norm_act(p.x, mean, var, p.weight, p.bias, residual=p.residual, scatter=p.index, **options)
    return y, mean, var


def results(function: Any, case: Case, p: Problem) -> dict[str, Tensor]:
    """y, running statistics, and the gradients of those leaves that there are."""
    leaves = {n: getattr(p, n).detach().requires_grad_() for n in LEAVES if getattr(p, n) is not None}
    y, mean, var = function(case, replace(p, **leaves))
    gradients = torch.autograd.grad(y, list(leaves.values()), p.dy.to(y.dtype), materialize_grads=True)
    of_leaves = {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}
    return {"y": y.detach(), "running_mean": mean, "running_var": var} | of_leaves


def check(case: Case, device: torch.device) -> None:
    """Errors at most twice those of PyTorch's own operators in the same dtype, but for some roundings."""
    p = problem(case, device)
    got, eager = results(ours, case, p), results(exact, case, p)
    true = results(exact, case, of_dtype(p, torch.float64))
    for name, g in got.items():
        assert (g.dtype, g.shape) == (eager[name].dtype, eager[name].shape), name
        assert g.isfinite().all(), name
        if g.numel() == 0:
            continue
        of_sum = 1.0 if name in ("dweight", "dbias") else 0.0  # its terms are about that large, and may cancel
        scale = max(g.abs().max().item(), of_sum)
        error, allowed = ((t[name].double() - true[name]).abs().max().item() for t in (got, eager))
        roundings = 8 if g.dtype == torch.float32 else 0.5  # PyTorch's sums on the CPU are float64, ours fp32
        assert error <= 2 * allowed + roundings * torch.finfo(g.dtype).eps * scale, (name, error, allowed, scale)
    if case.layout != "sliced":
        kept = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
        assert all(got[n].is_contiguous(memory_format=kept) for n in ("y", "dx", "dresidual") if n in got)


LIVE = ("none", "one", "all", "random", "run", "eights")
FLAGS = list(itertools.product((True, False), repeat=4))
WIDTHS = (1, 3, 8, 37, 64, 65)
LAYOUTS = ("contiguous", "channels_last")


def some_cases() -> list[Case]:
    """Every combination of flags with every kind of index, in every shape, layout and dtype in turn."""
    shapes = list(itertools.product(WIDTHS, LAYOUTS, (torch.float32, torch.float16)))
    cases = []
    for i, (live, flags) in enumerate(itertools.product(LIVE, FLAGS)):
        channels, name, dtype = shapes[7 * i % len(shapes)]
        live = "run" if live == "eights" and channels < 64 else live
        size = (3, 3, 5) if channels <= 8 else (11, 1, 2)  # the interpreter pays by the tile of a row
        cases.append(Case(channels, live, name, *flags, dtype=dtype, size=size))
    return cases


CASES = [
    *some_cases(),
    Case(64, "eights", "contiguous", size=(2, 2, 4)),  # bounds that are multiples of 8 in both layouts
    Case(64, "eights", residual=True, size=(20, 5, 5)),  # several chunks of rows, a last row cut short
    Case(6, "run", "contiguous", size=(9, 4, 4), residual=True),  # the same where maps are 16 pixels
    Case(37, "random", "sliced", residual=True, size=(11, 1, 3)),
    Case(65, "run", "sliced", training=False, size=(11, 1, 3)),
    Case(64, "eights", offset=1, dtype=torch.float16),
    Case(8, "run", size=(5, 1, 1)),
    Case(8, "one", "contiguous", size=(5, 1, 1)),
]


@pytest.mark.t0
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels(case: Case, device: torch.device) -> None:
    check(case, device)


@pytest.mark.parametrize("name", [*LAYOUTS, "sliced"])
@pytest.mark.parametrize("channels", WIDTHS)
def test_reference(channels: int, name: str, device: torch.device) -> None:
    dtypes = itertools.cycle((torch.float32, torch.float16, torch.float32, torch.float32, torch.float16))
    for live, flags in itertools.product(LIVE if channels >= 64 else LIVE[:-1], FLAGS):
        check(Case(channels, live, name, *flags, dtype=next(dtypes)), device)


@pytest.mark.parametrize("live", LIVE)
def test_bfloat16_by_the_reference(live: str, device: torch.device) -> None:
    for training, residual in itertools.product((True, False), repeat=2):
        check(Case(64, live, training=training, residual=residual, dtype=torch.bfloat16), device)


@paths
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("live", ["none", "random", "run"])
def test_zeros_leave_their_constant(live: str, residual: bool, path: str, device: torch.device) -> None:
    """In training a channel that is not there adds its bias and nothing else, to the last bit."""
    case = Case(37, live, residual=residual, relu=False)
    p = problem(case, device)
    y, mean, var = ours(case, p)
    absent = p.index.inverse < 0
    expected = p.bias.view(1, -1, 1, 1).expand_as(y)
    expected = expected if p.residual is None else p.residual + expected
    assert torch.equal(y[:, absent], expected[:, absent])
    keep = 1 - torch.tensor(MOMENTUM, dtype=torch.float32, device=device)
    for now, before in ((mean, p.running_mean), (var, p.running_var)):
        assert torch.allclose(now[absent], before[absent] * keep, rtol=1e-6)


@paths
@pytest.mark.parametrize(
    "case",
    [Case(37, "run", size=(11, 1, 2)), Case(64, "eights", residual=True, size=(3, 1, 3)), Case(9, "run", "contiguous")],
)
def test_a_run_is_as_its_map(case: Case, path: str, device: torch.device) -> None:
    for training in (True, False):
        p = problem(replace(case, training=training), device)
        found = []
        for first in (p.index.first, None):

            def function(case: Case, p: Problem, first: int | None = first) -> tuple[Tensor, Tensor, Tensor]:
                mean, var = p.running_mean.clone(), p.running_var.clone()
                maps = Maps(p.index.index, p.index.inverse, first)
                options: dict[str, Any] = {"training": case.training, "relu": case.relu, "residual": p.residual}
                return batch_norm_act_by_maps(p.x, mean, var, p.weight, p.bias, **options, maps=maps), mean, var

            found.append(results(function, case, p))
        # to rounding: a map and a run make two compiled kernels, which add in orders of their own
        for name, value in found[0].items():
            assert torch.allclose(value, found[1][name], rtol=1e-5, atol=1e-6), name


@paths
@pytest.mark.parametrize("live", ["random", "run", "none", "eights"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_parameters_of_live_channels_as_before(live: str, residual: bool, path: str, device: torch.device) -> None:
    """The other meaning: the residual alone where there is no channel; without any parameters 0 will do for it."""
    case = Case(64, live, residual=residual, affine=residual)
    p = problem(case, device)
    part = p.index.index.long()
    if residual:
        p = replace(p, **{n: getattr(p, n)[part] for n in ("weight", "bias", "running_mean", "running_var")})

    def placed(case: Case, p: Problem) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = (p.running_mean.clone(), p.running_var.clone()) if residual else (None, None)
        y = F.batch_norm(p.x, mean, var, p.weight, p.bias, True, MOMENTUM, EPS) if p.x.numel() else p.x
        y = channel_scatter(y, p.index)
        y = y if p.residual is None else y + p.residual
        return F.relu(y), p.x.new_zeros(0) if mean is None else mean, p.x.new_zeros(0) if var is None else var

    def function(case: Case, p: Problem) -> tuple[Tensor, Tensor, Tensor]:
        if residual:
            return ours(case, p)
        y = batch_norm_act(p.x, None, None, training=True, relu=True, scatter=p.index)
        return y, p.x.new_zeros(0), p.x.new_zeros(0)

    got, true = results(function, case, p), results(placed, case, p)
    for name, value in got.items():
        assert torch.allclose(value, true[name], rtol=1e-5, atol=5e-6), name
    assert got["y"].is_contiguous(memory_format=torch.channels_last)


@paths
@pytest.mark.parametrize("live", ["all", "random", "eights", "none"])
def test_statistics_given(live: str, path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing differs, and x is not read for them."""
    for residual in (False, True):
        case = Case(40 if live == "eights" else 8, live, residual=residual)
        p = problem(case, device)
        known = batch_norm_statistics(p.x)
        alone = results(ours, case, p)
        with monkeypatch.context() as patch:
            patch.setattr(module, "measure_statistics", lambda *_: pytest.fail("statistics were computed again"))
            given = results(lambda case, p: ours(case, p, statistics=known), case, p)  # noqa: B023
        # in one launch statistics are added up in another order
        same = partial(torch.allclose, rtol=1e-5, atol=1e-5) if path == "cooperative" else torch.equal
        for name, value in alone.items():
            assert same(value, given[name]), name
    plain = [
        batch_norm_act(p.x, None, None, training=True, residual=None, statistics=s, relu=True) for s in (None, known)
    ]
    assert same(*plain)
    mean, var = known[0] + 1, known[1] * 2  # and they are what is used
    shifted = batch_norm_act(p.x.double(), None, None, training=True, statistics=(mean.double(), var.double()))
    assert torch.allclose(
        shifted, (p.x.double() - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + EPS).sqrt(), atol=1e-6
    )


@paths
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("live", ["random", "run", "none"])
def test_gradcheck(live: str, residual: bool, training: bool, path: str, device: torch.device) -> None:
    case = Case(4, live, training=training, residual=residual, relu=not residual, dtype=torch.float64, size=(3, 2, 2))
    case = replace(case, layout="contiguous" if live == "none" else "channels_last")  # the other has strides of 0
    p = of_dtype(problem(case, device), torch.float64)
    names = [n for n in LEAVES if getattr(p, n) is not None]
    leaves = [getattr(p, n).detach().requires_grad_() for n in names]

    def function(*values: Tensor) -> Tensor:
        return ours(case, replace(p, **dict(zip(names, values, strict=True))))[0]

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.allclose(function(*leaves), exact(case, p)[0], rtol=1e-9, atol=1e-9)


@paths
@pytest.mark.parametrize("wanted", LEAVES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_only_the_gradients_asked_for(wanted: str, training: bool, path: str, device: torch.device) -> None:
    for live in ("random", "run"):
        case = Case(9, live, training=training, residual=True)
        p = problem(case, device)
        every = results(ours, case, p)
        leaf = getattr(p, wanted).requires_grad_()
        ours(case, p)[0].backward(p.dy)
        assert torch.equal(leaf.grad, every[f"d{wanted}"])


@paths
@pytest.mark.parametrize("case", [Case(6, "random", residual=True), Case(7, "run"), Case(6, "none", "contiguous")])
def test_one_batch_in_two_parts(case: Case, path: str, device: torch.device) -> None:
    """As SyncBatchNorm would: statistics and sums reduced between the passes."""
    p = problem(case, device)
    whole = results(ours, case, p)
    first = -1 if p.index.first is None else p.index.first
    inverse, places = p.index.inverse, {"padded": True, "first": first}
    cuts = [slice(0, 2), slice(2, 3)]
    parts = [batch_norm_statistics(p.x[c], inverse, first) for c in cuts]
    counts = [p.dy[c, 0].numel() for c in cuts]
    mean, var, _ = merge_statistics(torch.stack([m for m, _ in parts]), torch.stack([v for _, v in parts]), counts)
    outs, sums = [], []
    for c in cuts:
        r = None if p.residual is None else p.residual[c]
        y, mask = batch_norm_apply(p.x[c], mean, var, p.weight, p.bias, r, inverse, EPS, True, True, **places)
        outs.append({"y": y, "mask": None if r is None else mask})
        backward = (p.dy[c], p.x[c], mean, var, p.weight, p.bias, outs[-1]["mask"], inverse)
        sums.append(torch.stack(batch_norm_backward_sums(*backward, EPS, True, True, **places)))
    total = sums[0] + sums[1]
    for c, out in zip(cuts, outs, strict=True):
        backward = (p.dy[c], p.x[c], mean, var, p.weight, p.bias, out.pop("mask"), inverse)
        apply = (*backward, *total, float(sum(counts)), EPS, True, case.residual, True)
        out["dx"], out["dresidual"] = batch_norm_backward_apply(*apply, **places)
    got = {"dbias": total[0], "dweight": total[1]}
    got |= {n: torch.cat([out[n] for out in outs]) for n in ("y", "dx", "dresidual") if n in whole}
    for name, value in got.items():
        assert torch.allclose(value, whole[name], rtol=1e-5, atol=2e-6), name


@paths
@pytest.mark.parametrize("live", ["random", "run", "none"])
def test_compiled(live: str, path: str, device: torch.device) -> None:
    for residual, given in ((False, False), (True, True)):
        case = Case(6, live, residual=residual)
        p = problem(case, device)
        known = batch_norm_statistics(p.x * 2) if given else None
        names = [n for n in LEAVES if getattr(p, n) is not None]

        def function(*leaves: Tensor) -> Tensor:
            values = dict(zip(names, leaves, strict=True))  # noqa: B023
            values["x"] = values["x"] * 2
            y, mean, var = ours(case, replace(p, **values), statistics=known)  # noqa: B023
            return y.sin() + mean.sum() + var.sum()

        torch._dynamo.reset()
        outputs = []
        for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            leaves = [getattr(p, n).detach().clone().requires_grad_() for n in names]
            y = run(*leaves)
            y.backward(p.dy)
            assert y.stride() == p.dy.stride() or live == "none"  # whose strides say nothing once x is 2 x
            outputs.append([y.detach(), *(t.grad for t in leaves)])
        assert outputs[0][0].stride() == outputs[1][0].stride()
        for a, b in zip(*outputs, strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


@paths
@pytest.mark.parametrize(
    "case",
    [
        Case(6, "random", residual=True, size=(2, 2, 3)),
        Case(6, "run", "contiguous", size=(2, 2, 3)),
        Case(5, "one", size=(2, 2, 3)),
        Case(5, "none"),
    ],
    ids=str,
)
def test_operators_keep_their_contracts(case: Case, path: str, device: torch.device) -> None:
    p = problem(case, device)
    first = -1 if p.index.first is None else p.index.first
    inverse, places = p.index.inverse, {"padded": True, "first": first}
    leaves = {n: getattr(p, n).detach().requires_grad_() for n in LEAVES if getattr(p, n) is not None}
    known = batch_norm_statistics(p.x)
    mean, var = batch_norm_statistics(p.x, inverse, first)
    parameters = (p.weight, p.bias, p.residual, inverse, EPS, True, True)
    _, mask = batch_norm_apply(p.x, mean, var, *parameters, **places)
    of = (p.dy, p.x, mean, var, p.weight, p.bias, mask if case.residual else None, inverse)
    affine = (leaves["weight"], leaves["bias"], leaves.get("residual"), inverse, EPS, True, True)
    last = case.layout == "channels_last"
    checks: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (module._batch_norm_act, (leaves["x"], None, None, *affine, True), places),
        (module._batch_norm_act, (leaves["x"], *known, *affine, True), places),
        (module._batch_norm_act, (leaves["x"], p.running_mean, p.running_var, *affine, False), places),
        (module._batch_norm_act_backward, (*of, EPS, True, last, True, True, True, True), places),
        (batch_norm_statistics, (p.x, inverse, first), {}),
        (batch_norm_apply, (p.x, mean, var, *parameters), places),
        (batch_norm_backward_sums, (*of, EPS, True, last), places),
        (batch_norm_backward_apply, (*of, mean, var, 45.0, EPS, True, True, last), places),
        (batch_norm_update_running_, (p.running_mean, p.running_var, mean, var, 45, 0.1), {}),
    ]
    for operator, arguments, keywords in checks:
        torch.library.opcheck(operator, arguments, keywords)


@paths
def test_what_is_kept_for_backward(path: str, device: torch.device) -> None:
    """x of the live channels, and a bit per element where a residual and a ReLU meet; never x with zeros."""
    for residual in (False, True):
        case = Case(8, "run", residual=residual)
        p = problem(case, device)
        saved: list[Tensor] = []
        p.x.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):  # noqa: B023
            ours(case, p)
        large = [t.numel() for t in saved if t.numel() > 8]
        assert large == [p.x.numel()] + ([p.dy.numel() // 8] if residual else [])


@paths
@pytest.mark.parametrize("live", ["random", "run"])
def test_nan_and_infinity_stay_in_their_channels(live: str, path: str, device: torch.device) -> None:
    for training in (True, False):
        case = Case(9, live, training=training)
        p = problem(case, device)
        p.x[0, 0, 0, 0], p.x[1, 1, 1, 1] = torch.nan, torch.inf
        got, eager = results(ours, case, p), results(exact, case, p)
        for name in ("y", "dx", "dweight", "dbias"):
            assert torch.equal(got[name].isnan(), eager[name].isnan()), name


@paths
def test_one_live_channel_keeps_the_layout(path: str, device: torch.device) -> None:
    """A tensor of one channel is stored both ways: its strides say which one its maker meant."""
    mean, var = torch.zeros(5, device=device), torch.ones(5, device=device)
    index = ChannelIndex([3], 5, device)
    for stored in (torch.channels_last, torch.contiguous_format):
        x = torch.empty(2, 1, 3, 4, device=device, memory_format=stored).zero_()
        y = batch_norm_act(x, mean, var, scatter=index)
        assert y.is_contiguous(memory_format=stored)
        assert not y.is_contiguous(
            memory_format=torch.contiguous_format if stored == torch.channels_last else torch.channels_last
        )


@pytest.mark.t0
@pytest.mark.parametrize("live", ["random", "run", "eights"])
def test_same_bits_again(live: str, device: torch.device) -> None:
    case = Case(64, live, residual=True, dtype=torch.float16)
    p = problem(case, device)
    first = results(ours, case, p)
    for _ in range(20 if device.type == "cuda" else 1):
        for name, value in results(ours, case, p).items():
            assert torch.equal(first[name], value), name


@paths
def test_no_images(path: str, device: torch.device) -> None:
    case = Case(4, "run", training=False, size=(0, 3, 3))
    got = results(ours, case, problem(case, device))
    assert got["y"].shape == (0, 4, 3, 3)
    assert torch.equal(got["dbias"], torch.zeros(4, device=device))


X, LIVE_ONES, ONES = torch.zeros(2, 2, 4, 4), torch.ones(2), torch.ones(5)
INDEX = ChannelIndex([1, 3], 5)
REFUSED = {
    "mixed sizes": (lambda: batch_norm_act(X, ONES, ONES, LIVE_ONES, scatter=INDEX), "running_var has 5 values"),
    "statistics of all, affine of live": (
        lambda: batch_norm_act(X, ONES, ONES, LIVE_ONES, LIVE_ONES, scatter=INDEX, residual=torch.zeros(2, 5, 4, 4)),
        "as many of each",
    ),
    "a length of neither": (
        lambda: batch_norm_act(X, torch.ones(3), torch.ones(3), scatter=INDEX),
        r"must be \(2,\) or \(5,\)",
    ),
    "parameters of live, no residual": (
        lambda: batch_norm_act(X, LIVE_ONES, LIVE_ONES, scatter=INDEX),
        "scatter adds to a residual",
    ),
    "all channels, no scatter": (lambda: batch_norm_act(X, ONES, ONES), r"must be \(2,\)"),
    "a residual of live": (lambda: batch_norm_act(X, ONES, ONES, scatter=INDEX, residual=X), "residual has shape"),
    "statistics in eval": (
        lambda: batch_norm_act(X, ONES, ONES, scatter=INDEX, statistics=(LIVE_ONES, LIVE_ONES)),
        "for training",
    ),
    "statistics of all": (
        lambda: batch_norm_act(X, None, None, training=True, scatter=INDEX, statistics=(ONES, ONES)),
        r"\(2,\) is needed",
    ),
    "statistics of half precision": (
        lambda: batch_norm_act(X, None, None, training=True, statistics=(LIVE_ONES.half(), LIVE_ONES)),
        "mean is torch.float16",
    ),
    "statistics elsewhere": (
        lambda: batch_norm_act(X, None, None, training=True, statistics=(LIVE_ONES, LIVE_ONES.to("meta"))),
        "var is on meta",
    ),
    "eval without statistics": (lambda: batch_norm_act(X, None, None, ONES, ONES, scatter=INDEX), "running_mean"),
    "one value": (
        lambda: batch_norm_act(torch.zeros(1, 2), ONES, ONES, training=True, scatter=INDEX),
        "more than 1 value",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        function()


def test_statistics_have_no_gradient() -> None:
    mean, var = torch.zeros(2, requires_grad=True), torch.ones(2)
    y = batch_norm_act(X.clone().requires_grad_(), None, None, training=True, statistics=(mean, var))
    with pytest.raises(InputError, match="detach"):
        y.sum().backward()
