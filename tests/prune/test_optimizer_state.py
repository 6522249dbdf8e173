"""Whatever an optimizer keeps per weight is pruned with it, or refused before anything is touched."""

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from nets import DYING, kill, rest_of, same, small_net, snapshot, traced, train, twin_of, warm_up
from torch import nn, optim

from prunetrain_kernels import InputError, reconfigure

Make = Callable[[Iterable[nn.Parameter]], optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: optim.SGD(p, lr=0.01),
    "sgd-momentum": lambda p: optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "adam": lambda p: optim.Adam(p, lr=0.001),
    "adamw-amsgrad": lambda p: optim.AdamW(p, lr=0.001, amsgrad=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.001, momentum=0.9, centered=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.01),
    "adadelta": lambda p: optim.Adadelta(p),
    "adamax": lambda p: optim.Adamax(p),
    "nadam": lambda p: optim.NAdam(p, lr=0.001),
    "radam": lambda p: optim.RAdam(p, lr=0.001),
    "asgd": lambda p: optim.ASGD(p, lr=0.001),
    "rprop": lambda p: optim.Rprop(p, lr=0.001),
}


# State that moves a parameter without a gradient; the rest are sizes of gradients and of steps.
MOVES = {"momentum_buffer", "exp_avg", "grad_avg", "prev", "ax"}


def pruned(make: Make, name: str = "in-place-bottleneck", dying: bool = True):  # type: ignore[no-untyped-def]
    model, x = small_net(name, torch.float32)
    optimizer = make(model.parameters())
    warm_up(model, optimizer, x)
    graph = traced(model, x)
    kill(graph, model)
    if dying:
        rest_of(model, DYING[name]).zero_()
    before = twin_of(model, optimizer)
    keep = graph.keep(model)
    reconfigure(model, optimizer, keep)
    return model, optimizer, x, graph, keep, before


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_pruned_and_round_trips(name: str) -> None:
    make = OPTIMIZERS[name]
    model, optimizer, x, graph, keep, (old_model, old) = pruned(make)
    assert [id(p) for p in model.parameters()] == [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert {id(p) for p in optimizer.state} <= {id(p) for p in model.parameters()}
    for layer in graph.layers.values():
        if layer.name in keep.removed:
            continue
        outs, ins = keep.channels[layer.output], keep.channels[layer.input]
        state = optimizer.state[model.get_submodule(layer.name).weight]
        before = old.state[old_model.get_submodule(layer.name).weight]
        assert state.keys() == before.keys()
        for key, value in before.items():
            if isinstance(value, torch.Tensor) and value.dim() > 1:
                if key in MOVES:  # of slices that were set to zero but stay
                    value = value.clone()
                    value[keep.sparse[layer.name].outputs] = 0
                    value[:, keep.sparse[layer.name].inputs] = 0
                assert torch.equal(state[key], value[outs][:, ins])
            else:
                assert same(state[key], value)

    copy_model, copy_optimizer = twin_of(model, optimizer)
    fresh = make(copy_model.parameters())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same(fresh.state_dict(), optimizer.state_dict())
    batches = [torch.randn_like(x) for _ in range(3)]
    assert train(copy_model, fresh, batches) == train(model, optimizer, batches)
    assert same(copy_optimizer.state_dict()["param_groups"], optimizer.state_dict()["param_groups"])


def test_several_groups_and_a_scheduler() -> None:
    model, x = small_net("out-of-place")
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    branch = [p for n, p in model.named_parameters() if n == "blocks.0.conv1.weight"]
    weights = [p for p in weights if p is not branch[0]]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": others}, {"params": branch, "lr": 0.5}]
    optimizer = optim.SGD(groups, lr=0.01, momentum=0.9)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    warm_up(model, optimizer, x)
    rest_of(model, "blocks.0.conv2").zero_()
    reconfigure(model, optimizer, traced(model, x).keep(model))
    assert [len(g["params"]) for g in optimizer.param_groups] == [len(weights) - 1, len(others) - 2, 0]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0, 0]
    warm_up(model, optimizer, x)
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.005, 0.005, 0.25]
    optimizer.load_state_dict(optimizer.state_dict())


