"""Numbers of channels that attributes tell are set when channels go; what a number in the source counts stays."""

from pathlib import Path

import pytest
import torch
from told_networks import NETWORKS, Mixed
from torch import nn
from torch.optim import SGD, AdamW
from twice import inner_reasons, shrink_twice
from zoo_kit import distance, kill, outputs_of, randomise

from prunetrain_kernels import (
    ChannelGraph,
    apply_shape,
    load_pruned,
    pruned_shape,
    reconfigure,
    save_pruned,
    trace_channels,
)
from prunetrain_kernels.prune.shape import describe_shape, restore_shape

INPUT = "it is not computed from anything followed"
STAY = {
    "levit": {INPUT, "operation 'matmul' is over its channels, of which each is a part, so none can go"},
    "state": {"the forward picks channels by number"},  # of the network's input, a step of a sequence
}


def numbers_of(model: nn.Module) -> dict[str, int | list[int] | tuple[int, ...]]:
    """The whole numbers, and lists of them, that the modules of these networks hold."""
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        if type(module).__module__ == "told_networks"
        for key, value in vars(module).items()
        if not key.startswith("_") and isinstance(value, int | list) and not isinstance(value, bool)
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_shrinks_twice_and_is_saved(name: str, tmp_path: Path) -> None:
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = randomise(build()).double()
    before = numbers_of(model)
    number = list(NETWORKS).index(name)
    optimizer = (SGD(model.parameters(), lr=1e-3, momentum=0.9), AdamW(model.parameters(), lr=1e-4))[number % 2]
    batches = [torch.randn(3, *shape, dtype=torch.float64) for _ in range(3)]

    def look(graph: ChannelGraph) -> None:
        assert graph.tracer == "torch.fx"
        assert inner_reasons(graph) == STAY.get(name, set()), str(graph)
        assert numbers_of(model) == before  # tracing leaves plain numbers behind
        assert all(type(value) in (int, list) for value in numbers_of(model).values())

    shrink_twice(model, optimizer, batches, look)
    after = numbers_of(model)
    assert before != after
    assert all(type(value) in (int, list) for value in after.values())
    save_pruned(tmp_path / "pruned.pt", model, optimizer)
    fresh, shaped = build().double(), build().double()
    load_pruned(tmp_path / "pruned.pt", fresh)
    apply_shape(shaped, pruned_shape(model))
    shaped.load_state_dict(model.state_dict())
    for other in (fresh, shaped):
        assert numbers_of(other) == after
        for module in other.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eps = 0.01  # as in `randomise`
        assert distance(outputs_of(other.eval(), batches[0]), outputs_of(model.eval(), batches[0])) == 0


def test_a_pruned_network_gets_the_numbers_back_with_its_shape() -> None:
    """Lightning's callback loads the state of before a pruning into the network that was pruned since."""
    torch.manual_seed(0)
    model, x = Mixed().double(), torch.randn(3, 3, 6, 6, dtype=torch.float64)
    shape, state = describe_shape(model), {name: t.clone() for name, t in model.state_dict().items()}
    expected = model(x).detach()
    graph = trace_channels(model, (x,))
    kill(graph, model, share=0.5, partly=0.0, seed=0)
    reconfigure(model, None, graph.keep(model, 0))
    assert sum(model.splits) == model.first.out_channels < 12
    small = describe_shape(model), {name: t.clone() for name, t in model.state_dict().items()}
    restore_shape(model, shape, state)
    model.load_state_dict(state)
    assert model.splits == [5, 4, 3]
    assert torch.equal(model(x), expected)
    restore_shape(model, *small)
    model.load_state_dict(small[1])
    assert sum(model.splits) == model.first.out_channels < 12
