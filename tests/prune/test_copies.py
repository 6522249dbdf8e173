"""Copies of a model (`also=[...]`) lose the same channels in the same transaction, on disk too."""

import copy
from pathlib import Path

import pytest
import torch
from nets import (
    DYING,
    NETS,
    OutOfPlace,
    Residual,
    forget_momentum,
    hold_masks,
    kill,
    rest_of,
    same,
    small_net,
    snapshot,
    traced,
    train,
    warm_up,
)
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from prunetrain_kernels import CheckpointError, InputError, Keep, PruneTrainError, load_pruned, reconfigure, save_pruned
from prunetrain_kernels.nn import GatedConv2d, fuse
from prunetrain_kernels.prune.also import copies_of

module = __import__("prunetrain_kernels.prune.reconfigure", fromlist=["reconfigure"])


def averaged(model: nn.Module, decay: float = 0.5) -> AveragedModel:
    """An average of parameters and buffers, in float64."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def dying(name: str, policy: str = "union", branch: bool = True) -> tuple[nn.Module, Optimizer, Tensor, Keep]:
    model, x = small_net(name)
    optimizer = Adam(model.parameters(), lr=0.001)
    warm_up(model, optimizer, x)
    if policy == "gating":
        fuse(model)
    graph = traced(model, x)
    kill(graph, model)
    if branch and name in DYING:
        rest_of(model, DYING[name]).zero_()
    return model, optimizer, x, graph.keep(model, policy=policy)


def loud(model: nn.Module) -> nn.Module:
    """A copy of which nothing is zero."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=torch.float64))
    return other


@pytest.mark.parametrize("policy", ["union", "gating"])
@pytest.mark.parametrize("name", NETS)
def test_an_ema_goes_on_as_that_of_a_masked_twin(name: str, policy: str) -> None:
    """Average and network of a pruned run are the kept part of those of a run whose dead weights are held at zero."""
    model, optimizer, x, keep = dying(name, policy)
    ema = averaged(model)
    ema.update_parameters(model)
    for p, noise in zip(ema.parameters(), loud(model).parameters(), strict=True):
        p.data.copy_(noise)  # it still remembers what the network has forgotten
    twin, twin_optimizer, twin_ema = copy.deepcopy((model, optimizer, ema))
    masks = hold_masks(keep.graph, keep, model)
    forget_momentum(keep.graph, keep, twin, twin_optimizer)
    identity = {n: id(p) for n, p in ema.named_parameters()}

    done = reconfigure(model, optimizer, keep, also=[ema])
    assert done.changed
    assert len(done.also_max_abs_dy) == 1
    assert all(identity[n] == id(p) for n, p in ema.named_parameters())
    for number in range(3):
        batch = torch.randn(x.shape, generator=torch.Generator().manual_seed(number), dtype=x.dtype)
        train(model, optimizer, [batch])
        train(twin, twin_optimizer, [batch], masks)
        ema.update_parameters(model)
        twin_ema.update_parameters(twin)
    assert [type(m) for m in ema.module.modules()] == [type(m) for m in model.modules()]
    _assert_kept_part(keep, ema.module, twin_ema.module)


def _assert_kept_part(keep: Keep, small: nn.Module, large: nn.Module) -> None:
    graph, large_modules = keep.graph, dict(large.named_modules())
    for change in graph.layers.values():
        if change.name in keep.removed:
            continue
        rows = keep.live[change.name][1]
        columns = [c * change.block + b for c in keep.live[change.name][0].tolist() for b in range(change.block)]
        expected = large_modules[change.name].weight[rows][:, columns]
        torch.testing.assert_close(small.get_submodule(change.name).weight, expected, rtol=1e-9, atol=1e-11)
    for follower in graph.followers.values():
        if follower.name in keep.removed:
            continue
        kept = keep.channels[follower.space]
        rows = torch.tensor([c * follower.block + b for c in kept.tolist() for b in range(follower.block)])
        ours = small.get_submodule(follower.name)
        for key, tensor in (*ours._parameters.items(), *ours._buffers.items()):
            if tensor is not None and tensor.dim():
                expected = large_modules[follower.name].state_dict()[key][rows]
                torch.testing.assert_close(tensor.detach(), expected, rtol=1e-9, atol=1e-11)


def test_a_copy_of_the_same_weights_computes_the_same() -> None:
    model, optimizer, x, keep = dying("in-place-bottleneck", branch=False)
    other = copy.deepcopy(model)
    done = reconfigure(model, optimizer, keep, also=[other])
    assert done.also_max_abs_dy[0] < 1e-12
    assert torch.equal(model.eval()(x), other.eval()(x))
    assert reconfigure(model, optimizer, traced(model, x).keep(model), also=[other]).changed is False


