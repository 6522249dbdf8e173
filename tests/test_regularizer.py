"""The lasso of a whole model: which groups count, and lambda."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetrain_kernels import GroupLasso, InputError, PruneTrain, penalty_coefficient, reconfigure, trace_channels
from prunetrain_kernels.models import resnet20
from prunetrain_kernels.optim import SGD


class Net(nn.Module):
    """Conv, depthwise conv, residual branch, flatten to 2 x 2 pixels per channel, two linear layers, log-softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.conv1, self.conv2 = nn.Conv2d(6, 5, 1), nn.Conv2d(5, 6, 1)
        self.fc1, self.fc2 = nn.Linear(24, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.depthwise(self.first(x))))
        x = x + self.conv2(F.relu(self.conv1(x)))
        x = torch.flatten(F.adaptive_max_pool2d(x, 2), 1)
        return F.log_softmax(self.fc2(F.relu(self.fc1(x))), 1)


# layer -> (features per input channel, input groups count, output groups count)
COUNTED = {
    "first": (1, False, True),
    "conv1": (1, True, True),
    "conv2": (1, True, True),
    "fc1": (4, True, True),
    "fc2": (1, True, False),
}
X = (torch.linspace(-1, 1, 2 * 3 * 36).view(2, 3, 6, 6).double(),)


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def loop(model: nn.Module) -> float:
    """Eq. 2 slice by slice."""
    total = 0.0
    for name, (block, inputs, outputs) in COUNTED.items():
        weight = getattr(model, name).weight.detach()
        if inputs:
            for c in range(weight.shape[1] // block):
                total += math.sqrt(float((weight[:, c * block : (c + 1) * block] ** 2).sum()) + 1e-8)
        if outputs:
            for k in range(weight.shape[0]):
                total += math.sqrt(float((weight[k] ** 2).sum()) + 1e-8)
    return total


def test_penalty_is_equation_2() -> None:
    model = net()
    lasso = GroupLasso(model, X)
    assert lasso.penalty().item() == pytest.approx(loop(model), rel=1e-13)
    model.conv1.weight.data *= 3  # present weights, at every call
    assert lasso.penalty().item() == pytest.approx(loop(model), rel=1e-13)


def test_gradient_reaches_weights_and_nothing_else() -> None:
    model = net()
    lasso = GroupLasso(model, X)
    lasso.penalty().backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    assert {n for n, g in gradients.items() if g is not None} == {f"{name}.weight" for name in COUNTED}
    step = 1e-6
    for name in COUNTED:
        weight = getattr(model, name).weight
        index = tuple(s // 2 for s in weight.shape)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[index] += sign * step
            values.append(loop(model))
            with torch.no_grad():
                weight[index] -= sign * step
        assert weight.grad[index].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)

    model.zero_grad()
    assert lasso.add_gradient_(0.5).item() == pytest.approx(loop(model))
    for name, parameter in model.named_parameters():
        if gradients[name] is None:
            assert parameter.grad is None
        else:
            assert torch.allclose(parameter.grad, 0.5 * gradients[name], rtol=1e-12)


def test_groups_is_a_table_of_every_group() -> None:
    model = net()
    table = GroupLasso(model, X).groups()
    counts = {(layer, side): 0 for layer, side, *_ in table}
    for layer, side, *_ in table:
        counts[layer, side] += 1
    assert counts == {
        ("first", "out"): 6, ("conv1", "in"): 6, ("conv1", "out"): 5, ("conv2", "in"): 5, ("conv2", "out"): 6,
        ("fc1", "in"): 6, ("fc1", "out"): 8, ("fc2", "in"): 8,
    }  # fmt: skip
    assert sum(group.norm for group in table) == pytest.approx(loop(model), rel=1e-12)
    block = next(g for g in table if (g.layer, g.side, g.channel) == ("fc1", "in", 2))
    weight = model.fc1.weight.detach()[:, 8:12]
    assert block.max_abs == weight.abs().max().item()
    assert block.norm == pytest.approx(math.sqrt(float(weight.square().sum()) + 1e-8))


def test_survives_a_reconfiguration() -> None:
    model = net()
    lasso = GroupLasso(model, X)
    graph = trace_channels(model, X)
    with torch.no_grad():
        model.conv2.weight.zero_()
        for name in ("first", "fc1"):
            getattr(model, name).weight[:3] = 0
        model.fc1.weight[:, :12] = 0
        model.fc2.weight[:, :3] = 0
    assert reconfigure(model, None, graph.keep(model)).removed == ("conv1", "conv2")
    assert model.fc1.in_features == 12
    table = lasso.groups()
    assert {g.layer for g in table} == {"first", "fc1", "fc2"}
    assert lasso.penalty().item() == pytest.approx(sum(g.norm for g in table))
    lasso.penalty().backward()
    lasso.add_gradient_(0.1)
    assert GroupLasso(model, X).penalty().item() == pytest.approx(lasso.penalty().item())


def test_counts_of_resnet20_and_a_graph_at_hand() -> None:
    model = resnet20()
    graph = trace_channels(model, (torch.zeros(1, 3, 8, 8),))
    table = GroupLasso(model, (), graph=graph).groups()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    expected = sum(m.in_channels + m.out_channels for m in convolutions) - 3 + 64
    assert len(table) == expected


def test_groups_and_transposed_convolutions() -> None:
    """An input group is a channel of every group; in a transposed convolution rows are the input."""

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.grouped = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1, groups=2)
            self.up, self.last = nn.ConvTranspose2d(4, 5, 2), nn.ConvTranspose2d(5, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.up(self.grouped(self.first(x))))

    torch.manual_seed(0)
    model = Decoder().double()
    lasso = GroupLasso(model, X)
    table = lasso.groups()
    counts = {(g.layer, g.side): sum((h.layer, h.side) == (g.layer, g.side) for h in table) for g in table}
    assert counts == {
        ("first", "out"): 6,
        ("grouped", "in"): 3,
        ("grouped", "out"): 4,
        ("up", "in"): 4,
        ("up", "out"): 5,
        ("last", "in"): 5,
    }
    norms = {(g.layer, g.side, g.channel): g.norm for g in table}
    assert norms["grouped", "in", 1] == pytest.approx(
        math.sqrt(float(model.grouped.weight[:, 1].square().sum()) + 1e-8)
    )
    assert norms["up", "in", 2] == pytest.approx(math.sqrt(float(model.up.weight[2].square().sum()) + 1e-8))
    assert norms["up", "out", 4] == pytest.approx(math.sqrt(float(model.up.weight[:, 4].square().sum()) + 1e-8))
    assert norms["last", "in", 0] == pytest.approx(math.sqrt(float(model.last.weight[0].square().sum()) + 1e-8))
    assert float(lasso.penalty()) == pytest.approx(sum(norms.values()))


