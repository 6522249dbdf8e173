"""Optimizers around optimizers, several in a list, and state in other places: pruned like a masked twin, or refused."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import DYING, hold_masks, kill, rest_of, same, small_net, snapshot, traced
from torch import Tensor, nn, optim
from wrappers import (
    ByName,
    Elsewhere,
    Factored,
    Flat,
    InClass,
    InNumpy,
    Inside,
    Masked,
    Masters,
    Noting,
    Prepared,
    Sam,
    SlowInLists,
    SlowInside,
    SlowOutside,
    Unkeyed,
    Warming,
    WithCopy,
)

from prunetrain_kernels import InputError, PruneTrain, load_pruned, reconfigure, save_pruned
from prunetrain_kernels.errors import CheckpointError
from prunetrain_kernels.optim import SGD
from prunetrain_kernels.train.mini_batch import MiniBatch, scale_learning_rate

Make = Callable[[nn.Module], Any]


def momentum(params: Any) -> optim.Optimizer:
    return optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=1e-3)


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices, and everything else."""
    two = [p for p in model.parameters() if p.dim() == 2]
    return two, [p for p in model.parameters() if p.dim() != 2]


FOLLOW: dict[str, Make] = {
    "sam-sgd": lambda m: Sam(m.parameters(), optim.SGD, lr=0.02, momentum=0.9),
    "sam-adam": lambda m: Sam(m.parameters(), optim.Adam, lr=0.002),
    "sam-ours": lambda m: Sam(m.parameters(), SGD, lr=0.02, momentum=0.9),
    "lookahead-inside": lambda m: SlowInside(momentum(m.parameters())),
    "lookahead-outside": lambda m: SlowOutside(optim.RMSprop(m.parameters(), lr=0.001, momentum=0.9)),
    "lookahead-lists": lambda m: SlowInLists(momentum(list(m.parameters()))),
    "lookahead-lists-of-groups": lambda m: SlowInLists(momentum([{"params": g} for g in split(m)])),
    "prepared": lambda m: Prepared(optim.AdamW(m.parameters(), lr=0.002)),
    "prepared-ours": lambda m: Prepared(SGD(m.parameters(), lr=0.02, momentum=0.9)),
    "prepared-lookahead-sam": lambda m: Prepared(SlowOutside(Sam(m.parameters(), optim.SGD, lr=0.02, momentum=0.9))),
    "no-groups": lambda m: Warming(momentum(m.parameters())),
    "two-sgd": lambda m: [momentum(g) for g in split(m)],
    "sgd-and-ours": lambda m: [momentum(split(m)[0]), SGD(split(m)[1], lr=0.02, momentum=0.9)],
    "lookahead-and-adam": lambda m: [SlowInside(momentum(split(m)[0])), optim.Adam(split(m)[1], lr=0.002)],
    "rprop": lambda m: optim.Rprop(m.parameters(), lr=0.001),
    "asgd": lambda m: optim.ASGD(m.parameters(), lr=0.01),
    "nadam": lambda m: optim.NAdam(m.parameters(), lr=0.002),
    "radam": lambda m: optim.RAdam(m.parameters(), lr=0.002),
    "adagrad": lambda m: optim.Adagrad(m.parameters(), lr=0.01),
    "by-name": ByName,
    **{
        where: lambda m, where=where: Elsewhere(m.parameters(), where)  # type: ignore[misc]
        for where in ("by-parameter", "by-id", "flat-list", "group-entry", "object", "list-of-dicts", "state-list")
    },
    **{
        where: lambda m, where=where: Inside(m.parameters(), where)  # type: ignore[misc]
        for where in (
            *("closure", "closure-in-a-closure", "bound-method", "weak", "partial", "objects", "parameter"),
            *("bare-tensor", "bare-object"),
        )
    },
    "class": lambda m: InClass(m.parameters(), "class"),
}


def listed(optimizer: Any) -> list[Any]:
    return optimizer if isinstance(optimizer, list) else [optimizer]


