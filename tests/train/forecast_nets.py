"""Small networks whose forecasts can be worked out by hand, for tests of forecasts and targets."""

import torch
from torch import Tensor, nn

X = torch.zeros(2, 3, 8, 8)


def plain_net(width: int = 24) -> nn.Sequential:
    """Two convolutions, the second of `width` channels, and a classifier."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, width, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10),
    )  # fmt: skip


class SideBySide(nn.Module):
    """Two convolutions whose maps are concatenated, a depthwise one behind them, and then perhaps a residual block."""

    def __init__(self, *, residual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 12, 1)
        self.depthwise = nn.Conv2d(20, 20, 3, padding=1, groups=20)
        self.mix = nn.Conv2d(20, 16, 1)
        self.inner = nn.Conv2d(16, 16, 3, padding=1) if residual else None
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(torch.cat([self.left(x), self.right(x)], 1)).relu()
        x = self.mix(x)
        x = x.relu() if self.inner is None else x + self.inner(x.relu())
        return self.head(x.mean((2, 3)))
