"""Synchronised batch norm on several ranks is batch norm of the whole batch."""

import pytest
import torch
from rank_processes import OnRanks, nets, on_ranks  # noqa: F401  (fixtures among them)
from torch import Tensor, nn

from prunetrain_kernels import to_dense
from prunetrain_kernels.nn import SyncBatchNorm, synchronize_batch_norm

CUTS = (5, 2)  # images of each rank


def _norm(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (7, 5) if kind == "1d" else (7, 5, 4, 3)
    norm: nn.Module = nn.BatchNorm1d(5) if kind == "1d" else nn.BatchNorm2d(5, momentum=None, affine=kind == "2d")
    norm.double()
    for tensor in norm.parameters():
        tensor.data = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 7 for _ in range(2))
    return norm, x, dy


def _run(norm: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    for _ in range(2):
        y = norm(x)
    y.backward(dy)
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in norm.parameters()), *norm.buffers()]  # type: ignore[list-item]


def _synchronised(rank: int, kind: str) -> list[Tensor]:
    norm, x, dy = _norm(kind)
    assert synchronize_batch_norm(norm) == 1
    assert isinstance(norm, SyncBatchNorm)
    assert synchronize_batch_norm(nn.Sequential(norm)) == 1
    assert type(to_dense(nn.Sequential(norm))[0]) is (nn.BatchNorm1d if kind == "1d" else nn.BatchNorm2d)
    mine = slice(0, CUTS[0]) if rank == 0 else slice(CUTS[0], sum(CUTS))
    return _run(norm, x[mine], dy[mine])


@pytest.mark.parametrize("kind", ["1d", "2d", "2d without weights"])
def test_synchronised_batch_norm_is_batch_norm_of_the_whole_batch(on_ranks: OnRanks, kind: str) -> None:
    whole = _run(*_norm(kind))
    ranks = on_ranks(2, _synchronised, kind)
    parameters = 0 if "without" in kind else 2
    for i, expected in enumerate(whole):
        parts = [rank[i] for rank in ranks]
        if i < 2:
            torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-10, atol=1e-10)
        elif i < 2 + parameters:
            torch.testing.assert_close(sum(parts), expected, rtol=1e-10, atol=1e-10)  # DDP's mean makes them one
        else:
            assert torch.equal(*parts)
            torch.testing.assert_close(parts[0], expected, rtol=1e-10, atol=1e-10)
