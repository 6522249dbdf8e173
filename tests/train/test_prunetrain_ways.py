"""PruneTrain with other optimizers, layouts, policies and parts of networks."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strangers import EXAMPLE, DropoutNet, dropout_net, sgd, single_images, step
from torch import Tensor, nn

from prunetrain_kernels.cost import count_flops
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.models import build
from prunetrain_kernels.nn import BatchNormAct2d, GatedConv2d
from prunetrain_kernels.optim import SGD, ProximalSGD
from prunetrain_kernels.prune.checkpoint import load_pruned, save_pruned
from prunetrain_kernels.train.layout import unsafe_in_channels_last
from prunetrain_kernels.train.prunetrain import PruneTrain


class LooksAtItsData(nn.Module):
    """Cannot be traced, nor run on tensors without values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else -self.conv(x)


def test_a_part_that_cannot_be_traced_stays_and_the_rest_shrinks() -> None:
    torch.manual_seed(0)
    head = [nn.Conv2d(8, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), LooksAtItsData(), *head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = torch.randn(4, 3, 12, 12)
    prunetrain = PruneTrain(model, optimizer, (x,), interval=1, batch=4)
    prunetrain.regularize(F.cross_entropy(model(x), torch.arange(4))).backward()
    optimizer.step()
    with torch.no_grad():
        model[2].weight[:8] = 0
        model[6].weight[:, :8] = 0
    report = prunetrain.epoch_end()
    assert report is not None
    assert (model[1].conv.out_channels, model[2].in_channels, model[2].out_channels) == (8, 8, 8)
    assert report.training_ratio < 1
    prunetrain.regularize(F.cross_entropy(model(x), torch.arange(4))).backward()
    optimizer.step()


@pytest.mark.parametrize("how", ["regularize", "add_gradient_"])
@pytest.mark.parametrize("fuse", [False, True])
def test_the_lasso_inside_the_update(fuse: bool, how: str) -> None:
    """The package's SGD has the same values and the same training, fine-tunes without it, and nothing is in `.grad`."""
    models = [dropout_net(), dropout_net()]
    optimizers = [sgd(models[0]), SGD(models[1].parameters(), lr=0.05, momentum=0.9)]
    pair = [
        PruneTrain(m, o, EXAMPLE, 0.3, interval=1, fuse=fuse and o is optimizers[1])
        for m, o in zip(models, optimizers, strict=True)
    ]
    assert (pair[1].fused is not None) == fuse
    assert pair[1].lasso_inside
    assert not pair[0].lasso_inside
    assert (type(models[1].bn) is BatchNormAct2d) == fuse
    for number in range(8):
        values = []
        for model, optimizer, prunetrain in zip(models, optimizers, pair, strict=True):
            prunetrain.regularizing = number != 5
            if number == 7:
                assert prunetrain.coefficient is not None
                prunetrain.coefficient *= 3  # a user's own schedule
            x, y = single_images(number)
            model.eval()  # no dropout
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if how == "regularize":
                loss = prunetrain.regularize(loss)
                loss.backward()
            else:
                loss.backward()
                prunetrain.add_gradient_(loss)
            optimizer.step()
            values.append(float(loss.detach()))
        assert values[0] == pytest.approx(values[1], rel=1e-5)
        assert pair[1].optimizer.lasso is (pair[1].lasso if number != 5 else None)
        if number == 3:
            for model, prunetrain in zip(models, pair, strict=True):
                with torch.no_grad():
                    model.a.conv1.weight[2:4] = 0
                    model.a.conv2.weight[:, 2:4] = 0
                    model.b.conv2.weight.zero_()
                report = prunetrain.epoch_end()
                assert report is not None
                assert set(report.reconfiguration.removed) == {"b.conv1", "b.bn1", "b.conv2"}
    assert pair[0].coefficient == pytest.approx(pair[1].coefficient, rel=1e-6)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-6, msg=name)
    last = pair[1].last_penalty
    assert last is not None
    assert float(last) == pytest.approx(float(pair[1].lasso.penalty().detach()), rel=1e-6)


