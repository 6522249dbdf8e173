"""FLOPs under channel gating, everywhere and at branch ends, of a network small enough for the back of an envelope."""

import torch
from torch import nn

from bench.paper.networks import BRANCH_ENDS, gating_flops
from prunetrain_kernels.cost import count_flops


class HandMade(nn.Module):
    """A residual network of five layers whose FLOPs fit on the back of an envelope: 4 x 4 pixels all the way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1, bias=False)
        self.a = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.b = nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.last = nn.Conv2d(8, 4, 1, bias=False)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.b(torch.relu(self.a(x))))
        return self.fc(torch.relu(self.last(x)).mean((2, 3)))


def test_gating_flops_of_a_hand_made_network() -> None:
    torch.manual_seed(0)
    model, example = HandMade(), (torch.zeros(1, 3, 4, 4),)
    dense = count_flops(model, example)
    pixels = 2 * 4 * 4
    by_hand = {"stem": 3 * 8, "a": 8 * 6 * 9, "b": 6 * 8 * 9, "last": 8 * 4}
    assert dense.inference == pixels * sum(by_hand.values()) + 2 * 4 * 5
    assert gating_flops(model, example, 1e-4) == dense
    with torch.no_grad():
        model.stem.weight[:, 0] = 0  # an input of the network: nobody gates that
        model.stem.weight[5:] = 0  # 5 of 8 outputs live
        model.a.weight[:, 6:] = 1e-5  # 6 of 8 inputs live
        model.a.weight[4:] = 0  # 4 of 6 outputs live
        model.b.weight[:, 3:] = 0  # 3 of 6 inputs live
        model.b.weight[7:] = 0  # 7 of 8 outputs live
        model.fc.weight[:2] = 0  # an output of the network
    gated = {"stem": 3 * 5, "a": 6 * 4 * 9, "b": 3 * 7 * 9, "last": 8 * 4}
    counted = gating_flops(model, example, 1e-4)
    assert counted.inference == pixels * sum(gated.values()) + 2 * 4 * 5
    saved = {name: pixels * (by_hand[name] - gated[name]) for name in gated}
    assert counted.training == dense.training - 2 * saved["stem"] - 3 * (saved["a"] + saved["b"])
    assert gating_flops(model, example, 1e-6).inference > counted.inference  # 1e-5 is live there
    # the paper's: gates where the branch leaves the sum and where it comes back; inside union keeps 4 channels
    ends = {"stem": 3 * 8, "a": 6 * 4 * 9, "b": 4 * 7 * 9, "last": 8 * 4}
    at_ends = gating_flops(model, example, 1e-4, where=BRANCH_ENDS)
    assert at_ends.inference == pixels * sum(ends.values()) + 2 * 4 * 5
