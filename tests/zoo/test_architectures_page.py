"""docs/architectures.md says what tracing finds today, and its numbers are what they are said to be."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench.architectures import HEAD, comparison, describe, look_at, table_row
from bench.zoo import ZOO

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "timm:skresnet18", "unet"])
def test_rows_are_up_to_date(name: str) -> None:
    assert table_row(name, look_at(name)) in PAGE.read_text().splitlines(), "run python -m bench architectures"


def test_page_is_complete() -> None:
    text = PAGE.read_text()
    assert text.startswith(HEAD)
    assert text.endswith("\n".join(comparison()) + "\n")
    for name in ZOO:
        assert f"\n| {name.replace('timm:', 'timm ')} | " in text


class Parts(nn.Module):
    """Half of what `last` reads is the network's input, which stays; its output stays too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1, bias=False)
        self.last = nn.Conv2d(6, 8, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([x, self.first(x)], dim=1))


def test_shares_are_counted_by_multiply_adds() -> None:
    row = describe(Parts(), torch.randn(2, 3, 4, 4))
    # 9 of `first`, 48 of `last`: of these 24 join the input with the output
    assert row.share == pytest.approx(1 - 24 / 57)
    assert (row.layers, row.all_layers) == (2, 2)
    assert (row.channels, row.all_channels) == (3, 3 + 3 + 8)
    assert row.frozen == {}
    assert row.tracer == "torch.fx"


def test_tells_what_traced_it() -> None:
    network = ZOO["unet_any_size"]
    assert describe(network.for_tests(), network.images(2)).tracer == "torch.export"


def test_reasons_are_grouped() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.GroupNorm(1, 4), nn.Conv2d(4, 5, 1), nn.GroupNorm(1, 5), nn.Conv2d(5, 2, 1)
    )
    row = describe(model, torch.randn(2, 3, 4, 4))
    assert sum(row.frozen.values()) == sum(size for size in row.frozen.values())
    assert all("GroupNorm" in reason and "'" not in reason for reason in row.frozen)
    assert row.channels == 0
    assert row.share == 0