def test_a_proximal_optimizer_prunes_and_is_saved(tmp_path: Path) -> None:
    model = dropout_net()
    optimizer = ProximalSGD(model.parameters(), lr=0.05, momentum=0.9)
    prunetrain = PruneTrain(model, optimizer, EXAMPLE, 0.6, interval=1)
    for number in range(60):
        optimizer.zero_grad()
        prunetrain.regularize(F.cross_entropy(model(single_images(number)[0]), single_images(number)[1])).backward()
        optimizer.step()
    before = sum(p.numel() for p in model.parameters())
    assert prunetrain.epoch_end() is not None
    assert sum(p.numel() for p in model.parameters()) < before
    save_pruned(tmp_path / "pruned.pt", model, optimizer, prunetrain)
    other = dropout_net(1)
    other_optimizer = ProximalSGD(other.parameters(), lr=0.05, momentum=0.9)
    again = PruneTrain(other, other_optimizer, EXAMPLE, 0.6, interval=1)
    load_pruned(tmp_path / "pruned.pt", other, other_optimizer, again)
    for m, o, p in ((model, optimizer, prunetrain), (other, other_optimizer, again)):
        m.eval()
        for number in range(3):
            o.zero_grad()
            p.regularize(F.cross_entropy(m(single_images(number)[0]), single_images(number)[1])).backward()
            o.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def shortcut_of_few_channels(channels: int) -> tuple[nn.Module, PruneTrain]:
    """ResNet-20 in channels_last whose second stage reads `channels` channels after a reconfiguration."""
    torch.manual_seed(0)
    model = build("resnet20", 10).to(memory_format=torch.channels_last)
    example = (torch.zeros(2, 3, 16, 16).contiguous(memory_format=torch.channels_last),)
    prunetrain = PruneTrain(model, torch.optim.SGD(model.parameters(), 0.1), example)
    with torch.no_grad():
        for layer in prunetrain.graph.layers.values():
            weight = model.get_submodule(layer.name).weight
            for dim, space in ((0, layer.output), (1, layer.input)):
                if "layer2.0.downsample.0" in prunetrain.graph.spaces[space].consumers:
                    weight.narrow(dim, channels, weight.shape[dim] - channels).zero_()
    return model, prunetrain


