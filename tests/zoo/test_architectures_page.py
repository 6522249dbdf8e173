"""docs/architectures.md says what tracing finds today, and its numbers are what they are said to be."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench.architectures import HEAD, NETWORKS, comparison, describe, look_at, table_row
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


CELL = r"[^|]+ \| "
ROW = re.compile(rf"\| (?P<name>[^|]+) \| torch\.\w+ \| {CELL}{CELL}(?P<free>[\d,]+) of {CELL}{CELL}(?P<held>[^|]+) \|")
# Reasons that name what holds the channels and why pruning there would not be exact; the page's head explains them.
WHY_NOT = (
    "can go", "its number of channels is written out in the forward", "the forward picks channels by number",
    "the forward computes its number of channels from that of others, which stay",
)  # fmt: skip


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_of_every_network_most_channels_can_go_or_the_row_says_what_holds_them_exactly() -> None:
    """At least 60 % of the channels between input and output; or each reason is one for which pruning is not exact."""
    rows = list(filter(None, map(ROW.fullmatch, PAGE.read_text().splitlines())))
    assert len(rows) == len(NETWORKS)
    for row in rows:
        held = [] if row["held"] == "–" else row["held"].split("; ")
        counts = [number(reason.split(": ")[0]) for reason in held]
        if number(row["free"]) < 0.6 * (number(row["free"]) + sum(counts)):
            unclear = [reason for reason in held if not reason.endswith(WHY_NOT)]
            assert not unclear, f"{row['name']}: {unclear}"


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
    assert (row.channels, row.all_channels) == (3, 3)  # the input's and the output's do not count
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
