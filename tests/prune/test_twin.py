"""A reconfigured network trains on exactly as its twin, whose dead channels are held at zero by a mask."""

from collections.abc import Callable

import pytest
import torch
from nets import (
    DYING,
    NETS,
    forget_momentum,
    hold_masks,
    kill,
    randomise,
    rest_of,
    small_net,
    traced,
    train,
    twin_of,
    warm_up,
)
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from prunetrain_kernels import reconfigure
from prunetrain_kernels.models import resnet20
from prunetrain_kernels.prune.branches import ConstantBatchNorm

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.02, momentum=0.9, weight_decay=5e-3),
    "adam": lambda p: Adam(p, lr=0.003, weight_decay=5e-3),
}
CASES = [(name, dying) for name in NETS for dying in (False, True) if not dying or name in DYING]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(("name", "dying"), CASES, ids=[f"{n}-{'branch' if d else 'channels'}" for n, d in CASES])
def test_trains_like_its_twin(name: str, dying: bool, kind: str) -> None:
    model, x = small_net(name)
    optimizer = OPTIMIZERS[kind](model.parameters())
    warm_up(model, optimizer, x)
    graph = traced(model, x)
    kill(graph, model)
    if dying:
        rest_of(model, DYING[name]).zero_()
    twin, twin_optimizer = twin_of(model, optimizer)
    keep = graph.keep(model)
    masks = hold_masks(graph, keep, model)
    forget_momentum(graph, keep, twin, twin_optimizer)
    report = reconfigure(model, optimizer, keep)
    assert report.branches == int(dying)
    assert {id(p) for p in model.parameters()} == {id(p) for g in optimizer.param_groups for p in g["params"]}
    batches = [torch.randn_like(x) for _ in range(20)]
    losses, twin_losses = train(model, optimizer, batches), train(twin, twin_optimizer, batches, masks)
    assert losses == pytest.approx(twin_losses, rel=1e-8)
    assert losses[-1] < losses[0]
    # the running statistics have moved alike, stand-ins' included
    a, b = model.eval()(x), twin.eval()(x)
    assert torch.allclose(a, b, rtol=1e-7, atol=1e-9)
    for path, module in model.named_modules():
        if isinstance(module, ConstantBatchNorm) and module.track_running_stats:
            kept = keep.channels[graph.followers[path].space]
            other = twin.get_submodule(path)
            assert torch.allclose(module.running_mean, other.running_mean[kept], atol=1e-9)
            assert torch.allclose(module.running_var, other.running_var[kept], atol=1e-9)
            assert torch.equal(module.num_batches_tracked, other.num_batches_tracked)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 3e-2)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("last", ["layer2.1.conv2", "layer2.0.downsample.0"], ids=["branch", "projection-shortcut"])
