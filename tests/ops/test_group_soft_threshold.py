"""The group soft-threshold against its formula in float64, and against the proximal operator where that is exact."""

import math

import pytest
import torch
from exact import error, sides
from fences import fenced, layout
from torch import Tensor

from prunetrain_kernels.ops.group_soft_threshold import group_soft_threshold_

pytestmark = pytest.mark.t0

WEIGHTS = [((37, 5, 3, 3), 1, 3), ((64, 48, 1, 1), 1, 3), ((10, 3 * 49), 49, 1), ((8, 3, 3, 3), 1, 2), ((1, 1), 1, 3)]


def problem(dtype: torch.dtype, kind: str, device: torch.device) -> tuple[list[Tensor], Tensor, list[int], list[int]]:
    torch.manual_seed(0)
    weights = [torch.randn(shape) * 0.3 for shape, *_ in WEIGHTS]
    for w in weights:
        w[-1] *= 0.01  # an output slice that the threshold takes
    weights[0][:, 2] *= 0.01  # an input slice
    weights[1][5] = 0
    weights = [layout(w.to(device, dtype), kind) for w in weights]
    blocks = [block for _, block, _ in WEIGHTS]
    norms = torch.cat([side for w, block in zip(weights, blocks, strict=True) for side in sides(w, block, 0.0)])
    return weights, norms.float().to(device), blocks, [u for *_, u in WEIGHTS]


def formula(w: Tensor, block: int, used: int, t: float) -> Tensor:
    n_in, n_out = sides(w, block, 0.0)
    cube = w.double().cpu().reshape(w.shape[0], w.shape[1] // block, -1)
    for used_side, norm, shape in ((used & 1, n_in, (1, -1, 1)), (used & 2, n_out, (-1, 1, 1))):
        if used_side:
            cube = cube * torch.where(norm > t, 1 - t / norm, torch.zeros_like(norm)).view(shape)
    return cube.reshape(w.shape)


@pytest.mark.parametrize("kind", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_formula(dtype: torch.dtype, kind: str, device: torch.device) -> None:
    weights, norms, blocks, used = problem(dtype, kind, device)
    exact = [formula(w, b, u, 0.15) for w, b, u in zip(weights, blocks, used, strict=True)]
    threshold = torch.tensor(0.15, device=device)
    if kind == "sliced":
        norms = torch.stack([norms, torch.ones_like(norms)], 1)[:, 0]
    group_soft_threshold_(weights, norms, [threshold], None, [0] * len(weights), blocks, used)
    for w, expected in zip(weights, exact, strict=True):
        assert error(w, expected) <= (2**-23 if dtype == torch.float32 else 2**-11) * 2
        assert torch.equal(w.double().cpu() == 0, expected == 0)  # exactly zero there, and only there
    assert not weights[0][:, 2].any()
    assert not weights[3][-1].any()


def test_is_the_proximal_operator_where_groups_do_not_overlap(device: torch.device) -> None:
    """prox(v) minimises |w - v|^2 / 2 + t sum |w[k]|; no step away from it may be lower."""
    torch.manual_seed(0)
    v, t = torch.randn(6, 4, 1, 1, device=device) * 0.3, 0.4
    w = v.clone()
    norms = torch.cat(sides(w, 1, 0.0)).float().to(device)
    group_soft_threshold_([w], norms, [torch.tensor(t, device=device)], None, [0], [1], [2])

    def objective(x: Tensor) -> float:
        x = x.double()
        return float((x - v.double()).square().sum() / 2 + t * x.flatten(1).norm(dim=1).sum())

    assert 0 < int((w.flatten(1).norm(dim=1) == 0).sum()) < 6
    least = objective(w)
    for scale in (1e-3, 1e-2, 1e-1):
        for _ in range(50):
            assert objective(w + scale * torch.randn_like(w)) > least


def test_groups_thresholds_skips_and_nan(device: torch.device) -> None:
    weights, norms, blocks, used = problem(torch.float32, "channels_last", device)
    before = [w.clone() for w in weights]
    thresholds = [torch.tensor(0.0, device=device), torch.tensor(1e6, device=device)]
    group = [0, 1, 0, 1, 0]
    group_soft_threshold_(weights, norms, thresholds, torch.ones((), device=device), group, blocks, used)
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    group_soft_threshold_(weights, norms, thresholds, torch.zeros((), device=device), group, blocks, used)
    for i, w in enumerate(weights):
        assert torch.equal(w, torch.zeros_like(w) if group[i] else before[i])
    w = torch.ones(2, 2, 1, 1, device=device)
    w[0, 0] = math.nan
    norms = torch.cat(sides(w, 1, 0.0)).float().to(device)
    group_soft_threshold_([w], norms, [torch.tensor(0.1, device=device)], None, [0], [1], [3])
    assert w.isnan().flatten().tolist() == [True, True, True, False]


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
def test_writes_nothing_outside(offset: int, device: torch.device) -> None:
    weights, norms, blocks, used = problem(torch.float32, "channels_last", device)
    inside = [fenced(w, offset) for w in weights]
    for some in (weights, inside):
        group_soft_threshold_(some, norms, [torch.tensor(0.15, device=device)], None, [0] * 5, blocks, used)
    for w, i in zip(weights, inside, strict=True):
        assert torch.equal(w, i)
        whole = i.as_strided((i.untyped_storage().nbytes() // i.element_size(),), (1,), 0)
        assert int(whole.isnan().sum()) == whole.numel() - i.numel()


def test_operator_passes_pytorchs_own_check_compiles_and_exports(steps_as_on_a_gpu: None, device: torch.device) -> None:
    def shrink(w: Tensor, norms: Tensor, threshold: Tensor) -> Tensor:
        group_soft_threshold_([w], norms, [threshold], None, [0], [1], [3])
        return w * 1

    def tensors() -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        w = torch.randn(20, 3, 3, 3, device=device)
        return w, torch.cat(sides(w, 1, 0.0)).float().to(device), torch.tensor(0.5, device=device)

    w, norms, threshold = tensors()
    torch.library.opcheck(
        torch.ops.prunetrain_kernels.group_soft_threshold_.default, ([w], norms, [threshold], None, [0], [1], [3])
    )
    expected = shrink(*tensors())
    assert torch.equal(torch.compile(shrink, backend="aot_eager", fullgraph=True)(*tensors()), expected)

    class Shrink(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return shrink(*inputs)

    assert torch.equal(torch.export.export(Shrink(), tensors()).module()(*tensors()), expected)
