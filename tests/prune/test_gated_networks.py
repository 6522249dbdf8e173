"""Channel gating: a gated network is the union network, the zeroed network, and itself again after every conversion."""

import copy
import zlib
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
    traced,
    train,
    twin_of,
    warm_up,
    zero_slice,
)
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from prunetrain_kernels import ChannelGraph, CheckpointError, InputError, load_pruned, reconfigure, save_pruned
from prunetrain_kernels.cost import count_flops
from prunetrain_kernels.cost.convolution import Convolution, Form, RoofCost
from prunetrain_kernels.cost.roof import Roof
from prunetrain_kernels.graph.gating import MeasuredCost
from prunetrain_kernels.models import build
from prunetrain_kernels.nn import BatchNormAct2d, GatedConv2d, fuse

POLICIES = ["gating", "auto"]
CASES = [(name, dying) for name in NETS for dying in (False, True) if not dying or name in DYING]
IDS = [f"{n}-{'branch' if d else 'channels'}" for n, d in CASES]
NOT_FUSED = ("1d", "3d", "flattened", "bias-without-bn", "bias-without-bn-in-place")


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-3)


def any_form(conv: Convolution, form: Form) -> float:
    """A cost with which `auto` chooses all sorts of forms."""
    return float(zlib.crc32(repr((conv.in_live, conv.out_live, conv.kernel, str(form))).encode()) % 97)


def zero_some_slices(graph: ChannelGraph, model: nn.Module, seed: int = 0) -> None:
    """Zeroes channels everywhere, and others in some layers of each space only, as group lasso leaves them."""
    kill(graph, model, share=0.25, partly=0.5, seed=seed)


def gated(model: nn.Module) -> list[GatedConv2d]:
    return [m for m in model.modules() if isinstance(m, GatedConv2d)]


def is_whole(keep, name: str) -> bool:  # type: ignore[no-untyped-def]
    layer = keep.graph.layers[name]
    kept = keep.channels[layer.input], keep.channels[layer.output]
    return all(torch.equal(a, b) for a, b in zip(keep.live[name], kept, strict=True))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(("name", "dying"), CASES, ids=IDS)
