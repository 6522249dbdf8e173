"""What batch norm remembers of its calls: a tensor that has changed since the last one is seen, whatever changed."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import launches
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.ops import batch_norm_cooperative as cooperative
from prunetrain_kernels.ops import batch_norm_usual as usual
from prunetrain_kernels.ops import launch
from prunetrain_kernels.ops.batch_norm_act import (
    batch_norm_act,
    batch_norm_apply,
    batch_norm_backward_apply,
    batch_norm_backward_sums,
    batch_norm_update_running_,
)
from prunetrain_kernels.ops.channel_index import ChannelIndex

pytestmark = pytest.mark.t0
T0_BACKENDS = ("kernels", "cooperative")


@dataclass
class Tensors:
    """Of one call: x and the residual (2, 8, 4, 4), channels_last; values per channel."""

    x: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor

    def leaves(self) -> tuple[Tensor, ...]:
        return self.x, self.weight, self.bias, self.residual

    def call(self) -> Tensor:
        return batch_norm_act(
            self.x, self.mean, self.var, self.weight, self.bias, training=True, residual=self.residual, relu=True
        )  # fmt: skip

    def torchs(self) -> tuple[list[Tensor], list[Tensor]]:
        """PyTorch's results in float64: y, and all gradients of sum(y * ramp); and the new running statistics."""
        x, weight, bias, residual = (t.detach().double().requires_grad_() for t in self.leaves())
        mean, var = self.mean.detach().double(), self.var.detach().double()
        y = F.relu(F.batch_norm(x, mean, var, weight, bias, training=True) + residual)
        gradients = torch.autograd.grad(y, (x, weight, bias, residual), _ramp(y))
        return [y.detach(), *gradients], [mean, var]


def _ramp(like: Tensor) -> Tensor:
    return torch.linspace(-1, 2, like.numel(), device=like.device).reshape(like.shape).to(like.dtype)


def _tensors(device: torch.device) -> Tensors:
    generator = torch.Generator().manual_seed(5)

    def activation() -> Tensor:
        t = torch.randn(2, 8, 4, 4, generator=generator)
        return t.to(device).contiguous(memory_format=torch.channels_last).requires_grad_()

    weight, bias = (nn.Parameter(torch.randn(8, generator=generator).to(device)) for _ in range(2))
    return Tensors(
        activation(), activation(), weight, bias, torch.zeros(8, device=device), torch.ones(8, device=device)
    )


def _gapped(t: Tensor) -> Tensor:
    """The same values, one in three places of memory."""
    wide = torch.full((t.numel(), 3), 99.0, dtype=t.dtype, device=t.device)
    wide[:, 0] = t.detach()
    return wide[:, 0]


