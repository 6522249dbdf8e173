"""Published networks shrink, and go on computing and training as their masked twins do."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from zoo_kit import (
    check_attributes,
    check_kept,
    check_optimizer,
    distance,
    forget_momentum,
    hold_masks,
    kill,
    outputs_of,
    randomise,
    settle,
    train,
    without_noise,
)

from bench.architectures import describe_graph
from bench.zoo import ZOO, Architecture
from prunetrain_kernels import PruneTrain, load_pruned, reconfigure, save_pruned, trace_channels

NAMES = [pytest.param(name, marks=pytest.mark.slow if network.slow else ()) for name, network in ZOO.items()]
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=1e-3, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: AdamW(p, lr=1e-4, weight_decay=1e-3),
}
THRESHOLD = 0  # only what is exactly zero is sparse, so that zeroing it moves nothing

# Least share of the FLOPs, and of the channels between input and output, that may go. All of them where a network is
# not named: then nothing but its input and output is frozen.
LEAST = {
    "convnext_tiny": (0.6, 0.5),
    "timm:skresnet18": (0.85, 0.6),
    "timm:res2net50_26w_4s": (0.97, 0.5),
    "timm:nf_resnet50": (0.0, 0.0),
    "timm:nfnet_l0": (0.1, 0.03),
    "timm:dpn68": (0.85, 0.03),
    "timm:cspresnet50": (0.999, 0.47),
    "timm:cspdarknet53": (0.999, 0.7),
    "timm:mixnet_s": (0.45, 0.1),
    "timm:rexnet_100": (0.999, 0.85),
    "timm:convnext_atto": (0.7, 0.5),
    "timm:edgenext_xx_small": (0.7, 0.6),
    "timm:efficientvit_b0": (0.6, 0.5),
    "timm:levit_128s": (0.15, 0.003),
}


def build(network: Architecture, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(network.for_tests(), seed).double()


def depends_on_images(output: Tensor) -> bool:
    """The killed channels have left something of the network to compare."""
    return float(output.detach().std(dim=0).max()) > 1e-6 * float(output.detach().abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_shrinks_and_trains_on(name: str, tmp_path: Path) -> None:
    network, number = ZOO[name], list(ZOO).index(name)
    make_optimizer = OPTIMIZERS["sgd" if number % 2 else "adamw"]
    model = build(network)
    optimizer = make_optimizer(model.parameters())
    batches = [network.images(4, seed=i).double() for i in range(4)]
    train(model, optimizer, batches[:1])

    for turn in range(2):
        graph = trace_channels(model, (batches[0],))
        if turn == 0:
            row = describe_graph(graph, model, batches[0])
            shares = row.share, row.channels / (row.channels + sum(row.frozen.values()))
            assert all(a >= b for a, b in zip(shares, LEAST.get(name, (1, 1)), strict=True)), (shares, row.frozen)
        dead = kill(graph, model, share=0.3, partly=0.1, seed=turn)
        settle(without_noise(model), batches[0])
        reference, reference_optimizer = copy.deepcopy((model, optimizer))
        keep = graph.keep(model, THRESHOLD)
        check_kept(graph, keep, model, dead)
        report = reconfigure(model, optimizer, keep)
        assert report.changed == bool(dead)
        for training in (False, True):
            outputs, expected = (outputs_of(m.train(training), batches[1]) for m in (model, reference))
            assert distance(outputs, expected) <= 1e-9, (turn, training)
            assert depends_on_images(expected[0])
        check_attributes(model)
        check_optimizer(model, optimizer)
        assert sum(p.numel() for p in model.parameters()) == report.parameters_after
        losses = train(model, optimizer, batches[2:])
        if turn == 0:
            masks = hold_masks(graph, keep, reference)
            forget_momentum(graph, keep, reference, reference_optimizer)
            assert losses == pytest.approx(train(reference, reference_optimizer, batches[2:], masks), rel=1e-7)

    save_pruned(tmp_path / "pruned.pt", model, optimizer)
    fresh = without_noise(build(network, seed=1))
    fresh_optimizer = make_optimizer(fresh.parameters())
    load_pruned(tmp_path / "pruned.pt", fresh, fresh_optimizer)
    assert distance(outputs_of(fresh.eval(), batches[0]), outputs_of(model.eval(), batches[0])) == 0
    check_optimizer(fresh, fresh_optimizer)
    assert train(fresh, fresh_optimizer, batches[:1]) == train(model, optimizer, batches[:1])


@pytest.mark.parametrize("name", ["googlenet", "mobilenet_v3_small", "unet", "efficientnet_b0", "timm:ghostnet_100"])
def test_single_precision(name: str) -> None:
    """Outputs move by less than 1e-5 of their scale, or than single precision is off anyway in a network so deep."""
    network = ZOO[name]
    model, x = build(network).float(), network.images(4)
    graph = trace_channels(model, (x,))
    kill(graph, model, share=0.3, partly=0.1, seed=0)
    settle(model, x)
    exact = outputs_of(copy.deepcopy(model).double().eval(), x.double())
    before = [output.double() for output in outputs_of(model.eval(), x)]
    reconfigure(model, None, graph.keep(model, THRESHOLD))
    after = [output.double() for output in outputs_of(model, x)]
    assert distance(after, before) <= max(1e-5, 2 * distance(before, exact))
    assert distance(after, exact) <= max(1e-5, 2 * distance(before, exact))


@pytest.mark.parametrize("name", ["googlenet", "mobilenet_v3_small", "unet"])
def test_in_a_training_loop(name: str) -> None:
    """PruneTrain's own calls and thresholds, on networks with several losses, squeeze-excite and concatenations."""
    network = ZOO[name]
    model, x = build(network).float(), network.images(4)
    optimizer = SGD(model.parameters(), lr=1e-3, momentum=0.9)
    # what a step makes of the zeros is below the threshold, yet not nothing behind a batch norm of this network
    prunetrain = PruneTrain(model, optimizer, (x,), penalty_ratio=0.2, interval=1, zeroing_tolerance=1.0)
    kill(prunetrain.graph, model, share=0.3, partly=0.1, seed=0)
    settle(model, x)
    for _ in range(2):
        optimizer.zero_grad()
        losses = [output.square().mean() for output in outputs_of(model.train(), x)]
        prunetrain.regularize(torch.stack(losses).sum()).backward()
        optimizer.step()
        prunetrain.epoch_end()
    assert len(prunetrain.history) == 2
    assert prunetrain.flops.training < 0.8 * prunetrain.dense_flops.training
    assert all(bool(output.isfinite().all()) for output in outputs_of(model, x))
    check_optimizer(model, optimizer)