def test_a_copy_in_another_dtype_layout_mode_and_without_gradients() -> None:
    model, optimizer, _, keep = dying("in-place-bottleneck")
    teacher = copy.deepcopy(model).to(torch.float32).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    teacher.eval().requires_grad_(False)
    reconfigure(model, optimizer, keep, also=[teacher])
    assert not any(m.training for m in teacher.modules())
    assert all(m.training for m in model.modules())
    for (name, a), b in zip(model.named_parameters(), teacher.parameters(), strict=True):
        assert (a.shape, torch.float32, False) == (b.shape, b.dtype, b.requires_grad), name
        if a.dim() == 4 and a.shape[2] > 1 and a.shape[1] > 1:
            assert b.is_contiguous(memory_format=torch.channels_last), name


def test_two_networks_that_teach_each_other() -> None:
    """A copy that is trained itself: its optimizer is given too, and loses what it must."""
    model, optimizer, x, keep = dying("out-of-place")
    peer = loud(model)
    peer_optimizer = SGD(peer.parameters(), lr=0.01, momentum=0.9)
    warm_up(peer, peer_optimizer, x)
    reconfigure(model, [optimizer, peer_optimizer], keep, also=[peer])
    assert [id(p) for p in peer.parameters()] == [id(p) for p in peer_optimizer.param_groups[0]["params"]]
    assert all(s["momentum_buffer"].shape == p.shape for p, s in peer_optimizer.state.items())
    train(peer, peer_optimizer, [x] * 2)


@pytest.mark.parametrize("policy", ["union", "gating"])
@pytest.mark.parametrize("step", ["_slice_all", "swap_in", "drop", "_set_sizes", "_gate", "_outputs_after"])
@pytest.mark.parametrize("call", [1, 2])
def test_model_and_copy_are_undone_together(step: str, call: int, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, _, keep = dying("in-place-bottleneck", policy)
    ema = averaged(loud(model))
    before = snapshot(model, optimizer), snapshot(ema)
    old, calls = getattr(module, step), []

    def fails(*args: object) -> object:
        result = old(*args)
        calls.append(step)
        if len(calls) == min(call, 1 if step in ("_slice_all", "drop") else 2):
            raise RuntimeError("forced")
        return result

    monkeypatch.setattr(module, step, fails)
    with pytest.raises(RuntimeError, match="forced"):
        reconfigure(model, optimizer, keep, also=[ema])
    assert same(before[0], snapshot(model, optimizer))
    assert same(before[1], snapshot(ema))
    monkeypatch.undo()
    reconfigure(model, optimizer, keep, also=[ema])


class Rebel(nn.Module):
    """Behaves until it has lost channels."""

    def __init__(self, rebels: bool) -> None:
        super().__init__()
        self.one, self.two, self.rebels = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), rebels

    def forward(self, x: Tensor) -> Tensor:
        if self.rebels and self.one.out_channels < 8:
            raise ValueError("not with me")
        return self.two(self.one(x))


def test_a_copy_that_fails_afterwards_undoes_all() -> None:
    model = Rebel(False)
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        model.one.weight[2:5] = 0
        model.two.weight[:, 2:5] = 0
    other = copy.deepcopy(model)
    other.rebels = True
    keep = traced(model, x).keep(model)
    before = snapshot(model), snapshot(other)
    with pytest.raises(PruneTrainError, match="not with me"):
        reconfigure(model, None, keep, also=[other])
    assert same(before[0], snapshot(model))
    assert same(before[1], snapshot(other))


