"""Counting changes nothing: not the model, not its gradients, not the random numbers, not the caller's modes."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from odd_models import ODD, UNCOUNTED, images
from torch import Tensor, nn

from prunetrain_kernels.cost import batch_norm_bytes, count_flops, count_flops_by_layer, step_memory
from prunetrain_kernels.cost.dry_run import scalar_of
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.models import build

COSTS: list[Callable[..., object]] = [count_flops, count_flops_by_layer, batch_norm_bytes, step_memory]


class Model(nn.Module):
    """Everything that may leak: dropout, noise, a tied weight, a plain tensor attribute, a layer in its own mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.frozen_norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout2d(0.3)
        self.tied = nn.Conv2d(3, 8, 3, padding=1)
        self.tied.weight = self.conv.weight
        self.fc = nn.Linear(8, 4)
        self.scale = torch.full((8, 1, 1), 2.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.norm(self.conv(x))) + self.frozen_norm(self.tied(x + torch.randn_like(x)))
        return self.fc((h * self.scale.to(h.dtype)).mean((2, 3)))


def flat(value: object) -> list[object]:
    return [*value] if isinstance(value, list | tuple) else [value]


def snapshot(model: nn.Module) -> dict[str, object]:
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "versions": [tensor._version for tensor in model.state_dict().values()],
        "addresses": [tensor.data_ptr() for tensor in model.state_dict().values()],
        "identities": [id(p) for p in model.parameters()] + [id(b) for b in model.buffers()],
        "gradients": [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "values": [
            (id(value), [(id(x), x.clone(), x.grad) if isinstance(x, Tensor) else id(x) for x in flat(value)])
            for module in model.modules()
            for name, value in vars(module).items()
            if not name.startswith("_") and isinstance(value, list | tuple | Tensor)
        ],
        "random": torch.get_rng_state(),
    }


def assert_unchanged(before: object, after: object) -> None:
    if isinstance(before, Tensor):
        assert isinstance(after, Tensor)
        assert torch.equal(before, after)
    elif isinstance(before, dict):
        assert isinstance(after, dict)
        assert before.keys() == after.keys()
        for key in before:
            assert_unchanged(before[key], after[key])
    elif isinstance(before, list | tuple):
        assert isinstance(after, list | tuple)
        assert len(before) == len(after)
        for a, b in zip(before, after, strict=True):
            assert_unchanged(a, b)
    else:
        assert before == after


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_changes(cost: Callable[..., object], layout: torch.memory_format, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Model().to(dtype, memory_format=layout)  # type: ignore[call-overload]
    model.frozen_norm.eval()
    for p in model.fc.parameters():
        p.grad = torch.randn_like(p)
    x = torch.randn(3, 3, 6, 6).to(dtype, memory_format=layout)
    before, x_before = snapshot(model), x.clone()
    cost(model, (x,))
    assert_unchanged(before, snapshot(model))
    assert torch.equal(x, x_before)
    assert isinstance(model.scale, Tensor)
    assert type(model.scale) is Tensor
    model(x).sum().backward()  # and it still runs


@pytest.mark.parametrize("cost", COSTS)
def test_nothing_changes_when_it_fails(cost: Callable[..., object]) -> None:
    model, x = Model().eval(), torch.randn(1, 5, 6, 6)
    before = snapshot(model)
    with pytest.raises(InputError):
        cost(model, (x,))
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize("cost", COSTS)
def test_the_callers_modes_do_not_matter(cost: Callable[..., object]) -> None:
    model, x = build("resnet20", 10), torch.randn(1, 3, 8, 8)
    expected = cost(model, (x,))
    with torch.no_grad():
        assert cost(model, (x,)) == expected
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert cost(model, (x,)) == expected
        assert torch.is_inference_mode_enabled()
    assert cost(model.eval(), (x,)) == expected
    assert not model.training


@pytest.mark.parametrize("cost", COSTS)
def test_a_model_without_memory_can_be_counted(cost: Callable[..., object]) -> None:
    with torch.device("meta"):
        meta, x = build("resnet20", 10), torch.randn(1, 3, 8, 8)
    assert cost(meta, (x,)) == cost(build("resnet20", 10), (torch.randn(1, 3, 8, 8),))


@pytest.mark.parametrize("name", [*ODD, *UNCOUNTED])
@pytest.mark.parametrize("cost", COSTS)
def test_nothing_changes_about_odd_models(cost: Callable[..., object], name: str) -> None:
    """Counted or not: their attributes, tensors outside of the tables, and all gradients are as they were."""
    torch.manual_seed(0)
    kind, inputs = ODD[name] if name in ODD else (UNCOUNTED[name][0], images)
    model, x = kind(), inputs()
    model.fc.bias.grad = torch.randn(3)
    before, x_before = snapshot(model), [one.clone() for one in x]
    with contextlib.suppress(InputError):
        cost(model, x)
    assert_unchanged(before, snapshot(model))
    assert all(map(torch.equal, x, x_before))
    if name in ODD:
        scalar_of(model(*x)).backward()  # and it still learns
        assert type(model.a.weight.grad) is Tensor


@pytest.mark.parametrize("name", ODD)
def test_no_hooks_on_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlopCounterMode's tracker of modules sets them, and fails on views of parameters."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a hook on a gradient")

    monkeypatch.setattr("torch.utils.module_tracker.register_multi_grad_hook", refuse)
    monkeypatch.setattr(Tensor, "register_hook", refuse)
    kind, inputs = ODD[name]
    for cost in COSTS:
        cost(kind(), inputs())