def steps(model: nn.Module, optimizer: Any, batches: Sequence[Tensor], masks: dict[str, Tensor] | None = None) -> None:
    """Training steps; with masks, whatever they hold at zero has neither gradient nor weight."""
    for x in batches:

        def closure(x: Tensor = x) -> Tensor:
            model.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            for name, mask in (masks or {}).items():
                gradient = model.get_submodule(name).weight.grad
                if gradient is not None:
                    gradient.mul_(mask)
            return loss

        for one in listed(optimizer):
            closure()
            if "Sam" in str([type(o) for o in chain(one)]):
                one.step(closure)
            else:
                one.step()
            for name, mask in (masks or {}).items():
                rest_of(model, name).mul_(mask)


def chain(optimizer: Any) -> list[Any]:
    inside = [v for v in vars(optimizer).values() if isinstance(v, optim.Optimizer)]
    return [optimizer, *(o for one in inside for o in chain(one))]


def batches(x: Tensor, count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(count)]


def pruned_beside_its_twin(make: Make, net: str = "in-place-bottleneck", dying: bool = True) -> Any:
    """A pruned network with its optimizer, one that holds the same channels at zero instead, and the masks."""
    (model, x), (twin, _) = small_net(net), small_net(net)
    optimizer, other = make(model), make(twin)
    for network, its_optimizer in ((model, optimizer), (twin, other)):
        steps(network, its_optimizer, batches(x, 3))
        kill(traced(network, x), network)
        if dying:
            rest_of(network, DYING[net]).zero_()
    graph = traced(model, x)
    keep = graph.keep(model)
    assert keep.removed or not dying
    masks = hold_masks(graph, keep, twin)
    done = reconfigure(model, optimizer, keep, keep_momentum=True)  # as the twin does
    assert done.parameters_after < done.parameters_before
    return model, optimizer, twin, other, masks, x


@pytest.mark.parametrize("name", FOLLOW)
def test_trains_on_like_a_masked_twin(name: str) -> None:
    model, optimizer, twin, other, masks, x = pruned_beside_its_twin(FOLLOW[name])
    # Rprop goes by the sign of gradients: where one is zero but for rounding, networks of two shapes may part a little
    atol = 2e-3 if name == "rprop" else 1e-10
    for batch in batches(x, 6, seed=1):
        steps(model, optimizer, [batch])
        steps(twin, other, [batch], masks)
        assert torch.allclose(model(batch), twin(batch), rtol=1e-9, atol=atol)


@pytest.mark.parametrize("name", ["sam-sgd", "sam-ours", "lookahead-inside", "prepared", "prepared-lookahead-sam"])
def test_the_momentum_of_zeroed_slices_goes_inside_of_wrappers_too(name: str) -> None:
    model, x = small_net("in-place-bottleneck")
    optimizer = FOLLOW[name](model)
    steps(model, optimizer, batches(x, 3))
    graph = traced(model, x)
    layer = next(each for each in graph.layers.values() if each.kind == "conv" and not graph.spaces[each.input].frozen)
    weight = model.get_submodule(layer.name).weight
    with torch.no_grad():
        weight[:, :2] = 0  # of one layer alone: the channels stay, their slices are zero
    momentum = [
        value
        for each in chain(optimizer)
        for parameter, state in getattr(each, "state", {}).items()
        for key, value in state.items()
        if parameter is weight and key in ("momentum_buffer", "exp_avg")
    ]
    assert momentum
    assert all(bool(each[:, :2].any()) for each in momentum)
    reconfigure(model, optimizer, graph.keep(model))
    assert not any(bool(each[:, :2].any()) for each in momentum)
    assert all(bool(each[:, 2:].any()) for each in momentum)


