"""The lasso added by a hook of the optimizer: trainers that clip and step inside one call of theirs."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetrain_kernels import PruneTrain
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.optim import SGD, ProximalSGD

X = torch.randn(6, 2, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (6,), generator=torch.Generator().manual_seed(2))
Step = Callable[[nn.Module, Any], None]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(4, 3),
    ).double()  # fmt: skip


def backward(model: nn.Module, part: slice = slice(None), share: float = 1.0) -> Tensor:
    loss = F.cross_entropy(model(X[part].double()), Y[part])
    (loss * share).backward()
    return loss


# -- trainers that hide their step -------------------------------------------------------------------------------------


def clipping(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    backward(model)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


def accumulating(model: nn.Module, optimizer: Any) -> None:
    """Two parts of a batch, one update, clipped."""
    optimizer.zero_grad()
    for part in (slice(0, 3), slice(3, 6)):
        backward(model, part, 0.5)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


def by_closure(model: nn.Module, optimizer: Any) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = backward(model)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        return loss

    optimizer.step(closure)


def by_named_closure(model: nn.Module, optimizer: Any) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(model)

    optimizer.step(closure=closure)


def scaled(model: nn.Module, optimizer: Any) -> None:
    """What timm's NativeScaler and Accelerate do: scale, backward, unscale, clip, step, update, in one call."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(model(X.double()), Y)).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()


TRAINERS: list[Step] = [clipping, accumulating, by_closure, by_named_closure, scaled]
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "ours": lambda params: SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "proximal": lambda params: ProximalSGD(params, lr=0.05, momentum=0.9),
}


class ByHand:
    """An optimizer that a twin steps with: the lasso is added after all that the trainer does, before the update."""

    def __init__(self, optimizer: Any, prunetrain: PruneTrain) -> None:
        self.optimizer, self.prunetrain = optimizer, prunetrain

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        if closure is not None:
            closure()
        self.prunetrain.add_gradient_(torch.tensor(1.1))
        self.optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.__name__)
def test_the_hook_does_what_add_gradient_before_the_step_does(trainer: Step, kind: str) -> None:
    attached, by_hand = net(), net()
    one, other = OPTIMIZERS[kind](attached.parameters()), OPTIMIZERS[kind](by_hand.parameters())
    hooked = PruneTrain(attached, one, (X[:2].double(),), interval=100)
    twin = PruneTrain(by_hand, other, (X[:2].double(),), interval=100)
    hooked.attach(first_loss=1.1)
    stepping: Any = ByHand(other, twin)
    for _ in range(3):
        trainer(attached, one)
        if trainer is scaled:  # the scaler of the twin wants the optimizer itself
            _scaled_by_hand(by_hand, other, twin)
        else:
            trainer(by_hand, stepping)
    assert hooked.coefficient == twin.coefficient
    assert hooked.coefficient is not None
    for a, b in zip(attached.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(a, b)
    assert hooked.last_penalty is not None


def _scaled_by_hand(model: nn.Module, optimizer: Any, prunetrain: PruneTrain) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(model(X.double()), Y)).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    prunetrain.add_gradient_(torch.tensor(1.1))
    scaler.step(optimizer)
    scaler.update()


def test_clipping_does_not_reach_the_lasso() -> None:
    """With gradients clipped to nothing, what moves the weights is the lasso alone: lr * lambda * dR/dW."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    prunetrain = PruneTrain(model, optimizer, (X[:2].double(),), coefficient=0.01)
    prunetrain.attach()
    before = {id(p): p.detach().clone() for p in model.parameters()}
    expected = net()
    lasso_of = PruneTrain(expected, torch.optim.SGD(expected.parameters(), lr=0.5), (X[:2].double(),), coefficient=0.01)
    for p in expected.parameters():
        p.grad = torch.zeros_like(p)
    lasso_of.add_gradient_(torch.tensor(1.0))
    backward(model)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-12)
    optimizer.step()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert q.grad is not None
        assert torch.allclose(p, before[id(p)] - 0.5 * q.grad, atol=1e-10)


def test_a_skipped_step_has_no_lasso() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    PruneTrain(model, optimizer, (X[:2].double(),), coefficient=0.01).attach()
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(backward_of_infinity(model)).backward()
    scaler.step(optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def backward_of_infinity(model: nn.Module) -> Tensor:
    return model(X.double()).sum() * math.inf


class Sam(torch.optim.Optimizer):
    """An optimizer around another, two backward passes a step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.05, momentum=0.9)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base_optimizer.step()


