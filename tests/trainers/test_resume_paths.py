"""Strangers' trainers, pruned, stopped and taken up again by their own save and load: two lines of ours in each.

Written anew after the resume paths of five public trainers, in the fewest lines that do what these do.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetrain_kernels import PruneTrain, apply_shape, load_pruned, pruned_shape


class Net(nn.Module):
    """Two convolutions and a residual branch that dies."""

    def __init__(self, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.branch = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.last = nn.Conv2d(width, width, 3, bias=False)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(F.relu(self.last(F.relu(x + self.branch(x)))).mean((2, 3)))


X, Y = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(3)), torch.arange(8) % 3


def parts(seed: int = 0) -> tuple[Net, torch.optim.Optimizer, PruneTrain]:
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return model, optimizer, PruneTrain(model, optimizer, (X[:2],), interval=1, zeroing_tolerance=1.0)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, prunetrain: PruneTrain) -> float:
    optimizer.zero_grad()
    loss = prunetrain.regularize(F.cross_entropy(model(X), Y))
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def wither(*models: nn.Module) -> None:
    """What many epochs of the lasso do: a branch dies, and three channels."""
    for model in models:
        model.branch[3].weight.zero_()
        model.last.weight[:3] = 0
        model.fc.weight[:, :3] = 0


def pruned() -> tuple[Net, torch.optim.Optimizer, PruneTrain]:
    model, optimizer, prunetrain = parts()
    step(model, optimizer, prunetrain)
    wither(model)
    report = prunetrain.epoch_end()
    assert report is not None
    assert report.reconfiguration.branches == 1
    assert model.last.out_channels == 5
    step(model, optimizer, prunetrain)
    return model, optimizer, prunetrain


def goes_on_alike(one: tuple[Any, Any, Any], other: tuple[Any, Any, Any]) -> bool:
    return [step(*one) for _ in range(3)] == [step(*other) for _ in range(3)] and one[2].epochs == other[2].epochs


def without_ours_it_fails(load: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing key|Unexpected key"):
        load()


def test_pytorchs_imagenet_example(tmp_path: Path) -> None:
    """--resume: a dict with epoch, state_dict, optimizer and scheduler; --evaluate loads the same file."""
    model, optimizer, prunetrain = pruned()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 30)
    torch.save(
        {
            "epoch": 1,
            "state_dict": nn.DataParallel(model).state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "shape": pruned_shape(model),  # +
            "prunetrain": prunetrain.state_dict(),  # +
        },
        tmp_path / "checkpoint.pth.tar",
    )
    again = parts(seed=9)
    wrapped = nn.DataParallel(again[0])
    checkpoint = torch.load(tmp_path / "checkpoint.pth.tar", map_location="cpu")
    without_ours_it_fails(lambda: nn.DataParallel(Net()).load_state_dict(checkpoint["state_dict"]))
    apply_shape(wrapped, checkpoint["shape"], again[1])  # +
    wrapped.load_state_dict(checkpoint["state_dict"])
    again[1].load_state_dict(checkpoint["optimizer"])
    torch.optim.lr_scheduler.StepLR(again[1], 30).load_state_dict(checkpoint["scheduler"])
    again[2].load_state_dict(checkpoint["prunetrain"])  # +
    assert goes_on_alike((model, optimizer, prunetrain), again)
    evaluated = Net()  # --evaluate: without the optimizer
    load_pruned(tmp_path / "checkpoint.pth.tar", evaluated)
    assert evaluated.last.out_channels == 5


def test_a_script_like_timms_with_an_average(tmp_path: Path) -> None:
    """--resume with state_dict, state_dict_ema and optimizer; the validation script loads the average by itself."""
    model, optimizer, prunetrain = parts()
    ema = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    prunetrain = PruneTrain(model, optimizer, (X[:2],), interval=1, zeroing_tolerance=1.0, also=[ema])
    step(model, optimizer, prunetrain)
    wither(model, ema.module)
    prunetrain.epoch_end()
    step(model, optimizer, prunetrain)
    ema.update_parameters(model)
    state = {
        "arch": "net",
        "state_dict": model.state_dict(),
        "state_dict_ema": ema.module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "shape": pruned_shape(model),  # +
        "prunetrain": prunetrain.state_dict(),  # +
    }
    torch.save(state, tmp_path / "last.pth.tar")
    torch.manual_seed(9)
    again = Net()
    again_optimizer = torch.optim.SGD(again.parameters(), lr=0.05, momentum=0.9)
    again_ema = torch.optim.swa_utils.AveragedModel(again, use_buffers=True)
    taken_up = PruneTrain(again, again_optimizer, (X[:2],), interval=1, zeroing_tolerance=1.0, also=[again_ema])
    checkpoint = torch.load(tmp_path / "last.pth.tar", map_location="cpu", weights_only=True)
    apply_shape(again, checkpoint["shape"], again_optimizer, also=[again_ema])  # +
    again.load_state_dict(checkpoint["state_dict"])
    again_optimizer.load_state_dict(checkpoint["optimizer"])
    again_ema.module.load_state_dict(checkpoint["state_dict_ema"])
    taken_up.load_state_dict(checkpoint["prunetrain"])  # +
    assert goes_on_alike((model, optimizer, prunetrain), (again, again_optimizer, taken_up))
    validated = Net()
    load_pruned(tmp_path / "last.pth.tar", validated, which="ema")  # + in place of load_checkpoint(use_ema=True)
    assert torch.equal(validated.eval()(X), ema.module.eval()(X))


class Pretrained(Net):
    """`save_pretrained` and `from_pretrained` in a folder: config.json says how to build, the weights come by name."""

    def save_pretrained(self, folder: Path) -> None:
        config = {"width": 8, "classes": 3, "pruned_shape": pruned_shape(self)}  # + the shape
        (folder / "config.json").write_text(json.dumps(config))
        torch.save(self.state_dict(), folder / "pytorch_model.bin")

    @classmethod
    def from_pretrained(cls, folder: Path) -> "Pretrained":
        config = json.loads((folder / "config.json").read_text())
        model = cls(config["width"], config["classes"])
        apply_shape(model, config["pruned_shape"])  # +
        model.load_state_dict(torch.load(folder / "pytorch_model.bin", weights_only=True))
        return model.eval()


def test_hugging_faces_from_pretrained(tmp_path: Path) -> None:
    model, _, _ = pruned()
    model.__class__ = Pretrained
    model.save_pretrained(tmp_path)
    without_ours_it_fails(lambda: Net().load_state_dict(torch.load(tmp_path / "pytorch_model.bin")))
    assert torch.equal(Pretrained.from_pretrained(tmp_path)(X), model.eval()(X))


class Accelerator:
    """`save_state` and `load_state`: what was prepared or registered is saved in its order, each in its own file."""

    def __init__(self) -> None:
        self.models: list[nn.Module] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        self.registered: list[Any] = []

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.models.append(model)
        self.optimizers.append(optimizer)

    def register_for_checkpointing(self, *things: Any) -> None:
        self.registered += things

    def files(self) -> list[tuple[str, Any]]:
        named = (("model", self.models), ("optimizer", self.optimizers), ("custom_checkpoint", self.registered))
        return [(f"{name}_{i}.bin", thing) for name, things in named for i, thing in enumerate(things)]

    def save_state(self, folder: Path) -> None:
        for name, thing in self.files():
            torch.save(thing.state_dict(), folder / name)

    def load_state(self, folder: Path) -> None:
        for name, thing in self.files():
            thing.load_state_dict(torch.load(folder / name, weights_only=True))


def test_accelerates_save_state_and_load_state(tmp_path: Path) -> None:
    model, optimizer, prunetrain = pruned()
    accelerator = Accelerator()
    accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(prunetrain)  # +
    accelerator.save_state(tmp_path)
    (tmp_path / "shape.json").write_text(json.dumps(pruned_shape(model)))  # +
    again = parts(seed=9)
    accelerator = Accelerator()
    accelerator.prepare(*again[:2])
    accelerator.register_for_checkpointing(again[2])  # +
    without_ours_it_fails(lambda: accelerator.load_state(tmp_path))
    apply_shape(again[0], json.loads((tmp_path / "shape.json").read_text()), again[1])  # +
    accelerator.load_state(tmp_path)
    assert goes_on_alike((model, optimizer, prunetrain), again)


class Trainer:
    """Hooks in the order of Lightning's: the module may change the checkpoint before it is saved, and itself before the
    weights are loaded.
    """

    @staticmethod
    def save_checkpoint(path: Path, module: "Module", optimizer: torch.optim.Optimizer) -> None:
        checkpoint = {"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()]}
        module.on_save_checkpoint(checkpoint)
        torch.save(checkpoint, path)

    @staticmethod
    def load_checkpoint(path: Path, module: "Module", optimizer: torch.optim.Optimizer) -> None:
        checkpoint = torch.load(path, weights_only=True)
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer_states"][0])


class Module(Net):
    optimizer: torch.optim.Optimizer | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["shape"] = pruned_shape(self)  # +

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        apply_shape(self, checkpoint["shape"], self.optimizer)  # +


def test_a_trainer_with_lightnings_hooks(tmp_path: Path) -> None:
    """Lightning itself has a callback that does all this: tests/integrations/test_lightning.py."""
    model, optimizer, prunetrain = pruned()
    model.__class__ = Module
    Trainer.save_checkpoint(tmp_path / "last.ckpt", model, optimizer)
    other, other_optimizer, other_prunetrain = parts(seed=9)
    other.__class__ = Module
    other.optimizer = other_optimizer
    Trainer.load_checkpoint(tmp_path / "last.ckpt", other, other_optimizer)
    other_prunetrain.load_state_dict(prunetrain.state_dict())
    assert goes_on_alike((model, optimizer, prunetrain), (other, other_optimizer, other_prunetrain))