def test_trains_like_its_twin(name: str, dying: bool, fused: bool, policy: str) -> None:
    """The twin is the network before it was pruned, whatever gating leaves out held at zero by masks."""
    if fused and name in NOT_FUSED:
        pytest.skip("nothing to fuse")
    model, x = small_net(name)
    optimizer = sgd(model)
    warm_up(model, optimizer, x)
    twin, twin_optimizer = twin_of(model, optimizer)
    if fused:
        fuse(model, (x,))
    graph = traced(model, x)
    zero_some_slices(graph, model)
    if dying:
        rest_of(model, DYING[name]).zero_()
    for layer in graph.layers:
        rest_of(twin, layer).copy_(rest_of(model, layer))
    keep = graph.keep(model, policy=policy, cost=any_form)
    masks = hold_masks(graph, keep, twin)
    forget_momentum(graph, keep, twin, twin_optimizer)
    expected = copy.deepcopy(twin).eval()(x).detach()
    report = reconfigure(model, optimizer, keep)
    assert report.branches == int(dying)
    assert report.changed
    gates = policy == "gating" and (name, dying) != ("odd-width", True)  # that one's stem has only live channels
    if name not in ("1d", "3d", "flattened") and gates:
        assert gated(model)
    if fused and gates and name != "pre-activation":
        assert any(m.places_of is not None for m in model.modules() if isinstance(m, BatchNormAct2d))
    assert torch.allclose(model.eval()(x), expected, rtol=1e-10, atol=1e-12)
    model.train()
    batches = [torch.randn_like(x) for _ in range(20)]
    losses, twin_losses = train(model, optimizer, batches), train(twin, twin_optimizer, batches, masks)
    assert losses == pytest.approx(twin_losses, rel=1e-8)
    assert torch.allclose(model.eval()(x), twin.eval()(x), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(
    ("name", "size", "batch"),
    [("resnet20", 8, 4), ("resnet32", 8, 4), ("resnet50", 8, 4), ("imagenet_resnet50", 32, 3)],
)
def test_union_and_gating_are_one_function(name: str, size: int, batch: int, fused: bool) -> None:
    """Made from one zeroed model: the same outputs, and the same gradients of what both compute."""
    torch.manual_seed(0)
    zeroed, x = build(name, 10).double(), torch.randn(batch, 3, size, size).double()
    with torch.no_grad():
        for m in zeroed.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.bias.uniform_(-0.5, 0.5)
                m.running_mean.uniform_(-0.3, 0.3)
    zero_some_slices(traced(zeroed, x), zeroed)
    networks, keeps = {}, {}
    for policy in ("union", "gating"):
        model = copy.deepcopy(zeroed)
        if fused:
            fuse(model)
        graph = traced(model, x)
        keeps[policy] = graph.keep(model, policy=policy)
        report = reconfigure(model, None, keeps[policy])
        assert report.max_abs_dy <= 1e-10 * report.scale
        networks[policy] = model
    assert gated(networks["gating"])
    for training in (False, True):
        outputs = [networks[p].train(training)(x) for p in ("union", "gating")]
        assert torch.allclose(*outputs, rtol=1e-9, atol=1e-9 * float(outputs[0].detach().abs().max()))
    for model in networks.values():
        model.train()(x).square().sum().backward()
    graph, kept = keeps["gating"].graph, keeps["gating"].channels
    for name, (inputs, outputs) in keeps["gating"].live.items():
        layer = graph.layers[name]
        places = []
        for space, live in ((layer.output, outputs), (layer.input, inputs)):
            place = torch.full((graph.spaces[space].size,), -1)
            union = keeps["union"].channels[space]
            place[union] = torch.arange(len(union))
            places.append(place[live])
        of_union = networks["union"].get_submodule(name).weight.grad[places[0]][:, places[1]]
        of_gating = networks["gating"].get_submodule(name).weight.grad
        tolerance = 1e-9 * float(of_union.abs().max().clamp(min=1e-6))
        assert torch.allclose(of_gating, of_union, rtol=1e-7, atol=tolerance), name
    for follower in graph.followers.values():  # batch norms: of all channels that are kept, computed or not
        order = torch.argsort(torch.argsort(kept[follower.space]))
        for key in ("weight", "bias"):
            of_gating, of_union = (
                getattr(networks[policy].get_submodule(follower.name), key).grad for policy in ("gating", "union")
            )
            tolerance = 1e-8 * float(of_union.abs().max())
            assert torch.allclose(of_gating, of_union[order], rtol=1e-7, atol=tolerance), follower.name


@pytest.mark.parametrize("name", ["resnet20", "resnet32"])
def test_paper_networks_train_alike(name: str) -> None:
    """Twenty steps; what gating leaves out is held at zero in the union network, where it would grow again."""
    torch.manual_seed(0)
    zeroed, x = build(name, 10).double(), torch.randn(8, 3, 8, 8).double()
    zero_some_slices(traced(zeroed, x), zeroed)
    union, gating = copy.deepcopy(zeroed), copy.deepcopy(zeroed)
    optimizers = [SGD(m.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4) for m in (union, gating)]
    reconfigure(union, optimizers[0], traced(union, x).keep(union))
    graph = traced(union, x)
    masks = hold_masks(graph, graph.keep(union, policy="gating"), union)
    reconfigure(gating, optimizers[1], traced(gating, x).keep(gating, policy="gating"))
    batches = [torch.randn_like(x) for _ in range(20)]
    losses = train(gating, optimizers[1], batches)
    assert losses == pytest.approx(train(union, optimizers[0], batches, masks), rel=1e-8)


def test_flops_are_those_of_the_live_channels() -> None:
    torch.manual_seed(0)
    model, x = build("resnet20", 10), torch.randn(2, 3, 16, 16)
    graph = traced(model, x)
    zero_some_slices(graph, model)
    union = copy.deepcopy(model)
    reconfigure(union, None, traced(union, x).keep(union))
    keep = graph.keep(model, policy="gating")
    expected = 0
    for name, (inputs, outputs) in keep.live.items():
        layer, taps = graph.layers[name], rest_of(model, name)[0, 0].numel()
        pixels = layer.map_out[0] * layer.map_out[1] if layer.map_out else 1
        expected += 2 * len(inputs) * len(outputs) * taps * pixels
    reconfigure(model, None, keep)
    for conv in gated(model):
        conv.backend = "naive"
    assert count_flops(model, (x,)).inference == expected < count_flops(union, (x,)).inference


# -- conversions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sgd, lambda m: Adam(m.parameters(), lr=0.003)], ids=["sgd", "adam"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_there_and_back(fused: bool, make) -> None:  # type: ignore[no-untyped-def]
    model, x = small_net("in-place-bottleneck")
    if fused:
        fuse(model)
    optimizer = make(model)
    warm_up(model, optimizer, x)
    graph = traced(model, x)
    zero_some_slices(graph, model)
    reconfigure(model, optimizer, graph.keep(model))
    identity = [(n, id(p)) for n, p in model.named_parameters()]
    graph = traced(model, x)
    live = {n: (~m.inputs, ~m.outputs) for n, m in graph.keep(model).sparse.items()}
    union, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())["state"]
    expected = model.eval()(x).detach()

    keep = graph.keep(model, policy="gating")
    reconfigure(model, optimizer, keep)
    assert gated(model)
    assert torch.allclose(model(x), expected, rtol=1e-10, atol=1e-12)
    assert [(n, id(p)) for n, p in model.named_parameters()] == identity
    back = traced(model, x).keep(model, policy="union")
    reconfigure(model, optimizer, back)
    assert not gated(model)
    assert not any(isinstance(m, BatchNormAct2d) and m.places_of for m in model.modules())
    assert torch.allclose(model(x), expected, rtol=1e-10, atol=1e-12)
    assert [(n, id(p)) for n, p in model.named_parameters()] == identity
    assert list(model.state_dict()) == list(union)

    # the same weights, in another order; zeros, and zeros in the optimizer, where nothing was computed meanwhile
    index = {n: i for i, (n, _) in enumerate(identity)}
    for name, layer in graph.layers.items():
        outs, ins = keep.channels[layer.output], keep.channels[layer.input]
        assert torch.equal(rest_of(model, name), union[f"{name}.weight"][outs][:, ins])
        for key, value in optimizer.state[model.get_submodule(name).weight].items():
            if value.dim() > 1:
                mask = live[name][1].double()[:, None] * live[name][0].double()[None, :]
                if layer.kind == "linear":
                    mask = torch.ones_like(mask)  # linear layers are not gated
                masked = state[index[f"{name}.weight"]][key] * mask.view(*mask.shape, *[1] * (value.dim() - 2))
                assert torch.equal(value, masked[outs][:, ins]), (name, key)
    assert train(model.train(), optimizer, [x] * 3)


