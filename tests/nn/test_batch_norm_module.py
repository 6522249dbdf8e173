"""BatchNormAct2d is nn.BatchNorm2d, a sum and a ReLU."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetrain_kernels import InputError
from prunetrain_kernels.nn import BatchNormAct2d
from prunetrain_kernels.ops.channel_index import ChannelIndex

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cumulative": {"momentum": None},
    "not-affine": {"affine": False},
    "no-statistics": {"track_running_stats": False},
    "nothing": {"affine": False, "track_running_stats": False},
    "eps-momentum": {"eps": 1e-2, "momentum": 0.3},
}


def pair(options: dict[str, Any], relu: bool = True) -> tuple[BatchNormAct2d, nn.BatchNorm2d]:
    torch.manual_seed(0)
    fused, plain = BatchNormAct2d(5, relu=relu, **options).double(), nn.BatchNorm2d(5, **options).double()
    for tensor in plain.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    fused.load_state_dict(plain.state_dict())
    return fused, plain


@pytest.mark.parametrize("residual", [None, "map", "constant", "broadcast"])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_same_as_the_three(options: str, relu: bool, residual: str | None) -> None:
    fused, plain = pair(OPTIONS[options])
    shapes = {"map": (4, 5, 3, 3), "constant": (1, 5, 1, 1), "broadcast": (4, 1, 3, 1)}
    assert list(fused.state_dict()) == list(plain.state_dict())
    for training in (True, True, False):
        fused.train(training), plain.train(training)
        x = torch.randn(4, 5, 3, 3, dtype=torch.float64, requires_grad=True)
        r = torch.randn(shapes[residual], dtype=torch.float64, requires_grad=True) if residual else None
        expected = plain(x) if r is None else plain(x) + r
        expected = F.relu(expected) if relu else expected
        actual = fused(x, r, relu=relu)
        assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-13)
        upstream = torch.randn_like(expected)
        needed = [x, *([r] if r is not None else []), *plain.parameters()]
        mine = [x, *([r] if r is not None else []), *fused.parameters()]
        for a, b in zip(
            torch.autograd.grad(actual, mine, upstream), torch.autograd.grad(expected, needed, upstream), strict=True
        ):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
        for name, buffer in plain.named_buffers():
            assert torch.allclose(fused.get_buffer(name), buffer, rtol=1e-12), name


def test_its_own_setting_and_the_call_s() -> None:
    x = torch.randn(4, 5, 3, 3, dtype=torch.float64)
    for own in (True, False):
        fused, _ = pair({}, relu=own)
        assert bool((fused(x) < 0).any()) is not own
        assert not (fused(x, relu=True) < 0).any()
        assert (fused(x, relu=False) < 0).any()
    assert "relu=False" in repr(fused)


@pytest.mark.parametrize(
    ("x_dtype", "r_dtype"), [("float16", "float32"), ("float32", "float16"), ("bfloat16", "float16")]
)
def test_mixed_dtypes_promote_as_a_sum_does(x_dtype: str, r_dtype: str) -> None:
    fused, plain = BatchNormAct2d(5), nn.BatchNorm2d(5)
    x = torch.randn(4, 5, 3, 3).to(getattr(torch, x_dtype)).requires_grad_()
    r = torch.randn(4, 5, 3, 3).to(getattr(torch, r_dtype)).requires_grad_()
    expected, actual = F.relu(plain(x) + r), fused(x, r)
    assert actual.dtype == expected.dtype == torch.float32
    assert torch.allclose(actual, expected, rtol=1e-2, atol=1e-2)
    actual.sum().backward()
    assert x.grad is not None
    assert r.grad is not None
    assert (x.grad.dtype, r.grad.dtype) == (x.dtype, r.dtype)


def test_under_autocast() -> None:
    conv, fused = nn.Conv2d(3, 5, 3, padding=1), BatchNormAct2d(5)
    x = torch.randn(4, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        first = conv(x)
        assert fused(first, first).dtype == torch.bfloat16
        assert fused(first, torch.randn(4, 5, 6, 6)).dtype == torch.float32


def test_scatter_adds_a_branch_with_fewer_channels() -> None:
    fused, plain = pair({})
    index = ChannelIndex([6, 0, 3, 2, 5], 8)
    x, r = torch.randn(4, 5, 3, 3, dtype=torch.float64), torch.randn(4, 8, 3, 3, dtype=torch.float64)
    expected = r.clone()
    expected[:, index.index.long()] += plain(x)
    assert torch.allclose(fused(x, r, scatter=index), F.relu(expected), rtol=1e-12, atol=1e-13)
    with pytest.raises(InputError, match="pass the residual"):
        fused(x, scatter=index)


def test_refuses_what_batch_norm_refuses() -> None:
    fused, _ = pair({})
    with pytest.raises(ValueError, match="4D"):
        fused(torch.randn(4, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match="more than 1 value"):
        fused(torch.randn(1, 5, 1, 1, dtype=torch.float64))


@pytest.mark.parametrize("options", OPTIONS)
def test_an_empty_batch_counts_and_changes_nothing_else(options: str) -> None:
    fused, plain = pair(OPTIONS[options])
    for module in (fused, plain):
        x = torch.empty(0, 5, 3, 3, dtype=torch.float64, requires_grad=True)
        y = module(x)
        assert y.shape == x.shape
        y.sum().backward()
        assert x.grad is not None
    for (name, a), b in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for p, q in zip(fused.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("residual", ["none", "map", "constant"])
def test_compiles_whole(residual: str) -> None:
    fused, _ = pair({})
    other = copy.deepcopy(fused)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    shapes = {"map": (4, 5, 3, 3), "constant": (1, 5, 1, 1)}
    r = torch.randn(shapes[residual], dtype=torch.float64) if residual != "none" else None
    x = torch.randn(4, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    a, b = fused(x, r), compiled(x, r)
    assert torch.allclose(a, b, rtol=1e-12)
    (da,), (db,) = torch.autograd.grad(a.square().sum(), x), torch.autograd.grad(b.square().sum(), x)
    assert torch.allclose(da, db, rtol=1e-9, atol=1e-12)
    assert torch.allclose(fused.running_var, other.running_var)


def test_exports() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = BatchNormAct2d(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x, x * 2)

    model, x = Model().eval(), torch.randn(4, 5, 3, 3)
    program = torch.export.export(model, (x,))
    assert torch.allclose(program.module()(x), model(x))
