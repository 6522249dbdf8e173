"""A reconfiguration that cannot be trusted is undone to the last bit, and one that can leaves nothing stale behind."""

import math
from typing import Any

import pytest
import torch
from nets import kill, randomise, rest_of, same, small_net, snapshot, traced, train, twin_of, warm_up
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.modules import module as torch_module
from torch.optim import SGD, Adam, Optimizer
from torch.utils.flop_counter import FlopCounterMode

from prunetrain_kernels import InputError, Keep, PruneTrainError, reconfigure
from prunetrain_kernels.nn import BatchNormAct2d, fuse
from prunetrain_kernels.probe import Difference
from prunetrain_kernels.prune import reconfigure as package_member
from prunetrain_kernels.prune.undo import AllOrNothing

module = __import__("prunetrain_kernels.prune.reconfigure", fromlist=["reconfigure"])


DIFFERENT = Difference(math.inf, 1.0, math.inf, "", 1, 0.0)


def ready(
    dtype: torch.dtype = torch.float64, branch: bool = True, policy: str = "union"
) -> tuple[nn.Module, Optimizer, Tensor, Keep]:
    """A model about to lose channels and a branch, with gradients and optimizer state; under gating a fused one that is
    gated and paired already."""
    model, x = small_net("in-place-bottleneck", dtype)
    optimizer = Adam(model.parameters(), lr=0.001)
    warm_up(model, optimizer, x)
    if policy == "gating":
        fuse(model)
        graph = traced(model, x)
        kill(graph, model, share=0.0, partly=0.3, seed=5)
        reconfigure(model, optimizer, graph.keep(model, policy=policy))
        assert any(isinstance(m, BatchNormAct2d) and m.places_of is not None for m in model.modules())
        warm_up(model, optimizer, x)
    graph = traced(model, x)
    kill(graph, model)
    if branch:
        rest_of(model, "blocks.0.conv3").zero_()
    rest_of(model, "fc")[0, 0] = 1e-6  # sparse slices that are not zero yet
    rest_of(model, "blocks.1.conv1")[:, 1] = 1e-6
    return model, optimizer, x, graph.keep(model, policy=policy)


