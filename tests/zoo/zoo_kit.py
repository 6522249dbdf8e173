"""Channels of a real network killed through their spaces, and what must hold of it afterwards."""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bench.crosscheck import channels_of
from prunetrain_kernels import ChannelGraph, Keep
from prunetrain_kernels.nn import GatedConv2d

Channel = tuple[int, int]  # a space that is not put together from others, and the channel in it


@dataclass(frozen=True)
class Use:
    """One slice of one layer: the place in its input or output space."""

    layer: str
    side: str
    place: int


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter of one value per channel values that are not trivially 0 or 1.

    Batch norms divide by no less than 0.1: over the few pixels of small images they would magnify rounding.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps = 0.01
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                uniform(parameter, -0.3, 0.3)
            elif parameter.dim() == 1 or parameter.numel() == max(
                parameter.shape, default=0
            ):  # also layer scales (C, 1, 1)
                uniform(parameter, 0.6, 1.4)
    return model


def settle(model: nn.Module, x: Tensor) -> None:
    """Sets every batch norm's running statistics to those of a batch, so that deep networks let their input through."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum


def without_noise(model: nn.Module) -> nn.Module:
    """Dropout and stochastic depth off: two networks of different widths would draw different noise."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for attribute in ("drop_prob", "p", "drop_rate"):
            if type(module).__module__.startswith(("timm", "torchvision")) and isinstance(
                getattr(module, attribute, None), float
            ):
                setattr(module, attribute, 0.0)
    return model


def outputs_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(model(x)) if isinstance(leaf, Tensor)]