def test_two_optimizers() -> None:
    model, x = small_net("out-of-place")
    first = optim.SGD([p for p in model.parameters() if p.dim() > 1], lr=0.01, momentum=0.9)
    second = optim.Adam([p for p in model.parameters() if p.dim() <= 1])
    for optimizer in (first, second):
        warm_up(model, optimizer, x)
    graph = traced(model, x)
    kill(graph, model)
    rest_of(model, "blocks.1.conv2").zero_()
    keep = graph.keep(model)
    with pytest.raises(
        InputError, match=r"does not hold the model's parameter 'stem.1.weight' \(\d+ of \d+ are missing"
    ):
        reconfigure(model, first, keep)
    reconfigure(model, [first, second], keep)
    held = {id(p) for o in (first, second) for g in o.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters()}
    for optimizer in (first, second):
        warm_up(model, optimizer, x)


def test_an_optimizer_without_steps_has_nothing_to_slice() -> None:
    model, x = small_net("out-of-place")
    optimizer = optim.Adam(model.parameters())
    graph = traced(model, x)
    kill(graph, model)
    reconfigure(model, optimizer, graph.keep(model))
    warm_up(model, optimizer, x)


def closure_steps(model: nn.Module, optimizer: optim.Optimizer, x: torch.Tensor) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: optim.LBFGS(p, max_iter=2), "LBFGS keeps a state"),
        (lambda p: optim.Adafactor(p), "Adafactor keeps a state 'row_var' of shape"),
    ],
    ids=["lbfgs", "adafactor"],
)
def test_state_that_cannot_be_sliced_is_refused(make: Make, message: str) -> None:
    model, x = small_net("out-of-place")
    optimizer = make(model.parameters())
    closure_steps(model, optimizer, x)
    graph = traced(model, x)
    kill(graph, model)
    keep = graph.keep(model)
    before = snapshot(model, optimizer)
    with pytest.raises(InputError, match=message):
        reconfigure(model, optimizer, keep)
    assert same(before, snapshot(model, optimizer))
    closure_steps(model, optimizer, x)


def test_lbfgs_before_its_first_step_is_pruned() -> None:
    model, x = small_net("out-of-place")
    optimizer = optim.LBFGS(model.parameters(), max_iter=2)
    rest_of(model, "blocks.0.conv2").zero_()
    reconfigure(model, optimizer, traced(model, x).keep(model))
    closure_steps(model, optimizer, x)


def test_wrong_optimizers_are_refused() -> None:
    model, x = small_net("out-of-place")
    graph = traced(model, x)
    kill(graph, model)
    keep = graph.keep(model)
    other, _ = small_net("out-of-place")
    before = snapshot(model)
    with pytest.raises(InputError, match=r"does not hold the model's parameter 'stem\.0\.weight'"):
        reconfigure(model, optim.SGD(other.parameters(), lr=0.1), keep)
    with pytest.raises(InputError, match="a StepLR is no optimizer"):
        reconfigure(model, optim.lr_scheduler.StepLR(optim.SGD(model.parameters(), lr=0.1), 1), keep)  # type: ignore[arg-type]
    assert same(before, snapshot(model))


def test_a_parameter_shared_with_a_removed_branch_stays_with_the_optimizer() -> None:
    model, x = small_net("out-of-place")
    model.blocks[0].conv1.weight = model.blocks[1].conv1.weight
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    warm_up(model, optimizer, x)
    rest_of(model, "blocks.0.conv2").zero_()
    twin = twin_of(model, optimizer)[0]
    reconfigure(model, optimizer, traced(model, x).keep(model))
    assert {id(p) for p in model.parameters()} == {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert torch.allclose(model(x), twin(x), rtol=1e-10)


def test_extra_parameters_of_the_optimizer_stay() -> None:
    model, x = small_net("out-of-place")
    temperature = nn.Parameter(torch.ones(()))
    optimizer = optim.Adam([*model.parameters(), temperature])
    graph = traced(model, x)
    kill(graph, model)
    reconfigure(model, optimizer, graph.keep(model))
    assert any(p is temperature for p in optimizer.param_groups[0]["params"])
