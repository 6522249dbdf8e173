"""Fused networks are pruned, saved, loaded and trained on exactly as the plain ones."""

import copy
from pathlib import Path

import pytest
import torch
from nets import (
    DYING,
    NETS,
    forget_momentum,
    hold_masks,
    kill,
    rest_of,
    same,
    small_net,
    snapshot,
    traced,
    train,
    twin_of,
    warm_up,
)
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from prunetrain_kernels import ChannelGraph, PruneTrainError, load_pruned, reconfigure, save_pruned
from prunetrain_kernels.cost.flops import count_flops
from prunetrain_kernels.cost.memory import step_memory
from prunetrain_kernels.cost.traffic import batch_norm_bytes
from prunetrain_kernels.models import build
from prunetrain_kernels.nn import BatchNormAct2d, fuse
from prunetrain_kernels.prune import branches
from prunetrain_kernels.prune.branches import describe_stand_ins

PAPER = {
    "resnet20": (8, ("layer2.1.conv2", "layer2.0.downsample.0")),
    "resnet50": (8, ("layer1.3.conv3",)),
    "vgg11": (32, ()),
}
SMALL = [n for n in NETS if n not in ("1d", "3d", "flattened", "bias-without-bn", "bias-without-bn-in-place")]
CASES = [(name, dying) for name in SMALL for dying in (False, True)]
IDS = [f"{n}-{'branch' if d else 'channels'}" for n, d in CASES]


def pair(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    model, x = small_net(name)
    fused = copy.deepcopy(model)
    assert any(b.what != "alone" for b in fuse(fused, (x,)).fused)
    return model, fused, x


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-3)


def described(graph: ChannelGraph) -> object:
    spaces = [(s.size, s.producers, s.consumers, s.followers, s.frozen, s.is_input, s.is_output) for s in graph.spaces]
    return spaces, graph.layers, graph.followers, [m.in_place for m in graph.merges], graph.opaque, graph.pinned


