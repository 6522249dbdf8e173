"""The forecast: how far slices move, what resists, the schedule ahead, the FLOPs of a shape."""

import copy
import math

import pytest
import torch
from forecast_nets import SideBySide, X, plain_net
from torch import nn
from torch.optim import lr_scheduler

from prunetrain_kernels.cost import count_flops
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.graph import ChannelGraph, trace_channels
from prunetrain_kernels.graph.sparse import largest_in_spaces, slice_sizes
from prunetrain_kernels.models import build
from prunetrain_kernels.optim import SGD, ProximalSGD
from prunetrain_kernels.prune import reconfigure
from prunetrain_kernels.regularizer import GroupLasso
from prunetrain_kernels.train.forecast import ShapeFlops, rates_to_come
from prunetrain_kernels.train.present import Limits, Present, look
from prunetrain_kernels.train.prunetrain import PruneTrain


def lasso_only(
    optimizer_class: type[torch.optim.Optimizer], momentum: float, epochs: int = 4, outward: float = 0.0
) -> PruneTrain:
    """Trains with no loss but one that pulls every weight outward by `outward` of its own length a step."""
    model = plain_net()
    optimizer = optimizer_class(model.parameters(), lr=0.05, momentum=momentum)  # type: ignore[call-arg]
    prunetrain = PruneTrain(model, optimizer, (X,), epochs=epochs, interval=100)
    prunetrain.coefficient = 2e-3
    for _ in range(epochs):
        for _ in range(20):
            optimizer.zero_grad()
            loss = torch.ones(()) - outward * sum(p.square().sum() for p in model.parameters() if p.dim() > 1) / 2
            prunetrain.regularize(loss).backward()
            optimizer.step()
        prunetrain.epoch_end()
    return prunetrain


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, SGD, ProximalSGD])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_slices_that_nothing_holds_move_as_the_formula_says(
    optimizer_class: type[torch.optim.Optimizer], momentum: float
) -> None:
    prunetrain = lasso_only(optimizer_class, momentum)
    resistance = torch.cat([side for sides in prunetrain.course.resistance.values() for side in sides])
    # lambda times the pull is 0.004 and more; what is left over is momentum that has not built up yet, and rounding
    assert resistance.nan_to_num(0).abs().median() < 0.1 * 2e-3


def test_what_resists_is_measured() -> None:
    prunetrain = lasso_only(SGD, 0.0, outward=1e-3)
    norms = prunetrain.lasso.slice_norms()
    for name, sides in prunetrain.course.resistance.items():
        for side, pulled in ((0, norms[name].inputs_pulled), (1, norms[name].outputs_pulled)):
            if pulled:  # the gradient -outward * w moves a slice outward by outward * norm for a reach of 1
                assert torch.allclose(sides[side], 1e-3 * norms[name][side], rtol=0.15, atol=5e-5), name


def test_the_channel_that_is_forecast_to_go_first_goes_first() -> None:
    model = plain_net()
    with torch.no_grad():
        model[0].weight[5] *= 0.1
        model[2].weight[:, 5] *= 0.1
    optimizer = ProximalSGD(model.parameters(), lr=0.05)
    prunetrain = PruneTrain(model, optimizer, (X,), epochs=40, interval=1)
    prunetrain.coefficient = 5e-3
    expected = None
    while not prunetrain.history or prunetrain.history[-1]["parameters"] == prunetrain.history[0]["parameters"]:
        for _ in range(20):
            optimizer.zero_grad()
            prunetrain.add_gradient_(torch.ones(()))
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            optimizer.step()
        prunetrain.epoch_end()
        if expected is None:
            now = prunetrain.now()
            needs = prunetrain.course.needs(now, prunetrain.course.reach(now, 10))
            space = prunetrain.graph.layers["0"].output
            expected = int(needs[space].argmin())
        assert prunetrain.epochs < 40
    assert expected == 5
    assert prunetrain.kept["0"][1].tolist() == [c for c in range(16) if c != 5]


