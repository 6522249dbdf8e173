"""Batch norm by the native library, where it differs from the kernels: rows, planes, pieces, threads."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from fences import layout
from test_batch_norm_act import EPS, Case, by_torch, check, errors, exact, ours, problem, results
from torch import Tensor

from prunetrain_kernels.ops import native
from prunetrain_kernels.ops.batch_norm_act import batch_norm_apply, batch_norm_statistics
from prunetrain_kernels.ops.batch_norm_reference import _pack_bits

pytestmark = pytest.mark.t0
T0_BACKENDS = ("native",)
LAYOUTS = ("contiguous", "channels_last")


@pytest.fixture(autouse=True)
def _of_the_cpu(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("the native library runs on a CPU; PRUNETRAIN_TEST_DEVICE=cuda tests the kernels")


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# A piece is about 32 thousand elements. By planes: contiguous with 32 pixels or more, or with many channels.
SHAPES = [
    (1, 3, 7, 7),
    (2, 13, 7, 7),
    (37, 27, 7, 7),  # by planes, two parts of images
    (2, 1, 1, 2),
    (1, 5, 200, 211),  # one image, more than a piece
    (3, 13, 61, 53),  # pieces that end within a plane
    (70, 16, 6, 5),  # several pieces by columns, in both layouts
    (9, 531, 3, 3),  # odd and wide: a row of one period of eight
    (3, 1100, 2, 2),  # more columns than are handled at once
    (40, 1031, 1, 1),
]


@pytest.mark.parametrize("residual", ["none", "same"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, ...], name: str, residual: str) -> None:
    case = Case(shape, name, residual)
    check(case, torch.device("cpu"), roundings=4)  # sums of three channels, of terms that cancel
    check(replace(case, training=False, affine=False, offset=3), torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    for shape in ((5, 27, 7, 7), (9, 64, 9, 9), (70, 13, 5, 5)):
        case = Case(shape, name, "same", dtype=dtype)
        check(case, torch.device("cpu"))
        check(replace(case, residual="none", offset=1), torch.device("cpu"))
        check(replace(case, relu=False, training=False), torch.device("cpu"))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYOUTS)
def test_float64(name: str, training: bool) -> None:
    for shape, residual in (((5, 27, 7, 7), "same"), ((70, 13, 5, 5), "none")):
        case = Case(shape, name, residual, training=training, dtype=torch.float64)
        p = problem(case, torch.device("cpu"))
        p = replace(p, **{n: getattr(p, n).double() for n in ("weight", "bias", "running_mean", "running_var")})
        for got, true in zip(results(ours, case, p), results(exact, case, p), strict=True):
            assert torch.allclose(got, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 8, 30, 31, 4), (200, 33, 9), (4000, 37)], ids=str)
def test_other_dimensions(shape: tuple[int, ...]) -> None:
    check(Case(shape, residual="same"), torch.device("cpu"))


def bits(case: Case) -> list[Tensor]:
    p = problem(case, torch.device("cpu"))
    return [*batch_norm_statistics(p.x), *results(ours, case, p)]


BITS: dict[str, list[Tensor]] = {}


@pytest.mark.parametrize("residual", ["none", "same"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_same_bits_by_any_number_of_threads(name: str, residual: str, threads: int) -> None:
    case = Case((50, 13, 21, 23), name, residual)
    got = bits(case)
    for g, first in zip(got, BITS.setdefault(str(case), got), strict=True):
        assert torch.equal(g, first)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shape", [(64, 16, 24, 24), (64, 13, 6, 5), (9, 27, 7, 7)], ids=str)
def test_mean_a_thousand_times_the_deviation(shape: tuple[int, ...], name: str) -> None:
    x = layout(torch.randn(shape, generator=torch.Generator().manual_seed(7)) + 1000, name)
    mean, var = batch_norm_statistics(x)
    true_var, true_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert (mean - true_mean).abs().max() <= 2**-14  # half an ulp of 1000, and a rounding
    assert (var / true_var - 1).abs().max() < 1e-6
    case = Case(shape, name, "same", mean=1000.0)
    p = problem(case, torch.device("cpu"))
    true, got, eager = results(exact, case, p, torch.float64), results(ours, case, p), results(by_torch, case, p)
    for error, allowed, t in zip(errors(got, true), errors(eager, true), true, strict=True):
        assert error <= allowed + 2e-6 * t.abs().max()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_sample_that_is_unlike_the_rest(name: str) -> None:
    """Sums are taken about the mean of the first sixteenth of a part."""
    x = torch.randn(64, 16, 24, 24, generator=torch.Generator().manual_seed(9)) + 1000
    x[:2], x[:, :, 0, 0] = -1000, 0
    mean, var = batch_norm_statistics(layout(x, name))
    true_var, true_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert (mean / true_mean - 1).abs().max() < 1e-6
    assert (var / true_var - 1).abs().max() < 1e-5


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 3, 7, 7), (5, 13, 61, 53), (3, 64, 32, 32), (3, 37, 5, 5)], ids=str)
def test_mask(shape: tuple[int, ...], name: str) -> None:
    p = problem(Case(shape, name, "same"), torch.device("cpu"))
    p.residual[0, 0, 0, :2] = torch.tensor([torch.nan, -torch.inf])[: shape[-1]]
    y, mask = batch_norm_apply(p.x, p.running_mean, p.running_var, None, None, p.residual, None, EPS, False, False)
    assert mask.numel() == 0
    act, mask = batch_norm_apply(p.x, p.running_mean, p.running_var, None, None, p.residual, None, EPS, True, True)
    assert torch.equal(mask, _pack_bits((y <= 0).logical_not()))
    assert torch.equal(act.isnan(), y.isnan())
    assert torch.equal(act.nan_to_num(), torch.where(y <= 0, 0, y).nan_to_num())


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shape", [(20, 13, 16, 16), (20, 13, 5, 5)], ids=str)
def test_nan_and_infinity_stay_in_their_channel(shape: tuple[int, ...], name: str) -> None:
    for residual in ("none", "same"):
        case = Case(shape, name, residual)
        p = problem(case, torch.device("cpu"))
        clean = results(ours, case, p)
        p.x[3, 2, 1, 1], p.x[0, 7, 0, 0], p.x[19, 8, 4, 4] = torch.nan, torch.inf, -torch.inf
        others = [c for c in range(13) if c not in (2, 7, 8)]
        for got, before in zip(results(ours, case, p), clean, strict=True):
            dim = min(got.dim() - 1, 1)
            if got.dim() > 1:
                got, before = got.movedim(dim, 0), before.movedim(dim, 0)
            assert torch.equal(got[others], before[others])
        mean, var = batch_norm_statistics(p.x)
        assert not mean[[2, 7, 8]].isfinite().any()
        assert var[[2, 7, 8]].isnan().all()


def test_tensors_that_do_not_fit_are_refused() -> None:
    x, c = torch.zeros(2, 3, 4, 4), torch.ones(3)
    with pytest.raises(RuntimeError, match="the residual must be as x is"):
        native.ops().batch_norm_forward(x, c, c, False, None, None, x.half(), x, None, 0, 16, EPS, True)
    with pytest.raises(RuntimeError, match="dy must be as x is"):
        native.ops().batch_norm_backward(
            x[:1], x, c, c, None, None, None, None, None, False, x, None, 0, 16, 0.0, EPS, True
        )