def test_of_optimizers_around_others_the_inner_one_is_followed_once() -> None:
    model, twin = net(), net()
    outer, inner = Sam(model.parameters()), torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    PruneTrain(model, outer, (X[:2].double(),), coefficient=0.01).attach()
    PruneTrain(twin, inner, (X[:2].double(),), coefficient=0.01).attach()
    for _ in range(3):
        clipping(model, outer)
        clipping(twin, inner)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_each_of_several_optimizers_adds_to_its_own_weights() -> None:
    model, twin = net(), net()

    def halves(of: nn.Sequential) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(of[:3].parameters(), lr=0.05), torch.optim.SGD(of[3:].parameters(), lr=0.05)]

    two, one = halves(model), torch.optim.SGD(twin.parameters(), lr=0.05)
    PruneTrain(model, two, (X[:2].double(),), coefficient=0.01).attach()
    PruneTrain(twin, one, (X[:2].double(),), coefficient=0.01).attach()
    for _ in range(3):
        for optimizer in (*two, one):
            optimizer.zero_grad()
        backward(model)
        backward(twin)
        for optimizer in (*two, one):
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-12)


# -- pruning, copies, removal ------------------------------------------------------------------------------------------


def test_it_stays_attached_when_channels_go_and_after_a_resume() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    prunetrain = PruneTrain(model, optimizer, (X[:2].double(),), interval=1)
    prunetrain.attach(first_loss=1.1)
    clipping(model, optimizer)
    with torch.no_grad():
        model[0].weight[:2], model[0].bias[:2], model[3].weight[:, :2] = 0, 0, 0
        model[1].bias[:2] = 0
    report = prunetrain.epoch_end()
    assert report is not None
    assert model[0].out_channels == 4
    assert prunetrain.coefficient
    before = prunetrain.lasso.penalty()
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.step()  # without gradients of a loss: of the lasso alone
    assert prunetrain.lasso.penalty() < before
    state = prunetrain.state_dict()
    prunetrain.attachment.remove()
    prunetrain.load_state_dict(state)
    prunetrain.attach()  # lambda is known


def test_removing_and_copying() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    prunetrain = PruneTrain(model, optimizer, (X[:2].double(),), coefficient=0.01)
    with prunetrain.attach():
        with pytest.raises(InputError, match=r"attached to its optimizer.*remove"):
            prunetrain.regularize(torch.tensor(1.0))
        with pytest.raises(InputError, match="attached to its optimizer"):
            prunetrain.add_gradient_(torch.tensor(1.0))
        with pytest.raises(InputError, match="attached already"):
            prunetrain.attach()
        model_copy, copied = copy.deepcopy((model, prunetrain))
        assert copied.attachment is None
        assert copied.model is model_copy
        assert pickle.loads(pickle.dumps(prunetrain)).attachment is None
        assert prunetrain.attachment is not None
    assert prunetrain.attachment is None
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert prunetrain.regularize(torch.tensor(1.0)) > 1


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_loss", [0, -1.0, math.nan, math.inf, "2.3"])
def test_a_first_loss_must_be_a_positive_number(first_loss: Any) -> None:
    model = net()
    prunetrain = PruneTrain(model, torch.optim.SGD(model.parameters(), lr=0.1), (X[:2].double(),))
    with pytest.raises(InputError, match="first_loss must be a positive number"):
        prunetrain.attach(first_loss)
    with pytest.raises(InputError, match=r"needs the loss.*first_loss=2\.3.*coefficient"):
        prunetrain.attach()
    assert prunetrain.attachment is None


def test_a_step_that_unscales_inside_is_refused_at_the_first_one() -> None:
    model = net().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    PruneTrain(model, optimizer, (X[:2],), coefficient=0.01).attach()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(F.cross_entropy(model(X), Y)).backward()
    with pytest.raises(InputError, match=r"SGD unscales gradients inside its step.*fused=True"):
        scaler.step(optimizer)


@pytest.mark.parametrize("coefficient", [0, -1e-4, math.nan, math.inf, "1e-4", True])
def test_a_coefficient_must_be_a_positive_number(coefficient: Any) -> None:
    model = net()
    with pytest.raises(InputError, match=r"coefficient \(lambda\) must be a positive number"):
        PruneTrain(model, torch.optim.SGD(model.parameters(), lr=0.1), (X[:2].double(),), coefficient=coefficient)


def test_a_coefficient_is_lambda_from_the_first_step_on() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prunetrain = PruneTrain(model, optimizer, (X[:2].double(),), coefficient=3e-3)
    loss = torch.tensor(5.0, dtype=torch.float64)
    expected = loss + 3e-3 * prunetrain.lasso.penalty()
    assert torch.equal(prunetrain.regularize(loss), expected)
    assert prunetrain.coefficient == 3e-3
    with pytest.raises(InputError, match="penalty_ratio=0 means no lasso"):
        PruneTrain(model, optimizer, (X[:2].double(),), penalty_ratio=0, coefficient=1e-3)