def test_the_forecast_says_what_will_happen() -> None:
    prunetrain = lasso_only(SGD, 0.9, epochs=6)
    prunetrain.course.epochs = 1000
    ahead = prunetrain.forecast()
    assert ahead.measured
    assert ahead.inference < 0.05, "with ages to go everything goes that may"
    assert prunetrain.forecast(epochs=6).inference == 1.0, "and nothing does when no step is left"
    reach = 4 * 20 * 0.05 / (1 - 0.9)
    assert math.isclose(prunetrain.forecast(epochs=10).moves, 2e-3 * reach, rel_tol=1e-6)
    assert 0 < ahead.smallest < ahead.median
    assert "until epoch 1000" in str(ahead)


def test_a_forecast_without_the_length_of_the_training_is_refused() -> None:
    model = plain_net()
    prunetrain = PruneTrain(model, SGD(model.parameters(), lr=0.1), (X,))
    with pytest.raises(InputError, match="epochs="):
        prunetrain.forecast()
    assert prunetrain.forecast(epochs=5).moves == 0.0, "no step has been made, so no reach is known"
    with pytest.raises(InputError, match="penalty_ratio=0"):
        PruneTrain(model, SGD(model.parameters(), lr=0.1), (X,), penalty_ratio=0).forecast(epochs=5)


# -- the schedule ahead ------------------------------------------------------------------------------------------------

PER_EPOCH = {
    "steps": lambda o: lr_scheduler.MultiStepLR(o, [3, 5], 0.1),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda e: 1 / (1 + e)),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.25, total_iters=2), lr_scheduler.ExponentialLR(o, 0.7)], [2]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


def optimizer_of(rate: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=rate, momentum=0.9)


@pytest.mark.parametrize("kind", PER_EPOCH)
@pytest.mark.parametrize("passed", [0, 1, 4])
def test_rates_to_come_are_those_that_come(kind: str, passed: int) -> None:
    optimizer = optimizer_of()
    scheduler = PER_EPOCH[kind](optimizer)
    for _ in range(passed):
        optimizer.step()
        scheduler.step()
    before = copy.deepcopy((scheduler.state_dict(), optimizer.param_groups[0]["lr"]))
    rates = rates_to_come(scheduler, optimizer, 0, float(passed), 8 - passed)
    assert (scheduler.state_dict(), optimizer.param_groups[0]["lr"]) == before, "the scheduler was only looked at"
    came = []
    for _ in range(8 - passed):
        came.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(came)


def test_a_scheduler_that_is_stepped_after_epoch_end_is_as_far_as_one_before() -> None:
    """`epoch_end()` may come before `scheduler.step()`: the epoch's own rate is not to come again."""
    optimizer = optimizer_of()
    scheduler = lr_scheduler.MultiStepLR(optimizer, [2], 0.1)
    optimizer.step()
    scheduler.step()
    optimizer.step()  # two epochs trained, the scheduler is one behind
    assert rates_to_come(scheduler, optimizer, 0, 2.0, 3) == pytest.approx([0.01, 0.01, 0.01])


def test_a_scheduler_that_is_stepped_after_every_step() -> None:
    optimizer = optimizer_of()
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=80, cycle_momentum=True)
    for _ in range(20):
        optimizer.step()
        scheduler.step()
    rates = rates_to_come(scheduler, optimizer, 0, 2.0, 6)
    came = []
    for _ in range(6):
        of_epoch = []
        for _ in range(10):
            of_epoch.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if scheduler.last_epoch < 80:
                scheduler.step()
        came.append(sum(of_epoch) / 10)
    assert rates == pytest.approx(came)


def test_what_cannot_be_run_ahead_keeps_its_rate() -> None:
    optimizer = optimizer_of(0.3)
    for scheduler in (None, lr_scheduler.ReduceLROnPlateau(optimizer), object(), [object()]):
        assert rates_to_come(scheduler, optimizer, 0, 0.0, 3) == [0.3, 0.3, 0.3]