@pytest.mark.parametrize(("name", "dying"), CASES, ids=IDS)
def test_small_networks_train_on_like_the_plain_twin(name: str, dying: bool) -> None:
    model, fused, x = pair(name)
    optimizers = [sgd(m) for m in (model, fused)]
    for m, optimizer in zip((model, fused), optimizers, strict=True):
        warm_up(m, optimizer, x)
    graphs = [traced(m, x) for m in (model, fused)]
    assert described(graphs[0]) == described(graphs[1])
    for m, graph in zip((model, fused), graphs, strict=True):
        kill(graph, m)
        if dying:
            rest_of(m, DYING[name]).zero_()
    held, held_optimizer = twin_of(fused, optimizers[1])  # fused, not pruned: its dead channels held at zero
    keeps = [graph.keep(m) for m, graph in zip((model, fused), graphs, strict=True)]
    assert keeps[0].branches == keeps[1].branches
    assert len(keeps[1].branches) == int(dying)
    for a, b in zip(keeps[0].channels, keeps[1].channels, strict=True):
        assert torch.equal(a, b)
    masks = hold_masks(graphs[1], keeps[1], fused)
    forget_momentum(graphs[1], keeps[1], held, held_optimizer)
    expected = held.eval()(x).detach()
    reports = [reconfigure(m, o, k) for m, o, k in zip((model, fused), optimizers, keeps, strict=True)]
    assert reports[1].max_abs_dy <= 1e-12 * max(reports[1].scale, 1)
    assert reports[0].removed == reports[1].removed
    assert torch.allclose(fused.eval()(x), expected, rtol=1e-10, atol=1e-12)
    assert describe_stand_ins(fused) == describe_stand_ins(model)
    assert list(fused.state_dict()) == list(model.state_dict())
    for m in (model, fused, held):
        m.train()
    batches = [torch.randn_like(x) for _ in range(8)]
    losses = train(fused, optimizers[1], batches)
    assert losses == pytest.approx(train(model, optimizers[0], batches), rel=1e-9)
    assert losses == pytest.approx(train(held, held_optimizer, batches, masks), rel=1e-8)
    assert torch.allclose(fused.eval()(x), model.eval()(x), rtol=1e-7, atol=1e-9)
    for (key, a), b in zip(model.state_dict().items(), fused.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9), key
    # and once more, with what was removed in place
    again = [traced(m, x) for m in (model, fused)]
    assert described(again[0]) == described(again[1])
    for m, graph, optimizer in zip((model, fused), again, optimizers, strict=True):
        kill(graph, m, seed=1)
        reconfigure(m, optimizer, graph.keep(m))
    assert torch.allclose(fused(x), model(x), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", PAPER)
def test_paper_networks(name: str) -> None:
    size, dying = PAPER[name]
    torch.manual_seed(0)
    model, x = build(name, 10).double(), torch.randn(4, 3, size, size).double()
    fused = copy.deepcopy(model)
    fuse(fused, (x,))
    optimizers = [SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (model, fused)]
    graphs = [traced(m, x) for m in (model, fused)]
    assert described(graphs[0]) == described(graphs[1])
    for m, graph, optimizer in zip((model, fused), graphs, optimizers, strict=True):
        kill(graph, m)
        for last in dying:
            rest_of(m, last).zero_()
        report = reconfigure(m, optimizer, graph.keep(m))
        assert set(dying) <= set(report.removed)
    assert describe_stand_ins(fused) == describe_stand_ins(model)
    assert {n: tuple(t.shape) for n, t in fused.state_dict().items()} == {
        n: tuple(t.shape) for n, t in model.state_dict().items()
    }
    batches = [torch.randn_like(x) for _ in range(3)]
    assert train(fused, optimizers[1], batches) == pytest.approx(train(model, optimizers[0], batches), rel=1e-8)
    assert torch.allclose(fused.eval()(x), model.eval()(x), rtol=1e-6, atol=1e-9)
    fused.float(), model.float()
    assert count_flops(fused, (x.float(),)) == count_flops(model, (x.float(),))
    assert batch_norm_bytes(fused, (x.float(),)) == batch_norm_bytes(model, (x.float(),))
    assert step_memory(fused, (x.float(),)).bytes(64) <= step_memory(model, (x.float(),)).bytes(64)


@pytest.mark.parametrize("fused_before", [True, False], ids=["fused before", "fused after"])
@pytest.mark.parametrize("loaded", ["fused", "plain"])
@pytest.mark.parametrize("saved", ["fused", "plain"])
@pytest.mark.parametrize("name", ["out-of-place", "in-place-bottleneck", "squeeze-excite"])
def test_checkpoints_go_both_ways(name: str, saved: str, loaded: str, fused_before: bool, tmp_path: Path) -> None:
    model, x = small_net(name)
    if saved == "fused":
        fuse(model)
    optimizer = sgd(model)
    warm_up(model, optimizer, x)
    graph = traced(model, x)
    kill(graph, model)
    rest_of(model, DYING[name]).zero_()
    assert reconfigure(model, optimizer, graph.keep(model)).branches == 1
    warm_up(model, optimizer, x)
    save_pruned(tmp_path / "c.pt", model, optimizer)
    other, _ = small_net(name, seed=5)
    other_optimizer = sgd(other)
    if loaded == "fused" and fused_before:
        fuse(other)
    load_pruned(tmp_path / "c.pt", other, other_optimizer)
    if loaded == "fused" and not fused_before:
        fuse(other, (x,))
    assert loaded == "plain" or any(isinstance(m, BatchNormAct2d) for m in other.modules())
    assert torch.allclose(other.eval()(x), model.eval()(x), rtol=1e-10)
    model.train(), other.train()
    batches = [torch.randn_like(x) for _ in range(4)]
    assert train(other, other_optimizer, batches) == pytest.approx(train(model, optimizer, batches), rel=1e-9)
    assert describe_stand_ins(other) == describe_stand_ins(model)


def test_fused_after_pruning_is_the_same() -> None:
    model, x = small_net("in-place-bottleneck")
    graph = traced(model, x)
    kill(graph, model)
    rest_of(model, DYING["in-place-bottleneck"]).zero_()
    reconfigure(model, None, graph.keep(model))
    fused = copy.deepcopy(model)
    fuse(fused, (x,))
    assert described(traced(fused, x)) == described(traced(model, x))
    for training in (True, False):
        assert torch.allclose(fused.train(training)(x), model.train(training)(x), rtol=1e-10)


@pytest.mark.parametrize("name", ["out-of-place", "in-place-bottleneck"])
def test_what_goes_wrong_is_undone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused, x = pair(name)
    optimizer = sgd(fused)
    warm_up(fused, optimizer, x)
    graph = traced(fused, x)
    kill(graph, fused)
    rest_of(fused, DYING[name]).zero_()
    keep, output = graph.keep(fused), fused.eval()(x)
    fused.train()
    before = snapshot(fused, optimizer)
    true_forward = branches.ConstantBatchNorm.forward
    monkeypatch.setattr(branches.ConstantBatchNorm, "forward", lambda self, *a, **k: true_forward(self, *a, **k) + 1)
    with pytest.raises(PruneTrainError, match="undone"):
        reconfigure(fused, optimizer, keep)
    assert same(snapshot(fused, optimizer), before)
    assert torch.equal(fused.eval()(x), output)


def test_under_autocast_stand_ins_keep_the_dtype() -> None:
    _, fused, x = pair("in-place-bottleneck")
    fused, x = fused.float(), x.float()
    rest_of(fused, DYING["in-place-bottleneck"]).zero_()
    seen: list[torch.dtype] = []
    fused.blocks[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            fused(x).float().square().mean().backward()
        if len(seen) == 1:
            reconfigure(fused, None, traced(fused, x).keep(fused))
            seen[1:] = []
    assert seen[0] == seen[1] == torch.bfloat16
    assert all(p.grad is not None for p in fused.blocks[0].bn3.parameters())