def _check(t: Tensors) -> None:
    """A call, its gradients and running statistics are PyTorch's."""
    wanted, running = t.torchs()
    y = t.call()
    got = [y.detach(), *torch.autograd.grad(y, t.leaves(), _ramp(y))]
    tolerance = 2e-2 if t.x.dtype == torch.float16 else 1e-5
    for a, b in zip([*got, t.mean, t.var], [*wanted, *running], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def _with_half_activations(t: Tensors) -> None:
    t.x.data, t.residual.data = t.x.data.half(), t.residual.data.half()


def _with_contiguous(t: Tensors) -> None:
    t.x.data = t.x.data.contiguous()


def _resized(t: Tensors) -> None:
    for each in (t.x, t.residual):
        each.requires_grad_(False).resize_(1, 8, 4, 4, memory_format=torch.channels_last).requires_grad_()


def _other_storage(t: Tensors) -> None:
    with torch.no_grad():
        t.x.set_(torch.randn(3, 8, 2, 2, device=t.x.device))  # type: ignore[call-overload]
    t.residual = torch.randn(3, 8, 2, 2, device=t.x.device).requires_grad_()


CHANGES: dict[str, Callable[[Tensors], None]] = {
    "nothing": lambda t: None,
    "x in another layout, by .data": _with_contiguous,
    "activations in another dtype, by .data": _with_half_activations,
    "another batch, in memory that is there": _resized,
    "another storage": _other_storage,
    "x with gaps": lambda t: setattr(t.x, "data", torch.stack([t.x.data, t.x.data], 4)[..., 0]),
    "the residual in another layout": lambda t: setattr(t.residual, "data", t.residual.data.contiguous()),
    "weight with gaps, by .data": lambda t: setattr(t.weight, "data", _gapped(t.weight)),
    "bias with gaps, by .data": lambda t: setattr(t.bias, "data", _gapped(t.bias)),
    "running mean with gaps": lambda t: setattr(t, "mean", _gapped(t.mean)),
    "running var with gaps, by .data": lambda t: setattr(t.var, "data", _gapped(t.var)),
    "parameters of another tensor": lambda t: setattr(t, "weight", nn.Parameter(t.weight.detach() + 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str, path: str, device: torch.device) -> None:
    t = _tensors(device)
    _check(t)
    CHANGES[change](t)
    _check(t)


def test_what_does_not_fit_any_more_is_refused(path: str, device: torch.device) -> None:
    """Although the same tensors have been taken before."""
    for name, wrong in (
        ("weight", torch.ones(9)),
        ("mean", torch.ones(8, dtype=torch.int32)),
        ("bias", torch.ones(8, 1)),
    ):
        t = _tensors(device)
        _check(t)
        getattr(t, name).data = wrong.to(device)
        with pytest.raises(InputError):
            t.call()
    t = _tensors(device)
    _check(t)
    t.residual.data = t.residual.data[:, :, :, :3]
    with pytest.raises(InputError, match="residual"):
        t.call()


def _with_gaps(parameter: Tensor, dy: Tensor) -> Tensor:
    parameter.data = _gapped(parameter)
    return dy


BETWEEN: dict[str, Callable[[Tensors, Tensor], Tensor]] = {
    "dy in another layout": lambda t, dy: dy.contiguous(),
    "dy with gaps": lambda t, dy: torch.stack([dy, dy], 4)[..., 0],
    "dy expanded": lambda t, dy: dy.new_full((), 2.0).expand_as(dy),
    "weight with gaps": lambda t, dy: _with_gaps(t.weight, dy),
    "bias with gaps": lambda t, dy: _with_gaps(t.bias, dy),
}


@pytest.mark.parametrize("change", BETWEEN)
@pytest.mark.parametrize("relu", [False, True])
def test_a_change_between_forward_and_backward_is_seen(
    change: str, relu: bool, path: str, device: torch.device
) -> None:
    results = []
    for changes in (lambda t, dy: dy, BETWEEN[change]):
        t = _tensors(device)
        y = batch_norm_act(t.x, None, None, t.weight, t.bias, training=True, relu=relu)
        dy = (
            torch.full_like(y, 2.0)
            if change == "dy expanded"
            else _ramp(y).contiguous(memory_format=torch.channels_last)
        )
        results.append(torch.autograd.grad(y, (t.x, t.weight, t.bias), changes(t, dy)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("places", [None, [0, 2, 3, 5]], ids=["all", "map"])
def test_what_hooks_give_back_may_lie_elsewhere(places: list[int] | None, path: str, device: torch.device) -> None:
    """As saved activations that were sent to the host and back, here into another layout; the mask has that of y."""
    t = _tensors(device)
    scatter = None if places is None else ChannelIndex(places, 8, device)
    x, weight, bias = (v.detach() for v in (t.x, t.weight, t.bias))
    if places is not None:
        x, weight, bias = x[:, places].contiguous(memory_format=torch.channels_last), weight[places], bias[places]
    leaves = [v.requires_grad_() for v in (x, weight, bias, t.residual)]

    def gradients() -> tuple[Tensor, ...]:
        y = batch_norm_act(x, None, None, weight, bias, training=True, residual=t.residual, relu=True, scatter=scatter)
        return torch.autograd.grad(y, leaves, _ramp(y))

    wanted = gradients()
    with torch.autograd.graph.saved_tensors_hooks(lambda s: s.clone(), lambda s: s.contiguous()):
        got = gradients()
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_switches_are_seen(path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    t = _tensors(device)
    numbers = []
    for together in (True, False, True):
        monkeypatch.setattr(cooperative, "ENABLED", together)
        with launches.counted() as counts:
            t.call()
        numbers.append(sum(counts.values()))
    in_one = 1 if launch.programs_wait() else 2
    assert numbers == [in_one, 3, in_one]


def test_a_second_call_is_known_and_no_tensor_is_kept(path: str, device: torch.device) -> None:
    usual._known.cache_clear()
    t = _tensors(device)
    with torch.no_grad():
        t.call()
        t.call()
    assert usual._known.cache_info()[:2] == (1, 1)  # hits, misses
    kept = [weakref.ref(each) for each in (t.x, t.weight, t.mean)]
    del t
    gc.collect()
    assert [each() for each in kept] == [None] * 3


def test_out_of_a_transform(path: str, device: torch.device) -> None:
    """A tensor that left the transform that wrapped it is taken for what it is."""
    t = _tensors(device)
    left: list[Tensor] = []

    def leaks(x: Tensor) -> Tensor:
        left.append(x)
        return x.sum()

    torch.func.grad(leaks)(t.x.detach())
    (leaked,) = left
    a = batch_norm_act(leaked, None, None, t.weight, t.bias, training=True)
    b = batch_norm_act(t.x, None, None, t.weight, t.bias, training=True)
    assert torch.equal(a, b)


@pytest.mark.parametrize("training", [False, True])
def test_values_per_channel_with_gaps(training: bool, path: str, device: torch.device) -> None:
    """In eval, as a batch's given statistics, and in the passes as operators each."""
    t = _tensors(device)
    mean, var = torch.linspace(-1, 1, 8, device=device), torch.linspace(0.5, 2, 8, device=device)
    x, dy = t.x.detach(), _ramp(t.x)
    results = []
    for gapped in (False, True):
        of = [_gapped(v) if gapped else v.detach() for v in (mean, var, t.weight, t.bias)]
        if training:
            y = batch_norm_act(x, None, None, of[2], of[3], training=True, statistics=(of[0], of[1]))
        else:
            y = batch_norm_act(x, *of)
        passes = batch_norm_apply(x, *of, None, None, 1e-5, relu=True, record=False)[0]
        sums = batch_norm_backward_sums(dy, x, *of, None, None, 1e-5, relu=True)
        some = [_gapped(s) for s in sums] if gapped else sums
        dx, _ = batch_norm_backward_apply(
            dy, x, *of, None, None, *some, 32.0, 1e-5, relu=True, residual_gradient=False
        )  # fmt: skip
        moved = [torch.zeros(8, device=device), torch.ones(8, device=device)]
        batch_norm_update_running_(*moved, *of[:2], 32, 0.3)
        results.append([y, passes, *sums, dx, *moved])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
