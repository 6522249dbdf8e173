"""Other people's checkpoints: the shape as a small dict, a plain state dict, the average of the weights."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import DYING, kill, rest_of, same, small_net, snapshot, traced, train, warm_up
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.swa_utils import AveragedModel

from prunetrain_kernels import (
    CheckpointError,
    InputError,
    apply_shape,
    load_pruned,
    pruned_shape,
    reconfigure,
    save_pruned,
)
from prunetrain_kernels.nn import fuse

NAMES = ["in-place-bottleneck", "out-of-place"]


def pruned(name: str, policy: str = "union", branch: bool = True) -> tuple[nn.Module, Optimizer, Tensor]:
    model, x = small_net(name)
    if policy == "gating":
        fuse(model)
    optimizer = Adam(model.parameters(), lr=0.001)
    warm_up(model, optimizer, x)
    graph = traced(model, x)
    kill(graph, model, partly=0.3)
    if branch and name in DYING:
        rest_of(model, DYING[name]).zero_()
    reconfigure(model, optimizer, graph.keep(model, policy=policy))
    warm_up(model, optimizer, x)
    return model, optimizer, x


def fresh(name: str, policy: str = "union") -> tuple[nn.Module, Optimizer]:
    model, _ = small_net(name, seed=5)
    if policy == "gating":
        fuse(model)
    return model, Adam(model.parameters(), lr=0.5)


@pytest.mark.parametrize("policy", ["union", "gating"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("through_json", [False, True])
def test_a_strangers_resume_goes_on_bitwise(name: str, policy: str, through_json: bool, tmp_path: Path) -> None:
    model, optimizer, x = pruned(name, policy)
    shape = pruned_shape(model)
    if through_json:
        shape = json.loads(json.dumps(shape))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "shape": shape}, tmp_path / "c.pt")
    checkpoint = torch.load(tmp_path / "c.pt", weights_only=True)
    other, other_optimizer = fresh(name, policy)
    objects = {n: id(p) for n, p in other.named_parameters()}
    average = AveragedModel(other)
    apply_shape(other, checkpoint["shape"], other_optimizer, also=[average])
    other.load_state_dict(checkpoint["model"])
    other_optimizer.load_state_dict(checkpoint["optimizer"])
    average.module.load_state_dict(checkpoint["model"])
    assert all(objects[n] == id(p) for n, p in other.named_parameters())
    assert pruned_shape(other) == pruned_shape(model) == pruned_shape(average)
    batches = [torch.randn_like(x) for _ in range(3)]
    assert torch.equal(model.eval()(x), average.module.eval()(x))
    model.train()
    assert train(model, optimizer, batches) == train(other, other_optimizer, batches)
    assert torch.equal(model.eval()(x), other.eval()(x))
    apply_shape(other, shape, other_optimizer)  # of that shape already
    reconfigure(other, None, traced(other, x).keep(other))


def test_state_of_an_optimizer_that_has_made_steps_is_cut_with_the_shape() -> None:
    model, _, x = pruned("in-place-bottleneck")
    other, _ = fresh("in-place-bottleneck")
    optimizer = SGD(other.parameters(), lr=0.1, momentum=0.9)
    warm_up(other, optimizer, x)
    apply_shape(other, pruned_shape(model), optimizer)
    assert all(optimizer.state[p]["momentum_buffer"].shape == p.shape for p in other.parameters())
    train(other, optimizer, [x])


class Wide(nn.Module):
    def __init__(self, width: int = 8, classes: int = 4, channels: int = 3) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, width, 3), nn.Conv2d(width, width, 3)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


OTHERS: list[tuple[dict[str, int], str]] = [
    ({"width": 16}, r"'a.weight' is \(8, 3, 3, 3\) there and \(16, 3, 3, 3\) here"),
    ({"classes": 100}, r"'fc.weight' is \(4, 8\) there and \(100, 8\) here"),
    ({"channels": 4}, r"'a.weight' is \(8, 3, 3, 3\) there and \(8, 4, 3, 3\) here"),
    ({"width": 16, "classes": 100, "channels": 4}, r"'a.weight' is .* build the model as it was first built"),
    ({"width": 4}, r"'a.weight' is \(8, 3, 3, 3\) there and \(4, 3, 3, 3\) here"),
]


@pytest.mark.parametrize(("options", "message"), OTHERS, ids=[str(o) for o, _ in OTHERS])
@pytest.mark.parametrize("prunes", [False, True])
def test_a_larger_network_takes_no_smaller_one(
    options: dict[str, int], message: str, prunes: bool, tmp_path: Path
) -> None:
    model = Wide()
    if prunes:
        graph = traced(model, x := torch.randn(2, 3, 9, 9))
        kill(graph, model)
        reconfigure(model, None, graph.keep(model))
        assert model.a.out_channels < 8, x.shape
    save_pruned(tmp_path / "c.pt", copy.deepcopy(model))
    other = Wide(**options)
    before = snapshot(other)
    with pytest.raises(CheckpointError, match=message):
        load_pruned(tmp_path / "c.pt", other)
    with pytest.raises(CheckpointError, match=message):
        apply_shape(other, pruned_shape(model))
    assert same(before, snapshot(other))
    load_pruned(tmp_path / "c.pt", same_size := Wide())
    save_pruned(tmp_path / "again.pt", same_size)  # the original sizes survive loading and saving
    load_pruned(tmp_path / "again.pt", Wide())


def test_a_layer_that_was_put_in_later_has_its_own_size(tmp_path: Path) -> None:
    model = Wide()
    kill(graph := traced(model, torch.randn(2, 3, 9, 9)), model)
    reconfigure(model, None, graph.keep(model))
    model.fc = nn.Linear(model.fc.in_features, 2)
    save_pruned(tmp_path / "c.pt", model)
    other = Wide()
    other.fc = nn.Linear(model.fc.in_features, 2)
    load_pruned(tmp_path / "c.pt", other)
    assert same(model.state_dict(), other.state_dict())


WRONG: list[tuple[str, Any]] = [
    ("format", "something else"),
    ("tensors", {"a.weight": [0, 3, 3, 3]}),
    ("tensors", {"a.weight": [10**12, 3, 3, 3]}),
    ("tensors", {}),
    ("original", None),
    ("stand_ins", {"a": {"kind": "forward"}}),
    ("stand_ins", {"nowhere": {"kind": "removed", "geometry": {}}}),
    ("sizes", {"a": {"forward": 3}}),
    ("sizes", {"a": {"out_channels": 9}}),
    ("gated", {"a": {}}),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=[f"{k}-{v}" for k, v in WRONG])
def test_a_damaged_shape_changes_nothing(key: str, value: Any) -> None:
    model, optimizer = Wide(), None
    kill(graph := traced(model, torch.randn(2, 3, 9, 9)), model)
    reconfigure(model, optimizer, graph.keep(model))
    other = Wide()
    before = snapshot(other)
    with pytest.raises(CheckpointError) as raised:
        apply_shape(other, {**pruned_shape(model), key: value})
    assert "\n" not in str(raised.value)
    assert same(before, snapshot(other))


# -- files of other programs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_plain_state_dict_where_shapes_decide(key: str | None, prefix: str, tmp_path: Path) -> None:
    model, _, x = pruned("out-of-place", branch=False)
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save(state if key is None else {key: state, "epoch": 3}, tmp_path / "c.pt")
    other, _ = fresh("out-of-place")
    assert load_pruned(tmp_path / "c.pt", other) == ({} if key is None else {"epoch": 3})
    assert torch.equal(model.eval()(x), other.eval()(x))


def test_removed_branches_and_gating_need_the_shape(tmp_path: Path) -> None:
    for policy, message in (("union", "branches were removed"), ("gating", "of a gated layer")):
        model, optimizer, x = pruned("in-place-bottleneck", policy)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, tmp_path / "without.pt")
        torch.save({**state, "shape": pruned_shape(model)}, tmp_path / "with.pt")
        other, other_optimizer = fresh("in-place-bottleneck", policy)
        before = snapshot(other, other_optimizer)
        with pytest.raises(CheckpointError, match=f"{message}.*pruned_shape.*apply_shape"):
            load_pruned(tmp_path / "without.pt", other)
        assert same(before, snapshot(other, other_optimizer))
        load_pruned(tmp_path / "with.pt", other, other_optimizer)
        assert train(model, optimizer, [x] * 2) == train(other, other_optimizer, [x] * 2)


def test_which_ema_fills_the_model_with_the_average(tmp_path: Path) -> None:
    model, x = small_net("out-of-place")
    average = AveragedModel(model)
    train(model, SGD(model.parameters(), lr=0.1), [x])
    kill(graph := traced(model, x), model)
    reconfigure(model, None, graph.keep(model), also=[average])
    save_pruned(tmp_path / "c.pt", model, None, None, [average])
    for which, expected in (("model", model), ("ema", average.module), ("also[0]", average.module)):
        other, _ = fresh("out-of-place")
        load_pruned(tmp_path / "c.pt", other, which=which)
        assert same(other.state_dict(), expected.state_dict())
    other, optimizer = fresh("out-of-place")
    with pytest.raises(InputError, match="is none of 'model', 'ema', 'also"):
        load_pruned(tmp_path / "c.pt", other, which="average")
    with pytest.raises(InputError, match="for evaluation"):
        load_pruned(tmp_path / "c.pt", other, optimizer, which="ema")
    save_pruned(tmp_path / "none.pt", model)
    with pytest.raises(CheckpointError, match="holds no copy"):
        load_pruned(tmp_path / "none.pt", other, which="ema")
    torch.save({"state_dict": model.state_dict(), "state_dict_ema": average.state_dict()}, tmp_path / "timm.pt")
    load_pruned(tmp_path / "timm.pt", other, which="ema")
    assert same(other.state_dict(), average.module.state_dict())
