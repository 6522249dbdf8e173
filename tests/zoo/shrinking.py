"""What every network of the zoo must stand: pruned twice, beside a masked twin, saved and loaded."""

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
from bench.zoo import Architecture
from prunetrain_kernels import load_pruned, reconfigure, save_pruned, trace_channels

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=1e-3, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: AdamW(p, lr=1e-4, weight_decay=1e-3),
}
THRESHOLD = 0  # only what is exactly zero is sparse, so that zeroing it moves nothing


def build(network: Architecture, seed: int = 0) -> nn.Module:
    """The network that is tested, in double precision, without trivial values."""
    torch.manual_seed(seed)
    return randomise(network.for_tests(), seed).double()


def depends_on_images(output: Tensor) -> bool:
    """The killed channels have left something of the network to compare."""
    return float(output.detach().std(dim=0).max()) > 1e-6 * float(output.detach().abs().max())


def check_shrinks(
    network: Architecture, make_optimizer: Callable[..., Optimizer], least: tuple[float, float], folder: Path
) -> None:
    """Prunes a network twice and compares it with its masked twin, in float64; saves and loads it.

    Args:
        least: the least share of the FLOPs, and of the channels between input and output, that can go.
        folder: for the checkpoint.
    """
    model = build(network)
    optimizer = make_optimizer(model.parameters())
    images = [network.images(4, seed=i) for i in range(4)]
    batches = [x.double() if x.is_floating_point() else x for x in images]
    train(model, optimizer, batches[:1])

    for turn in range(2):
        graph = trace_channels(model, (batches[0],))
        if turn == 0:
            row = describe_graph(graph, model, batches[0])
            shares = row.share, row.channels / (row.channels + sum(row.frozen.values()))
            assert all(a >= b for a, b in zip(shares, least, strict=True)), (shares, row.frozen)
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

    save_pruned(folder / "pruned.pt", model, optimizer)
    fresh = without_noise(build(network, seed=1))
    fresh_optimizer = make_optimizer(fresh.parameters())
    load_pruned(folder / "pruned.pt", fresh, fresh_optimizer)
    assert distance(outputs_of(fresh.eval(), batches[0]), outputs_of(model.eval(), batches[0])) == 0
    check_optimizer(fresh, fresh_optimizer)
    assert train(fresh, fresh_optimizer, batches[:1]) == train(model, optimizer, batches[:1])