def distance(outputs: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference as a share of the scale of `expected`, the worst of all outputs."""
    assert [t.shape for t in outputs] == [t.shape for t in expected]
    gaps = [
        float((a - b).detach().abs().max()) / max(float(b.detach().abs().max()), 1e-12)
        for a, b in zip(outputs, expected, strict=True)
    ]
    assert all(math.isfinite(gap) for gap in gaps)
    return max(gaps)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor], masks: dict[str, Tensor] | None = None
) -> list[float]:
    """Some steps; `masks` hold weights at zero."""
    model.train()
    weights = {name: model.get_submodule(name).weight for name in masks or {}}
    losses = []
    for x in batches:
        optimizer.zero_grad()
        loss = sum((y - 0.5).square().mean() for y in outputs_of(model, x))
        assert isinstance(loss, Tensor)
        loss.backward()
        for name, weight in weights.items():
            if weight.grad is not None:
                weight.grad.mul_(masks[name])  # type: ignore[index]
        optimizer.step()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.mul_(masks[name])  # type: ignore[index]
        losses.append(loss.item())
    return losses


# -- channels ----------------------------------------------------------------------------------------------------------


def uses_of(graph: ChannelGraph) -> dict[Channel, list[Use]]:
    """Every slice of every layer that a channel has."""
    uses: dict[Channel, list[Use]] = defaultdict(list)
    for layer in graph.layers.values():
        for side, space in (("in", layer.input), ("out", layer.output)):
            for place, channel in enumerate(channels_of(graph, space)):
                uses[channel].append(Use(layer.name, side, place))
    return uses


def slice_of(graph: ChannelGraph, model: nn.Module, use: Use) -> Tensor:
    """The weights of a slice: a view; empty where a gated layer does not compute it."""
    layer, weight = graph.layers[use.layer], model.get_submodule(use.layer).weight
    assert isinstance(weight, Tensor)
    dim, block = (layer.dims[1], 1) if use.side == "out" else (layer.dims[0], layer.block)
    positions = (graph.computed(use.layer)[use.side == "out"] == use.place).nonzero()  # one or none
    start = int(positions) * block if len(positions) else 0
    return weight.detach().narrow(dim, start, block * len(positions))


def kill(graph: ChannelGraph, model: nn.Module, share: float, partly: float, seed: int) -> set[Channel]:
    """Zeroes random channels in every slice they have, and others in all of them but one; returns the former.

    A frozen space loses no channel, but some of its channels are dead in part.
    """
    generator = torch.Generator().manual_seed(seed)
    uses, dead = uses_of(graph), set()
    for n, space in enumerate(graph.spaces):
        if space.members is not None:
            continue
        order = torch.randperm(space.size, generator=generator).tolist()
        everywhere = 0 if space.frozen else int(share * space.size)
        for channel in [(n, i) for i in order[: everywhere + int(partly * space.size)]]:
            slices = uses.get(channel, [])
            spared = int(torch.randint(max(len(slices), 1), (1,), generator=generator))
            if (n, channel[1]) in {(n, i) for i in order[:everywhere]}:
                dead.add(channel)
                spared = -1
            for i, use in enumerate(slices):
                if i != spared:
                    slice_of(graph, model, use).zero_()
    return dead


def expected_channels(graph: ChannelGraph, model: nn.Module, threshold: float = 0) -> list[set[int]]:
    """The union rule, from the weights: what some layer's slice of it is alive in stays. Empty for a space in which
    nothing is alive: one channel of it stays, whichever."""
    alive: set[Channel] = set()
    for layer in graph.layers.values():
        weight = model.get_submodule(layer.name).weight.detach().abs()
        by_output = weight.transpose(0, 1) if layer.transposed else weight  # (K, C * block, ...)
        sizes = by_output.unflatten(1, (-1, layer.block)).flatten(2).amax(2)
        sides = ((layer.input, sizes.amax(0)), (layer.output, sizes.amax(1)))
        for computed, (space, largest) in zip(graph.computed(layer.name), sides, strict=True):
            channels = channels_of(graph, space)
            pairs = zip(computed.tolist(), largest.tolist(), strict=True)
            alive |= {channels[place] for place, size in pairs if size > threshold}
    return [
        {i for i, channel in enumerate(channels_of(graph, n)) if graph.spaces[channel[0]].frozen or channel in alive}
        for n in range(len(graph.spaces))
    ]


def check_kept(graph: ChannelGraph, keep: Keep, model: nn.Module, dead: set[Channel]) -> None:
    """`keep` holds what the union rule says, no planned channel survives, and nothing frozen goes."""
    wanted = expected_channels(graph, model)
    emptied = {
        n
        for n, (space, expected) in enumerate(zip(graph.spaces, wanted, strict=True))
        if space.members is None and len(expected) < space.least
    }
    for n, (space, expected) in enumerate(zip(graph.spaces, wanted, strict=True)):
        kept = set(keep.channels[n].tolist())
        owners = {channel[0] for channel in channels_of(graph, n)}
        if owners & emptied:
            assert expected <= kept
            assert len(kept) > 0
        else:
            assert kept == expected
        if space.frozen:
            assert kept == set(range(space.size))
    surviving = {(n, i) for n in range(len(graph.spaces)) for i in keep.channels[n].tolist()} & dead
    assert {n for n, _ in surviving} <= emptied


def hold_masks(graph: ChannelGraph, keep: Keep, model: nn.Module) -> dict[str, Tensor]:
    """A mask for each layer that holds at zero whatever `keep` prunes, or leaves to gating."""
    masks = {}
    for layer in graph.layers.values():
        weight = model.get_submodule(layer.name).weight
        assert isinstance(weight, Tensor)
        masks[layer.name] = torch.zeros_like(weight.detach())
        if layer.name in keep.removed:
            continue
        mask = masks[layer.name].transpose(0, 1) if layer.transposed else masks[layer.name]
        places = [
            torch.isin(computed, live).nonzero().flatten()
            for computed, live in zip(graph.computed(layer.name), keep.live[layer.name], strict=True)
        ]
        columns = (places[0][:, None] * layer.block + torch.arange(layer.block)).flatten()
        mask[places[1][:, None], columns[None, :]] = 1
    return masks


def forget_momentum(graph: ChannelGraph, keep: Keep, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Sets the momentum of all sparse slices to zero, as `reconfigure` does for those that stay."""
    for name, layer in graph.layers.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        for key in ("momentum_buffer", "exp_avg"):
            momentum = optimizer.state.get(weight, {}).get(key)
            if momentum is None:
                continue
            inputs, outputs = graph.computed(name)
            sparse = keep.sparse[name].inputs[inputs], keep.sparse[name].outputs[outputs]
            momentum.movedim(layer.dims[0], 0)[sparse[0].repeat_interleave(layer.block)] = 0
            momentum.movedim(layer.dims[1], 0)[sparse[1]] = 0


# -- afterwards --------------------------------------------------------------------------------------------------------


def check_attributes(model: nn.Module) -> None:
    """Sizes that modules tell are those of their tensors."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, GatedConv2d):
            sides = zip((module.out_channels, module.in_channels), weight.shape[:2], strict=True)
            assert all(told >= computed for told, computed in sides), name  # it tells of its spaces
        elif isinstance(module, nn.modules.conv._ConvTransposeNd):
            assert tuple(weight.shape[:2]) == (module.in_channels, module.out_channels // module.groups), name
        elif isinstance(module, nn.modules.conv._ConvNd):
            assert tuple(weight.shape[:2]) == (module.out_channels, module.in_channels // module.groups), name
        elif isinstance(module, nn.Linear):
            assert tuple(weight.shape) == (module.out_features, module.in_features), name
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (weight, module.bias, module.running_mean, module.running_var):
                assert tensor is None or tensor.shape == (module.num_features,), name
        elif isinstance(module, nn.LayerNorm):
            assert weight is None or tuple(weight.shape) == tuple(module.normalized_shape), name
        elif isinstance(module, nn.GroupNorm):
            assert weight is None or weight.shape == (module.num_channels,), name
            assert module.num_channels % module.num_groups == 0, name


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's parameters are exactly the model's, and every state tensor has its parameter's shape."""
    assert {id(p) for p in model.parameters()} == {id(p) for g in optimizer.param_groups for p in g["params"]}
    live = {id(p) for p in model.parameters()}
    for parameter, state in optimizer.state.items():
        assert id(parameter) in live
        for value in state.values():
            if isinstance(value, Tensor) and value.dim() > 0:
                assert value.shape == parameter.shape


def check_same_channels(derived: ChannelGraph, traced: ChannelGraph) -> None:
    """Two graphs of one network have the same channels: what stays or goes together, what is computed, what is frozen.

    With one channel left tracing sees less: `view(n, 1)` does not say what the 1 is, a map of one channel that is
    multiplied with it looks like a channel of the same space, and a depthwise convolution like any other.
    """
    if any(space.size == 1 for space in derived.spaces):
        return
    assert derived.layers.keys() == traced.layers.keys()
    for name, layer in derived.layers.items():
        other = traced.layers[name]
        assert (layer.kind, layer.block, layer.groups) == (other.kind, other.block, other.groups)
        for a, b in zip(derived.computed(name), traced.computed(name), strict=True):
            assert torch.equal(a, b), name
    assert {n: (f.kind, f.block, derived.spaces[f.space].size) for n, f in derived.followers.items()} == {
        n: (f.kind, f.block, traced.spaces[f.space].size) for n, f in traced.followers.items()
    }
    derived_channels, traced_channels = (
        {
            frozenset((u.layer, u.side, u.place) for u in uses): graph.spaces[channel[0]].frozen
            for channel, uses in channels
        }
        for graph, channels in ((derived, uses_of(derived).items()), (traced, uses_of(traced).items()))
    )
    assert derived_channels.keys() == traced_channels.keys()
    assert all(traced_channels[uses] for uses, frozen in derived_channels.items() if frozen)
