"""The optimizers with a lasso whose layers differ in strength, against the same lasso in the loss and against numpy."""

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_optimizers import X, Y, equal, losses, losses_once, small
from torch import Tensor, nn

from prunetrain_kernels import GroupLasso, PruneTrain
from prunetrain_kernels.models import resnet20
from prunetrain_kernels.optim import SGD, ProximalSGD
from prunetrain_kernels.optim import sgd as optimizers

T0_BACKENDS = ("reference", "kernels", "native")

MIXED = {"0": 0.3, "5": 3.0}  # "3" has 1
LEFT_OUT = {"0": 0.0, "3": 1.7}


def with_lasso(
    cls: type[SGD], model: nn.Module, coefficients: Mapping[str, float], coefficient: Any = 0.01, **options: Any
) -> SGD:
    optimizer = cls(model.parameters(), **{"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3} | options)
    lasso = GroupLasso(model, (torch.zeros(1, 3, 8, 8),), coefficients=coefficients)
    optimizer.regularize_with(lasso, coefficient)
    return optimizer


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"maximize": True}, {"momentum": 0.0}], ids=str)
@pytest.mark.parametrize("coefficients", [MIXED, LEFT_OUT, {"": 2.0}], ids=str)
def test_inside_is_in_the_loss(coefficients: dict[str, float], options: dict[str, Any]) -> None:
    a, b = small(), small()
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3} | options
    lasso = GroupLasso(a, (X,), coefficients=coefficients)
    mine = with_lasso(SGD, b, coefficients, **options)
    a, b, x = a.double(), b.double(), X.double()
    theirs = torch.optim.SGD(a.parameters(), **settings)
    sign = -1 if options.get("maximize") else 1  # under which a penalty is taken off what grows
    for step in range(6):
        for model, optimizer in ((a, theirs), (b, mine)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x + step), Y)
            (loss + sign * 0.01 * lasso.penalty() if model is a else loss).backward()
            optimizer.step()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    assert mine.lasso is not None
    assert mine.penalty().item() == pytest.approx(mine.lasso.penalty().item(), rel=1e-13)
    assert mine.penalty().item() == pytest.approx(lasso.penalty().item(), rel=1e-11)
    sizes = mine.slice_max_abs()
    assert set(sizes) == set(mine.lasso.weights()[0])
    assert all(torch.equal(s[1], w.detach().abs().flatten(1).amax(1)) for w, s in sizes.items())


