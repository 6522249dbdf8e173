"""Accelerate and the Hugging Face Trainer on two ranks, by their calls: a network called by keywords in DDP, an
optimizer in a wrapper, backward and step inside of the engine. As a loop by hand, bitwise."""

from typing import Any

import torch
import torch.nn.functional as F
from rank_processes import OnRanks, on_ranks  # noqa: F401  (fixture)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prunetrain_kernels import PruneTrain


class Classifier(nn.Module):
    """As those of transformers: called by keywords, with the labels, and a dict comes back that holds the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.middle, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None
    ) -> dict[str, Tensor]:
        x = F.relu(self.norm(self.stem(pixel_values)))
        logits = self.head(F.relu(self.middle(x)).mean((2, 3)))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class AcceleratedOptimizer(torch.optim.Optimizer):
    """A wrapper of which everything is the other's."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["optimizer"], name)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


def trained(rank: int, *, by_engine: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Classifier()
    ddp = DistributedDataParallel(model)
    plain = torch.optim.AdamW(ddp.parameters(), lr=1e-3)
    optimizer = AcceleratedOptimizer(plain) if by_engine else plain
    example = {"pixel_values": torch.randn(4, 3, 6, 6), "labels": torch.arange(4)}
    prunetrain = PruneTrain(ddp, optimizer, example, coefficient=1e-4, interval=1)
    if by_engine:
        prunetrain.attach()
    for epoch in range(2):
        for number in range(2):
            draw = torch.Generator().manual_seed(10 * epoch + 2 * number + rank)
            batch = {"pixel_values": torch.randn(4, 3, 6, 6, generator=draw), "labels": torch.arange(4)}
            optimizer.zero_grad()
            loss = ddp(**batch)["loss"]
            loss.backward()
            if not by_engine:
                prunetrain.add_gradient_(loss)
            optimizer.step()
        with torch.no_grad():
            model.stem.weight[epoch], model.middle.weight[:, epoch] = 0, 0
        prunetrain.epoch_end()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _both(rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return trained(rank, by_engine=True), trained(rank, by_engine=False)


def test_an_engine_on_two_ranks_is_the_loop_by_hand(on_ranks: OnRanks) -> None:  # noqa: F811
    ranks = on_ranks(2, _both)
    by_engine, by_hand = ranks[0]
    assert by_engine["stem.weight"].shape[0] < 8
    for name, tensor in by_engine.items():
        assert torch.equal(tensor, by_hand[name]), name
        if "running" not in name:  # every rank has statistics of its own
            assert torch.equal(tensor, ranks[1][0][name]), name
