"""Slices that are set to zero but stay, because another layer needs their channels, lose their momentum too."""

import copy
from collections.abc import Callable

import pytest
import torch
from nets import kill, rest_of, same, small_net, snapshot, traced, train, warm_up
from torch import Tensor, nn, optim

from prunetrain_kernels import Keep, PruneTrainError, reconfigure

module = __import__("prunetrain_kernels.prune.reconfigure", fromlist=["reconfigure"])
THRESHOLD = 1e-4
OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.01, momentum=0.9),
    "nesterov": lambda p: optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.001, momentum=0.9, centered=True),
    "adam": lambda p: optim.Adam(p, lr=0.001),
    "amsgrad": lambda p: optim.AdamW(p, lr=0.001, amsgrad=True),
    "nadam": lambda p: optim.NAdam(p, lr=0.001),
    "adamax": lambda p: optim.Adamax(p, lr=0.001),
}


def dying(
    make: Callable[..., optim.Optimizer], policy: str = "union"
) -> tuple[nn.Module, optim.Optimizer, Tensor, Keep]:
    """A network with momentum, of which some slices are sparse in every layer of their space and others in some."""
    model, x = small_net("out-of-place")
    optimizer = make(model.parameters())
    warm_up(model, optimizer, x, steps=10)
    graph = traced(model, x)
    kill(graph, model, share=0.3, partly=0.5)
    return model, optimizer, x, graph.keep(model, THRESHOLD, policy=policy)


def zero_slices(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Weights, and where their slices of zeros are."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    masks = []
    for w in weights:
        mask = torch.zeros_like(w, dtype=torch.bool)
        mask[(w.detach().flatten(1) == 0).all(1)] = True
        mask[:, (w.detach().transpose(0, 1).flatten(1) == 0).all(1)] = True
        masks.append(mask)
    return list(zip(weights, masks, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeroed_slices_revive_less(name: str) -> None:
    """Next to no gradient, so that all that moves a weight is what the optimizer remembers."""
    revived = {}
    for keep_momentum in (True, False):
        model, optimizer, x, keep = dying(OPTIMIZERS[name])
        reconfigure(model, optimizer, keep, keep_momentum=keep_momentum)
        slices = zero_slices(model)
        train(model, optimizer, [x] * 10, loss_of=lambda y: 1e-9 * y.sum())
        revived[keep_momentum] = max(float(w.detach()[mask].abs().max()) for w, mask in slices) / THRESHOLD
    assert revived[True] > 10
    assert revived[False] < 1e-2 * revived[True]


@pytest.mark.parametrize("policy", ["union", "gating"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_momentum_is_zero_where_the_weight_is_and_nowhere_else(name: str, policy: str) -> None:
    model, optimizer, x, keep = dying(OPTIMIZERS[name], policy)
    kept_model, kept_optimizer = copy.deepcopy((model, optimizer))
    reconfigure(model, optimizer, keep)
    reconfigure(kept_model, kept_optimizer, traced(kept_model, x).keep(kept_model, policy=policy), keep_momentum=True)
    pairs = list(zip(model.named_parameters(), kept_model.parameters(), strict=True))
    masks = {id(w): mask for w, mask in zero_slices(model)}
    assert any(mask.any() for mask in masks.values())
    for (parameter_name, parameter), kept_parameter in pairs:
        mask = masks.get(id(parameter), torch.zeros_like(parameter, dtype=torch.bool))
        for key, value in optimizer.state[parameter].items():
            expected = kept_optimizer.state[kept_parameter][key]
            if key in ("momentum_buffer", "exp_avg", "grad_avg"):
                expected = expected.masked_fill(mask, 0)
            assert torch.equal(value, expected), (parameter_name, key)
    losses = train(model, optimizer, [x] * 3)
    assert all(torch.isfinite(torch.tensor(losses)))


def test_also_where_nothing_is_cut() -> None:
    """Sparse in one layer of its space only: the channel stays, and so does every shape."""
    model, x = small_net("out-of-place")
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    warm_up(model, optimizer, x)
    rest_of(model, "blocks.0.conv2")[3] = 1e-6
    done = reconfigure(model, optimizer, traced(model, x).keep(model))
    assert not done.changed
    weight = model.blocks[0].conv2.weight
    buffer = optimizer.state[weight]["momentum_buffer"]
    assert torch.equal(weight.detach()[3], torch.zeros(8, 3, 3, dtype=x.dtype))
    assert torch.equal(buffer[3], torch.zeros(8, 3, 3, dtype=x.dtype))
    assert all(buffer[k].abs().min() > 0 for k in range(8) if k != 3)


def test_batch_norm_behind_zeros_stays() -> None:
    """It makes a constant of the zeros that the rest of the network goes on reading: the function must stay."""
    model, x = small_net("out-of-place")
    rest_of(model, "blocks.0.conv2")[3] = 0
    before = {n: p.detach().clone() for n, p in model.blocks[0].bn2.named_parameters()}
    expected = model.eval()(x).detach()
    reconfigure(model, None, traced(model, x).keep(model))
    assert all(torch.equal(p.detach(), before[n]) for n, p in model.blocks[0].bn2.named_parameters())
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_undone_with_the_rest(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, _, keep = dying(OPTIMIZERS[name])
    before = snapshot(model, optimizer)

    def fails(*_: object) -> None:
        raise PruneTrainError("forced")

    monkeypatch.setattr(module, "check_cutting", fails)
    with pytest.raises(PruneTrainError, match="forced"):
        reconfigure(model, optimizer, keep)
    assert same(before, snapshot(model, optimizer))