@pytest.mark.parametrize("native", [True, False])
def test_bit_for_bit_through_a_reconfiguration(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 on a CPU, with multipliers that round nothing (powers of two), which layers keep in the new shape."""
    monkeypatch.setattr("prunetrain_kernels.ops.native.ENABLED", native)
    coefficients = {"layer1": 0.5, "layer2.1.conv1": 4.0, "layer3": 2.0, "layer3.0": 0.0, "": 0.25}
    results = []
    for cls, multipliers in ((torch.optim.SGD, coefficients), (SGD, coefficients), (SGD, {})):
        torch.manual_seed(0)
        model, images = resnet20(), torch.randn(16, 3, 8, 8)
        optimizer = cls(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
        prunetrain = PruneTrain(model, optimizer, (images[:2],), penalty_ratio=0.3, interval=1, fuse=False)
        strengthen(prunetrain, multipliers)
        for step in range(16):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), torch.arange(16) % 10)
            prunetrain.regularize(loss).backward()
            optimizer.step()
            if step == 7:
                with torch.no_grad():
                    for block in (model.layer2[1], model.layer3[0]):
                        block.conv1.weight[1:4] = 0
                        block.conv2.weight[:, 1:4] = 0
                assert prunetrain.epoch_end().reconfiguration.changed
                assert model.layer2[1].conv1.out_channels == 29
                assert prunetrain.lasso.coefficients == multipliers
        assert prunetrain.lasso_inside == (cls is SGD)
        results.append((model, prunetrain.coefficient))
    (outside, one), (inside, other), (plain, _) = results
    assert one == other
    assert equal(outside, inside)
    assert not equal(plain, inside)


def strengthen(prunetrain: PruneTrain, coefficients: Mapping[str, float]) -> None:
    """Gives PruneTrain a lasso with multipliers, before its first step."""
    lasso = GroupLasso(prunetrain.model, (), graph=prunetrain.graph, coefficients=coefficients)
    prunetrain.present = dataclasses.replace(prunetrain.present, lasso=lasso)


@pytest.mark.parametrize("coefficients", [MIXED, LEFT_OUT], ids=str)
@pytest.mark.parametrize("cls", [SGD, ProximalSGD])
def test_skipped_steps_change_nothing(cls: type[SGD], coefficients: dict[str, float]) -> None:
    """The norms of the weights, which the next step needs, included: afterwards all is as without the skipped steps."""
    a, b = small(), small()
    ours, calm = with_lasso(cls, a, coefficients), with_lasso(cls, b, coefficients)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, backoff_factor=0.5, growth_interval=100)
    bad = X.clone()
    bad[0, 0, 0, 0] = math.inf
    for inputs in (bad, X, bad, bad, X + 1, X):
        before = copy.deepcopy((a.state_dict(), ours.state_dict()["state"]))
        penalty, sizes = ours.penalty(), [torch.cat(pair) for pair in ours.slice_max_abs().values()]
        buffers = {name: t.clone() for name, t in a.named_buffers()}
        ours.zero_grad()
        scaler.scale(F.cross_entropy(a(inputs), Y)).backward()
        scaler.step(ours)
        scaler.update()
        if inputs is not bad:
            losses_once(b, calm, inputs)
            assert equal(a, b)  # the scale is a power of two
            continue
        for name, t in a.named_buffers():
            t.copy_(buffers[name])
        assert all(torch.equal(before[0][k], t) for k, t in a.state_dict().items())
        assert str(before[1]) == str(ours.state_dict()["state"])
        assert torch.equal(ours.penalty(), penalty)
        assert all(torch.equal(torch.cat(p), s) for p, s in zip(ours.slice_max_abs().values(), sizes, strict=True))
    assert ours.lasso is not None
    assert ours.penalty().item() == pytest.approx(ours.lasso.penalty().item(), rel=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("as_tensors", [False, True])
def test_a_proximal_step_is_numpys(as_tensors: bool, momentum: float) -> None:
    """Thresholds by parameter group and multiplier: two learning rates, three multipliers, over three layers."""
    model, twin = small(), small()
    rates, strength = (0.05, 0.02), 0.03
    groups = [[[m[0].weight, m[3].weight], [m[0].bias, m[3].bias, *m[1].parameters(), *m[5].parameters()]]
              for m in (model, twin)]  # fmt: skip
    ours, plain = (
        [{"params": params, "lr": torch.tensor(lr) if tensors else lr} for params, lr in zip(parts, rates, strict=True)]
        for parts, tensors in zip(groups, (as_tensors, False), strict=True)
    )
    optimizer = ProximalSGD(ours, lr=0.05, momentum=momentum, dampening=0.5)
    lasso = GroupLasso(model, (X,), coefficients={"0": 2.5, "3": 0.4})
    optimizer.regularize_with(lasso, torch.tensor(strength) if as_tensors else strength)
    losses(model, optimizer, 1)
    losses(twin, torch.optim.SGD(plain, lr=0.05, momentum=momentum, dampening=0.5), 1)
    unit = strength * (0.5 / (1 - momentum) if momentum else 1.0)
    for layer, block, sides, t in (
        (0, 1, (1,), rates[0] * unit * 2.5),
        (3, 1, (0, 1), rates[0] * unit * 0.4),
        (5, 16, (0,), rates[1] * unit),
    ):
        w = twin[layer].weight.detach().double().numpy()
        cube = w.reshape(w.shape[0], w.shape[1] // block, -1)
        expected = cube.copy()
        for side in sides:  # 0: input channels, 1: output channels
            norm = np.sqrt(np.square(cube).sum((0, 2) if side == 0 else (1, 2)))
            shrunk = np.maximum(0, 1 - t / norm)
            expected *= shrunk[None, :, None] if side == 0 else shrunk[:, None, None]
        np.testing.assert_allclose(
            model[layer].weight.detach().numpy(), expected.reshape(w.shape), rtol=2e-6, atol=1e-8
        )
    assert optimizer.penalty().item() == pytest.approx(lasso.penalty().item(), rel=1e-6)


@pytest.mark.parametrize("coefficients", [MIXED, LEFT_OUT], ids=str)
@pytest.mark.parametrize("cls", [SGD, ProximalSGD])
def test_through_the_dispatcher(
    cls: type[SGD], coefficients: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator, as tracing and compiling see it, does what the eager call does."""
    models = small(), small()
    for model, eager in zip(models, (True, False), strict=True):
        monkeypatch.setattr(optimizers, "is_eager", lambda _, eager=eager: eager)
        optimizer = with_lasso(cls, model, coefficients, 0.05)
        losses(model, optimizer, 3)
        for found_inf in (1.0, 0.0):
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(found_inf)
            optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        losses(model, optimizer, 2)
        assert optimizer.lasso is not None
        assert optimizer.penalty().item() == pytest.approx(optimizer.lasso.penalty().item(), rel=1e-6)
    assert equal(*models)


def test_a_frozen_layer_and_one_that_thaws() -> None:
    """Multipliers stay with their weights where only some of these are trained."""
    a, b = small(), small()
    mine, theirs = with_lasso(SGD, a, MIXED), torch.optim.SGD(b.parameters(), 0.05, 0.9, weight_decay=1e-3)
    lasso = GroupLasso(b, (X,), coefficients=MIXED)
    for frozen in (True, False):
        for model in (a, b):
            model[0].requires_grad_(not frozen)
        losses(a, mine, 2)
        losses(b, theirs, 2, (lasso, 0.01))
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_weights_written_from_outside_another_lasso_and_copies() -> None:
    model = small()
    optimizer = with_lasso(SGD, model, MIXED)
    losses(model, optimizer, 2)
    model.load_state_dict(small(1).state_dict())
    assert optimizer.lasso is not None
    assert optimizer.penalty().item() == pytest.approx(optimizer.lasso.penalty().item(), rel=1e-6)
    other_model, other = copy.deepcopy((model, optimizer))
    losses(model, optimizer, 2)
    losses(other_model, other, 2)
    assert equal(model, other_model)
    for one, network in ((optimizer, model), (other, other_model)):  # the second has another one in between
        if one is other:
            one.regularize_with(GroupLasso(network, (X,), coefficients={"3": 9.0}), 0.01)
            one.penalty()
        one.regularize_with(GroupLasso(network, (X,), coefficients=LEFT_OUT), 0.01)
        losses(network, one, 2)
    assert equal(model, other_model)
    assert optimizer.penalty().item() == pytest.approx(optimizer.lasso.penalty().item(), rel=1e-6)


def test_a_layer_left_out_is_none_of_the_lassos() -> None:
    """Its optimizer need not be this one, and a weight without a gradient is left alone."""
    model = small()
    optimizer = SGD([p for layer in model[1:] for p in layer.parameters()], 0.05)
    optimizer.regularize_with(GroupLasso(model, (X,), coefficients=LEFT_OUT), 0.01)
    before = model[0].weight.detach().clone()
    model[5](torch.randn(4, 96)).sum().backward()
    optimizer.step()
    assert model[0].weight.grad is None
    assert torch.equal(model[0].weight, before)


@pytest.mark.t0
@pytest.mark.parametrize("spares", [False, True], ids=["all", "spared"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cls", [SGD, ProximalSGD])
def test_on_every_backend(
    cls: type[SGD], dtype: torch.dtype, spares: bool, path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the formulas in float64 that see the same gradients, with a skipped step in between."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Conv2d(9, 6, 3), nn.Flatten(), nn.Linear(96, 4))
    model, wide = model.to(device, dtype), copy.deepcopy(model).to(device, dtype).double()
    coefficients = {"0": 3.0, "2": 0.3}
    optimizer = cls(model.parameters(), 0.05, 0.9)
    lasso = GroupLasso(model, (torch.zeros(1, 3, 8, 8, device=device, dtype=dtype),), coefficients=coefficients)
    if spares:
        lasso = lasso.sparing(
            {name: (torch.arange(len(n.inputs)) % 3 == 1, torch.arange(len(n.outputs)) % 2 == 0)
             for name, n in lasso.slice_norms().items()}
        )  # fmt: skip
        monkeypatch.setitem(globals(), "SPARED", ((3, 1), (2, 0)))
    optimizer.regularize_with(lasso, 0.02)
    exact = torch.optim.SGD(wide.parameters(), 0.05, 0.9)
    for step, skipped in enumerate((False, True, False)):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(model.parameters(), wide.parameters(), strict=True):
            p.grad = (torch.randn(p.shape, generator=generator) * 0.1).to(device, dtype)
            q.grad = p.grad.double()
        optimizer.grad_scale = torch.tensor(1.0, device=device)
        optimizer.found_inf = torch.tensor(float(skipped), device=device)
        optimizer.step()
        if not skipped:
            exact_step(exact, wide, cls is ProximalSGD)
    for p, q in zip(model.parameters(), wide.parameters(), strict=True):
        p, q = p.detach().double(), q.detach()
        assert float((p - q).abs().max()) <= 6 * torch.finfo(dtype).eps * float(q.abs().max())
    assert optimizer.penalty().item() == pytest.approx(by_hand(model).item(), rel=1e-5)
    assert lasso.penalty().item() == pytest.approx(by_hand(model).item(), rel=1e-5)
    check_gradients(lasso, model, dtype)


def check_gradients(lasso: GroupLasso, model: nn.Module, dtype: torch.dtype) -> None:
    wide = copy.deepcopy(model).double()
    wide.zero_grad()
    by_hand(wide).backward()
    for how in (lambda: lasso.penalty().backward(), lambda: lasso.add_gradient_(1.0)):
        model.zero_grad()
        how()
        for layer in (0, 2, 4):
            found, expected = model[layer].weight.grad.double(), wide[layer].weight.grad
            assert float((found - expected).abs().max()) <= 6 * torch.finfo(dtype).eps * float(expected.abs().max())


SPARED: tuple[tuple[int, int], ...] = ()  # by side: slices with this remainder have no lasso
SIDES = {0: (1, (1,), 3.0), 2: (1, (0, 1), 0.3), 4: (16, (0,), 1.0)}  # block, sides, multiplier


def norms(model: nn.Module, eps: float) -> list[tuple[Tensor, int, Tensor, Tensor]]:
    found = []
    for layer, (block, sides, multiplier) in SIDES.items():
        weight = model[layer].weight.double()
        cube = weight.reshape(weight.shape[0], weight.shape[1] // block, -1)
        for side in sides:
            norm = (cube.square().sum((0, 2) if side == 0 else (1, 2)) + eps).sqrt()
            factors = torch.full_like(norm, multiplier)
            if SPARED:
                factors[torch.arange(len(norm), device=norm.device) % SPARED[side][0] == SPARED[side][1]] = 0
            found.append((model[layer].weight, side, factors, norm))
    return found


def by_hand(model: nn.Module) -> Tensor:
    return sum((multiplier * norm).sum() for _, _, multiplier, norm in norms(model, 1e-8))  # type: ignore[return-value]


def exact_step(optimizer: torch.optim.SGD, model: nn.Module, proximal: bool) -> None:
    """One step of plain SGD with the penalty's gradient by autograd, or with a soft-threshold after it."""
    if not proximal:
        (0.02 * by_hand(model)).backward()
        optimizer.step()
        return
    optimizer.step()
    with torch.no_grad():
        found = norms(model, 0.0)  # of both sides before either is shrunk
        for weight, side, multiplier, norm in found:
            keep = (1 - 0.05 * 0.02 / (1 - 0.9) * multiplier / norm).clamp_min(0)
            cube = weight.view(weight.shape[0], len(norm) if side == 0 else weight.shape[1], -1)
            cube *= keep.view(1, -1, 1) if side == 0 else keep.view(-1, 1, 1)
