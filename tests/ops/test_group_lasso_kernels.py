"""The lasso's kernels against float64: shapes, layouts, dtypes, and what lies around the tensors."""

import math
from collections.abc import Sequence

import pytest
import torch
from exact import assert_as_exact, error, gradient, largest, sides
from fences import fenced, layout
from torch import Tensor

from prunetrain_kernels.ops.group_lasso import (
    Groups,
    add_group_lasso_gradient_,
    group_lasso,
    slice_max_abs,
    slice_statistics,
)

pytestmark = pytest.mark.t0
T0_BACKENDS = ("reference", "kernels", "native")

# shape and features per channel; channels of 1, 3, 8, 37, 64, 65, several tiles down and across
SHAPES = {
    "1x1": ((1, 1, 1, 1), 1),
    "first-layer": ((8, 3, 7, 7), 1),
    "37-37": ((37, 37, 3, 3), 1),
    "64-64": ((64, 64, 1, 1), 1),
    "65-37": ((65, 37, 3, 3), 1),
    "tiles": ((130, 65, 3, 3), 1),
    "vector": ((64, 48, 3, 3), 1),
    "linear": ((10, 64), 1),
    "block": ((37, 8 * 49), 49),
    "1d": ((3, 8, 5), 1),
}
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}


def weights_of(
    dtype: torch.dtype, kind: str, device: torch.device, names: Sequence[str] = tuple(SHAPES)
) -> tuple[list[Tensor], list[Groups]]:
    torch.manual_seed(0)
    weights, groups = [], []
    for i, name in enumerate(names):
        shape, block = SHAPES[name]
        w = torch.randn(shape) * 0.3
        w[0] *= 0  # a dead output slice
        w[-1] *= 1e-3
        weights.append(layout(w.to(device, dtype), kind).requires_grad_())
        groups.append(Groups(block, i % 3 != 1, i % 3 != 2))
    return weights, groups


SOME = ["first-layer", "37-37", "vector", "block"]
CASES = {
    "fp32-contiguous": (torch.float32, "contiguous", list(SHAPES)),
    "fp32-channels_last": (torch.float32, "channels_last", list(SHAPES)),
    "fp32-sliced": (torch.float32, "sliced", SOME),
    "fp16-contiguous": (torch.float16, "contiguous", SOME),
    "fp16-channels_last": (torch.float16, "channels_last", SOME),
    "bf16-channels_last": (torch.bfloat16, "channels_last", SOME),
}