def test_nothing_to_penalise() -> None:
    with pytest.raises(InputError, match="no channels to penalise"):
        GroupLasso(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (torch.zeros(1, 3, 2, 2),))


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.9])
def test_penalty_coefficient(ratio: float) -> None:
    loss, penalty = torch.tensor(2.3, requires_grad=True), torch.tensor(571.0)
    coefficient = penalty_coefficient(loss, penalty, ratio)
    assert isinstance(coefficient, float)
    assert coefficient * 571 / (2.3 + coefficient * 571) == pytest.approx(ratio)
    assert penalty_coefficient(2.3, 571, ratio) == pytest.approx(coefficient)


@pytest.mark.parametrize(
    ("loss", "penalty", "ratio", "message"),
    [
        (1.0, 1.0, 1.0, "penalty_ratio must be from 0"),
        (1.0, 1.0, -0.1, "penalty_ratio must be from 0"),
        (1.0, 1.0, float("nan"), "penalty_ratio must be from 0"),
        (float("nan"), 1.0, 0.2, "first loss of nan"),
        (float("inf"), 1.0, 0.2, "first loss of inf"),
        (0.0, 1.0, 0.2, "both must be positive"),
        (1.0, 0.0, 0.2, "both must be positive"),
        (1.0, -1.0, 0.2, "both must be positive"),
        (-0.5, 1.0, 0.2, "first loss of -0.5 .*: add a constant to the loss .* or set PruneTrain's `coefficient`"),
        (torch.tensor([-0.5]), 1.0, 0.2, "first loss of -0.5 .*: add a constant"),
        (0.0, 1.0, 0.2, "nothing to teach.* or set PruneTrain's `coefficient`"),
        (float("nan"), 1.0, 0.2, "look for images, labels or weights that are not finite"),
        (-float("inf"), 1.0, 0.2, "look for images, labels or weights that are not finite"),
        (1.0, 0.0, 0.2, "weights, which are all 0"),
        (1.0, float("nan"), 0.2, "look for weights that are not finite"),
        (torch.ones(4), 1.0, 0.2, r"the first loss must be one number, but has the shape \(4,\); .*loss.mean\(\)"),
        (torch.ones(0), 1.0, 0.2, r"has the shape \(0,\)"),
        (torch.ones(2, 1), 1.0, 0.2, r"has the shape \(2, 1\)"),
        (1.0, torch.ones(2), 0.2, r"the penalty must be one number, but has the shape \(2,\)"),
        (torch.tensor(1j), 1.0, 0.2, "must be a real number, not torch.complex64"),
        (torch.tensor(True), 1.0, 0.2, "must be a real number, not torch.bool"),
        (True, 1.0, 0.2, "not bool"),
        (None, 1.0, 0.2, "must be a tensor of one number, not NoneType"),
        ({"loss": torch.ones(())}, 1.0, 0.2, "must be a tensor of one number, not dict; give the loss inside it"),
        ((torch.ones(()), 3), 1.0, 0.2, "not tuple"),
        ("1.0", 1.0, 0.2, "not str"),
        (1e308, 1e-300, 0.2, "no finite lambda"),
    ],
)
def test_penalty_coefficient_refuses(loss: Any, penalty: Any, ratio: float, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        penalty_coefficient(loss, penalty, ratio)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("loss", [torch.tensor([2.3]), torch.tensor([[2.3]], dtype=torch.bfloat16), np.float32(2.3), 2])
def test_one_number_may_have_any_form(loss: Any) -> None:
    value = float(loss) if not isinstance(loss, torch.Tensor) else loss.item()
    assert penalty_coefficient(loss, 571, 0.25) == pytest.approx(value / 3 / 571)


FUSED = {"torch": torch.optim.SGD, "lasso inside": SGD}


@pytest.mark.parametrize("optimizer", FUSED)
@pytest.mark.parametrize("call", ["regularize", "add_gradient_"])
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda y: -y.square().mean(), "add a constant"),
        (lambda y: y.square().mean(1), r"shape \(4,\)"),
        (lambda y: y.sum() * 0, "nothing to teach"),
        (lambda y: y.mean() * math.nan, "not finite"),
        (lambda y: {"loss": y.square().mean()}, "not dict"),
        (lambda y: 1 + y.detach().square().mean().item(), None),
    ],
)
def test_prunetrain_refuses_such_a_first_loss_and_takes_the_next(
    loss: Any, message: str | None, call: str, optimizer: str
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    x = torch.randn(4, 3, 8, 8)
    prunetrain = PruneTrain(model, FUSED[optimizer](model.parameters(), 0.1), (x,), penalty_ratio=0.25)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    act = getattr(prunetrain, call)
    if message is None:  # a plain number will do
        act(loss(model(x)))
    else:
        with pytest.raises(InputError, match=message):
            act(loss(model(x)))
        assert prunetrain.coefficient is None
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        act(model(x).square().mean())
    assert prunetrain.coefficient is not None
    assert prunetrain.coefficient > 0


def test_with_a_lambda_of_ones_choice_any_loss_will_do() -> None:
    """What the refusals advise: the gradient is that of the loss, plus lambda times that of the lasso."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 3)).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    prunetrain = PruneTrain(model, torch.optim.SGD(model.parameters(), 0.1), (x,), penalty_ratio=0.25)
    prunetrain.coefficient = 0.125
    total = prunetrain.regularize(-model(x).square().mean())
    expected = -model(x).square().mean() + 0.125 * prunetrain.lasso.penalty()
    assert torch.equal(total, expected)
    total.backward()
    assert torch.equal(model[0].weight.grad, torch.autograd.grad(expected, model[0].weight)[0])


@pytest.mark.parametrize(
    "loss", [torch.ones(4), torch.ones(0), torch.ones(2, 1), None, {"loss": torch.ones(())}], ids=str
)
def test_what_is_no_loss_is_refused_after_lambda_is_set_too(loss: Any) -> None:
    """One loss per image would get the whole penalty each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    prunetrain = PruneTrain(model, torch.optim.SGD(model.parameters(), 0.1), (torch.randn(2, 3, 8, 8),))
    prunetrain.coefficient = 0.125
    with pytest.raises(InputError, match=r"^the loss must be (one number, but has the shape|a tensor of one number)"):
        prunetrain.regularize(loss)
    assert prunetrain.regularize(torch.ones(1)).shape == (1,)
