"""The SGD kernel against float64: momentum and its kin, the lasso inside, the norms that it leaves, skipped steps."""

import gc
import weakref
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from exact import assert_as_exact, error, gradient, largest, sides
from fences import fenced, layout
from torch import Tensor

from prunetrain_kernels.ops import tables
from prunetrain_kernels.ops.sgd import Hyperparameters, LassoState, Parameters, Scaling, flat, sgd_, sgd_update_

pytestmark = pytest.mark.t0
T0_BACKENDS = ("reference", "kernels", "native")

FP32 = 2.0**-24
# name -> momentum, dampening, weight decay, nesterov, maximize
SETTINGS = {
    "plain": (0.0, 0.0, 0.0, False, False),
    "paper": (0.9, 0.0, 5e-4, False, False),
    "nesterov": (0.9, 0.0, 5e-4, True, False),
    "dampened-maximize": (0.8, 0.25, 1e-2, False, True),
}
WEIGHTS = [((37, 5, 3, 3), 1, 3), ((64, 48, 1, 1), 1, 3), ((10, 3 * 49), 49, 1), ((8, 3, 3, 3), 1, 2)]
PLAIN = [(37,), (300,), (1,)]


@dataclass
class Problem:
    """Arguments of one call, beside the float64 state that an independent loop keeps."""

    params: list[Tensor]
    grads: list[Tensor]
    buffers: list[Tensor]
    norms: Tensor
    max_abs: Tensor
    rates: list[Tensor]
    settings: list[tuple[float, float, float, bool, bool]]
    group: list[int]
    blocks: list[int]
    used: list[int]
    update: Any = sgd_
    exact: list[Tensor] = field(default_factory=list)
    exact_buffers: list[Tensor | None] = field(default_factory=list)

    def step(
        self,
        first: bool,
        coefficient: Tensor | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        firsts = [first] * len(self.params)
        arguments = (
            Parameters(self.params, self.grads, self.buffers, self.group, firsts, self.blocks, self.used),
            LassoState(self.norms, self.max_abs, coefficient, 1e-8),
            self.rates,
            [Hyperparameters(*settings) for settings in self.settings],
            Scaling(grad_scale, found_inf),
        )
        self.update(*(flat(*arguments) if self.update is sgd_ else arguments))

    def exact_step(self, first: bool, coefficient: float) -> None:
        for i, (p, g) in enumerate(zip(self.exact, self.grads, strict=True)):
            momentum, dampening, decay, nesterov, maximize = self.settings[self.group[i]]
            g = g.double().cpu() * (-1 if maximize else 1) + decay * p
            if coefficient and self.used[i]:
                g = g + coefficient * gradient(p, self.blocks[i], bool(self.used[i] & 1), bool(self.used[i] & 2))
            if momentum:
                b = g if first else momentum * self.exact_buffers[i] + (1 - dampening) * g
                self.exact_buffers[i] = b
                g = g + momentum * b if nesterov else b
            self.exact[i] = p - float(self.rates[self.group[i]]) * g


def problem(settings: str, dtype: torch.dtype, kind: str, device: torch.device, lasso: bool = True) -> Problem:
    torch.manual_seed(0)
    specs = [*WEIGHTS, *((shape, 1, 0) for shape in PLAIN)]
    params = [layout((torch.randn(shape) * 0.3).to(device, dtype), kind) for shape, *_ in specs]
    blocks, used = [block for _, block, _ in specs], [sides if lasso else 0 for *_, sides in specs]
    values = [SETTINGS[settings], (0.5, 0.0, 0.1, False, False)]
    group = [i % 2 if settings != "plain" else 0 for i in range(len(specs))]
    result = Problem(
        params,
        [torch.randn_like(p) for p in params],
        [torch.empty_like(p) if values[i][0] else p.new_empty(0) for p, i in zip(params, group, strict=True)],
        *(norms_of(params, blocks, used, i, device) for i in (0, 1)),
        [torch.tensor(rate, device=device) for rate in (0.1, 0.03)],
        values,
        group,
        blocks,
        used,
    )
    result.exact, result.exact_buffers = [p.double().cpu().clone() for p in params], [None] * len(params)
    return result


def norms_of(params: list[Tensor], blocks: list[int], used: list[int], what: int, device: torch.device) -> Tensor:
    parts = [torch.empty(0, dtype=torch.float64)]
    for p, block, side in zip(params, blocks, used, strict=True):
        if side:
            parts += (sides, largest)[what](p, block)
    return torch.cat(parts).float().to(device)


@pytest.mark.parametrize(
    ("settings", "dtype", "kind", "lasso"),
    [
        ("paper", torch.float32, "contiguous", True),
        ("paper", torch.float32, "channels_last", True),
        ("paper", torch.float32, "sliced", True),
        ("paper", torch.float16, "channels_last", True),
        ("paper", torch.bfloat16, "contiguous", True),
        ("paper", torch.float32, "channels_last", False),
        ("plain", torch.float32, "contiguous", True),
        ("nesterov", torch.float32, "channels_last", True),
        ("dampened-maximize", torch.float32, "contiguous", True),
    ],
)
def test_three_steps(settings: str, dtype: torch.dtype, kind: str, lasso: bool, device: torch.device) -> None:
    case = problem(settings, dtype, kind, device, lasso)
    coefficient = torch.tensor(0.02, device=device) if lasso else None
    # PyTorch's own optimizer in the same dtype, with the lasso's exact gradient: how near the exact one can get
    torchs = [p.clone().requires_grad_() for p in case.params]
    names = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
    groups = [
        {"lr": float(rate), **dict(zip(names, values, strict=True)), "params": []}
        for rate, values in zip(case.rates, case.settings, strict=True)
    ]
    for p, n in zip(torchs, case.group, strict=True):
        groups[n]["params"].append(p)
    optimizer = torch.optim.SGD([group for group in groups if group["params"]])
    cut_off = dtype == torch.bfloat16 and device.type == "cpu"  # the interpreter stores bfloat16 without rounding
    for number in range(3):
        first = number == 0
        case.grads = [torch.randn_like(g) for g in case.grads]
        for i, p in enumerate(torchs):
            sign = -1 if case.settings[case.group[i]][4] else 1
            p.grad = case.grads[i].clone()
            if lasso and case.used[i]:
                pull = gradient(p, case.blocks[i], bool(case.used[i] & 1), bool(case.used[i] & 2))
                p.grad += (sign * 0.02 * pull).to(p.grad)
        optimizer.step()
        case.exact_step(first, 0.02 if lasso else 0.0)
        case.step(first, coefficient)
    for mine, theirs, exact in zip(case.params, torchs, case.exact, strict=True):
        assert_as_exact(mine, theirs, exact, floor=2**-6 if cut_off else 4 * FP32)
    # the norms and sizes that it leaves are those of the new weights
    for what, found in enumerate((case.norms, case.max_abs)):
        expected = norms_of(case.params, case.blocks, case.used, what, device)
        torch.testing.assert_close(found, expected, rtol=4 * FP32 * (1 - what), atol=0)


def test_a_skipped_step_changes_nothing(device: torch.device) -> None:
    case = problem("paper", torch.float32, "channels_last", device)
    case.step(True, torch.tensor(0.02, device=device))
    before = [t.clone() for t in (*case.params, *case.grads, *case.buffers, case.norms, case.max_abs)]
    one = torch.ones((), device=device)
    case.step(False, one, torch.tensor(8.0, device=device), one)
    after = (*case.params, *case.grads, *case.buffers, case.norms, case.max_abs)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    case.step(False, one, torch.tensor(8.0, device=device), torch.zeros((), device=device))
    assert not torch.equal(case.params[0], before[0])


def test_scaled_gradients_are_unscaled_in_place(device: torch.device) -> None:
    a, b = (problem("paper", torch.float32, "contiguous", device) for _ in range(2))
    one = torch.tensor(0.02, device=device)
    plain = [g.clone() for g in a.grads]
    for g in a.grads:
        g.mul_(1024)
    a.step(True, one, torch.tensor(1024.0, device=device), torch.zeros((), device=device))
    b.step(True, one)
    assert all(torch.equal(x, y) for x, y in zip(a.params, b.params, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(a.grads, plain, strict=True))


def test_a_gradient_in_another_layout(device: torch.device) -> None:
    a, b = (problem("paper", torch.float32, "channels_last", device) for _ in range(2))
    one, scale = torch.tensor(0.02, device=device), torch.tensor(2.0, device=device)
    a.grads = [g.contiguous() for g in a.grads]
    for case in (a, b):
        case.step(True, one, scale, torch.zeros((), device=device))
    assert all(torch.equal(x, y) for x, y in zip(a.params + a.grads, b.params + b.grads, strict=True))


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
def test_reads_and_writes_nothing_outside(offset: int, device: torch.device) -> None:
    a, b = (problem("nesterov", torch.float32, "channels_last", device) for _ in range(2))
    b.params, b.grads = [fenced(t, offset) for t in b.params], [fenced(t, offset) for t in b.grads]
    b.buffers = [fenced(t, offset) for t in b.buffers]
    one = torch.tensor(0.02, device=device)
    for first in (True, False):
        for case in (a, b):
            case.step(first, one)
    for x, y in zip(a.params + a.buffers, b.params + b.buffers, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-7)
        whole = y.as_strided((y.untyped_storage().nbytes() // y.element_size(),), (1,), 0)
        assert int(whole.isnan().sum()) == whole.numel() - y.numel()


def test_follows_a_learning_rate_in_a_tensor(device: torch.device) -> None:
    case = problem("plain", torch.float32, "contiguous", device)
    before = [p.clone() for p in case.params]
    case.rates[0].zero_()
    case.step(True)
    assert all(torch.equal(a, b) for a, b in zip(before, case.params, strict=True))
    case.rates[0].fill_(1)
    case.step(True)
    for p, g, old in zip(case.params, case.grads, before, strict=True):
        torch.testing.assert_close(p, old - g)


def test_steps_of_a_gpu(steps_as_on_a_gpu: None, device: torch.device) -> None:
    case = problem("paper", torch.float32, "channels_last", device)
    case.exact_step(True, 0.02)
    case.step(True, torch.tensor(0.02, device=device))
    assert all(error(p, exact) < 8 * FP32 for p, exact in zip(case.params, case.exact, strict=True))
    expected = norms_of(case.params, case.blocks, case.used, 0, device)
    torch.testing.assert_close(case.norms, expected, rtol=4 * FP32, atol=0)


def test_operator_passes_pytorchs_own_check_compiles_and_exports(device: torch.device) -> None:
    def update(p: Tensor, g: Tensor, b: Tensor, norms: Tensor, max_abs: Tensor, rate: Tensor, pull: Tensor) -> Tensor:
        sgd_(
            [p], [g], [b], norms, max_abs, [rate], pull, None, None, [0.9], [0.0], [5e-4], [False], [False], [0],
            [False], [1], [3], 1e-8,
        )  # fmt: skip
        return p * 1

    def tensors() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        p, g, b = (torch.randn(8, 3, 3, 3, device=device) for _ in range(3))
        norms, max_abs = (norms_of([p], [1], [3], i, device) for i in (0, 1))
        return p, g, b, norms, max_abs, torch.tensor(0.1, device=device), torch.tensor(0.02, device=device)

    p, g, b, norms, max_abs, rate, pull = tensors()
    torch.library.opcheck(
        torch.ops.prunetrain_kernels.sgd_.default,
        ([p], [g], [b], norms, max_abs, [rate], pull, None, None, [0.9], [0.0], [5e-4], [False], [False], [0], [False],
         [1], [3], 1e-8),
    )  # fmt: skip
    plain, compiled = tensors(), tensors()
    expected = update(*plain)
    found = torch.compile(update, backend="aot_eager", fullgraph=True)(*compiled)
    assert torch.equal(expected, found)
    assert all(torch.equal(x, y) for x, y in zip(plain, compiled, strict=True))

    class Update(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return update(*inputs)

    exported = tensors()
    assert torch.equal(torch.export.export(Update(), tensors()).module()(*exported), expected)
    assert torch.equal(exported[0], plain[0])


def test_bad_input_is_refused(device: torch.device) -> None:
    for change, message in (
        ("lengths", "one entry per parameter"),
        ("gradient", "all three must agree"),
        ("buffer", "all three must agree"),
        ("device", "one call updates one device"),
    ):
        case = problem("paper", torch.float32, "contiguous", device)
        before = [p.clone() for p in case.params]
        if change == "lengths":
            case.blocks = case.blocks[:-1]
        elif change == "gradient":
            case.grads[1] = case.grads[1][:-1]
        elif change == "buffer":
            case.buffers[2] = case.buffers[2][:, :-1]
        else:
            case.grads[3] = torch.empty_like(case.grads[3], device="meta")
            case.update = sgd_update_  # PyTorch's dispatcher would take a meta tensor for a trace
        with pytest.raises(ValueError, match=message):
            case.step(True)
        assert all(torch.equal(a, b) for a, b in zip(before, case.params, strict=True))


def test_a_capture_owns_the_tables_handed_out_to_it() -> None:
    """A captured graph reads them at their addresses, long after other shapes have pushed them out of the caches."""
    owner: list[Any] = []
    weights = [torch.zeros(8, 4) for _ in range(200)]

    def handed_out(i: int) -> list[Any]:
        table = tables.table_of((tables.flat_tile(torch.zeros(i + 1)),), torch.device("cpu"))
        return [weakref.ref(t) for t in (table.tensors, tables.addresses([weights[i]]))]

    with tables.owned_by(owner):
        owned = handed_out(0)
    others = [handed_out(i) for i in range(1, 200)]
    assert all(ref() is not None for ref in owned)
    assert all(ref() is None for ref in others[0])  # the caches do forget
    owner.clear()
    gc.collect()
    assert all(ref() is None for ref in owned)


def test_another_stream_waits_for_the_copy_of_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """With streams that note what is asked of them; test_on_gpu.py has real ones."""
    noted: list[tuple[str, str, Any]] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_event(self, event: Any) -> None:
            noted.append((self.name, "waits", event))

    first, second = Stream("first"), Stream("second")
    table = torch.zeros(3)
    table.record_stream = lambda stream: noted.append((stream.name, "holds", table))  # type: ignore[method-assign]
    for current, expected in ((first, []), (second, [("second", "waits", "event"), ("second", "holds", table)])):
        noted.clear()
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, current=current: current)
        tables._Upload(table, table, first, "event").wait()
        tables._Upload(table, table).wait()  # of a CPU, or of a capture
        assert noted == expected
