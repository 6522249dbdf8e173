"""The group-lasso reference against a loop over slices, written from the formula alone."""

import math

import pytest
import torch
from torch import Tensor

from prunetrain_kernels.ops.group_lasso import (
    Groups,
    add_group_lasso_gradient_,
    group_lasso,
    slice_max_abs,
    slice_norms,
)

EPS = 1e-8


def loop(weight: Tensor, block: int, inputs: bool, outputs: bool) -> tuple[float, list[float], list[float]]:
    """Penalty, norms of inputs and norms of outputs in Python floats, one weight at a time."""
    values = weight.detach().double().reshape(weight.shape[0], -1)
    channels = weight.shape[1] // block
    per_channel = values.shape[1] // channels
    ins = [
        math.sqrt(sum(float(v) ** 2 for v in values[:, c * per_channel : (c + 1) * per_channel].flatten()) + EPS)
        for c in range(channels)
    ]
    outs = [math.sqrt(sum(float(v) ** 2 for v in row) + EPS) for row in values]
    return inputs * sum(ins) + outputs * sum(outs), ins, outs


def loop_gradient(weight: Tensor, block: int, inputs: bool, outputs: bool) -> Tensor:
    _, ins, outs = loop(weight, block, inputs, outputs)
    gradient = weight.detach().double().clone().reshape(weight.shape[0], len(ins), -1)
    for k in range(gradient.shape[0]):
        for c in range(gradient.shape[1]):
            gradient[k, c] *= inputs / ins[c] + outputs / outs[k]
    return gradient.reshape(weight.shape)


SHAPES = {
    "1x1": ((1, 1, 1, 1), 1),
    "odd": ((37, 5, 3, 3), 1),
    "1d": ((4, 6, 5), 1),
    "3d": ((3, 2, 2, 3, 1), 1),
    "linear": ((7, 9), 1),
    "block": ((7, 12), 4),
    "one-block": ((3, 8), 8),
}
USED = [(True, True), (True, False), (False, True)]


def weight_of(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, int]:
    shape, block = SHAPES[name]
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=dtype) * 0.3
    weight[0] = 0  # a dead output slice
    weight[-1] *= 1e-4  # one near sqrt(eps), where the pull fades
    return weight.requires_grad_(), block


@pytest.mark.parametrize(("inputs", "outputs"), USED, ids=["both", "inputs", "outputs"])
@pytest.mark.parametrize("name", SHAPES)
def test_value_and_gradient_match_the_loop(name: str, inputs: bool, outputs: bool) -> None:
    weight, block = weight_of(name)
    groups = [Groups(block, inputs, outputs)]
    value = group_lasso([weight], groups)
    assert value.dtype == torch.float64
    assert value.shape == ()
    assert value.item() == pytest.approx(loop(weight, block, inputs, outputs)[0], rel=1e-12)
    (3 * value).backward()
    expected = loop_gradient(weight, block, inputs, outputs)
    assert torch.allclose(weight.grad, 3 * expected, rtol=1e-12, atol=0)
    if inputs and outputs:
        assert torch.autograd.gradcheck(lambda w: group_lasso([w], groups, eps=1e-2), (weight,))

    weight.grad = torch.ones_like(weight)
    returned = add_group_lasso_gradient_([weight], groups, 0.25)
    assert returned.item() == pytest.approx(value.item(), rel=1e-14)
    assert not returned.requires_grad
    assert torch.allclose(weight.grad, 1 + 0.25 * expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)], ids=str
)
def test_lower_precision_accumulates_in_fp32(dtype: torch.dtype, tolerance: float) -> None:
    weight, block = weight_of("odd", dtype)
    value = group_lasso([weight], [Groups(block)])
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loop(weight, block, True, True)[0], rel=1e-6)
    value.backward()
    assert weight.grad.dtype == dtype
    expected = loop_gradient(weight, block, True, True)
    assert torch.allclose(weight.grad.double(), expected, rtol=tolerance, atol=tolerance * 1e-3)
    by_autograd, weight.grad = weight.grad, None
    add_group_lasso_gradient_([weight], [Groups(block)], 1.0)
    assert torch.equal(weight.grad, by_autograd)


