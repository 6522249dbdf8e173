"""SGD with the lasso inside against `torch.optim.SGD` beside it, and the proximal variant."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetrain_kernels import GroupLasso, InputError, PruneTrain
from prunetrain_kernels.models import resnet20
from prunetrain_kernels.optim import SGD, ProximalSGD

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3])


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 9, 3), nn.BatchNorm2d(9), nn.ReLU(), nn.Conv2d(9, 6, 3), nn.Flatten(), nn.Linear(6 * 16, 4)
    )


def losses(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, lasso: tuple[GroupLasso, float] | None = None
) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X + step), Y)
        if lasso is not None:
            loss = loss + lasso[1] * lasso[0].penalty()
        loss.backward()
        optimizer.step()


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9, "weight_decay": 5e-4},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "dampening": {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1},
    "maximize": {"momentum": 0.5, "maximize": True},
    "tensor": {"lr": torch.tensor(0.05), "momentum": 0.9},
    "fused-and-foreach": {"momentum": 0.9, "foreach": True, "fused": False},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_is_torchs_sgd_bit_for_bit(name: str) -> None:
    a, b = small(), small()
    options = {"lr": 0.05, **OPTIONS[name]}
    theirs, mine = torch.optim.SGD(a.parameters(), **options), SGD(b.parameters(), **options)
    losses(a, theirs, 4)
    losses(b, mine, 4)
    assert equal(a, b)
    saved = mine.state_dict()
    assert saved["state"].keys() == theirs.state_dict()["state"].keys()
    ignored = {"foreach", "fused"}
    for ours, other in zip(saved["param_groups"], theirs.state_dict()["param_groups"], strict=True):
        assert ours.keys() == other.keys()
        assert all(ours[k] == other[k] for k in ours.keys() - ignored)
    # both load each other's state and go on alike
    theirs.load_state_dict(copy.deepcopy(saved))
    swapped = SGD(b.parameters(), **options)
    swapped.load_state_dict(copy.deepcopy(theirs.state_dict()))
    losses(a, theirs, 3)
    losses(b, swapped, 3)
    assert equal(a, b)


def test_groups_and_a_scheduler() -> None:
    models, optimizers = [small(), small()], []
    for cls, model in zip((torch.optim.SGD, SGD), models, strict=True):
        groups = [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 1e-2, "lr": 0.02},
            {"params": [p for p in model.parameters() if p.dim() == 1], "momentum": 0.0},
        ]
        optimizer = cls(groups, lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for _ in range(3):
            losses(model, optimizer, 2)
            scheduler.step()
        optimizers.append(optimizer)
    assert equal(*models)
    assert isinstance(optimizers[1], torch.optim.SGD)


@pytest.mark.parametrize("dampening", [0.0, 0.4])
def test_the_lasso_inside_is_the_lasso_in_the_loss(dampening: float) -> None:
    a, b = small().double(), small().double()
    global X
    x, X = X, X.double()
    try:
        lassos = [GroupLasso(m, (X,)) for m in (a, b)]
        theirs = torch.optim.SGD(a.parameters(), 0.05, 0.9, dampening, 1e-3)
        mine = SGD(b.parameters(), 0.05, 0.9, dampening, 1e-3)
        mine.regularize_with(lassos[1], 0.01)
        losses(a, theirs, 6, (lassos[0], 0.01))
        losses(b, mine, 6)
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
        assert mine.penalty().item() == pytest.approx(lassos[1].penalty().item(), rel=1e-13)
        mine.regularize_with(None)
        before = copy.deepcopy(b)
        optimizer = torch.optim.SGD(before.parameters(), 0.05, 0.9, dampening, 1e-3)
        optimizer.load_state_dict(copy.deepcopy(mine.state_dict()))
        losses(b, mine, 2)
        losses(before, optimizer, 2)
        assert equal(b, before)
    finally:
        X = x


@pytest.mark.parametrize("write", ["copy_", "load", "data", "data-in-place"])
def test_writes_from_outside_are_noticed(write: str) -> None:
    model = small()
    lasso = GroupLasso(model, (X,))
    optimizer = SGD(model.parameters(), 0.05, 0.9)
    optimizer.regularize_with(lasso, 0.01)
    losses(model, optimizer, 2)
    weight = model[3].weight
    if write == "copy_":
        with torch.no_grad():
            weight.mul_(3)
    elif write == "load":
        model.load_state_dict(small(1).state_dict())
    elif write == "data":
        weight.data = weight.data * 3
    else:
        weight.data.mul_(3)
        optimizer.forget_norms()  # the one kind that PyTorch does not record
    assert optimizer.penalty().item() == pytest.approx(lasso.penalty().item(), rel=1e-6)
    sizes = optimizer.slice_max_abs()[weight]
    assert torch.equal(sizes[1], weight.detach().abs().amax((1, 2, 3)))
    twin = copy.deepcopy(model)
    plain = torch.optim.SGD(twin.parameters(), 0.05, 0.9)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    losses(model, optimizer, 1)
    losses(twin, plain, 1, (GroupLasso(twin, (X,)), 0.01))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("cls", [SGD, ProximalSGD])
def test_gradient_scaling_and_a_skipped_step(cls: type[SGD]) -> None:
    a, b = small(), small()
    optimizers = [cls(m.parameters(), 0.05, 0.9, 0.3, 1e-3) for m in (a, b)]
    for model, optimizer in zip((a, b), optimizers, strict=True):
        optimizer.regularize_with(GroupLasso(model, (X,)), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = X.clone()
    x[0, 0, 0, 0] = math.inf  # the very first step is skipped
    for inputs in (x, X, x, X, X):
        before = copy.deepcopy((a.state_dict(), optimizers[0].state_dict(), optimizers[0].penalty()))
        buffers = {name: t.clone() for name, t in a.named_buffers()}
        optimizers[0].zero_grad()
        scaler.scale(F.cross_entropy(a(inputs), Y)).backward()
        scaler.step(optimizers[0])
        scaler.update()
        if inputs is x:
            for name, t in a.named_buffers():
                t.copy_(buffers[name])
            after = (a.state_dict(), optimizers[0].state_dict(), optimizers[0].penalty())
            assert str(before) == str(after)
            assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
            continue
        losses_once(b, optimizers[1], inputs)
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def losses_once(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), Y).backward()
    optimizer.step()


def test_a_weight_that_the_loss_does_not_reach_is_regularised_too() -> None:
    model = small()
    lasso = GroupLasso(model, (X,))
    optimizer = SGD(model.parameters(), 0.05)
    optimizer.regularize_with(lasso, 0.01)
    before = model[0].weight.detach().clone()
    model[0].weight.requires_grad_(False)
    losses(model, optimizer, 1)
    assert torch.equal(model[0].weight, before)  # frozen stays frozen
    model[0].weight.requires_grad_(True)
    optimizer.zero_grad()
    model[5](torch.randn(4, 96)).sum().backward()
    optimizer.step()
    gradient = before / (before.flatten(1).norm(dim=1).square() + 1e-8).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(model[0].weight.detach(), before - 0.05 * 0.01 * gradient)


def run(
    inside: bool, fuse: bool, device: torch.device, steps: int = 60, nudge: float = 0.0
) -> tuple[nn.Module, list[tuple[int, ...]]]:
    torch.manual_seed(0)
    model = resnet20().to(device)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + nudge)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(64, 3, 8, 8, generator=generator).to(device)
    labels = torch.randint(0, 10, (64,), generator=generator).to(device)
    cls = SGD if inside else torch.optim.SGD
    optimizer = cls(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    prunetrain = PruneTrain(model, optimizer, (images[:2],), penalty_ratio=0.3, interval=1, fuse=fuse)
    shapes = []
    for step in range(steps):
        batch = torch.arange(16) + 16 * (step % 4)
        optimizer.zero_grad()
        prunetrain.regularize(F.cross_entropy(model(images[batch]), labels[batch])).backward()
        optimizer.step()
        if step in (steps // 4, steps // 2):
            with torch.no_grad():  # channels die sooner than the lasso kills them
                for layer in ("layer1.0.conv1", "layer2.1.conv1", "layer3.2.conv1"):
                    block = model.get_submodule(layer.rsplit(".", 1)[0])
                    block.conv1.weight[1:4] = 0
                    block.conv2.weight[:, 1:4] = 0
            report = prunetrain.epoch_end()
            assert report is not None
            shapes.append(tuple(p.numel() for p in model.parameters()))
    assert len(set(shapes)) == 2
    return model, shapes


def apart(a: nn.Module, b: nn.Module) -> float:
    """Largest difference of two networks' parameters, relative to each parameter's largest entry."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float(((p - q).abs().max() / p.abs().max().clamp_min(1e-3)).detach()) for p, q in pairs)


