"""A shrunk model comes back into a freshly built original, to the last bit, or not at all."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nets import DYING, NETS, kill, randomise, rest_of, same, small_net, snapshot, traced, train, warm_up
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from prunetrain_kernels import CheckpointError, load_pruned, reconfigure, save_pruned
from prunetrain_kernels.models import resnet20, resnet32
from prunetrain_kernels.prune.branches import describe_stand_ins


def shrunk(name: str = "in-place-bottleneck", dying: bool = True) -> tuple[nn.Module, Optimizer, Tensor]:
    model, x = small_net(name)
    optimizer = Adam(model.parameters(), lr=0.001)
    warm_up(model, optimizer, x)
    graph = traced(model, x)
    kill(graph, model)
    if dying:
        rest_of(model, DYING[name]).zero_()
    reconfigure(model, optimizer, graph.keep(model))
    warm_up(model, optimizer, x)
    return model, optimizer, x


def fresh(name: str = "in-place-bottleneck") -> tuple[nn.Module, Optimizer]:
    model, _ = small_net(name, seed=5)
    return model, Adam(model.parameters(), lr=0.5)


CASES = [(name, dying) for name in NETS for dying in (False, True) if not dying or name in DYING]


@pytest.mark.parametrize(("name", "dying"), CASES, ids=[f"{n}-{'branch' if d else 'channels'}" for n, d in CASES])
def test_comes_back_and_trains_on_bitwise(name: str, dying: bool, tmp_path: Path) -> None:
    model, optimizer, x = shrunk(name, dying)
    save_pruned(tmp_path / "c.pt", model, optimizer, epoch=3, scheduler={"last_epoch": 3, "rates": [0.1, 0.2]})
    torch.load(tmp_path / "c.pt", weights_only=True)
    other, other_optimizer = fresh(name)
    identity = {n: id(p) for n, p in other.named_parameters()}
    extra = load_pruned(tmp_path / "c.pt", other, other_optimizer)
    assert extra == {"epoch": 3, "scheduler": {"last_epoch": 3, "rates": [0.1, 0.2]}}
    assert same(model.state_dict(), other.state_dict())
    assert same(optimizer.state_dict(), other_optimizer.state_dict())
    assert all(identity[n] == id(p) for n, p in other.named_parameters())
    assert [id(p) for p in other.parameters()] == [id(p) for p in other_optimizer.param_groups[0]["params"]]
    assert bool(describe_stand_ins(other)) == dying
    for (path, a), (_, b) in zip(model.named_modules(), other.named_modules(), strict=True):
        for attribute in ("out_channels", "in_channels", "groups", "num_features", "in_features", "num_parameters"):
            assert getattr(a, attribute, None) == getattr(b, attribute, None), path
    batches = [torch.randn_like(x) for _ in range(3)]
    assert train(model, optimizer, batches) == train(other, other_optimizer, batches)
    assert torch.equal(model.eval()(x), other.eval()(x))
    for each in (model, other):  # and both can be pruned further
        reconfigure(each, None, traced(each, x).keep(each))


def test_saved_twice_and_channels_last(tmp_path: Path) -> None:
    model, optimizer, x = shrunk()
    save_pruned(tmp_path / "c.pt", model, optimizer)
    second, second_optimizer = fresh()
    second = second.to(memory_format=torch.channels_last)
    load_pruned(tmp_path / "c.pt", second, second_optimizer)
    assert second.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    save_pruned(tmp_path / "c.pt", second, second_optimizer)  # over the first
    third, third_optimizer = fresh()
    load_pruned(tmp_path / "c.pt", third, third_optimizer)
    assert same(model.state_dict(), third.state_dict())
    assert torch.equal(second.eval()(x), third.eval()(x))  # same layout, same rounding
    assert os.listdir(tmp_path) == ["c.pt"]


def test_a_module_with_two_names(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model, _ = small_net("out-of-place")
        model.alias = nn.ModuleList([model.blocks[0].conv1, model.blocks[0].conv2])
        return model

    model, (_, x) = build(), small_net("out-of-place")
    rest_of(model, "blocks.0.conv2").zero_()
    assert reconfigure(model, None, traced(model, x).keep(model)).branches == 1
    save_pruned(tmp_path / "c.pt", model)
    other = build()
    load_pruned(tmp_path / "c.pt", other)
    assert other.alias[1] is other.blocks[0].conv2
    assert torch.equal(model(x), other(x))


class Kernel5(nn.Module):
    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, kernel, padding=kernel // 2)


def untouched(path: Path, model: nn.Module, optimizer: Optimizer | None, message: str) -> None:
    held = () if optimizer is None else (optimizer,)
    before = snapshot(model, *held)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_pruned(path, model, optimizer)
    assert same(before, snapshot(model, *held))
    assert "\n" not in str(raised.value)


def test_missing_damaged_and_foreign_files(tmp_path: Path) -> None:
    model, optimizer, _ = shrunk()
    save_pruned(tmp_path / "good.pt", model, optimizer)
    content = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "truncated.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "garbage.pt").write_bytes(b"not a checkpoint at all" * 10)
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"weights": torch.ones(3)}, tmp_path / "foreign.pt")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    model, optimizer = fresh()
    untouched(tmp_path / "none.pt", model, optimizer, "there is no checkpoint at")
    untouched(tmp_path / "no" / "folder.pt", model, optimizer, "there is no checkpoint at")
    for name in ("truncated", "garbage", "empty"):
        untouched(tmp_path / f"{name}.pt", model, optimizer, "damaged or no checkpoint")
    for name in ("foreign", "tensor"):
        untouched(tmp_path / f"{name}.pt", model, optimizer, "is no checkpoint of prunetrain_kernels")
    untouched(tmp_path, model, optimizer, "cannot read the checkpoint")


def test_other_networks(tmp_path: Path) -> None:
    model, optimizer, _ = shrunk()
    path = tmp_path / "c.pt"
    save_pruned(path, model, optimizer)
    untouched(path, small_net("out-of-place")[0], None, "of another network")
    untouched(path, model, optimizer, "of another network")  # pruned already
    save_pruned(path, resnet20())
    untouched(path, resnet32(), None, r"of another network \(CifarResNet\): it lacks 'layer1.3.conv1.weight'")
    untouched(path, resnet20(num_classes=5), None, "'fc.weight' is .* build the model as it was first built")
    save_pruned(path, Kernel5(3))
    untouched(path, Kernel5(5), None, r"'conv.weight' is \(4, 3, 3, 3\) there and \(4, 3, 5, 5\) here")


def test_optimizers_that_do_not_fit(tmp_path: Path) -> None:
    model, optimizer, _ = shrunk()
    save_pruned(tmp_path / "with.pt", model, optimizer)
    save_pruned(tmp_path / "without.pt", model)
    other, other_optimizer = fresh()
    untouched(tmp_path / "without.pt", other, other_optimizer, "holds no optimizer state")
    groups = [{"params": [p]} for p in other.parameters()]
    untouched(tmp_path / "with.pt", other, SGD(groups, lr=0.1), "optimizer state .* is of groups of")
    load_pruned(tmp_path / "with.pt", other)  # the model alone
    other, _ = fresh()
    with pytest.raises(CheckpointError, match="holds no PruneTrain state"):
        load_pruned(tmp_path / "with.pt", other, None, SGD(other.parameters(), lr=0.1))


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    model, optimizer, _ = shrunk()
    path = tmp_path / "c.pt"
    save_pruned(path, model, optimizer)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="could not be read again"):
        save_pruned(path, model, optimizer, where=Path("x"))
    with pytest.raises(CheckpointError, match="could not be read again"):
        save_pruned(path, model, optimizer, function=lambda: 1)
    assert path.read_bytes() == before
    with pytest.raises(CheckpointError, match="cannot write"):
        save_pruned(tmp_path / "none" / "c.pt", model)
    assert os.listdir(tmp_path) == ["c.pt"]


FULL_DISK = """
import resource, sys, torch
from prunetrain_kernels import CheckpointError, save_pruned
model = torch.nn.Conv2d(64, 64, 3)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save_pruned(sys.argv[1], model)
except CheckpointError as error:
    print(error)
    sys.exit(7)
"""


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    model = randomise(nn.Conv2d(64, 64, 3))
    save_pruned(path, model)
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert "cannot write" in done.stdout
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.pt"]
    other = copy.deepcopy(model)
    load_pruned(path, other)
