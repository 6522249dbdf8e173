"""Bytes that batch norms move, against sums written down by hand."""

import pytest
import torch
from torch import Tensor, nn

from prunetrain_kernels.cost import batch_norm_bytes
from prunetrain_kernels.models import build


def test_eight_passes_per_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1))
    per_image = 8 * 5 * 4 * 4 * 4
    assert batch_norm_bytes(model, (torch.randn(1, 3, 8, 8),)) == per_image
    assert batch_norm_bytes(model, (torch.randn(3, 3, 8, 8),), batch=6) == 6 * per_image


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_models_dtype_counts(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(1, 6, 1), nn.BatchNorm2d(6)).to(dtype)
    assert batch_norm_bytes(model, (torch.ones(1, 1, 2, 2, dtype=dtype),)) == 8 * 6 * 4 * dtype.itemsize


def test_resnet20() -> None:
    # 7 norms of 16 x 32 x 32; 6 and a shortcut of 32 x 16 x 16; 6 and a shortcut of 64 x 8 x 8
    elements = 7 * 16 * 32**2 + 7 * 32 * 16**2 + 7 * 64 * 8**2
    assert batch_norm_bytes(build("resnet20", 10), (torch.randn(1, 3, 32, 32),)) == 8 * 4 * elements


class ConstantNorm(nn.BatchNorm2d):
    constant_over_pixels = True

    def forward(self, input: Tensor) -> Tensor:
        return self.bias[None, :, None, None]


def test_a_constant_moves_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), ConstantNorm(3))
    assert batch_norm_bytes(model, (torch.randn(1, 3, 4, 4),)) == 8 * 3 * 16 * 4


def test_one_and_three_dimensional_norms_and_keyword_calls() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(input=x)

    assert batch_norm_bytes(Keyword(), (torch.randn(1, 3),)) == 8 * 3 * 4
    assert batch_norm_bytes(nn.BatchNorm3d(2), (torch.randn(1, 2, 3, 3, 3),)) == 8 * 2 * 27 * 4


def test_no_batch_norm() -> None:
    assert batch_norm_bytes(nn.Conv2d(3, 4, 3), (torch.randn(1, 3, 8, 8),)) == 0
