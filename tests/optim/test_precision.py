"""What `optim.SGD` promises for each dtype, against `torch.optim.SGD` and against float64, on every backend."""

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetrain_kernels import GroupLasso, InputError
from prunetrain_kernels.ops import sgd as operator
from prunetrain_kernels.optim import SGD, ProximalSGD

T0_BACKENDS = ("reference", "kernels", "native")

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
C64, C128 = torch.complex64, torch.complex128

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.1},
    "paper": {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
    "no-decay": {"lr": 1 / 3, "momentum": 0.9},
    "nesterov": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
    "dampened-maximize": {"lr": 0.1, "momentum": 0.7, "dampening": 0.3, "maximize": True},
}


def parameters(dtype: torch.dtype, grad_dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    result = []
    for shape in ((16, 8, 3, 3), (33, 9), (300,), (1,)):
        values = torch.randn(shape, generator=generator, dtype=C128 if dtype.is_complex else F64)
        p = nn.Parameter((values * 0.3).to(device, dtype))
        if grad_dtype != dtype:
            p.grad_dtype = grad_dtype
        result.append(p)
    return result


def gradients(like: list[Tensor], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    wide = C128 if like[0].is_complex() else F64
    return [torch.randn(p.shape, generator=generator, dtype=wide).to(p.device, p.grad_dtype) for p in like]


def trained(cls: type[torch.optim.SGD], params: list[Tensor], options: dict[str, Any], steps: int = 5) -> Any:
    optimizer = cls(params, **options)
    for step in range(steps):
        for p, g in zip(params, gradients(params, step), strict=True):
            p.grad = g
        optimizer.step()
    return optimizer


def exactly(params: list[Tensor], options: dict[str, Any], steps: int = 5) -> list[Tensor]:
    """The same steps, of the same rounded gradients, in float64."""
    wide = [nn.Parameter(p.detach().to(C128 if p.is_complex() else F64)) for p in params]
    optimizer = torch.optim.SGD(wide, **options)
    for step in range(steps):
        for p, w, g in zip(params, wide, gradients(params, step), strict=True):
            assert p.grad_dtype == g.dtype
            w.grad = g.to(w.dtype)
        optimizer.step()
    return [w.detach() for w in wide]


def mean_error(params: list[Tensor], exact: list[Tensor]) -> float:
    return float(
        torch.cat([(p.detach().to(e.dtype) - e).abs().flatten() for p, e in zip(params, exact, strict=True)]).mean()
    )


def steps_of(name: str, path: str, device: torch.device, *, by_kernels: bool) -> int:
    """Five steps; three in the interpreter, which is slow: the one that begins the buffers, and two that go on.

    Where kernels leave the work to plain PyTorch, whose path has all the options, one of these shows that they do.
    """
    if path != "kernels" or device.type != "cpu":
        return 5
    if not by_kernels and name != "paper":
        pytest.skip("plain PyTorch computes this, as on its own path")
    return 3


@pytest.mark.t0
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [(F32, F32), (F64, F64), (C64, C64), (C128, C128), (BF16, F32), (F16, F32), (F32, F64), (F64, F32), (BF16, F64)],
    ids=str,
)
def test_bit_for_bit_where_gradients_are_wide(
    name: str, dtype: torch.dtype, grad_dtype: torch.dtype, path: str, device: torch.device
) -> None:
    by_kernels = path == "kernels" and dtype == grad_dtype and not dtype.is_complex
    steps = steps_of(name, path, device, by_kernels=by_kernels)
    theirs, ours = parameters(dtype, grad_dtype, device), parameters(dtype, grad_dtype, device)
    a, b = trained(torch.optim.SGD, theirs, OPTIONS[name], steps), trained(SGD, ours, OPTIONS[name], steps)
    if by_kernels or device.type != "cpu":  # the interpreter rounds every product: another order of roundings
        exact = exactly(parameters(dtype, grad_dtype, device), OPTIONS[name], steps)
        assert mean_error(ours, exact) <= 1.25 * mean_error(theirs, exact) + 1e-15
    else:
        assert all(torch.equal(p, q) for p, q in zip(theirs, ours, strict=True))
    for p, q in zip(theirs, ours, strict=True):
        if OPTIONS[name].get("momentum"):
            kept, expected = b.state[q]["momentum_buffer"], a.state[p]["momentum_buffer"]
            assert kept.dtype == expected.dtype
            assert by_kernels or device.type != "cpu" or torch.equal(kept, expected)


@pytest.mark.t0
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"), [(F16, F16), (BF16, BF16), (F32, BF16), (F64, F16), (F16, BF16)], ids=str
)
def test_narrow_gradients_are_at_least_as_exact_as_in_pytorch(
    name: str, dtype: torch.dtype, grad_dtype: torch.dtype, path: str, device: torch.device
) -> None:
    if path == "kernels" and device.type == "cpu" and dtype == grad_dtype == BF16:
        pytest.skip("Triton's interpreter cuts bfloat16 off instead of rounding it")
    steps = steps_of(name, path, device, by_kernels=dtype == grad_dtype)
    theirs, ours = parameters(dtype, grad_dtype, device), parameters(dtype, grad_dtype, device)
    exact = exactly(parameters(dtype, grad_dtype, device), OPTIONS[name], steps)
    a, b = trained(torch.optim.SGD, theirs, OPTIONS[name], steps), trained(SGD, ours, OPTIONS[name], steps)
    assert mean_error(ours, exact) <= mean_error(theirs, exact)
    for p, q in zip(theirs, ours, strict=True):
        if OPTIONS[name].get("momentum"):
            assert b.state[q]["momentum_buffer"].dtype == a.state[p]["momentum_buffer"].dtype