def test_muon_and_adamw_train_on_like_a_masked_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Muon orthogonalises in bf16, whose rounding would hide everything: here in the matrix's own dtype."""
    monkeypatch.setattr(Tensor, "bfloat16", lambda tensor: tensor)

    def make(model: nn.Module) -> list[optim.Optimizer]:
        matrices, others = split(model)
        return [optim.Muon(matrices, lr=0.02, momentum=0.9), optim.AdamW(others, lr=0.002)]

    model, optimizer, twin, other, masks, x = pruned_beside_its_twin(make)
    buffers = [optimizer[0].state[p]["momentum_buffer"].shape for p in optimizer[0].param_groups[0]["params"]]
    assert buffers == [p.shape for p in optimizer[0].param_groups[0]["params"]]
    other[0].state[twin.get_submodule("fc").weight]["momentum_buffer"].mul_(masks["fc"])  # it mixes all of a matrix
    for batch in batches(x, 4, seed=1):
        steps(model, optimizer, [batch])
        steps(twin, other, [batch], masks)
        assert torch.allclose(model(batch), twin(batch), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", FOLLOW)
def test_is_taken_at_construction_and_left_as_it_is(name: str) -> None:
    model, x = small_net("out-of-place")
    optimizer = FOLLOW[name](model)
    before = snapshot(model), [(type(o), sorted(vars(o))) for one in listed(optimizer) for o in chain(one)]
    states = [len(getattr(o, "state", ())) for one in listed(optimizer) for o in chain(one)]
    prunetrain = PruneTrain(model, optimizer, (x,), batch=4)
    assert prunetrain.optimizers == listed(optimizer)
    after = snapshot(model), [(type(o), sorted(vars(o))) for one in listed(optimizer) for o in chain(one)]
    assert same(before[0], after[0])
    assert before[1] == after[1]
    assert states == [len(getattr(o, "state", ())) for one in listed(optimizer) for o in chain(one)]


# -- refused -----------------------------------------------------------------------------------------------------------


def adapters(model: nn.Module) -> Any:
    return Prepared(optim.Adafactor(model.parameters()))


REFUSED: dict[str, tuple[Make, str]] = {
    "adafactor": (lambda m: optim.Adafactor(m.parameters()), "Adafactor keeps a state 'row_var' of shape"),
    "adafactor-inside": (adapters, "Adafactor keeps a state 'row_var' of shape"),
    "adafactor-in-a-list": (
        lambda m: [momentum(split(m)[1]), optim.Adafactor(split(m)[0])],
        "Adafactor keeps a state 'row_var' of shape",
    ),
    "lbfgs": (lambda m: optim.LBFGS(m.parameters(), max_iter=2), "LBFGS keeps a state 'd' of shape"),
    "factors": (lambda m: Factored(m.parameters(), in_object=False), "Factored keeps a state 'factor_0' of shape"),
    "factors-in-objects": (
        lambda m: Factored(m.parameters(), in_object=True),
        r"Factored keeps a state 'preconditioner.statistics\[0\]' of shape",
    ),
    "factors-inside-sam": (lambda m: Sam(m.parameters(), Factored, in_object=True), "keeps a state 'preconditioner"),
    "notes-of-shapes": (lambda m: Noting(m.parameters()), "Noting keeps a state 'note.original_shape' that notes"),
    "numpy": (lambda m: InNumpy(m.parameters()), "InNumpy keeps a state 'buffer' that notes the shape"),
    "flat": (lambda m: Flat(m.parameters()), "Flat keeps an attribute 'flat' of shape"),
    "unkeyed": (lambda m: Unkeyed(m.parameters()), "nothing says which parameter it belongs to"),
    "masters": (lambda m: Masters(m.parameters(), show=True), "SGD inside another optimizer updates copies"),
    "hidden-masters": (lambda m: Masters(m.parameters(), show=False), "SGD inside another optimizer updates copies"),
    "a-copy-of-the-model": (lambda m: WithCopy(m, copy.deepcopy(m)), "copy of the model in its attribute 'average'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_at_construction(name: str) -> None:
    make, message = REFUSED[name]
    model, x = small_net("out-of-place", torch.float32)
    optimizer = make(model)
    before = snapshot(model)
    entries = [sorted(vars(o)) for one in listed(optimizer) for o in chain(one)]
    with pytest.raises(InputError, match=message) as caught:
        PruneTrain(model, optimizer, (x,))
    assert "\n" not in str(caught.value)
    assert same(before, snapshot(model))
    assert entries == [sorted(vars(o)) for one in listed(optimizer) for o in chain(one)]
    assert not any(getattr(o, "state", None) for one in listed(optimizer) for o in chain(one))


def test_state_from_the_construction_on_and_schedules_are_tried_too() -> None:
    model, x = small_net("out-of-place", torch.float32)
    optimizer = Masked(model.parameters())
    before, chance = snapshot(model), optimizer.schedule.random.getstate()
    with pytest.raises(InputError, match=r"Masked keeps a state 'seen' of shape \(\d+,\) for a parameter of shape"):
        PruneTrain(model, optimizer, (x,))
    assert same(before, snapshot(model))
    assert all(set(optimizer.state[p]) == {"mask"} for p in model.parameters())
    assert optimizer.schedule.random.getstate() == chance
    assert all(p.grad is None for p in (*model.parameters(), optimizer.schedule.angle))


@pytest.mark.parametrize("name", ["adafactor", "lbfgs", "factors", "factors-in-objects", "notes-of-shapes"])
def test_is_refused_before_anything_is_touched(name: str) -> None:
    make, message = REFUSED[name]
    model, x = small_net("out-of-place")
    optimizer = make(model)

    def closure() -> Tensor:
        model.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    closure()
    optimizer.step(closure)
    graph = traced(model, x)
    kill(graph, model)
    keep = graph.keep(model)
    before = snapshot(model, optimizer)
    with pytest.raises(InputError, match=message.split(" of shape")[0]):
        reconfigure(model, optimizer, keep)
    assert same(before, snapshot(model, optimizer))


def test_shards_are_refused(tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed.optim import ZeroRedundancyOptimizer

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model, x = small_net("out-of-place")
        optimizer = ZeroRedundancyOptimizer(model.parameters(), optim.SGD, lr=0.1, momentum=0.9)
        with pytest.raises(InputError, match="ZeroRedundancyOptimizer keeps its state in shards"):
            PruneTrain(model, optimizer, (x,))
    finally:
        distributed.destroy_process_group()


def test_a_copy_that_follows_may_be_the_optimizers() -> None:
    model, x = small_net("out-of-place")
    average = copy.deepcopy(model)
    PruneTrain(model, WithCopy(model, average), (x,), also=[average])


def test_an_optimizer_of_something_else_inside() -> None:
    """An optimizer that borrows a schedule: the one inside has another parameter, which is no copy of the model's."""
    model, x = small_net("out-of-place")
    optimizer = momentum(model.parameters())
    optimizer.warm_up = optim.lr_scheduler.StepLR(optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), 1)
    optimizer.inner = optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    steps(model, optimizer, batches(x, 2))
    prunetrain = PruneTrain(model, optimizer, (x,), interval=1)
    rest_of(model, "blocks.0.conv2").zero_()
    report = prunetrain.reconfigure()
    assert report.reconfiguration.changed
    steps(model, optimizer, batches(x, 2))


LEADS_BACK: dict[str, Callable[[Any], Any]] = {
    "itself": lambda o: o,
    "its method": lambda o: o.zero_grad,
    "a function that holds it": lambda o: lambda: o.zero_grad(),
    "a list that holds it": lambda o: [o],
}


@pytest.mark.parametrize("name", LEADS_BACK)
def test_an_optimizer_that_leads_back_to_itself_is_not_wrapped(name: str) -> None:
    """It may hold another network's parameters too, which are no copies that a wrapper keeps."""
    model, x = small_net("out-of-place")
    other, _ = small_net("out-of-place")
    optimizer = momentum([*model.parameters(), *other.parameters()])
    optimizer.link = LEADS_BACK[name](optimizer)  # type: ignore[attr-defined]
    PruneTrain(model, optimizer, (x,))


def test_no_optimizer_at_all() -> None:
    model, x = small_net("out-of-place")
    for nothing in ([], None):
        with pytest.raises(InputError, match="needs the optimizer that trains the model"):
            PruneTrain(model, nothing, (x,))  # type: ignore[arg-type]
    for other in ("sgd", 3, optim.lr_scheduler.StepLR(momentum(model.parameters()), 1)):
        with pytest.raises(InputError, match="is no optimizer"):
            PruneTrain(model, other, (x,))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"does not hold the model's parameter 'fc\.weight'"):
        PruneTrain(model, [momentum(split(model)[1])], (x,))


# -- undone, once, scheduled -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLLOW)
def test_an_undone_pruning_leaves_what_it_keeps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from prunetrain_kernels.prune.optimizer_holdings import holdings_of
    from prunetrain_kernels.prune.optimizers import as_list, check_optimizers, drop, slice_state
    from prunetrain_kernels.prune.undo import AllOrNothing

    model, x = small_net("in-place-bottleneck")
    optimizer = FOLLOW[name](model)
    steps(model, optimizer, batches(x, 3))
    optimizers = as_list(optimizer)

    def kept() -> Any:
        holdings = holdings_of(optimizers, model)
        held = [
            (k.where, id(k.parameter), id(k.tensor), k.tensor.clone()) for k in holdings.kept if k.tensor is not None
        ]
        groups = [[list(map(id, g["params"])) for g in getattr(o, "param_groups", ())] for o in holdings.optimizers]
        return held, groups, sorted(id(p) for _, _, p in holdings.keyed), [len(each) for each, _ in holdings.beside]

    before = kept()
    weight, gone = model.get_submodule("blocks.0.conv1").weight, model.get_submodule("blocks.0.conv3").weight
    check_optimizers(model, optimizers, {id(weight), id(gone)})
    with AllOrNothing([model], optimizers):
        slice_state(optimizers, weight, lambda value: value[:3].clone())
        drop(optimizers, {id(gone)})
        assert not same(before, kept())
    assert same(before, kept())


def test_the_rate_of_each_group_grows_once() -> None:
    model, _ = small_net("out-of-place")
    rate = torch.tensor(0.1)
    shared = momentum([{"params": g} for g in split(model)])
    for group in shared.param_groups:
        group["lr"] = rate
    for optimizer in (
        Sam(model.parameters(), optim.SGD, lr=0.1),
        SlowOutside(momentum(model.parameters())),
        Prepared(Prepared(momentum(model.parameters()))),
        Warming(momentum(model.parameters())),
        [momentum(g) for g in split(model)],
        shared,
    ):
        groups = [g for one in listed(optimizer) for o in chain(one) for g in getattr(o, "param_groups", ())]
        old = [float(g["lr"]) for g in groups]
        scale_learning_rate(optimizer, None, 2.0)
        assert [float(g["lr"]) for g in groups] == pytest.approx([2 * lr for lr in old])


# -- the lasso, lists, the mini-batch, and files -----------------------------------------------------------------------


def test_several_optimizers_through_prunetrain() -> None:
    """The lasso is inside an update where one optimizer holds all weights that have one; the result is the same."""
    results = []
    for kinds in ((optim.SGD, optim.SGD), (SGD, optim.SGD), (optim.SGD, SGD), (SGD, SGD)):
        model, x = small_net("out-of-place")
        weights = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        optimizers = [cls(g, lr=0.05, momentum=0.9) for cls, g in zip(kinds, (weights, others), strict=True)]
        prunetrain = PruneTrain(
            model, optimizers, (x,), interval=1, batch=MiniBatch(4, granularity=4, maximum=8, budget_bytes=10**9)
        )
        assert prunetrain.lasso_inside == (kinds[0] is SGD)
        for batch in batches(x, 4):
            for optimizer in optimizers:
                optimizer.zero_grad()
            prunetrain.regularize((model(batch) - 1).square().mean()).backward()
            for optimizer in optimizers:
                optimizer.step()
        rest_of(model, "blocks.0.conv1")[2:5] = 0
        rest_of(model, "blocks.0.conv2")[:, 2:5] = 0
        report = prunetrain.epoch_end()
        assert report is not None
        assert report.batch is not None
        assert report.batch == 8  # and every rate has grown with it
        assert {g["lr"] for o in optimizers for g in o.param_groups} == {0.1}
        for optimizer in optimizers:
            optimizer.zero_grad()
        prunetrain.regularize((model(x) - 1).square().mean()).backward()
        for optimizer in optimizers:
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-10, atol=1e-12)


def test_the_lasso_of_the_optimizer_that_steps() -> None:
    """Two optimizers that step one after the other: together they add what one addition adds."""
    (model, x), (twin, _) = small_net("out-of-place"), small_net("out-of-place")
    optimizers = [momentum(g) for g in split(model)]
    apart, at_once = PruneTrain(model, optimizers, (x,)), PruneTrain(twin, momentum(twin.parameters()), (x,))
    for network in (model, twin):
        (network(x) - 1).square().mean().backward()
    for optimizer in optimizers:
        apart.add_gradient_(torch.tensor(1.0), optimizer)
    at_once.add_gradient_(torch.tensor(1.0))
    assert apart.last_penalty is not None
    assert float(apart.last_penalty) == pytest.approx(float(at_once.last_penalty))  # type: ignore[arg-type]
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


SAVED = ["sam-sgd", "lookahead-inside", "lookahead-outside", "prepared", "prepared-lookahead-sam", "no-groups",
         "two-sgd", "sgd-and-ours", "lookahead-and-adam", "rprop", "state-list"]  # fmt: skip


@pytest.mark.parametrize("name", SAVED)
def test_saved_and_loaded_it_trains_on_alike(name: str, tmp_path: Path) -> None:
    model, optimizer, _, _, _, x = pruned_beside_its_twin(FOLLOW[name])
    steps(model, optimizer, batches(x, 2, seed=3))
    save_pruned(tmp_path / "a.pt", model, optimizer)
    fresh, _ = small_net("in-place-bottleneck", seed=1)
    other = FOLLOW[name](fresh)
    load_pruned(tmp_path / "a.pt", fresh, other)
    for one in listed(other):
        groups = [id(g) for g in getattr(one, "param_groups", ())]
        for inner in chain(one)[1:]:
            assert not groups or groups == [id(g) for g in inner.param_groups]  # what was shared is shared
    for batch in batches(x, 4, seed=4):
        steps(model, optimizer, [batch])
        steps(fresh, other, [batch])
        assert torch.equal(model(batch), fresh(batch))


def test_files_of_other_optimizers(tmp_path: Path) -> None:
    model, _ = small_net("out-of-place")
    save_pruned(tmp_path / "two.pt", model, [momentum(g) for g in split(model)])
    save_pruned(tmp_path / "one.pt", model, momentum(model.parameters()))
    save_pruned(tmp_path / "sam.pt", model, Sam(model.parameters(), optim.SGD, lr=0.1))
    before = snapshot(model)
    for file, optimizer, message in (
        ("two.pt", momentum(model.parameters()), "holds the states of 2 optimizers, and 1 were passed"),
        ("one.pt", [momentum(g) for g in split(model)], "holds the states of 1 optimizers, and 2 were passed"),
        ("sam.pt", momentum(model.parameters()), "wraps 1 others, and here it wraps 0"),
        ("one.pt", [momentum(split(model)[0])], "groups of"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_pruned(tmp_path / file, model, optimizer)
        assert same(before, snapshot(model))
    load_pruned(tmp_path / "one.pt", model, [momentum(model.parameters())])


def test_what_no_state_dict_restores_is_said(tmp_path: Path) -> None:
    model, optimizer, _, _, _, _ = pruned_beside_its_twin(FOLLOW["lookahead-lists"])
    save_pruned(tmp_path / "a.pt", model, optimizer)
    fresh, _ = small_net("in-place-bottleneck")
    other = FOLLOW["lookahead-lists"](fresh)
    with pytest.raises(CheckpointError, match="build the optimizer anew from the loaded model"):
        load_pruned(tmp_path / "a.pt", fresh, other)