@pytest.mark.parametrize(
    "step",
    [
        "_zero_slices",
        "_slice_all",
        "swap_in",
        "drop",
        "_set_sizes",
        "_gate",
        "_forget_momentum",
        "_outputs_after",
        "zeroing_difference",
        "check_cutting",
        "forget_compiled",
        "layer_changes",
    ],
)
@pytest.mark.parametrize("policy", ["union", "gating"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failing_step_is_undone(
    step: str, error: type[BaseException], when: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, x, keep = ready(policy=policy)
    before = snapshot(model, optimizer)
    old = getattr(module, step)

    def fails(*args: object) -> None:
        if when == "after":
            old(*args)
        raise error("forced")

    monkeypatch.setattr(module, step, fails)
    with pytest.raises(error, match="forced"):
        reconfigure(model, optimizer, keep)
    assert same(before, snapshot(model, optimizer))
    monkeypatch.undo()
    twin, twin_optimizer = twin_of(model, optimizer)
    assert train(model, optimizer, [x] * 2) == train(twin, twin_optimizer, [x] * 2)
    reconfigure(model, optimizer, traced(model, x).keep(model))


def test_undone_half_way_through_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, _, keep = ready()
    before = snapshot(model, optimizer)
    old, calls = module.set_data, []

    def fails(tensor: Tensor, data: Tensor) -> None:
        calls.append(tensor)
        if len(calls) == 7:
            raise RuntimeError("forced")
        old(tensor, data)

    monkeypatch.setattr(module, "set_data", fails)
    with pytest.raises(RuntimeError, match="forced"):
        reconfigure(model, optimizer, keep)
    assert same(before, snapshot(model, optimizer))


class Secret(nn.Module):
    """Computes something with its channels behind torch.fx's back, once `armed`."""

    armed = None

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        self.a.register_forward_hook(self.hook)

    @staticmethod
    def hook(conv: nn.Conv2d, args: object, out: Tensor) -> Tensor | None:
        if Secret.armed == "count":
            return out / out.shape[1]
        if Secret.armed == "eight":
            return out * torch.ones(1, 8, 1, 1, dtype=out.dtype)
        if Secret.armed == "nan":
            return out if out.shape[1] == 8 else out.log()
        return None

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


@pytest.mark.parametrize(
    ("secret", "message"),
    [
        ("count", "pruning moved the model's output by .* so it was undone"),
        ("nan", "pruning moved the model's output by inf"),
        ("eight", "the pruned model fails on the example inputs .* so pruning was undone"),
    ],
    ids=["count", "nan", "eight"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_a_model_that_does_something_untraceable_is_undone(
    secret: str, message: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = randomise(Secret()).to(dtype), torch.randn(4, 3, 8, 8, dtype=dtype)
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    warm_up(model, optimizer, x)
    graph = traced(model, x)
    kill(graph, model)
    keep = graph.keep(model)
    monkeypatch.setattr(Secret, "armed", secret)
    before = snapshot(model, optimizer)
    with pytest.raises(PruneTrainError, match=message):
        reconfigure(model, optimizer, keep)
    assert same(before, snapshot(model, optimizer))


def test_outputs_that_are_not_finite_do_not_stop_it() -> None:
    model, x = small_net("out-of-place")
    graph = traced(model, x)
    kill(graph, model)
    rest_of(model, "fc")[0] = float("inf")
    rest_of(model, "fc")[1] = float("nan")
    report = reconfigure(model, None, graph.keep(model))
    assert report.max_abs_dy < 1e-10


def test_keep_of_another_shape_is_refused() -> None:
    model, optimizer, x, keep = ready()
    other, _ = small_net("out-of-place")
    before = snapshot(other)
    with pytest.raises(InputError, match="does not have the shape that was traced"):
        reconfigure(other, None, keep)
    assert same(before, snapshot(other))
    reconfigure(model, optimizer, keep)
    before = snapshot(model, optimizer)
    with pytest.raises(InputError, match=r"call trace_channels\(model, example_inputs\) again"):
        reconfigure(model, optimizer, keep)  # a second time
    assert same(before, snapshot(model, optimizer))
    broken, _ = small_net("in-place-bottleneck")
    graph = traced(broken, x)
    broken.blocks[1].bn1 = nn.BatchNorm2d(3)
    with pytest.raises(InputError, match=r"'blocks\.1\.bn1' does not have the 8 channels that were traced"):
        graph.keep(broken)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["", "unfrozen-later"])
def test_an_old_loss_that_is_still_held_does_no_harm(dtype: torch.dtype, frozen: bool) -> None:
    model, optimizer, x, keep = ready(dtype)
    loss = model(x).square().mean()
    loss.backward(retain_graph=True)
    if frozen:
        model.requires_grad_(False)
    reconfigure(model, optimizer, keep)
    model.requires_grad_(True)
    for _ in range(2):
        optimizer.zero_grad()
        fresh = model(x).square().mean()
        fresh.backward()
        optimizer.step()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    assert loss.grad_fn is not None


def test_an_old_loss_does_no_harm_after_an_undone_reconfiguration(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, x, keep = ready()
    loss = model(x).square().mean()
    monkeypatch.setattr("prunetrain_kernels.prune.measure.difference", lambda a, b, **_: DIFFERENT)
    with pytest.raises(PruneTrainError):
        reconfigure(model, optimizer, keep)
    warm_up(model, optimizer, x)
    assert loss.grad_fn is not None


def test_gradient_hooks_survive() -> None:
    model, optimizer, x, keep = ready()
    seen: list[torch.Size] = []
    model.fc.weight.register_hook(lambda g: seen.append(g.shape))
    model.fc.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    loss = model(x).sum()
    loss.backward(retain_graph=True)
    reconfigure(model, optimizer, keep)
    seen.clear()
    model(x).sum().backward()
    assert seen == [model.fc.weight.shape] * 2


def test_buffers_that_move_in_evaluation_mode_are_left_alone() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x

    model, x = small_net("out-of-place")
    model.stem.append(Counts())
    graph = traced(model, x)
    kill(graph, model)
    reconfigure(model, None, graph.keep(model))
    assert float(model.stem[3].calls) == 0


def test_the_package_offers_it() -> None:
    assert package_member is reconfigure


def global_hooks() -> list[str]:
    """The tables of hooks on every module that hold any."""
    tables = {name: value for name, value in vars(torch_module).items() if name.startswith("_global_")}
    return [name for name, value in tables.items() if isinstance(value, dict) and value]


@pytest.mark.parametrize("name", ["flop counter", "fake tensors", "both", "function mode"])
def test_modes_whose_exit_was_interrupted_are_taken_off_the_stack(name: str) -> None:
    modes: dict[str, list[Any]] = {
        "flop counter": [FlopCounterMode(display=False)],
        "fake tensors": [FakeTensorMode()],
        "both": [FakeTensorMode(), FlopCounterMode(display=False)],
        "function mode": [torch.device("meta")],
    }
    lengths = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
    before = [length() for length in lengths]

    def interrupted() -> None:
        with AllOrNothing([nn.Linear(1, 1)]):
            for mode in modes[name]:
                mode.__enter__()
            assert [length() for length in lengths] != before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [length() for length in lengths] == before
    assert not global_hooks()
    assert torch.zeros(1, device="cpu").sum().item() == 0.0