@pytest.mark.parametrize("case", CASES)
def test_norms_sizes_penalty_and_gradient(case: str, device: torch.device) -> None:
    dtype, kind, names = CASES[case]
    weights, groups = weights_of(dtype, kind, device, names)
    norms, sizes = slice_statistics(weights, groups)
    total = 0.0
    for w, g, norm, size in zip(weights, groups, norms, sizes, strict=True):
        for side in (0, 1):
            exact = sides(w, g.block)[side]
            cube = (
                w.detach().reshape(w.shape[0], -1)
                if side
                else w.detach().reshape(w.shape[0], w.shape[1] // g.block, -1)
            )
            dims = (1,) if side else (0, 2)
            torchs = (torch.linalg.vector_norm(cube.float(), dim=dims).square() + 1e-8).sqrt()
            assert norm[side].dtype == torch.float32
            assert_as_exact(norm[side], torchs, exact, floor=4 * UNIT[torch.float32])
            assert torch.equal(size[side].double().cpu(), largest(w, g.block)[side])
            total += float(exact.sum()) * (g.outputs if side else g.inputs)
    penalty = group_lasso(weights, groups)
    assert penalty.item() == pytest.approx(total, rel=1e-6)
    (0.5 * penalty).backward()
    for w, g in zip(weights, groups, strict=True):
        assert w.grad.dtype == dtype
        # one rounding to the dtype (in the interpreter bfloat16 is cut off), some more in fp32
        assert (
            error(w.grad, 0.5 * gradient(w, g.block, g.inputs, g.outputs)) <= 2 * UNIT[dtype] + 8 * UNIT[torch.float32]
        )
    if kind != "sliced":
        assert all(w.grad.stride() == w.stride() for w in weights)


@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
@pytest.mark.parametrize("offset", [0, 3], ids=["aligned", "misaligned"])
def test_reads_and_writes_nothing_outside(offset: int, kind: str, device: torch.device) -> None:
    weights, groups = weights_of(torch.float32, kind, device, ["1x1", "65-37", "vector", "block"])
    inside = [fenced(w.detach(), offset).requires_grad_() for w in weights]
    expected, found = slice_statistics(weights, groups), slice_statistics(inside, groups)
    for a, b in zip(expected, found, strict=True):
        for pair, other in zip(a, b, strict=True):
            torch.testing.assert_close(other[0], pair[0], rtol=1e-6, atol=0)  # in another order where misaligned
            torch.testing.assert_close(other[1], pair[1], rtol=1e-6, atol=0)
    for w, i in zip(weights, inside, strict=True):
        w.grad = torch.ones_like(w)
        i.grad = fenced(w.grad, offset)
    a, b = (add_group_lasso_gradient_(ws, groups, 0.25) for ws in (weights, inside))
    assert a.item() == pytest.approx(b.item(), rel=1e-6)
    for w, i in zip(weights, inside, strict=True):
        torch.testing.assert_close(i.grad, w.grad, rtol=1e-6, atol=0)
        # the fences of weight and gradient are whole
        for tensor in (i.detach(), i.grad):
            whole = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
            assert int(whole.isnan().sum()) == whole.numel() - tensor.numel()


def test_adds_to_the_gradient_that_is_there(device: torch.device) -> None:
    names = ["first-layer", "37-37", "1d", "64-64", "linear"]
    weights, groups = weights_of(torch.float32, "contiguous", device, names)
    weights[2].requires_grad_(False)
    before = []
    for i, w in enumerate(weights):
        w.grad = None if i % 2 else torch.randn_like(w)
        before.append(0.0 if w.grad is None else w.grad.double().cpu().clone())
    add_group_lasso_gradient_(weights, groups, 0.25)
    assert torch.equal(weights[2].grad.double().cpu(), before[2])
    for i, (w, g) in enumerate(zip(weights, groups, strict=True)):
        if i != 2:
            assert error(w.grad, before[i] + 0.25 * gradient(w, g.block, g.inputs, g.outputs)) < 2e-7
    late = weights_of(torch.float32, "contiguous", device, ["64-64"])[0][0]
    late.grad = torch.ones(64, 64, 1, 1, device=device).transpose(0, 1)  # a layout of its own
    add_group_lasso_gradient_([late], [Groups()], 0.25)
    assert error(late.grad, 1 + 0.25 * gradient(late, 1, True, True)) < 2e-7


def test_nan_and_infinity_are_seen(device: torch.device) -> None:
    w = torch.randn(70, 20, 3, 3, device=device)
    w[66, 7, 1, 1] = math.nan
    w[3, 2, 0, 0] = -math.inf
    (norms,), (sizes,) = slice_statistics([w], [Groups()])
    assert norms[0].isnan().nonzero().flatten().tolist() == sizes[0].isnan().nonzero().flatten().tolist() == [7]
    assert norms[1].isnan().nonzero().flatten().tolist() == sizes[1].isnan().nonzero().flatten().tolist() == [66]
    assert sizes[0][2] == math.inf
    assert sizes[1][3] == math.inf
    assert slice_max_abs(w)[1].isnan().nonzero().flatten().tolist() == [66]


def test_weights_of_several_dtypes_in_one_call(device: torch.device) -> None:
    a, b = torch.randn(9, 5, 3, 3, device=device), torch.randn(7, 9, 1, 1, device=device).half()
    together = group_lasso([a, b], [Groups(), Groups()])
    apart = group_lasso([a], [Groups()]) + group_lasso([b], [Groups()])
    assert together.item() == pytest.approx(apart.item(), rel=1e-6)


def test_steps_of_a_gpu(steps_as_on_a_gpu: None, device: torch.device) -> None:
    for kind in ("contiguous", "channels_last"):
        (w, v), groups = weights_of(torch.float32, kind, device, ["first-layer", "64-64"])
        norms, sizes = slice_statistics([w, v], groups)
        for weight, norm, size in zip((w, v), norms, sizes, strict=True):
            for side in (0, 1):
                assert error(norm[side], sides(weight)[side]) < 4 * UNIT[torch.float32]
                assert torch.equal(size[side].double().cpu(), largest(weight)[side])
        group_lasso([w, v], groups).backward()
        for weight, group in zip((w, v), groups, strict=True):
            assert error(weight.grad, gradient(weight, 1, group.inputs, group.outputs)) < 8 * UNIT[torch.float32]


def test_same_bits_every_time(device: torch.device) -> None:
    weights, groups = weights_of(torch.float32, "channels_last", device, ["block", "65-37"])
    runs = []
    for _ in range(20 if device.type == "cuda" else 2):
        penalty = group_lasso(weights, groups)
        runs.append([penalty.detach(), *torch.autograd.grad(penalty, weights)])
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_gradient_check(device: torch.device) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(s, dtype=torch.float64, device=device) for s in ((2, 2, 2, 1), (1, 6))]
    weights[0] = weights[0].contiguous(memory_format=torch.channels_last)
    groups = [Groups(1, True, True), Groups(3, False, True)]
    inputs = [w.requires_grad_() for w in weights]
    assert torch.autograd.gradcheck(lambda *ws: group_lasso(ws, groups, 1e-2), inputs, atol=1e-8)


