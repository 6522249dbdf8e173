"""A small network with any forward, and pruning of half of whatever in it may go."""

import copy
import random
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from prunetrain_kernels import ChannelGraph, reconfigure, trace_channels
from prunetrain_kernels.graph import expand
from prunetrain_kernels.probe import difference, named_tensors_in

Forward = Callable[..., Tensor]


class Net(nn.Module):
    """Two 8-channel convolutions `a` and `b`, a linear layer `fc`, further modules by name, and a forward."""

    def __init__(self, forward: Forward, features: int = 8, **modules: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(features, 4)
        for name, module in modules.items():
            setattr(self, name, module)
        self.body = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def pool(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def images(batch: int = 2, size: int = 6) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(batch, 3, size, size)


def space_of(graph: ChannelGraph, layer: str, side: str = "output") -> int:
    return int(getattr(graph.layers[layer], side))


def frozen(graph: ChannelGraph, layer: str, side: str = "output") -> str | None:
    return graph.spaces[space_of(graph, layer, side)].frozen


def dead_half(graph: ChannelGraph, index: int) -> Tensor:
    """Every other channel of a free space, or those of a space that is put together from such."""
    space = graph.spaces[index]
    if space.members is not None:
        return torch.stack([dead_half(graph, n)[channel] for n, channel in space.members.tolist()])
    dead = torch.zeros(space.size, dtype=torch.bool)
    if not space.frozen:
        dead[::2] = True
    return dead


def zero_half(graph: ChannelGraph, model: nn.Module) -> None:
    """Zeroes half of the channels of all free spaces in every layer."""
    for layer in graph.layers.values():
        weight = model.get_submodule(layer.name).weight.data
        for dim, space, block in zip(layer.dims, (layer.input, layer.output), (layer.block, 1), strict=True):
            weight.index_fill_(dim, expand(dead_half(graph, space).nonzero().flatten(), block), 0)


def seeded(seed: int) -> None:
    """All global random number generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def shrinks(model: nn.Module, *x: Tensor, seeds: Iterable[int] = range(3)) -> ChannelGraph:
    """Does as `prune_half_of_everything`, for outputs of any structure and forwards that draw random numbers; the next
    training step runs too."""
    model = model.double()
    x = tuple(t.double() if t.is_floating_point() else t for t in x)
    graph = trace_channels(model, x)
    zero_half(graph, model)
    twin = copy.deepcopy(model)
    keep = graph.keep(model)
    reconfigure(model, None, keep)
    for training in (False, True):
        for seed in seeds:
            seeded(seed)
            pruned = named_tensors_in(model.train(training)(*x))
            seeded(seed)
            expected = named_tensors_in(twin.train(training)(*x))
            gap = difference(*({name: t.detach() for name, t in outputs.items()} for outputs in (expected, pruned)))
            assert gap.compared
            assert gap.largest <= 1e-10 * max(gap.scale, 1), (training, seed, gap)
            sum(t.sum() for t in pruned.values() if t.requires_grad).backward()  # type: ignore[union-attr]
    return graph


def prune_half_of_everything(model: nn.Module, *x: Tensor) -> ChannelGraph:
    """Zeroes half of all free spaces and prunes them; the outputs must not move, in either mode."""
    model = model.double()
    x = tuple(t.double() if t.is_floating_point() else t for t in x)
    graph = trace_channels(model, x)
    zero_half(graph, model)
    reference = copy.deepcopy(model)
    keep = graph.keep(model)
    for i, kept in enumerate(keep.channels):
        assert torch.equal(kept, (~dead_half(graph, i)).nonzero().flatten())
    reconfigure(model, None, keep)
    for training in (False, True):
        torch.manual_seed(1)
        a = model.train(training)(*x)
        torch.manual_seed(1)
        b = reference.train(training)(*x)
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    again = trace_channels(model.train(), x)
    assert [frozen(again, name) for name in again.layers] == [frozen(graph, name) for name in graph.layers]
    return graph


def simple(m: Net, x: Tensor) -> Tensor:
    return m.fc(pool(m.b(m.a(x))))