def test_resnet20_trains_like_its_twin(last: str, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    model, x = randomise(resnet20()).to(dtype), torch.randn(8, 3, 8, 8, dtype=dtype)
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    warm_up(model, optimizer, x)
    graph = traced(model, x)
    kill(graph, model)
    rest_of(model, last).zero_()
    twin, twin_optimizer = twin_of(model, optimizer)
    keep = graph.keep(model)
    masks = hold_masks(graph, keep, model)
    forget_momentum(graph, keep, twin, twin_optimizer)
    assert last in reconfigure(model, optimizer, keep).removed
    batches = [torch.randn_like(x) for _ in range(20)]
    losses, twin_losses = train(model, optimizer, batches), train(twin, twin_optimizer, batches, masks)
    assert losses == pytest.approx(twin_losses, rel=tolerance)  # fp32 rounding grows from step to step
    assert losses[:5] == pytest.approx(twin_losses[:5], rel=tolerance / 100)


def test_a_branch_dies_with_its_batch_norm_in_evaluation_mode() -> None:
    """A frozen batch norm emits a constant made of its running statistics, and does so after the removal."""
    model, x = small_net("out-of-place")
    model.blocks[0].bn2.eval()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    graph = traced(model, x)
    rest_of(model, "blocks.0.conv2").zero_()
    twin, twin_optimizer = twin_of(model, optimizer)
    keep = graph.keep(model)
    reconfigure(model, optimizer, keep)
    assert not model.blocks[0].bn2.training
    batches = [x] * 5
    masks = {"blocks.0.conv2": torch.zeros(8, 8, 3, 3, dtype=x.dtype)}
    assert train(model, optimizer, batches) == pytest.approx(train(twin, twin_optimizer, batches, masks), rel=1e-10)


def test_stand_ins_follow_autocast() -> None:
    model, x = small_net("in-place-bottleneck", torch.float32)
    graph = traced(model, x)
    rest_of(model, "blocks.0.conv3").zero_()
    seen: list[torch.dtype] = []
    model.blocks[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            model(x).float().square().mean().backward()
        if len(seen) == 1:
            reconfigure(model, None, graph.keep(model))
            seen[1:] = []
    assert seen[0] == seen[1] == torch.bfloat16
    assert all(p.grad is not None for p in model.blocks[0].bn3.parameters())


class Nested(nn.Module):
    """A branch within a branch, one of whose layers is also held by a ModuleList."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(6, 6, 3, padding=1) for _ in range(3))
        self.bn = nn.BatchNorm2d(6)
        self.alias = nn.ModuleList([self.conv1, self.conv2, self.conv3, self.bn])
        self.fc = nn.Linear(6, 4)
        self.in_place = in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        inner = self.alias[0](x)
        constant = self.bn(self.alias[1](inner))
        if self.in_place:
            constant += inner
            inner = constant
        else:
            inner = inner + constant
        return self.fc((x + self.alias[2](inner)).mean((2, 3)))


@pytest.mark.parametrize("dead", [("conv2",), ("conv3",), ("conv2", "conv3")], ids="+".join)
@pytest.mark.parametrize("in_place", [False, True], ids=["out-of-place", "in-place"])
def test_nested_branches_and_aliases(dead: tuple[str, ...], in_place: bool) -> None:
    torch.manual_seed(0)
    model, x = randomise(Nested(in_place)).double(), torch.randn(4, 3, 5, 5).double()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    warm_up(model, optimizer, x)
    graph = traced(model, x)
    for name in dead:
        rest_of(model, name).zero_()
    twin, twin_optimizer = twin_of(model, optimizer)
    keep = graph.keep(model)
    masks = {name: torch.zeros(6, 6, 3, 3).double() for name in dead}
    report = reconfigure(model, optimizer, keep)
    assert set(dead) <= set(report.removed)
    for alias, name in enumerate(("conv1", "conv2", "conv3", "bn")):
        assert model.alias[alias] is getattr(model, name)
    assert {id(p) for p in model.parameters()} == {id(p) for g in optimizer.param_groups for p in g["params"]}
    batches = [torch.randn_like(x) for _ in range(10)]
    assert train(model, optimizer, batches) == pytest.approx(train(twin, twin_optimizer, batches, masks), rel=1e-9)
    reconfigure(model, optimizer, traced(model, x).keep(model))  # what was removed can be traced


class Twice(nn.Module):
    """Both sides of the merge can die; then one of them must stay, for the map's size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 6, 3, padding=1) for _ in range(3))
        self.fc = nn.Conv2d(6, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        doubled = self.c(x)
        # torch.add writes into neither operand, so nothing but its operands can tell how large the sum is
        sides = self.fc(torch.relu(torch.add(self.a(x), self.b(x))))
        return (sides + self.fc(torch.add(doubled, doubled))).mean((2, 3))


@pytest.mark.parametrize("dead", ["ab", "abc", "c"])
def test_one_side_of_a_merge_always_stays(dead: str) -> None:
    model, x = randomise(Twice()).double(), torch.randn(2, 3, 6, 6).double()
    for name in dead:
        rest_of(model, name).zero_()
    twin = twin_of(model, None)[0]  # type: ignore[arg-type]
    for _ in range(2):  # the second time nothing more may go
        reconfigure(model, None, traced(model, x).keep(model))
        assert torch.allclose(model(x), twin(x), rtol=1e-12)
    assert any(isinstance(m, nn.Conv2d) for m in (model.a, model.b))


class Broadcast(nn.Module):
    """A branch merged with a pooled one, and a branch that ends in dropout: neither can be a constant pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.c2 = (nn.Conv2d(3, 6, 3, padding=1) for _ in range(4))
        self.head = nn.Conv2d(6, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.head(torch.add(self.a(x), self.b(x).mean((2, 3), keepdim=True)))
        y = y + self.head(torch.add(x.mean(), nn.functional.dropout(self.c(x), 0.5, self.training)))
        z = torch.add(nn.functional.dropout(self.c2(x), 0.5, self.training), self.b(x))
        return (y + self.head(z)).mean((2, 3))


@pytest.mark.parametrize("dead", ["a", "b", "c", "c2"])
def test_merges_that_need_the_full_map_keep_it(dead: str) -> None:
    model, x = randomise(Broadcast()).double(), torch.randn(2, 3, 6, 6).double()
    rest_of(model, dead).zero_()
    twin = twin_of(model, None)[0]  # type: ignore[arg-type]
    reconfigure(model, None, traced(model, x).keep(model))
    for training in (False, True):
        torch.manual_seed(3)
        a = model.train(training)(x)
        torch.manual_seed(3)
        assert torch.allclose(a, twin.train(training)(x), rtol=1e-12)