# -- FLOPs of a shape --------------------------------------------------------------------------------------------------


def present_of(model: nn.Module, graph: ChannelGraph) -> Present:
    return look(model, graph, None, GroupLasso(model, graph.example_inputs, graph=graph), Limits())


def zero_some(model: nn.Module, graph: object, share: float) -> None:
    """Sets a share of the channels of every free space to zero, in all their layers."""
    generator = torch.Generator().manual_seed(3)
    for index, space in enumerate(graph.spaces):  # type: ignore[attr-defined]
        if space.frozen or space.members is not None:
            continue
        gone = torch.rand(space.size, generator=generator) < share
        with torch.no_grad():
            for layer in graph.layers.values():  # type: ignore[attr-defined]
                weight = model.get_submodule(layer.name).weight
                if layer.output == index:
                    weight[gone] = 0
                if layer.input == index:
                    weight[:, gone.repeat_interleave(layer.block)] = 0


@pytest.mark.parametrize("name", ["towers", "resnet20", "vgg11", "imagenet_resnet50"])
def test_flops_of_a_shape_are_those_of_the_pruned_network(name: str) -> None:
    model = SideBySide(residual=True) if name == "towers" else build(name, 10)
    x = torch.zeros(2, 3, 32, 32)
    graph = trace_channels(model, (x,))
    zero_some(model, graph, 0.4)
    shape = ShapeFlops.of(present_of(model, graph), model)
    keep = graph.keep(model)
    training, inference = shape.of_keep(keep)
    reconfigure(model, torch.optim.SGD(model.parameters(), lr=0.1), keep)
    counted = count_flops(model, (x,))
    assert (training, inference) == pytest.approx((counted.training, counted.inference), rel=1e-9)
    if name != "towers":  # where a layer costs nothing only if its branch goes
        counts = [len(channels) for channels in keep.channels]
        assert shape.of_counts(counts) == pytest.approx((counted.training, counted.inference), rel=1e-9)


@pytest.mark.parametrize("name", ["towers", "resnet20"])
@pytest.mark.parametrize("floor", [0.3, 0.55, 0.8])
def test_as_few_of_the_largest_sparse_channels_stay_as_are_enough(name: str, floor: float) -> None:
    model = SideBySide(residual=True) if name == "towers" else build(name, 10)
    graph = trace_channels(model, (torch.zeros(2, 3, 32, 32),))
    with torch.no_grad():  # all are sparse, no two alike
        for layer in graph.layers.values():
            weight = model.get_submodule(layer.name).weight
            weight.copy_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) * 1e-5 + 1e-8)
    present = present_of(model, graph)
    shape, dense = ShapeFlops.of(present, model), present.flops.inference
    bare = graph.keep(model)
    assert shape.of_keep(bare)[1] < floor * dense, "without a floor it would be below"
    keep = graph.keep(model, enough=lambda keep: shape.of_keep(keep)[1] >= floor * dense)
    assert shape.of_keep(keep)[1] >= floor * dense
    sizes = largest_in_spaces(graph, slice_sizes(graph, model))
    stay, go = [], []
    for i, (space, kept) in enumerate(zip(graph.spaces, keep.channels, strict=True)):
        if space.members is None and not space.frozen and len(kept) > 1:
            stay += [(float(sizes[i][c]), i, c) for c in kept.tolist()]
            go += [float(sizes[i][c]) for c in set(range(space.size)) - set(kept.tolist())]
    assert stay
    assert go
    assert min(stay)[0] >= max(go), "the largest ones stay"
    _, space, channel = min(stay)
    for name_, layer in graph.layers.items():  # what stays is not set to zero
        if layer.output == space:
            assert not keep.sparse[name_].outputs[channel]