def test_pruning_again_narrows_both_spaces_and_layers() -> None:
    model, x = small_net("in-place-bottleneck")
    optimizer = sgd(model)
    warm_up(model, optimizer, x)
    graph = traced(model, x)
    kill(graph, model, share=0.0, partly=0.3)
    reconfigure(model, optimizer, graph.keep(model, policy="gating"))
    before = {n: tuple(rest_of(model, n).shape[:2]) for n in graph.layers}
    spaces = [s.size for s in traced(model, x).spaces]
    twin, twin_optimizer = twin_of(model, optimizer)

    graph = traced(model, x)
    for space in graph.spaces:
        if not space.frozen:
            for channel in (0, space.size - 1):  # gone everywhere
                for name, side in [(n, 1) for n in space.producers] + [(n, 0) for n in space.consumers]:
                    for m in (model, twin):
                        zero_slice(m, graph, name, "out" if side else "in", channel)
    some = next(n for n in graph.layers if n.endswith("conv1"))
    for m in (model, twin):
        zero_slice(m, graph, some, "out", int(graph.computed(some)[1][1]))
    keep = graph.keep(model, policy="gating")
    computed = {n: graph.computed(n) for n in graph.layers}
    masks = {}
    for name, (inputs, outputs) in keep.live.items():
        mask = torch.isin(computed[name][1], outputs)[:, None] & torch.isin(computed[name][0], inputs)[None, :]
        taps = rest_of(twin, name)
        masks[name] = mask.view(*mask.shape, *[1] * (taps.dim() - 2)).expand_as(taps).to(taps.dtype)
    reconfigure(model, optimizer, keep)
    after = traced(model, x)
    assert all(a.size < b for a, b in zip(after.spaces, spaces, strict=True) if not a.frozen)
    assert all(tuple(rest_of(model, n).shape[:2]) <= before[n] for n in after.layers)
    assert rest_of(model, some).shape[0] < before[some][0]
    batches = [torch.randn_like(x) for _ in range(8)]
    assert train(model, optimizer, batches) == pytest.approx(train(twin, twin_optimizer, batches, masks), rel=1e-8)


