"""A network pruned twice, each time beside a twin whose weights are held at zero instead."""

import copy
from collections.abc import Callable

import pytest
from torch import Tensor, nn
from torch.optim import Optimizer
from zoo_kit import (
    check_attributes,
    check_kept,
    check_optimizer,
    distance,
    forget_momentum,
    hold_masks,
    kill,
    outputs_of,
    train,
)

from prunetrain_kernels import ChannelGraph, reconfigure, trace_channels

ENDS = ("it is the network's input", "it is the network's output")


def inner_reasons(graph: ChannelGraph) -> set[str]:
    """Why channels stay that are neither the network's input nor its output."""
    reasons = {space.frozen for space in graph.spaces if space.members is None}
    return {reason for reason in reasons if reason and reason not in ENDS}


def shrink_twice(
    model: nn.Module, optimizer: Optimizer, batches: list[Tensor], look: Callable[[ChannelGraph], None]
) -> None:
    """Prunes a model in float64 and trains it on, twice; `look` is given the first graph.

    Raises:
        AssertionError: it computes, or learns, something else than its twin.
    """
    train(model, optimizer, batches[:1])
    for turn in range(2):
        graph = trace_channels(model, (batches[0],))
        if turn == 0:
            look(graph)
        dead = kill(graph, model, share=0.4, partly=0.1, seed=turn)
        twin, twin_optimizer = copy.deepcopy((model, optimizer))
        keep = graph.keep(model, threshold=0)
        check_kept(graph, keep, model, dead)
        masks = hold_masks(graph, keep, twin)
        forget_momentum(graph, keep, twin, twin_optimizer)
        assert reconfigure(model, optimizer, keep).changed or turn == 1
        for training in (False, True):
            outputs, expected = (outputs_of(m.train(training), batches[1]) for m in (model, twin))
            assert distance(outputs, expected) <= 1e-9
        check_attributes(model)
        check_optimizer(model, optimizer)
        losses = train(model, optimizer, batches[1:])
        if turn == 0:
            assert losses == pytest.approx(train(twin, twin_optimizer, batches[1:], masks), rel=1e-7)
