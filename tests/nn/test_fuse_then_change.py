"""A fused model that is changed afterwards is the unfused model changed in the same way."""

import copy
import pickle
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrizations, parametrize

from prunetrain_kernels.nn import BatchNormAct2d, fuse


class Block(nn.Module):
    """All that a rewritten forward may read: parts, containers, attributes of parts, a helper, an optional part."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.tail = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(2)])
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + (x if self.downsample is None else self.downsample(x))
        out = F.dropout(self.last(out), self.drop.p, True)
        for part in self.tail:
            out = part(out)
        return out

    def last(self, x: Tensor) -> Tensor:
        return self.relu(x)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), Block(), Block()).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            nn.init.uniform_(module.bias, -1, 0.5)
    return model


class Shift(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def _double(*arguments: Any) -> Tensor:
    return arguments[-1] * 2


def _half_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0] * 0.5, *inputs[1:])


def _scale_gradient(module: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0] * 3,)


def _set(path: str, name: str, value: Any) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        setattr(model.get_submodule(path), name, value() if callable(value) else value)

    return change


def _on(path: str, method: str, *arguments: Any, **options: Any) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        getattr(model.get_submodule(path), method)(*arguments, **options)

    return change


def _bn(**options: Any) -> nn.BatchNorm2d:
    torch.manual_seed(5)
    norm = nn.BatchNorm2d(4, **options).double()
    nn.init.uniform_(norm.running_mean)
    return norm


def _forward(path: str, function: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        module = model.get_submodule(path)
        module.forward = function(module)  # type: ignore[method-assign]

    return change


def _swap(model: nn.Module) -> None:
    tail = model[3].tail
    tail[0], tail[1] = tail[1], tail[0]


def _delete_and_make_anew(model: nn.Module) -> None:
    del model[3].relu
    model[3].relu = nn.Tanh()


def _weights_swapped(model: nn.Module) -> None:
    a, b = model[3].bn1, model[4].bn2
    a.weight, b.weight = b.weight, a.weight
    model[3].conv1.weight = nn.Parameter(model[4].conv1.weight.detach().clone())


def _frozen(model: nn.Module) -> None:
    for norm in (model[3].bn1, model[4].bn2):
        norm.eval()
        norm.requires_grad_(False)


def _other_class(model: nn.Module) -> None:
    class Other(Block):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.bn1(self.conv1(x)))

    model[3].__class__ = Other


def _parametrized(model: nn.Module) -> None:
    parametrize.register_parametrization(model[3].bn1, "weight", Shift())


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "activation to identity": _on("", "__setitem__", 2, nn.Identity()),
    "activation to identity, inside": _set("3", "relu", nn.Identity),
    "activation to another": _set("3", "relu", nn.GELU),
    "activation to a subclass": _set("3", "relu", nn.ReLU6),
    "activation in place": lambda m: setattr(m[3].relu, "inplace", True),
    "activation deleted, made anew": _delete_and_make_anew,
    "batch norm to another": _set("3", "bn1", _bn),
    "batch norm to identity": _set("4", "bn2", nn.Identity),
    "batch norm to group norm": _set("3", "bn1", lambda: nn.GroupNorm(2, 4).double()),
    "batch norm to instance norm": _on("", "__setitem__", 1, nn.InstanceNorm2d(4).double()),
    "batch norm to one without statistics": _set("3", "bn2", lambda: _bn(affine=False)),
    "batch norm in eval mode": _on("3.bn1", "eval"),
    "batch norms frozen": _frozen,
    "momentum and eps": lambda m: [setattr(m[3].bn1, "momentum", 0.7), setattr(m[3].bn1, "eps", 0.1)],
    "cumulative average": lambda m: setattr(m[3].bn2, "momentum", None),
    "optional part to None": _set("3", "downsample", None),
    "optional part to another": _set("3", "downsample", nn.Identity),
    "convolution to another": _set("3", "conv1", lambda: nn.Conv2d(4, 4, 1, bias=False).double()),
    "list appended to": lambda m: m[3].tail.append(nn.Tanh()),
    "list inserted into": lambda m: m[3].tail.insert(1, nn.Tanh()),
    "list popped": lambda m: m[3].tail.pop(1),
    "list swapped": _swap,
    "list entry replaced": lambda m: m[3].tail.__setitem__(0, nn.Tanh()),
    "sequential appended to": _on("", "append", nn.Tanh()),
    "sequential inserted into": _on("", "insert", 1, nn.Tanh()),
    "sequential popped": _on("", "pop", 4),
    "sequential entry deleted": _on("", "__delitem__", 2),
    "inner sequential": _on("3.tail.0", "__setitem__", 2, nn.Tanh()),
    "module added": _on("3", "add_module", "more", nn.Tanh()),
    "attribute of a part": lambda m: setattr(m[3].drop, "p", 1.0),
    "hook on a ReLU": _on("3.relu", "register_forward_hook", _double),
    "pre-hook on a ReLU": _on("3.relu", "register_forward_pre_hook", _half_input),
    "backward hook on a ReLU": _on("3.relu", "register_full_backward_hook", _scale_gradient),
    "hook on a batch norm": _on("3.bn2", "register_forward_hook", _double),
    "hook with keywords": _on("3.bn2", "register_forward_hook", lambda m, a, k, y: y * 3, with_kwargs=True),
    "pre-hook on a batch norm": _on("3.bn2", "register_forward_pre_hook", _half_input),
    "backward hook on a batch norm": _on("3.bn1", "register_full_backward_hook", _scale_gradient),
    "hook on a sequential's ReLU": _on("2", "register_forward_hook", _double),
    "hook on the block": _on("3", "register_forward_hook", _double),
    "hook on a convolution": _on("3.conv2", "register_forward_hook", _double),
    "instance's forward, block": _forward("3", lambda m: lambda x: x * 2),
    "instance's forward, ReLU": _forward("3.relu", lambda m: lambda x: x * 2),
    "instance's forward, batch norm": _forward("3.bn1", lambda m: lambda x: x * 2),
    "instance's forward, convolution": _forward("3.conv1", lambda m: lambda x: x * 2),
    "instance's helper": lambda m: setattr(m[3], "last", torch.tanh),
    "class changed": _other_class,
    "parametrization of a batch norm": _parametrized,
    "weight norm of a convolution": lambda m: parametrizations.weight_norm(m[3].conv1),
    "spectral norm of a convolution": lambda m: nn.utils.spectral_norm(m[3].conv1),
    "weights swapped": _weights_swapped,
    "in single precision": lambda m: m.float(),
    "state dict": lambda m: m.load_state_dict({n: t * 1.5 for n, t in m.state_dict().items()}),
}


def run(model: nn.Module) -> list[Tensor]:
    """Outputs, gradients and buffers of a few steps."""
    results: list[Tensor] = []
    dtype = next(model.parameters()).dtype
    for training in (True, False, True):
        model.train(training)
        if not training:  # a part in another mode than its parent
            next(m for m in model if isinstance(m, Block)).bn1.train()
        torch.manual_seed(1)
        x = torch.randn(3, 4, 5, 5, dtype=torch.float64).to(dtype).requires_grad_()
        y = model(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        results += [y.detach(), gradient]
    return results + [b.clone() for b in model.buffers()]


def assert_same(fused: list[Tensor], plain: list[Tensor]) -> None:
    assert len(fused) == len(plain)
    for a, b in zip(fused, plain, strict=True):
        assert a.dtype == b.dtype
        tolerance = 1e-9 if a.dtype == torch.float64 else 1e-4
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max() + 1))


@pytest.fixture(scope="module")
def net_and_fused() -> tuple[nn.Module, nn.Module]:
    """A network and the fused one, to be copied: tracing takes longer than all that a test does with them."""
    plain = net()
    fused = copy.deepcopy(plain)
    assert sum(b.what != "alone" for b in fuse(fused).fused) == 9
    return plain, fused


@pytest.mark.parametrize("name", CHANGES)
def test_the_change_is_heeded(name: str, net_and_fused: tuple[nn.Module, nn.Module]) -> None:
    plain, fused = copy.deepcopy(net_and_fused)
    for model in (plain, fused):
        torch.manual_seed(2)
        CHANGES[name](model)
    assert_same(run(fused), run(plain))


NOT_COPIED = ["activation to another", "batch norm to another", "list inserted into", "hook on a batch norm"]
NOT_COPIED += ["instance's forward, ReLU", "class changed", "weights swapped"]


@pytest.mark.parametrize("name", NOT_COPIED)
def test_the_change_of_what_was_fused_itself_is_heeded(name: str) -> None:
    plain = net()
    fused = copy.deepcopy(plain)
    fuse(fused)
    CHANGES[name](plain), CHANGES[name](fused)
    assert_same(run(fused), run(plain))


@pytest.mark.parametrize("name", ["activation to another", "hook on a ReLU", "list swapped", "optional part to None"])
def test_changed_then_copied(name: str) -> None:
    plain = net()
    fused = copy.deepcopy(plain)
    fuse(fused)
    CHANGES[name](plain), CHANGES[name](fused)
    assert_same(run(copy.deepcopy(fused)), run(copy.deepcopy(plain)))


@pytest.mark.parametrize("name", ["activation to another", "batch norm to identity", "optional part to None"])
def test_pickled_then_changed(name: str) -> None:
    plain = net()
    fused = copy.deepcopy(plain)
    fuse(fused)
    fused = pickle.loads(pickle.dumps(fused))
    CHANGES[name](plain), CHANGES[name](fused)
    assert_same(run(fused), run(plain))
    fuse(fused)  # again
    assert_same(run(fused), run(plain))


def spied(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    forward, calls = BatchNormAct2d.forward, []

    def spy(self: BatchNormAct2d, *arguments: Any, **options: Any) -> Tensor:
        calls.append(bool(options.get("relu", self.relu)))
        return forward(self, *arguments, **options)

    monkeypatch.setattr(BatchNormAct2d, "forward", spy)
    return calls


def test_it_is_fused_again_when_the_hook_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net(), torch.randn(3, 4, 5, 5).double()
    fuse(model)
    calls, fired = spied(monkeypatch), []
    handle = model[3].relu.register_forward_hook(lambda *_: fired.append(1))
    model(x)
    assert (len(fired), sum(calls)) == (2, 7)
    handle.remove()
    calls.clear()
    model(x)
    assert (len(fired), sum(calls)) == (2, 9)
    copy.deepcopy(model)(x)
    assert sum(calls) == 18


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_global_hooks_fire_on_all_modules(kind: str) -> None:
    plain = net()
    fused = copy.deepcopy(plain)
    fuse(fused)
    seen: list[list[str]] = []
    for model in (plain, fused):
        names = {id(m): n for n, m in model.named_modules()}
        fired: list[str] = []
        register = getattr(nn_module, f"register_module_{kind}_hook")
        handle = register(lambda m, *_, names=names, fired=fired: fired.append(names[id(m)]))
        try:
            model(torch.randn(3, 4, 5, 5).double().requires_grad_()).sum().backward()
        finally:
            handle.remove()
        seen.append(fired)
    assert seen[0] == seen[1]
    assert any(name.endswith("relu") for name in seen[1])


@pytest.mark.parametrize(
    ("cls", "name", "new"),
    [
        (nn.ReLU, "forward", lambda self, x: x * 2),
        (Block, "forward", lambda self, x: torch.tanh(self.bn1(self.conv1(x)))),
        (Block, "last", lambda self, x: torch.tanh(x)),
        (nn.Conv2d, "forward", lambda self, x: x * 2),
        (nn.Sequential, "forward", lambda self, x: self[0](x)),
    ],
    ids=["ReLU", "block", "a helper of the block", "convolution", "sequential"],
)
def test_a_class_patched_later(
    cls: type, name: str, new: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = net()
    fused = copy.deepcopy(plain)
    fuse(fused)
    monkeypatch.setattr(cls, name, new)
    assert_same(run(fused), run(plain))


class Scaled(nn.Module):
    """A forward that reads a number, a list and a helper of its class, and attributes of an object that it holds."""

    scale = 2.0
    shifts: ClassVar[list[float]] = [1.0, 2.0]

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.config = SimpleNamespace(head=SimpleNamespace(factor=1.5), powers=[1.0])

    def forward(self, x: Tensor) -> Tensor:
        y = self.more(F.relu(self.bn(self.conv(x))) * self.scale + self.shifts[1])
        return y * self.config.head.factor * self.config.powers[0]

    def more(self, x: Tensor) -> Tensor:
        return x + 1


class ScaledMore(Scaled):
    scale = 3.0


class ScaledLess(Scaled):
    def more(self, x: Tensor) -> Tensor:
        return x - 1


class ScaledByProperty(Scaled):
    @property
    def scale(self) -> float:  # type: ignore[override]
        return 0.5


def _become(cls: type) -> Callable[[nn.Module, pytest.MonkeyPatch], None]:
    return lambda model, patch: setattr(model, "__class__", cls)


READ_BY_THE_FORWARD: dict[str, Callable[[nn.Module, pytest.MonkeyPatch], Any]] = {
    "the class's number": lambda model, patch: patch.setattr(Scaled, "scale", 5.0),
    "the instance's number": lambda model, patch: setattr(model, "scale", 5.0),
    "the class's list, in place": lambda model, patch: Scaled.shifts.__setitem__(1, 7.0),
    "the instance's list": lambda model, patch: setattr(model, "shifts", [0.0, 7.0]),
    "a configuration's list, in place": lambda model, patch: model.config.powers.__setitem__(0, 3.0),
    "inside a configuration": lambda model, patch: setattr(model.config.head, "factor", 3.0),
    "a part of a configuration": lambda model, patch: setattr(model.config, "head", SimpleNamespace(factor=3.0)),
    "another configuration": lambda model, patch: setattr(
        model, "config", SimpleNamespace(head=SimpleNamespace(factor=3.0), powers=[1.0])
    ),
    "a subclass with another number": _become(ScaledMore),
    "a subclass with another helper": _become(ScaledLess),
    "a subclass with a property": _become(ScaledByProperty),
}


@pytest.mark.parametrize("name", READ_BY_THE_FORWARD)
def test_what_a_forward_reads_is_heeded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    Scaled.shifts[:] = [1.0, 2.0]  # as one of the cases has left it otherwise
    plain, x = Scaled().double(), torch.randn(3, 4, 5, 5).double()
    fused = copy.deepcopy(plain)
    assert len(fuse(fused).fused) == 1
    compiled = torch.compile(copy.deepcopy(fused), backend="eager", fullgraph=True)
    before = plain(x).detach()
    assert torch.allclose(compiled(x), before, rtol=1e-9)
    for model in (plain, fused):
        READ_BY_THE_FORWARD[name](model, monkeypatch)
    after = plain(x)
    assert (after - before).abs().max() > 0.1
    assert torch.allclose(fused(x), after, rtol=1e-9)


def test_compiled_then_changed() -> None:
    torch._dynamo.reset()
    plain = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).double().eval()
    fused, x = copy.deepcopy(plain), torch.randn(3, 4, 5, 5).double()
    fuse(fused)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    for activation in (None, nn.Tanh(), nn.Identity()):
        if activation is not None:
            plain[2] = fused[2] = activation
        assert torch.allclose(compiled(x), plain(x), rtol=1e-9)


def test_converted_to_torch_s_synchronised_batch_norm() -> None:
    plain = net().eval()
    fused, x = copy.deepcopy(plain), torch.randn(3, 4, 5, 5).double()
    fuse(fused)
    plain, fused = (nn.SyncBatchNorm.convert_sync_batchnorm(m) for m in (plain, fused))
    assert type(fused[3].bn1) is nn.SyncBatchNorm
    assert torch.allclose(fused(x), plain(x), rtol=1e-9)


class ReadsAnotherMode(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.relu(self.bn1(self.conv1(x))), 0.5, self.drop.training)


def test_a_forward_that_reads_another_module_s_mode_is_left() -> None:
    model = ReadsAnotherMode()
    assert "mode" in {b.name: b.reason for b in fuse(model).left}["bn1"]


# -- inference mode, default devices, threads --------------------------------------------------------------------------


@pytest.mark.parametrize("made", [True, False], ids=["made in inference mode", "made before"])
@pytest.mark.parametrize("examples", [True, False], ids=["with examples", "without"])
def test_in_inference_mode(made: bool, examples: bool) -> None:
    with torch.inference_mode():
        inside = net()
    plain = inside if made else net()
    x = torch.randn(3, 4, 5, 5).double()
    fused = net()
    with torch.inference_mode():
        fused = copy.deepcopy(plain) if made else fused
        before = {n: t.clone() for n, t in fused.state_dict().items()}
        assert len(fuse(fused, (x,) if examples else None).fused) == 11
        assert all(torch.equal(t, before[n]) for n, t in fused.state_dict().items())
        for training in (True, False):
            assert torch.allclose(fused.train(training)(x), plain.train(training)(x), rtol=1e-9)
    if not made:
        assert_same(run(fused), run(plain))


def test_a_model_made_in_inference_mode_is_fused_outside_of_it() -> None:
    with torch.inference_mode():
        plain = net().eval()
        fused = copy.deepcopy(plain)
    x = torch.randn(3, 4, 5, 5).double()
    assert len(fuse(fused, (x,)).fused) == 11
    with torch.no_grad():
        assert torch.allclose(fused(x), plain(x), rtol=1e-9)


def test_under_a_foreign_default_device() -> None:
    plain = net()
    fused, x = copy.deepcopy(plain), torch.randn(3, 4, 5, 5).double()
    expected = run(plain)
    torch.set_default_device("meta")
    try:
        assert len(fuse(fused, (x,)).fused) == 11
        fused(x).sum().backward()
    finally:
        torch.set_default_device("cpu")
    for module, other in zip(fused.modules(), plain.modules(), strict=True):
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats(), other.reset_running_stats()
    assert len(expected) == len(run(fused))
    for module, other in zip(fused.modules(), plain.modules(), strict=True):
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats(), other.reset_running_stats()
    assert_same(run(fused), run(plain))


def test_beside_an_inference_thread() -> None:
    """Another model's forwards are what they are while this one is traced."""
    serving, x = net().eval(), torch.randn(3, 4, 5, 5).double()
    expected, stop, wrong = serving(x).detach(), threading.Event(), []

    def serve() -> None:
        while not stop.is_set():
            try:
                with torch.no_grad():
                    y = serving(x)
                if not (isinstance(y, Tensor) and torch.equal(y, expected)):
                    wrong.append(type(y))
            except Exception as error:
                wrong.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(3):
            fuse(net(), (x,))
    finally:
        stop.set()
        thread.join()
    assert not wrong