def test_a_layout_that_corrupts_memory_on_a_cpu_is_named_once() -> None:
    model, prunetrain = shortcut_of_few_channels(7)
    with pytest.warns(UserWarning, match=r"'layer2.0.downsample.0' is left with fewer than 8 .* go on in contiguous"):
        prunetrain.reconfigure()
    assert unsafe_in_channels_last(model) == ["layer2.0.downsample.0"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prunetrain.reconfigure()
        model, prunetrain = shortcut_of_few_channels(8)
        prunetrain.reconfigure()  # eight are enough
    assert unsafe_in_channels_last(model) == []


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("policy", ["gating", "auto"])
@pytest.mark.parametrize("inside", [False, True], ids=["torch SGD", "our SGD"])
def test_gated_layers_are_trained_logged_saved_and_pruned_on(
    policy: str, fuse: bool, inside: bool, tmp_path: Path
) -> None:
    def ready() -> tuple[DropoutNet, Any, PruneTrain]:
        model = dropout_net()
        model.dropout.p = 0
        optimizer = (SGD if inside else torch.optim.SGD)(model.parameters(), lr=0.05, momentum=0.9)
        options: dict[str, Any] = {"cost": lambda conv, form: 1.0 - form.gated} if policy == "auto" else {}
        return model, optimizer, PruneTrain(model, optimizer, EXAMPLE, interval=1, policy=policy, fuse=fuse, **options)

    model, optimizer, prunetrain = ready()
    step(model, optimizer, prunetrain, 0)
    with torch.no_grad():
        model.a.conv1.weight[[1, 4]] = 0  # its reader still reads them
        model.a.conv2.weight[[0, 3, 6]] = 0
        model.b.conv1.weight[:, [2, 5]] = 0
        model.b.conv2.weight[[7]] = 0
    expected = copy.deepcopy(model).eval()(single_images(9)[0]).detach()
    report = prunetrain.epoch_end()
    assert report is not None
    assert "computes" in str(report.reconfiguration)
    assert {n for n, m in model.named_modules() if isinstance(m, GatedConv2d)} == {
        "a.conv1",
        "a.conv2",
        "b.conv1",
        "b.conv2",
    }
    assert torch.allclose(model.eval()(single_images(9)[0]), expected, atol=1e-5)
    model.train()
    assert report.flops == count_flops(model, EXAMPLE)
    for i in range(3):
        step(model, optimizer, prunetrain, i)
    rows = {row["layer"]: row for row in prunetrain.channel_table()}
    assert [rows["a.conv2"][k] for k in ("in_kept", "in_live", "out_kept", "out_live")] == [8, 8, 8, 5]
    assert [rows["b.conv1"][k] for k in ("in_kept", "in_live", "out_kept", "out_live")] == [8, 6, 8, 8]
    sizes = prunetrain.slice_sizes()
    assert (sizes["a.conv2"] == 0).nonzero().flatten().tolist() == [0, 3, 6]  # by their original numbers
    assert (sizes["a.conv1"] == 0).nonzero().flatten().tolist() == [1, 4]

    save_pruned(tmp_path / "c.pt", model, optimizer, prunetrain)
    again = ready()
    load_pruned(tmp_path / "c.pt", *again)
    assert prunetrain.channel_table() == again[2].channel_table()
    losses = []
    for held in ((model, optimizer, prunetrain), again):
        for i in range(3):
            step(*held, i)
        with torch.no_grad():  # two more channels of what is left
            held[0].a.conv2.weight[1] = 0
            held[0].b.conv1.weight[:, 0] = 0
        held[2].epoch_end()
        losses.append(F.cross_entropy(held[0].eval()(single_images(7)[0]), single_images(7)[1]).item())
        assert held[0].a.conv2.live_out == 4
        assert held[0].b.conv1.live_in == 5
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_an_unknown_policy_or_cost_is_refused_at_once() -> None:
    model = dropout_net()
    for options, message in (
        ({"policy": "gate"}, "policy 'gate' is not known"),
        ({"policy": "auto", "cost": "x"}, "cost 'x'"),
    ):
        with pytest.raises(InputError, match=message):
            PruneTrain(model, sgd(model), EXAMPLE, **options)  # type: ignore[arg-type]


def test_a_depthwise_convolution_may_be_down_to_one_channel(tmp_path: Path) -> None:
    """Traced again it looks like any convolution, of which nothing was known at the start."""

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.depthwise = nn.Conv2d(3, 6, 1, bias=False), nn.Conv2d(6, 6, 3, groups=6, padding=1)
            self.last, self.dead = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.last(self.depthwise(self.first(x)))
            return (x + self.dead(x)).mean((2, 3))

    def started() -> tuple[nn.Module, torch.optim.Optimizer, PruneTrain]:
        torch.manual_seed(0)
        model = Narrow()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, optimizer, PruneTrain(model, optimizer, (torch.randn(2, 3, 6, 6),), interval=1)

    model, optimizer, prunetrain = started()
    with torch.no_grad():
        model.first.weight[1:] = 0  # type: ignore[index]
        model.last.weight[:, 1:] = 0  # type: ignore[index]
    assert prunetrain.reconfigure().reconfiguration.changed
    model.dead.weight.data.zero_()  # type: ignore[union-attr, operator]
    assert prunetrain.reconfigure().reconfiguration.removed == ("dead",)
    assert "depthwise" in prunetrain.graph.layers
    prunetrain.reconfigure()
    assert prunetrain.kept["last"][0].tolist() == [0]
    save_pruned(tmp_path / "narrow.pt", model, optimizer, prunetrain)
    fresh, fresh_optimizer, again = started()
    load_pruned(tmp_path / "narrow.pt", fresh, fresh_optimizer, again)
    assert again.kept["last"][0].tolist() == [0]
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(fresh.eval()(x), model.eval()(x))


NOTHING: dict[str, Callable[[Tensor], Any]] = {
    "not a number": lambda y: y * float("nan"),
    "infinite": lambda y: y - float("inf"),
    "empty": lambda y: y[:, :0],
    "too deep": lambda y: [[[[[[[[[[y]]]]]]]]]],
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_model_of_which_nothing_can_be_compared_is_refused_at_construction(name: str) -> None:
    model = dropout_net()
    model.fc = nn.Sequential(model.fc, Last(NOTHING[name]))
    optimizer = sgd(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"returns nothing on the example inputs that could be compared"):
        PruneTrain(model, optimizer, example_inputs=EXAMPLE)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


class Last(nn.Module):
    def __init__(self, result: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Tensor) -> Any:
        return self.result(x)