def test_wrapped_copies_are_found() -> None:
    model, _ = small_net("out-of-place")
    inner = copy.deepcopy(model)
    for wrapped, prefix in (
        (inner, ""),
        (AveragedModel(inner), "module."),
        (nn.DataParallel(inner), "module."),
        (torch.compile(inner), "_orig_mod."),
        (AveragedModel(torch.compile(inner)), "module._orig_mod."),
    ):
        [wrapped_copy] = copies_of(model, [wrapped])
        assert wrapped_copy.prefix == prefix
        assert type(wrapped_copy.network) is type(model)
        assert {prefix + name for name in model.state_dict()} <= set(wrapped.state_dict())


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("shared", r"also\[0\] shares 'stem.0.weight' with the model"),
        ("one-shared", r"also\[0\] shares 'fc.bias' with the model"),
        ("twice", r"also\[1\] shares 'stem.0.weight' with also\[0\]"),
        ("width", r"also\[0\] is not like the model: the parameter 'stem.0.weight' is \(7, 3, 3, 3\) there and \(8,"),
        ("other", r"also\[0\] is not like the model: '.*' is a module that the model has and it has not"),
        ("fused", r"'stem.1' is a BatchNormAct2d there and a BatchNorm2d in the model"),
        ("tensors", "`also` takes a list of modules"),
        ("bare", "`also` takes a list of modules"),
    ],
)
def test_what_is_no_copy_is_refused_before_anything_is_touched(what: str, says: str) -> None:
    model, optimizer, _, keep = dying("out-of-place")
    other = copy.deepcopy(model)
    if what == "one-shared":
        other.fc.bias = model.fc.bias
    elif what == "fused":
        fuse(other)
    narrow = Residual(OutOfPlace(7), OutOfPlace(7), width=7)
    narrow(torch.randn(2, 3, 6, 6))
    also: object = {
        "shared": [model],
        "twice": [other, other],
        "width": [narrow],
        "other": [small_net("flattened")[0]],
        "tensors": [dict(model.state_dict())],
        "bare": other,
    }.get(what, [other])
    before = snapshot(model, optimizer)
    with pytest.raises(InputError, match=says):
        reconfigure(model, optimizer, keep, also=also)  # type: ignore[arg-type]
    assert same(before, snapshot(model, optimizer))


# -- in a file ---------------------------------------------------------------------------------------------------------


def shrunk(policy: str) -> tuple[nn.Module, Optimizer, AveragedModel, Tensor]:
    model, optimizer, x, keep = dying("in-place-bottleneck", policy)
    ema = averaged(loud(model))
    ema.update_parameters(model)
    reconfigure(model, optimizer, keep, also=[ema])
    ema.update_parameters(model)
    return model, optimizer, ema, x


@pytest.mark.parametrize("policy", ["union", "gating"])
def test_copies_come_back_from_a_checkpoint_bitwise(policy: str, tmp_path: Path) -> None:
    model, optimizer, ema, x = shrunk(policy)
    save_pruned(tmp_path / "c.pt", model, optimizer, also=[ema], epoch=2)
    other, _ = small_net("in-place-bottleneck", seed=5)
    if policy == "gating":
        fuse(other)
    other_optimizer, other_ema = Adam(other.parameters(), lr=0.5), averaged(other)
    assert load_pruned(tmp_path / "c.pt", other, other_optimizer, also=[other_ema]) == {"epoch": 2}
    assert same(ema.state_dict(), other_ema.state_dict())
    assert int(other_ema.n_averaged) == 2
    assert torch.equal(ema.eval()(x), other_ema.eval()(x))
    assert policy == "union" or any(isinstance(m, GatedConv2d) for m in other_ema.modules())
    for a, b, e in ((model, optimizer, ema), (other, other_optimizer, other_ema)):
        train(a, b, [x] * 2)
        e.update_parameters(a)
    assert same(ema.state_dict(), other_ema.state_dict())


def test_a_checkpoint_with_copies_serves_without_and_not_the_other_way_round(tmp_path: Path) -> None:
    model, _optimizer, ema, x = shrunk("union")
    save_pruned(tmp_path / "with.pt", model, also=[ema])
    save_pruned(tmp_path / "without.pt", model)
    other, _ = small_net("in-place-bottleneck", seed=5)
    other_ema = averaged(other)
    before = snapshot(other), snapshot(other_ema)
    with pytest.raises(CheckpointError, match="holds 0 copies of the model, and `also` has 1"):
        load_pruned(tmp_path / "without.pt", other, also=[other_ema])
    with pytest.raises(InputError, match=r"also\[0\] shares"):
        load_pruned(tmp_path / "with.pt", other, also=[other])
    assert same(before[0], snapshot(other))
    assert same(before[1], snapshot(other_ema))
    load_pruned(tmp_path / "with.pt", other)
    assert torch.equal(model.eval()(x), other.eval()(x))


def test_a_wrapped_model_is_saved_as_the_network_inside(tmp_path: Path) -> None:
    model, _optimizer, ema, x = shrunk("union")
    save_pruned(tmp_path / "c.pt", nn.DataParallel(model), also=[ema])
    other, _ = small_net("in-place-bottleneck", seed=5)
    load_pruned(tmp_path / "c.pt", torch.compile(other))
    assert torch.equal(model.eval()(x), other.eval()(x))
