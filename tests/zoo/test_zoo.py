"""Published networks shrink, and go on computing and training as their masked twins do."""

import copy
from pathlib import Path

import pytest
import torch
from shrinking import OPTIMIZERS, THRESHOLD, build, check_shrinks
from torch.optim import SGD
from zoo_kit import check_optimizer, distance, kill, outputs_of, settle

from bench.zoo import ZOO
from prunetrain_kernels import PruneTrain, reconfigure, trace_channels

NAMES = [pytest.param(name, marks=pytest.mark.slow if network.slow else ()) for name, network in ZOO.items()]

# Least share of the FLOPs, and of the channels between input and output, that may go. All of them where a network is
# not named: then nothing but its input and output is frozen.
LEAST = {
    "convnext_tiny": (0.6, 0.5),
    "timm:nf_resnet50": (0.0, 0.0),
    "timm:nfnet_l0": (0.1, 0.03),
    "timm:convnext_atto": (0.7, 0.5),
    "timm:edgenext_xx_small": (0.7, 0.6),
    "timm:efficientvit_b0": (0.6, 0.5),
    "timm:levit_128s": (0.9, 0.9),
}


@pytest.mark.parametrize("name", NAMES)
def test_shrinks_and_trains_on(name: str, tmp_path: Path) -> None:
    number = list(ZOO).index(name)
    check_shrinks(ZOO[name], OPTIMIZERS["sgd" if number % 2 else "adamw"], LEAST.get(name, (1, 1)), tmp_path)


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