def test_60_steps_through_two_reconfigurations(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lasso inside the update, and in the loss; same seed, fp32: equal bit for bit on a CPU.

    Elsewhere (`PRUNETRAIN_TEST_DEVICE=cuda` runs the kernels), and with fused batch norms, to rounding: 60 steps of
    training blow a rounding error up a thousandfold, so the yardstick is PyTorch's own run from weights that were
    nudged by one.
    """
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    (a, shapes), (b, others), (c, fused) = run(False, False, device), run(True, False, device), run(True, True, device)
    assert shapes == others == fused
    if device.type == "cpu":
        assert equal(a, b)
    by_rounding = apart(a, run(False, False, device, nudge=2**-23)[0])
    assert apart(a, b) <= 4 * by_rounding
    assert apart(a, c) <= 4 * by_rounding


@pytest.mark.t0
def test_kernels_train_as_torch_does(device: torch.device) -> None:
    a, b = small().to(device), small().to(device)
    x, y = X.to(device), Y.to(device)
    lassos = [GroupLasso(m, (x,)) for m in (a, b)]
    theirs = torch.optim.SGD(a.parameters(), 0.05, 0.9, weight_decay=1e-3)
    mine = SGD(b.parameters(), 0.05, 0.9, weight_decay=1e-3)
    mine.regularize_with(lassos[1], 0.01)
    for _ in range(4):
        for model, optimizer in ((a, theirs), (b, mine)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            (loss + 0.01 * lassos[0].penalty() if model is a else loss).backward()
            optimizer.step()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert mine.penalty().item() == pytest.approx(lassos[1].penalty().item(), rel=1e-6)


def test_proximal_makes_exact_zeros_and_sgd_does_not() -> None:
    counts = []
    for cls in (SGD, ProximalSGD):
        model = small()
        optimizer = cls(model.parameters(), lr=0.05, momentum=0.9)
        optimizer.regularize_with(GroupLasso(model, (X,)), 0.05)
        losses(model, optimizer, 60)
        counts.append(sum(int((m.weight.flatten(1).abs().amax(1) == 0).sum()) for m in (model[0], model[3])))
        assert optimizer.penalty().item() == pytest.approx(optimizer.lasso.penalty().item(), rel=1e-5)
    assert counts[0] == 0
    assert counts[1] > 0


def test_proximal_step_is_sgd_then_the_threshold() -> None:
    model, twin = small(), small()
    coefficient, rate = torch.tensor(0.03), torch.tensor(0.05)
    optimizer = ProximalSGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-3)
    optimizer.regularize_with(GroupLasso(model, (X,)), coefficient)
    plain = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    losses(model, optimizer, 1)
    losses(twin, plain, 1)
    t = 0.05 * 0.03 / (1 - 0.9)
    w = twin[3].weight.detach()
    n_in, n_out = w.pow(2).sum((0, 2, 3)).sqrt(), w.pow(2).sum((1, 2, 3)).sqrt()
    expected = w * (1 - t / n_in).clamp_min(0).view(1, -1, 1, 1) * (1 - t / n_out).clamp_min(0).view(-1, 1, 1, 1)
    torch.testing.assert_close(model[3].weight.detach(), expected)
    w = twin[0].weight.detach()  # the network's input channels are no groups
    expected = w * (1 - t / w.flatten(1).norm(dim=1)).clamp_min(0).view(-1, 1, 1, 1)
    torch.testing.assert_close(model[0].weight.detach(), expected)
    assert torch.equal(model[0].bias, twin[0].bias)


def test_copies_keep_their_lasso() -> None:
    model = small()
    optimizer = SGD(model.parameters(), 0.05, 0.9)
    optimizer.regularize_with(GroupLasso(model, (X,)), 0.01)
    losses(model, optimizer, 1)
    other_model, other = copy.deepcopy((model, optimizer))
    losses(model, optimizer, 2)
    losses(other_model, other, 2)
    assert equal(model, other_model)


def test_bad_input() -> None:
    model = small()
    lasso = GroupLasso(model, (X,))
    optimizer = SGD(model.parameters(), 0.1)
    with pytest.raises(InputError, match="no derivative"):
        SGD(model.parameters(), 0.1, differentiable=True)
    with pytest.raises(ValueError, match="learning rate"):
        SGD(model.parameters(), -1.0)
    for coefficient in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="must be 0 or more"):
            optimizer.regularize_with(lasso, coefficient)
    with pytest.raises(InputError, match="does not hold"):
        SGD(small().parameters(), 0.1).regularize_with(lasso, 0.1)
    with pytest.raises(InputError, match="has no lasso"):
        optimizer.penalty()
    embedding = nn.Embedding(5, 3, sparse=True)
    sparse = SGD(embedding.parameters(), 0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        sparse.step()
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0  # a closure's loss comes back; nothing to update