def test_fp16_survives_a_loss_scale() -> None:
    weight = torch.zeros(2, 2, 1, 1, dtype=torch.float16, requires_grad=True)
    weight.data[0, 0] = 1e-3
    (group_lasso([weight], [Groups()]) * 65536 * 0.1).backward()
    assert weight.grad.isfinite().all()  # zero times an infinite factor would be NaN
    assert weight.grad[0, 0].item() == pytest.approx(65536 * 0.1 * 2e-3 / math.sqrt(1e-6 + EPS), rel=2e-3)


def test_large_half_weights_do_not_overflow() -> None:
    weight = torch.full((4, 4, 3, 3), 300.0, dtype=torch.float16)  # 300 squared is beyond fp16
    assert slice_norms(weight)[0][0].item() == pytest.approx(1800, rel=1e-3)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_layout_does_not_matter_and_stays(layout: torch.memory_format) -> None:
    weight, _ = weight_of("odd")
    other = weight.detach().clone().contiguous(memory_format=layout).requires_grad_()
    a, b = (group_lasso([w], [Groups()]) for w in (weight, other))
    assert a.item() == pytest.approx(b.item(), rel=1e-14)
    b.backward()
    assert other.grad.is_contiguous(memory_format=layout)
    assert torch.allclose(other.grad, loop_gradient(weight, 1, True, True), rtol=1e-12)
    view = torch.zeros(40, 8, 3, 3, dtype=torch.float64)[1:38, 2:7]
    view.copy_(weight.detach())
    assert group_lasso([view], [Groups()]).item() == pytest.approx(a.item(), rel=1e-14)


def test_many_weights_and_those_without_gradient() -> None:
    pairs = [weight_of(name) for name in SHAPES]
    weights, groups = [w for w, _ in pairs], [Groups(b) for _, b in pairs]
    weights[1].requires_grad_(False)
    value = group_lasso(weights, groups)
    assert value.item() == pytest.approx(sum(loop(w, b, True, True)[0] for w, b in pairs), rel=1e-12)
    value.backward()
    assert weights[1].grad is None
    for weight, block in pairs[2:]:
        assert torch.allclose(weight.grad, loop_gradient(weight, block, True, True), rtol=1e-12)
        weight.grad = None
    assert add_group_lasso_gradient_(weights, groups, 1.0).item() == pytest.approx(value.item())
    assert weights[1].grad is None
    assert weights[2].grad is not None


def test_second_derivative() -> None:
    weight = weight_of("linear")[0].detach().double().requires_grad_()
    penalties = group_lasso([weight], [Groups()]), sum((weight.square().sum(d) + EPS).sqrt().sum() for d in (0, 1))
    seconds = []
    for penalty in penalties:
        (gradient,) = torch.autograd.grad(penalty, weight, create_graph=True)
        seconds.append(torch.autograd.grad(gradient.square().sum(), weight)[0])
    assert torch.allclose(*seconds, rtol=1e-10)


def test_norms_and_sizes() -> None:
    weight, block = weight_of("block")
    _, ins, outs = loop(weight, block, True, True)
    norms = slice_norms(weight, block)
    assert norms[0].tolist() == pytest.approx(ins)
    assert norms[1].tolist() == pytest.approx(outs)
    sizes = slice_max_abs(weight, block)
    view = weight.detach().view(7, 3, 4).abs()
    assert torch.equal(sizes[0], view.amax((0, 2)))
    assert torch.equal(sizes[1], view.amax((1, 2)))
    assert not any(t.requires_grad for t in (*norms, *sizes))
    weight.data[2, 5] = float("nan")
    sizes = slice_max_abs(weight, block)
    assert sizes[0].isnan().tolist() == [False, True, False]
    assert sizes[1].isnan().nonzero().flatten().tolist() == [2]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="2 weights but 1 groups"):
        group_lasso([torch.ones(2, 2)] * 2, [Groups()])
    for weights in ([], [torch.ones(2, 2)]):
        groups = [Groups(1, False, False)] * len(weights)
        with pytest.raises(ValueError, match="no group to penalise"):
            group_lasso(weights, groups)
        with pytest.raises(ValueError, match="no group to penalise"):
            add_group_lasso_gradient_(weights, groups, 1.0)