@pytest.mark.t0
@pytest.mark.parametrize("dtype", [F16, F32, F64], ids=str)
def test_backends_round_alike(dtype: torch.dtype, path: str, device: torch.device, monkeypatch: Any) -> None:
    """The same parameters by plain PyTorch and by the backend under test: no more than a last bit apart."""
    ours, plain = parameters(dtype, dtype, device), parameters(dtype, dtype, device)
    trained(SGD, ours, OPTIONS["paper"], steps=1)
    monkeypatch.setattr(operator, "_fits", lambda *_: False)
    operator._plans.clear()
    trained(SGD, plain, OPTIONS["paper"], steps=1)
    for p, q in zip(ours, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps * 0.1)


@pytest.mark.t0
@pytest.mark.parametrize("dtype", [F64, C128], ids=str)
@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1, dtype=F64), torch.tensor(0.1), torch.tensor([0.1], dtype=F64)])
def test_a_learning_rate_is_not_rounded(dtype: torch.dtype, rate: Any, path: str, device: torch.device) -> None:
    theirs, ours = parameters(dtype, dtype, device), parameters(dtype, dtype, device)
    trained(torch.optim.SGD, theirs, {"lr": rate, "momentum": 0.9})
    trained(SGD, ours, {"lr": rate, "momentum": 0.9})
    for p, q in zip(theirs, ours, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-15)


def network(dtype: torch.dtype, grad_dtype: torch.dtype | None = None) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Conv2d(9, 6, 3), nn.Flatten(), nn.Linear(96, 4)).to(dtype)
    for p in model.parameters() if grad_dtype is not None else ():
        p.grad_dtype = grad_dtype
    return model, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.t0
@pytest.mark.parametrize("cls", [SGD, ProximalSGD])
@pytest.mark.parametrize(("dtype", "grad_dtype"), [(BF16, F32), (F16, F16), (F32, F32), (F32, BF16)], ids=str)
def test_the_lasso_inside_at_every_precision(
    cls: type[SGD], dtype: torch.dtype, grad_dtype: torch.dtype, path: str, device: torch.device
) -> None:
    """Beside a float64 run that sees the same gradients: the lasso's part is not rounded to the gradient's dtype."""
    (model, x), (wide, _) = network(dtype, grad_dtype), network(F64)
    model, wide, x = model.to(device), wide.to(device), x.to(device)
    wide.load_state_dict(model.state_dict())
    ours, exact = cls(model.parameters(), 0.05, 0.9), cls(wide.parameters(), 0.05, 0.9)
    ours.regularize_with(GroupLasso(model, (x,)), 0.02)
    exact.regularize_with(GroupLasso(wide, (x.double(),)), 0.02)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(model.parameters(), wide.parameters(), strict=True):
            p.grad = (torch.randn(p.shape, generator=generator) * 0.1).to(device, grad_dtype)
            q.grad = p.grad.double()
        ours.step()
        exact.step()
    unit = max(torch.finfo(dtype).eps, 0.1 * torch.finfo(grad_dtype).eps)  # momentum is kept in the gradient's dtype
    for p, q in zip(model.parameters(), wide.parameters(), strict=True):
        p, q = p.detach().double(), q.detach()
        assert float((p - q).abs().max()) <= 6 * unit * float(q.abs().max())
    assert all(ours.state[p]["momentum_buffer"].dtype == grad_dtype for p in model.parameters())


