"""Networks of random calls, randomly zeroed: pruned in any way they compute and train on as they did.

`HYPOTHESIS_PROFILE=long pytest tests/zoo/test_properties.py` tries thousands, other ones each time. What is tried
otherwise is always the same: few for `make test`, more for `make test-all` (the profile "more"). A failure is shrunk to
the shortest program that fails, which is printed.
"""

import copy
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, Phase, example, given, note, settings
from hypothesis import strategies as st
from random_networks import FOLLOWED, IMAGE, IMAGES, STRANGE, RandomNetwork, Step
from zoo_kit import (
    check_attributes,
    check_kept,
    check_optimizer,
    check_same_channels,
    distance,
    forget_momentum,
    hold_masks,
    kill,
    outputs_of,
    randomise,
    train,
)

from prunetrain_kernels import ChannelGraph, reconfigure, trace_channels
from prunetrain_kernels.cost.convolution import Convolution, Form
from prunetrain_kernels.cost.flops import count_flops

COMMON = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink],
}
settings.register_profile("few", max_examples=15, derandomize=True, database=None, **COMMON)
settings.register_profile("more", max_examples=60, derandomize=True, database=None, **COMMON)
settings.register_profile("long", max_examples=3000, **COMMON)
NAME = os.environ.get("HYPOTHESIS_PROFILE", "few")
PROFILE = settings.get_profile(NAME)

OPERATIONS = FOLLOWED * 2 + STRANGE
NEAR = [0, 0, 0, 0, 0, 1, 1, 2, 3, 5, IMAGES]  # mostly the latest values
CHOICES: dict[str, list[Any]] = {
    "flat_heads": [False, True],
    "branches": [False, False, False, False, False, True],
    "share": [0.3, 0.0, 0.6, 1.0],
    "policy": ["union", "gating", "auto"],
    "round_to": [1, 2, 4],
    "adam": [False, True],
}
number = st.integers(0, 11)
steps = st.builds(Step, st.sampled_from(OPERATIONS), st.sampled_from(NEAR), number, number)


def with_drawn_examples(count: int) -> Callable[[Any], Any]:
    """More examples, drawn evenly: hypothesis likes to repeat itself within a program and from one to the next."""

    def add(test: Any) -> Any:
        for seed in range(count):
            draw = random.Random(seed)
            program = [
                Step(draw.choice(OPERATIONS), draw.choice(NEAR), draw.randrange(12), draw.randrange(12))
                for _ in range(draw.randrange(3, 13))
            ]
            settled = {name: draw.choice(values) for name, values in CHOICES.items()}
            test = example(steps=program, seed=seed, **settled)(test)
        return test

    return add


def some_cost(conv: Convolution, form: Form) -> float:
    """Gating is cheaper for every other shape, and one form cheaper than the next."""
    return float(form.gated) * (-1) ** (conv.in_full + conv.out_live) + 0.1 * form.gates_input


@PROFILE
@with_drawn_examples(20 if NAME == "few" else 80)
@given(
    steps=st.lists(steps, min_size=2, max_size=14),
    seed=st.integers(0, 1000),
    **{name: st.sampled_from(values) for name, values in CHOICES.items()},
)
def test_any_network_shrinks_and_trains_on(
    steps: list[Step], flat_heads: bool, branches: bool, seed: int, share: float, policy: str, round_to: int, adam: bool
) -> None:
    torch.manual_seed(seed)
    network = RandomNetwork(tuple(steps), flat_heads=flat_heads, branches=branches)
    note(f"{network!r}\ntraced by torch.{'export' if branches else 'fx'}")
    model = network.double()
    randomise(model, seed)
    optimizer = AdamW(model.parameters(), lr=1e-4) if adam else SGD(model.parameters(), lr=1e-3, momentum=0.9)
    batches = [torch.randn(5, IMAGE[0], IMAGE[1], IMAGE[1], dtype=torch.float64) for _ in range(4)]
    train(model, optimizer, batches[:1])
    graph = None
    for turn in range(2):
        graph = shrinks_once(model, optimizer, batches, seed + turn, share, policy, round_to, graph)


def shrinks_once(
    model: RandomNetwork,
    optimizer: torch.optim.Optimizer,
    batches: list[Tensor],
    seed: int,
    share: float,
    policy: str,
    round_to: int,
    graph: ChannelGraph | None,
) -> ChannelGraph | None:
    """Prunes by the given graph, or by a traced one; returns the graph of what is left, unless layers went."""
    graph = graph or trace_channels(model, (batches[0],))
    assert graph.tracer == ("torch.export" if model.branches else "torch.fx")
    dead = kill(graph, model, share, 0.2, seed)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    flops = count_flops(model, (batches[0],))
    keep = graph.keep(model, threshold=0, policy=policy, round_to=round_to, cost=some_cost)
    note(f"{graph}\n{keep}")
    if round_to == 1:
        check_kept(graph, keep, model, dead)
    masks = hold_masks(graph, keep, model)
    forget_momentum(graph, keep, twin, twin_optimizer)
    done = reconfigure(model, optimizer, keep)
    for training in (False, True):
        outputs, twin_outputs = (outputs_of(m.train(training), batches[1]) for m in (model, twin))
        assert distance(outputs, twin_outputs) <= 1e-9, f"outputs differ, training={training}"
    check_attributes(model)
    check_optimizer(model, optimizer)
    after = count_flops(model, (batches[0],))
    losses = train(model, optimizer, batches[2:])
    pairs = [zip(keep.live[name], graph.computed(name), strict=True) for name in graph.layers]
    if not all(torch.isin(live, before).all() for pair in pairs for live, before in pair):
        return None  # a gated layer has got channels back, which cost, and which its twin cannot have
    assert after.inference <= flops.inference
    assert after.training <= flops.training
    assert done.parameters_after <= done.parameters_before
    assert losses == pytest.approx(train(twin, twin_optimizer, batches[2:], masks), rel=1e-7)
    outputs, twin_outputs = (outputs_of(m.eval(), batches[1]) for m in (model, twin))
    assert distance(outputs, twin_outputs) <= 1e-7, "running statistics or parameters have moved differently"
    if keep.branches:
        return None
    graph_after = keep.graph_after()
    check_same_channels(graph_after, trace_channels(model, (batches[0],)))
    return graph_after


def test_programs_are_readable() -> None:
    steps = (Step("again", IMAGES), Step("add", 0), Step("chunk", 0), Step("pixel_shuffle", 0), Step("cat", 0, 1))
    conv = "Conv2d(3, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)"
    assert repr(RandomNetwork(steps)).splitlines() == [
        "v0 = images (N, 3, 4, 4)",
        f"v1 = conv(v0)  # m0 = {conv}",
        f"v2 = conv(v0)  # m0 = {conv}",
        "v3 = add(v2, v1)",
        "v4, v5 = chunk(v3, 2)",
        "v6 = cat(v5, v4)",
        "return [head(v.mean((2, 3))) for v in (v6)]",
    ]