def test_factors(device: torch.device) -> None:
    """Penalty, gradient and gradient check with a factor for each norm, zeros among them."""
    torch.manual_seed(0)
    weights = [torch.randn(s, dtype=torch.float64, device=device) for s in ((3, 2, 2, 1), (4, 6))]
    groups = [Groups(1, True, True), Groups(3, True, False)]
    factors = torch.tensor([0.0, 2.0, 1.0, 0.0, 0.5, 3.0, 0.0, 9.0, 9.0, 9.0, 9.0], dtype=torch.float64, device=device)
    norms = torch.cat([side for pair in slice_statistics(weights, groups, 1e-2)[0] for side in pair])
    counts = torch.tensor([1.0] * 7 + [0.0] * 4, dtype=torch.float64, device=device)
    inputs = [w.requires_grad_() for w in weights]
    penalty = group_lasso(inputs, groups, 1e-2, factors)
    assert penalty.item() == pytest.approx(float((norms * counts * factors).sum()), rel=1e-14)
    assert torch.autograd.gradcheck(lambda *ws: group_lasso(ws, groups, 1e-2, factors), inputs, atol=1e-8)
    assert torch.autograd.gradgradcheck(lambda *ws: group_lasso(ws, groups, 1e-2, factors), inputs, atol=1e-7)
    found = torch.autograd.grad(penalty, inputs)
    assert not found[0][1, 0].any()  # both of its slices have a factor of 0
    for call in (group_lasso, lambda w, g, e, f: add_group_lasso_gradient_(w, g, 1.0, e, f)):
        with pytest.raises(ValueError, match=r"one factor for each norm, a tensor of shape \(11,\)"):
            call(inputs, groups, 1e-2, factors[:-1])
    again = torch.func.grad(lambda ws: group_lasso(ws, groups, 1e-2, factors))([w.detach() for w in inputs])
    for a, b in zip(found, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def arguments(device: torch.device) -> dict[str, tuple]:
    weights, groups = weights_of(torch.float32, "channels_last", device, ["first-layer", "1d"])
    blocks, used = [g.block for g in groups], [g.used for g in groups]
    norms = torch.cat([side for pair in slice_statistics(weights, groups)[0] for side in pair])
    plain, one = [w.detach() for w in weights], torch.ones((), device=device)
    return {
        "group_lasso": (weights, blocks, used, 1e-8, None),
        "group_lasso with factors": (weights, blocks, used, 1e-8, torch.arange(float(len(norms)), device=device) % 3),
        "slice_statistics": (plain, blocks, 1e-8),
        "group_lasso_gradient": (one, norms, plain, blocks, used),
        "add_group_lasso_gradient_": ([torch.ones_like(w) for w in plain], plain, norms, one, blocks, used),
    }


@pytest.mark.parametrize(
    "name",
    [
        "group_lasso", "group_lasso with factors", "slice_statistics", "group_lasso_gradient",
        "add_group_lasso_gradient_",
    ],
)  # fmt: skip
def test_operators_pass_pytorchs_own_check(name: str, device: torch.device) -> None:
    operator = getattr(torch.ops.prunetrain_kernels, name.split()[0]).default
    torch.library.opcheck(operator, arguments(device)[name])


def test_compiles_without_a_graph_break_and_exports(device: torch.device) -> None:
    weights, groups = weights_of(torch.float32, "channels_last", device, ["first-layer", "linear"])

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return 2 * group_lasso([a * 1, b], groups)

    expected = torch.autograd.grad(loss(*weights), weights)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(*weights), weights)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))

    class Module(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return loss(a, b)

    plain = tuple(w.detach() for w in weights)
    exported = torch.export.export(Module(), plain)
    assert torch.equal(exported.module()(*plain), loss(*plain))


def test_bad_input_is_refused(device: torch.device) -> None:
    w = torch.ones(4, 6, device=device)
    for weights, groups, message in (
        ([w], [Groups(4)], "no blocks of 4 features"),
        ([torch.ones(4, 6, 1, 1)], [Groups(2)], "no blocks of 2 features"),
        ([w.int()], [Groups()], "floating-point"),
        ([torch.ones(0, 3)], [Groups()], "at least one channel"),
        ([torch.ones(3, 0)], [Groups()], "at least one channel"),
        ([torch.ones(3)], [Groups()], "takes weights"),
        ([w, torch.ones(2, 2, device="meta")], [Groups()] * 2, "move the model to one device"),
    ):
        with pytest.raises(ValueError, match=message):
            group_lasso(weights, groups)
        with pytest.raises(ValueError, match=message):
            slice_statistics(weights, groups)
    assert slice_statistics([], []) == ([], [])