@pytest.mark.parametrize("cls", [SGD, ProximalSGD])
def test_a_foreign_default_device(cls: type[SGD]) -> None:
    """As under `torch.set_default_device("cuda")`, which a CPU's network must not notice."""
    results = []
    for device in ("cpu", "meta"):
        model, x = network(F32)
        operator._plans.clear()
        for cache in (operator._flags_tensor, operator._settings_tensor):
            cache.cache_clear()
        optimizer = cls(model.parameters(), 0.05, 0.9, weight_decay=1e-3)
        lasso = GroupLasso(model, (x,))
        torch.set_default_device(device)
        try:
            optimizer.regularize_with(lasso, 0.01)
            for rate in (0.05, 0.04, 0.03):
                optimizer.param_groups[0]["lr"] = rate
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
            results.append((copy.deepcopy(model.state_dict()), optimizer.penalty(), optimizer.slice_max_abs()))
        finally:
            torch.set_default_device(None)
    (before, penalty, sizes), (after, same_penalty, same_sizes) = results
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(penalty, same_penalty)
    for pair, same in zip(sizes.values(), same_sizes.values(), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(pair, same, strict=True))


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings_that_torch_refuses_together() -> None:
    model, _ = network(F32)
    with pytest.raises(InputError, match="`foreach` and `fused` cannot be True together"):
        SGD(model.parameters(), 0.1, foreach=True, fused=True)
    with pytest.raises(InputError, match="no derivative"):
        SGD(model.parameters(), 0.1, differentiable=True, fused=True)
    SGD(model.parameters(), 0.1, foreach=True, fused=False)
    SGD(model.parameters(), 0.1, foreach=None, fused=True)


@pytest.mark.parametrize("momentum", [1.0, 1.5, float("nan")])
def test_a_proximal_step_has_no_length_at_momentum_1(momentum: float) -> None:
    model, x = network(F32)
    with pytest.raises(InputError, match=f"momentum below 1, not {momentum}"):
        ProximalSGD(model.parameters(), 0.1, momentum=momentum)
    with pytest.raises(InputError, match="momentum below 1"):
        ProximalSGD([{"params": model.parameters(), "momentum": momentum}], 0.1)
    optimizer = ProximalSGD(model.parameters(), 0.1, momentum=0.9)
    optimizer.regularize_with(GroupLasso(model, (x,)), 0.01)
    optimizer.param_groups[0]["momentum"] = momentum  # as OneCycleLR(cycle_momentum=True) may
    model(x).square().mean().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="momentum below 1"):
        optimizer.step()
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert not optimizer.state


@pytest.mark.parametrize(("momentum", "dampening"), [(0.0, 0.0), (0.0, 0.5), (0.9, 0.0), (0.8, 0.5)])
def test_a_proximal_step_is_as_long_as_the_subgradients_steps(momentum: float, dampening: float) -> None:
    """Far from zero, with no gradient but the lasso's: both shorten an output slice by the same length per step."""
    lengths = []
    for cls in (SGD, ProximalSGD):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)).double()
        optimizer = cls(model.parameters(), 1e-3, momentum, dampening)
        optimizer.regularize_with(GroupLasso(model, (torch.zeros(1, 3, 5, 5, dtype=F64),)), 0.01)
        for _ in range(80):  # until momentum has built up
            optimizer.zero_grad(set_to_none=False)
            before = model[0].weight.detach().flatten(1).norm(dim=1)
            optimizer.step()
        lengths.append(before - model[0].weight.detach().flatten(1).norm(dim=1))
    torch.testing.assert_close(lengths[0], lengths[1], rtol=1e-3, atol=0)


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def _switching_often() -> Iterator[None]:
    import sys

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_switching_often")
def test_threads_that_train_their_own_networks() -> None:
    """Plans are kept for all of the process; each thread gets what it gets alone."""
    sizes = range(4, 12)

    def run(width: int) -> Tensor:
        generator = torch.Generator().manual_seed(width)
        params = [torch.randn(width, 3, generator=generator) for _ in range(6)]
        optimizers = [SGD([p.requires_grad_()], 0.1, 0.9) for p in params]
        for _ in range(15):
            for p, optimizer in zip(params, optimizers, strict=True):
                p.grad = p.detach() * 2  # at another address in every step: a new plan
                optimizer.step()
        return torch.cat([p.detach().flatten() for p in params])

    alone = {width: run(width) for width in sizes}
    together: dict[int, Tensor] = {}
    errors: list[BaseException] = []

    def target(width: int) -> None:
        try:
            together[width] = run(width)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=target, args=(width,)) for width in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(torch.equal(alone[width], together[width]) for width in sizes)


def test_autograd_gives_gradients_in_grad_dtype() -> None:
    """From a real backward pass: fp32 gradients of a bf16 network."""
    (a, x), (b, _) = network(BF16, F32), network(BF16, F32)
    theirs, ours = torch.optim.SGD(a.parameters(), 0.05, 0.9), SGD(b.parameters(), 0.05, 0.9)
    for _ in range(3):
        for model, optimizer in ((a, theirs), (b, ours)):
            optimizer.zero_grad()
            F.mse_loss(model(x), torch.ones(4, 4, dtype=BF16)).backward()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert all(ours.state[p]["momentum_buffer"].dtype == F32 for p in b.parameters())
