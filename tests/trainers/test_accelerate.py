"""Accelerate itself: its prepared loop is the loop by hand, bitwise, and its checkpoints are taken up again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from prunetrain_kernels import PruneTrain, apply_shape, pruned_shape

accelerate = pytest.importorskip("accelerate")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.middle, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head(F.relu(self.middle(x)).mean((2, 3)))


def batches() -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(16, 3, 6, 6, generator=draw), torch.arange(16) % 4), batch_size=4)


def parts(seed: int = 0) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net()
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def wither(model: Any, channel: int) -> None:
    with torch.no_grad():
        model.stem.weight[channel] = 0
        model.middle.weight[:, channel] = 0


def epoch_by_accelerate(accelerator: Any, model: Any, optimizer: Any, loader: Any) -> None:
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()


def epoch_by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, prunetrain: PruneTrain) -> None:
    for number, (x, y) in enumerate(batches()):
        loss = F.cross_entropy(model(x), y)
        (loss / 2).backward()
        if number % 2:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            prunetrain.add_gradient_(loss)
            optimizer.step()
            optimizer.zero_grad()


def prepared() -> tuple[Any, Any, Any, Any, PruneTrain]:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, loader = accelerator.prepare(*parts(), batches())
    prunetrain = PruneTrain(model, optimizer, (torch.randn(2, 3, 6, 6),), coefficient=1e-3, interval=1)
    prunetrain.attach()
    accelerator.register_for_checkpointing(prunetrain)
    return accelerator, model, optimizer, loader, prunetrain


def test_a_prepared_loop_is_the_loop_by_hand_and_resumes(tmp_path: Path) -> None:
    accelerator, model, optimizer, loader, prunetrain = prepared()
    by_hand, its_optimizer = parts()
    plain = PruneTrain(by_hand, its_optimizer, (torch.randn(2, 3, 6, 6),), coefficient=1e-3, interval=1)
    for epoch in range(2):
        epoch_by_accelerate(accelerator, model, optimizer, loader)
        epoch_by_hand(by_hand, its_optimizer, plain)
        for each, network in ((prunetrain, model), (plain, by_hand)):
            wither(network, epoch)
            each.epoch_end()
    assert by_hand.stem.out_channels == 6
    for name, tensor in by_hand.state_dict().items():
        assert torch.equal(accelerator.unwrap_model(model).state_dict()[name], tensor), name
    accelerator.save_state(tmp_path)
    (tmp_path / "shape.json").write_text(json.dumps(pruned_shape(model)))

    again = prepared()
    apply_shape(again[1], json.loads((tmp_path / "shape.json").read_text()), again[2])
    again[0].load_state(tmp_path)
    assert again[4].epochs == prunetrain.epochs
    epoch_by_accelerate(accelerator, model, optimizer, loader)
    epoch_by_accelerate(*again[:4])
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[1].state_dict()[name], tensor), name