def test_nothing_to_do_the_second_time() -> None:
    model, x = small_net("out-of-place")
    zero_some_slices(traced(model, x), model)
    assert reconfigure(model, None, traced(model, x).keep(model, policy="gating")).changed
    shapes = {n: t.clone() for n, t in model.state_dict().items()}
    assert not reconfigure(model, None, traced(model, x).keep(model, policy="gating")).changed
    assert same(shapes, dict(model.state_dict()))


@pytest.mark.parametrize("round_to", [2, 4])
def test_live_channels_are_rounded_up_too(round_to: int) -> None:
    model, x = small_net("out-of-place")
    zero_some_slices(traced(model, x), model)
    expected = model.eval()(x).detach()
    keep = traced(model, x).keep(model, policy="gating", round_to=round_to)
    reconfigure(model, None, keep)
    assert gated(model)
    for conv in gated(model):
        assert conv.live_in % round_to == 0 or conv.live_in == conv.in_channels
        assert conv.live_out % round_to == 0 or conv.live_out == conv.out_channels
    assert torch.allclose(model(x), expected, rtol=1e-10, atol=1e-12)


def test_what_cannot_be_gated_is_left_alone() -> None:
    class Odd(nn.Module):
        """A bias, groups, padding that is not of zeros, a subclass, a weight that two layers share."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.biased = nn.Conv2d(8, 8, 3, padding="same")
            self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.circular = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular", bias=False)
            self.uneven = nn.Conv2d(8, 8, 2, padding="same", bias=False)
            self.twice = nn.Conv2d(8, 8, 1, bias=False)
            self.again = nn.Conv2d(8, 8, 1, bias=False)
            self.again.weight = self.twice.weight
            self.last = nn.Conv2d(8, 4, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.grouped(torch.relu(self.biased(torch.relu(self.stem(x)))))
            return self.last(torch.relu(self.again(self.twice(self.uneven(self.circular(x))))))

    torch.manual_seed(0)
    model, x = Odd().double(), torch.randn(2, 3, 6, 6).double()
    graph = traced(model, x)
    with torch.no_grad():
        for name in ("stem", "biased", "circular", "uneven", "twice", "last"):
            model.get_submodule(name).weight[:2] = 0
        for name in ("biased", "circular", "uneven"):
            model.get_submodule(name).weight[:, 3:5] = 0
    expected = model(x).detach()
    reconfigure(model, None, graph.keep(model, policy="gating"))
    assert [n for n, m in model.named_modules() if isinstance(m, GatedConv2d)] == ["biased"]
    assert model.biased.output_index is None  # its bias is added to channels whose weights are zero too
    assert torch.allclose(model(x), expected, rtol=1e-10, atol=1e-12)


# -- auto --------------------------------------------------------------------------------------------------------------


# A device with a V100's peaks mixes the two; this CPU, whatever it is, may not.
@pytest.mark.parametrize("cost", [RoofCost(Roof(900.0, {"fp32": 15.0}, 5.0)), None], ids=["GPU-like", "this-device"])
def test_auto_is_never_predicted_slower_and_says_why(cost: RoofCost | None) -> None:
    torch.manual_seed(0)
    model, x = build("resnet20", 10), torch.randn(2, 3, 32, 32)
    graph = traced(model, x)
    zero_some_slices(graph, model)
    keep = graph.keep(model, policy="auto", cost=cost)
    chosen = union = 0.0
    for name, choice in keep.choices.items():
        assert choice.reason
        if not choice.seconds:
            assert is_whole(keep, name)
            continue
        best = min(choice.seconds.values())
        assert choice.seconds[choice.form] == best
        chosen, union = chosen + best, union + choice.seconds[Form()]
        assert choice.form.gated != is_whole(keep, name)
        assert " us" in str(choice)
        assert str(choice.form) in str(choice)
    assert chosen <= union
    report = str(reconfigure(model, None, keep))
    if cost is not None:
        assert chosen < union
        assert "gating of" in report
        assert "(union: " in report
    assert {c.backend for c in gated(model)} <= {"expanded", "naive"}  # no Triton on a CPU


@pytest.mark.parametrize(("prefers", "some"), [("union", False), ("gating", True)])
def test_auto_follows_the_cost(prefers: str, some: bool) -> None:
    model, x = small_net("out-of-place")
    graph = traced(model, x)
    zero_some_slices(graph, model)
    keep = graph.keep(model, policy="auto", cost=lambda conv, form: float(form.gated == (prefers == "union")))
    reconfigure(model, None, keep)
    assert bool(gated(model)) == some


def test_auto_by_measurement() -> None:
    model, x = small_net("out-of-place", torch.float32)
    graph = traced(model, x)
    zero_some_slices(graph, model)
    cost = MeasuredCost(torch.device("cpu"), seconds_each=0.002)
    keep = graph.keep(model, policy="auto", cost=cost, batch=4)
    measured = [c for c in keep.choices.values() if c.seconds]
    assert measured
    assert all(s > 0 for c in measured for s in c.seconds.values())
    assert all("measured" in c.reason for c in measured)
    with pytest.raises(InputError, match="cost 'guess' is not known"):
        graph.keep(model, policy="auto", cost="guess")


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loaded", ["plain", "fused"])
@pytest.mark.parametrize("saved", ["plain", "fused"])
@pytest.mark.parametrize("dying", [False, True], ids=["channels", "branch"])
def test_checkpoints_go_both_ways(saved: str, loaded: str, dying: bool, tmp_path: Path) -> None:
    def fresh(kind: str) -> tuple[nn.Module, Optimizer, Tensor]:
        model, x = small_net("in-place-bottleneck")
        if kind == "fused":
            fuse(model)
        return model, sgd(model), x

    model, optimizer, x = fresh(saved)
    warm_up(model, optimizer, x)
    graph = traced(model, x)
    zero_some_slices(graph, model)
    if dying:
        rest_of(model, DYING["in-place-bottleneck"]).zero_()
    reconfigure(model, optimizer, graph.keep(model, policy="gating"))
    gated(model)[0].backend = "naive"
    warm_up(model, optimizer, x)
    save_pruned(tmp_path / "c.pt", model, optimizer)
    again, again_optimizer, _ = fresh(loaded)
    load_pruned(tmp_path / "c.pt", again, again_optimizer)
    assert [repr(m.backend) for m in gated(again)] == [repr(m.backend) for m in gated(model)]
    assert list(again.state_dict()) == list(model.state_dict())
    placed = [m.places_of is not None for m in again.modules() if isinstance(m, BatchNormAct2d)]
    assert any(placed) == (saved == loaded == "fused")
    batches = [torch.randn_like(x) for _ in range(4)]
    assert train(again, again_optimizer, batches) == pytest.approx(train(model, optimizer, batches), rel=1e-10)
    kill(traced(again, x), again, seed=3)  # and it is pruned on
    expected = again.eval()(x).detach()
    reconfigure(again, again_optimizer, traced(again, x).keep(again, policy="gating"))
    assert torch.allclose(again(x), expected, rtol=1e-10, atol=1e-12)


def test_a_gated_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    model, x = small_net("in-place-bottleneck")
    zero_some_slices(traced(model, x), model)
    reconfigure(model, None, traced(model, x).keep(model, policy="gating"))
    save_pruned(tmp_path / "c.pt", model)
    name = next(n for n, m in model.named_modules() if isinstance(m, GatedConv2d))
    other, _ = small_net("in-place-bottleneck")
    parent, _, leaf = name.rpartition(".")
    plain = other.get_submodule(name)
    swapped = nn.Conv2d(plain.in_channels, plain.out_channels, plain.kernel_size, plain.stride, plain.padding,
                        bias=False, padding_mode="circular").double()  # fmt: skip
    setattr(other.get_submodule(parent), leaf, swapped)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"it gates the convolution '{name}'.*circular"):
        load_pruned(tmp_path / "c.pt", other)
    assert same(before, dict(other.state_dict()))
    payload = torch.load(tmp_path / "c.pt", weights_only=True)
    payload["gated"][name]["output_index"] = [0, 0]
    payload["gated"][name]["input_index"] = None
    torch.save(payload, tmp_path / "d.pt")
    with pytest.raises(CheckpointError, match="listed twice"):
        load_pruned(tmp_path / "d.pt", small_net("in-place-bottleneck")[0])
