"""A fused model is the model: same numbers, same names, same objects; what cannot be fused is left, with the reason."""

import copy
import io
import pickle
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prunetrain_kernels import InputError, PruneTrainError
from prunetrain_kernels.cost.flops import count_flops
from prunetrain_kernels.cost.memory import step_memory
from prunetrain_kernels.cost.traffic import batch_norm_bytes
from prunetrain_kernels.models import build
from prunetrain_kernels.nn import BatchNormAct2d, fuse

PAPER = {"resnet20": 16, "resnet50": 8, "vgg11": 32}


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                if tensor is not None:
                    nn.init.uniform_(tensor, 0.5, 1.5)
    return model.double()


Calls = list[tuple[str, int, bool]]
_watched: dict[int, tuple[str, Calls, nn.Module]] = {}


@pytest.fixture(autouse=True)
def _spy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by hooks, which would make the forwards run as they were written."""
    forward = BatchNormAct2d.forward

    def spy(self: BatchNormAct2d, *arguments: Tensor, **options: bool) -> Tensor:
        if id(self) in _watched:
            name, calls, _ = _watched[id(self)]
            calls.append((name, len(arguments), options.get("relu", self.relu)))
        return forward(self, *arguments, **options)

    _watched.clear()
    monkeypatch.setattr(BatchNormAct2d, "forward", spy)


def watch(model: nn.Module) -> Calls:
    """Each call of a fused batch norm from now on: its name, its tensors, and whether it applies the ReLU."""
    calls: Calls = []
    for name, module in model.named_modules():
        if isinstance(module, BatchNormAct2d):
            _watched[id(module)] = (name, calls, module)
    return calls


def compare(model: nn.Module, fused: nn.Module, *inputs: Tensor, steps: int = 4) -> None:
    """Outputs, gradients, running statistics and trained parameters are equal."""
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (model, fused)]
    for step in range(steps):
        outputs = []
        for m, optimizer in zip((model, fused), optimizers, strict=True):
            m.train(step != 1)
            optimizer.zero_grad()
            torch.manual_seed(step)
            outputs.append(m(*(x.clone() for x in inputs)))
            outputs[-1].square().mean().backward()
        assert torch.allclose(outputs[0], outputs[1], rtol=1e-9, atol=1e-11), step
        for (name, p), q in zip(model.named_parameters(), fused.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None and q.grad is not None:
                assert torch.allclose(p.grad, q.grad, rtol=1e-7, atol=1e-10 * float(p.grad.abs().max() + 1)), name
        for optimizer in optimizers:
            optimizer.step()
    for (name, a), b in zip(model.state_dict().items(), fused.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9), name


@pytest.mark.parametrize("name", PAPER)
def test_paper_networks(name: str) -> None:
    model = randomised(build(name, 10))
    x = torch.randn(3, 3, PAPER[name], PAPER[name]).double()
    fused = copy.deepcopy(model)
    objects = {n: id(t) for n, t in (*fused.named_modules(), *fused.named_parameters(), *fused.named_buffers())}
    report = fuse(fused, (x,))
    assert {n: id(t) for n, t in (*fused.named_modules(), *fused.named_parameters(), *fused.named_buffers())} == objects
    assert list(fused.state_dict()) == list(model.state_dict())
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert [b.name for b in report.fused] == norms
    assert not report.left
    kinds = {b.name: b.what for b in report.fused}
    for norm, kind in kinds.items():
        last = norm.endswith("bn3") or (name == "resnet20" and norm.endswith("bn2"))
        assert kind == ("add + ReLU" if last else "alone" if "downsample" in norm else "ReLU"), norm
    calls = watch(copy.deepcopy(fused))
    assert not calls
    watched = copy.deepcopy(fused)
    calls = watch(watched)
    watched(x)
    assert sorted(calls) == sorted((n, 1 + ("add" in k), "ReLU" in k) for n, k in kinds.items())
    compare(model, fused, x, steps=3)


def test_the_report_reads_well() -> None:
    model = build("resnet20", 10)
    model.layer2[0].downsample[1].register_forward_hook(lambda *_: None)
    text = str(fuse(model))
    assert "CifarResNet: 20 batch norms fused, 1 left alone" in text
    assert [line.split() for line in text.splitlines() if " layer2.0" in line] == [
        ["layer2.0.bn1", "ReLU", "in", "layer2.0"],
        ["layer2.0.bn2", "add", "+", "ReLU", "in", "layer2.0"],
        ["layer2.0.downsample.1", "left", "alone", "it", "has", "hooks"],
    ]


def test_fusing_twice_changes_nothing() -> None:
    model, x = randomised(build("resnet20", 10)), torch.randn(2, 3, 8, 8).double()
    fuse(model)
    forwards = {n: vars(m).get("forward") for n, m in model.named_modules()}
    report = fuse(model, (x,))
    assert report.fused == report.left == report.rewritten == ()
    assert {n: vars(m).get("forward") for n, m in model.named_modules()} == forwards


# -- every way to write it ---------------------------------------------------------------------------------------------


class Block(nn.Module):
    """conv, BN, and then what `after` does with it and the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.act, self.in_place = nn.ReLU(), nn.ReLU(inplace=True)
        self.gate = nn.AdaptiveAvgPool2d(1)


def block(after: Callable[[Block, Tensor, Tensor], Tensor]) -> Block:
    """A block whose class has a forward of its own: h is the convolution's output."""
    namespace = {"_after": after}
    exec("def forward(self, x):\n    return _after(self, self.conv(x), x)\n", namespace)
    return randomised(type("Made", (Block,), {"forward": namespace["forward"]})())  # type: ignore[return-value]


def _iadd(self: Block, h: Tensor, x: Tensor) -> Tensor:
    out = self.bn(h)
    out += x
    return self.in_place(out)


def _iadd_residual_after(self: Block, h: Tensor, x: Tensor) -> Tensor:
    out = self.bn(h)
    identity = self.conv2(x)
    out += identity
    return F.relu_(out)


FUSED: dict[str, tuple[Callable[[Block, Tensor, Tensor], Tensor], list[str]]] = {
    "F.relu": (lambda self, h, x: F.relu(self.bn(h)), ["ReLU"]),
    "F.relu-inplace": (lambda self, h, x: F.relu(self.bn(h), inplace=True), ["ReLU"]),
    "F.relu_": (lambda self, h, x: F.relu_(self.bn(h)), ["ReLU"]),
    "torch.relu": (lambda self, h, x: torch.relu(self.bn(h)), ["ReLU"]),
    "method": (lambda self, h, x: self.bn(h).relu(), ["ReLU"]),
    "method_": (lambda self, h, x: self.bn(h).relu_(), ["ReLU"]),
    "module": (lambda self, h, x: self.act(self.bn(h)), ["ReLU"]),
    "in-place module": (lambda self, h, x: self.in_place(self.bn(h)), ["ReLU"]),
    "sum": (lambda self, h, x: self.bn(h) + x, ["add"]),
    "sum, right": (lambda self, h, x: x + self.bn(h), ["add"]),
    "torch.add": (lambda self, h, x: F.relu(torch.add(x, self.bn(h))), ["add + ReLU"]),
    "add method": (lambda self, h, x: self.bn(h).add(x).relu(), ["add + ReLU"]),
    "add_ method": (lambda self, h, x: self.bn(h).add_(x).relu_(), ["add + ReLU"]),
    "out += x": (_iadd, ["add + ReLU"]),
    "residual made later": (_iadd_residual_after, ["add + ReLU"]),
    "two batch norms": (lambda self, h, x: F.relu(self.bn(h) + self.bn2(self.conv2(x))), ["alone", "add + ReLU"]),
    "tanh": (lambda self, h, x: torch.tanh(self.bn(h)), ["alone"]),
    "number": (lambda self, h, x: F.relu(self.bn(h) + 1), ["alone"]),
    "alpha": (lambda self, h, x: torch.add(self.bn(h), x, alpha=2), ["alone"]),
    "itself": (lambda self, h, x: (lambda y: y + y)(self.bn(h)), ["alone"]),
    "into the other": (lambda self, h, x: h.clone().add_(self.bn(h)), ["alone"]),
    "used again": (lambda self, h, x: (lambda y: F.relu(y) * y)(self.bn(h)), ["alone"]),
    "sum used again": (lambda self, h, x: (lambda y: F.relu(y) * y)(self.bn(h) + x), ["add"]),
    "called twice alike": (lambda self, h, x: F.relu(self.bn(F.relu(self.bn(h)))), ["ReLU"]),
    "called twice": (lambda self, h, x: torch.tanh(self.bn(F.relu(self.bn(h)))), ["alone"]),
    "broadcast": (lambda self, h, x: F.relu(self.bn(h) + self.gate(x)), ["alone"]),
}


@pytest.mark.parametrize("examples", [True, False], ids=["with examples", "without"])
@pytest.mark.parametrize("name", FUSED)
def test_ways_to_write_it(name: str, examples: bool) -> None:
    after, kinds = FUSED[name]
    model, x = block(after), torch.randn(3, 4, 5, 5).double()
    fused = copy.deepcopy(model)
    report = fuse(fused, (x,) if examples else None)
    if name == "broadcast" and not examples:
        kinds = ["add + ReLU"]  # computes right, in two passes
    assert [b.what for b in report.fused] == kinds, str(report)
    before, watched = x.clone(), copy.deepcopy(fused)
    calls = watch(watched)
    watched(x)
    assert any(relu for _, _, relu in calls) == any("ReLU" in kind for kind in kinds)
    assert any(tensors == 2 for _, tensors, _ in calls) == any("add" in kind for kind in kinds)
    compare(model, fused, x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("later", ["writes", "calls"])
def test_what_is_normalised_must_not_change_before_the_sum(later: str) -> None:
    """The fused call stands where the sum stood."""
    model = block(lambda self, h, x: self.bn(x) + (x.mul_(2) if later == "writes" else self.in_place(x))).eval()
    fused = copy.deepcopy(model)
    report = fuse(fused)
    assert [(b.what, b.note) for b in report.fused] == [
        ("alone", "what it normalises may change before the sum is made")
    ]
    x = torch.randn(3, 4, 5, 5).double()
    with torch.no_grad():
        assert torch.allclose(model(x.clone()), fused(x.clone()), rtol=1e-12)


def test_writing_into_the_caller_s_tensor_stays() -> None:
    def forward(self: Block, h: Tensor, x: Tensor) -> Tensor:
        x += self.bn(h)
        return F.relu(self.bn2(self.conv2(x)))

    model = block(forward)
    fused = copy.deepcopy(model)
    assert {b.name: b.what for b in fuse(fused).fused} == {"bn": "alone", "bn2": "ReLU"}
    x = torch.randn(3, 4, 5, 5).double()
    a, b = x.clone(), x.clone()
    assert torch.allclose(model(a), fused(b))
    assert torch.allclose(a, b)
    assert not torch.equal(a, x)


def test_sequential_with_names_and_containers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList([nn.BatchNorm2d(4) for _ in range(2)])
            self.convs = nn.ModuleDict({"a": nn.Conv2d(4, 4, 1), "b": nn.Conv2d(4, 4, 1)})
            self.scale = nn.Parameter(torch.ones(1))
            self.register_buffer("offset", torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            for norm, conv in zip(self.norms, self.convs.values(), strict=True):
                x = F.relu(norm(conv(x)) + x) * self.scale
            return x + self.offset * 2

    model = randomised(nn.Sequential(Net(), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))
    fused = copy.deepcopy(model)
    assert [b.what for b in fuse(fused).fused] == ["add + ReLU", "add + ReLU", "ReLU"]
    compare(model, fused, torch.randn(3, 4, 5, 5).double())
    tail = fused[1:]  # a Sequential of its own over the same modules
    x = torch.randn(3, 4, 5, 5).double()
    assert torch.equal(tail(x), fused[3](fused[2](fused[1](x))))
    longer = copy.deepcopy(fused).append(nn.Tanh())
    assert longer(x).abs().max() <= 1


# -- what tracing would get wrong --------------------------------------------------------------------------------------


class Left(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.register_buffer("calls", torch.zeros(()))
        self.steps, self.kept = 0, None


class DataDependent(Left):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x))) if x.mean() > 0 else x


class NoGrad(Left):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.conv(x)
        return F.relu(self.bn(x))


class Counts(Left):
    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return F.relu(self.bn(self.conv(x)))


class Keeps(Left):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.conv(x)
        return F.relu(self.bn(self.kept))


class WritesBuffer(Left):
    def forward(self, x: Tensor) -> Tensor:
        self.bn.num_batches_tracked.add_(0)
        return F.relu(F.batch_norm(self.conv(x), self.bn.running_mean, self.bn.running_var, training=True))


class RandomDepth(Left):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and random.random() < 0.5:
            return x
        return F.relu(self.bn(self.conv(x)))


class TorchRandomDepth(Left):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(()).item() < 0.5:
            return x
        return F.relu(self.bn(self.conv(x)))


class TakesLists(Left):
    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        x = x if isinstance(x, Tensor) else torch.cat(x)
        return F.relu(self.bn(self.conv(x)))


class MakesTensors(Left):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x))) * torch.tensor([2.0])


class ByHelper(Left):
    def forward(self, x: Tensor) -> Tensor:
        return self._inner(x)

    def _inner(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return F.relu(self.bn(self.conv(x)))


@torch.no_grad()
def _frozen(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


class ByFunction(Left):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(_frozen(self.conv, x)))


LEFT = {
    DataDependent: "cannot be traced", NoGrad: "`with` block", Counts: "sets 'steps'", Keeps: "sets 'kept'",
    WritesBuffer: "", RandomDepth: "random numbers", TorchRandomDepth: "random numbers", TakesLists: "isinstance",
    MakesTensors: "makes a tensor", ByHelper: "`with` block", ByFunction: "`with` block",
}  # fmt: skip


@pytest.mark.parametrize("cls", LEFT, ids=lambda c: c.__name__)
def test_left_alone_with_the_reason(cls: type[Left]) -> None:
    model = nn.Sequential(cls(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    state, random_states = copy.deepcopy(vars(model[0])), (random.getstate(), torch.get_rng_state())
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    report = fuse(model)
    assert [b.name for b in report.left] == ["0.bn"]
    assert LEFT[cls] in report.left[0].reason
    assert type(model[0].bn) is nn.BatchNorm2d
    assert [b.name for b in report.fused] == ["2"]
    assert vars(model[0]).keys() - {"_fused_part"} == state.keys()  # by which the forward that calls it knows it
    assert (model[0].steps, model[0].kept) == (0, None)
    assert random.getstate() == random_states[0]
    assert torch.equal(torch.get_rng_state(), random_states[1])
    assert all(torch.equal(t, tensors[n]) for n, t in model.state_dict().items())


class Flags(Left):
    """A flow that depends on arguments and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.sizes = False, [1, 2]

    def forward(
        self, x: Tensor, features: bool = False, mask: Tensor | None = None, *rest: Tensor, scale: float = 1.0
    ) -> object:
        h = F.relu(self.bn(self.conv(x)))
        if self.twice:
            h = h * len(self.sizes)
        if mask is not None:
            h = h * mask
        for r in rest:
            h = h + r
        return (h, x) if features else h * scale


def test_arguments_and_attributes_are_heeded() -> None:
    model = randomised(Flags()).eval()
    fused = copy.deepcopy(model)
    assert [b.what for b in fuse(fused).fused] == ["ReLU"]
    x = torch.randn(2, 4, 3, 3).double()
    calls = watch(fused)
    for args, options in (
        ((x,), {}), ((x, True), {}), ((x,), {"features": True}), ((x, False, x), {}), ((x,), {"mask": x}),
        ((x,), {"scale": 3.0}), ((x, False, None, x, x), {}), ((x, False, None), {"scale": 1.0}),
    ):  # fmt: skip
        for a, b in zip(model(*args, **options), fused(*args, **options), strict=True):
            assert torch.allclose(a, b, rtol=1e-9)
    # only calls at the defaults go the fused way
    assert [relu for _, _, relu in calls] == [True, False, False, False, False, False, False, True]
    fused(x=x)
    assert calls[-1][2]
    model.twice = fused.twice = True
    assert torch.allclose(model(x), fused(x))
    model.sizes.append(3), fused.sizes.append(3)
    assert torch.allclose(model(x), fused(x))
    model.twice = fused.twice = False
    model.sizes.pop(), fused.sizes.pop()
    copied = copy.deepcopy(fused)
    copied_calls = watch(copied)
    assert torch.allclose(model(x), copied(x))
    assert copied_calls[-1][2]


def test_arguments_that_are_no_tensors() -> None:
    class Scaled(Left):
        def forward(self, x: Tensor, scale: float, pair: tuple[Tensor, Tensor]) -> Tensor:
            return F.relu(self.bn(self.conv(x)) + pair[1]) * scale

    class Optional(Left):
        def forward(self, x: Tensor, other: Tensor | None) -> Tensor:
            h = self.bn(self.conv(x))
            return F.relu(h if other is None else h + other)

    x = torch.randn(2, 4, 3, 3).double()
    for cls, arguments, is_fused in (
        (Scaled, (x, 2.0, (x, x)), True), (Optional, (x, x), True), (Optional, (x, None), False)
    ):  # fmt: skip
        model = randomised(cls()).eval()
        fused = copy.deepcopy(model)
        fuse(fused)
        calls = watch(fused)
        assert torch.allclose(model(*arguments), fused(*arguments), rtol=1e-12)
        assert [(n, relu) for _, n, relu in calls] == [(2, True) if is_fused else (1, False)]


class ByMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.aux = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(F.relu(self.bn(self.conv(x))), 0.5, self.training)
        if self.training:
            h = h + self.aux(h)
        return h


@pytest.mark.parametrize("training", [True, False])
def test_both_modes_are_traced(training: bool) -> None:
    model = randomised(ByMode()).train(training)
    fused = copy.deepcopy(model)
    report = fuse(fused)
    assert {b.name: b.what for b in report.fused} == {"bn": "ReLU", "aux": "add"}
    assert fused.training is training
    assert fused.bn.training is training
    compare(model, fused, torch.randn(3, 4, 5, 5).double())


def test_replaced_forwards_subclasses_and_hooks_are_left() -> None:
    class Own(nn.BatchNorm2d):
        pass

    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(4, 4, 1), Own(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.SyncBatchNorm(4),
        nn.Conv2d(4, 4, 1),
        nn.utils.parametrize.register_parametrization(nn.BatchNorm2d(4), "weight", nn.Identity()),
    )
    first = model[1]
    first.forward = lambda x: x  # type: ignore[method-assign]
    seen: list[Tensor] = []
    model[2][2].register_forward_hook(lambda m, a, out: seen.append(out))
    model[3][1].register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    report = fuse(model)
    reasons = {b.name: b.reason for b in report.left}
    assert reasons["0.1"] == "it is a Own"
    assert "replaced" in reasons["1.1"]
    assert reasons["3.1"] == "it has hooks"
    assert "6" in reasons
    assert {b.name: b.what for b in report.fused} == {"2.1": "alone"}


def test_a_wrong_guess_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    flag = {"twice": True}

    class Global(Left):
        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.bn(self.conv(x)))
            return h * 2 if flag.pop("twice", None) else h

    model, x = Global(), torch.randn(2, 4, 3, 3)
    expected = model.eval()(x)
    flag["twice"] = True
    model.train()
    with pytest.raises(PruneTrainError, match="undone"):
        # the first run doubles, and so does the first trace: the mode that is compared, evaluation, does not
        fuse(model, (x,))
    assert type(model.bn) is nn.BatchNorm2d
    assert "forward" not in vars(model)
    assert "relu" not in vars(model.bn)
    assert model.training
    assert torch.equal(model.eval()(x) * 2, expected)
    with pytest.raises(InputError, match="does not run"):
        fuse(model, (torch.randn(2, 3, 3, 3),))


# -- the fused model among PyTorch's tools -----------------------------------------------------------------------------


def test_copies_are_independent() -> None:
    model, x = randomised(build("resnet20", 10)), torch.randn(2, 3, 8, 8).double()
    fuse(model)
    other = copy.deepcopy(model)
    expected = model(x)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(other(x), torch.zeros_like(expected))
    for name, module in other.named_modules():
        if "forward" in vars(module):
            assert vars(module)["forward"].__self__ is module, name
    before = model.bn1.running_mean.clone()
    other(x)
    assert torch.equal(model.bn1.running_mean, before)


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_pickled_whole_it_computes_the_same_and_can_be_fused_again(way: str) -> None:
    model, x = randomised(build("resnet20", 10)), torch.randn(2, 3, 8, 8).double()
    fuse(model)
    if way == "pickle":
        loaded = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
    model.eval(), loaded.eval()
    assert torch.allclose(loaded(x), model(x), rtol=1e-12)
    report = fuse(loaded, (x,))
    assert sum("ReLU" in b.what for b in report.fused) == 19
    calls = watch(loaded)
    assert torch.equal(loaded(x), model(x))
    assert sum(n == 2 for _, n, _ in calls) == 9


def test_state_dicts_go_both_ways() -> None:
    plain, fused = randomised(build("resnet20", 10)), build("resnet20", 10).double()
    fuse(fused)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 8, 8).double()
    assert torch.allclose(fused(x), plain(x), rtol=1e-10)
    again = build("resnet20", 10).double()
    again.load_state_dict(fused.state_dict())
    assert torch.allclose(again.eval()(x), fused.eval()(x), rtol=1e-10)


def test_compiles_exports_and_is_called_functionally() -> None:
    model = randomised(nn.Sequential(build("resnet20", 10).layer1[0], build("resnet20", 10).layer2[0]))
    x = torch.randn(2, 16, 6, 6).double()
    fuse(model, (x,))
    expected = model.eval()(x)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), expected, rtol=1e-10)
    training = copy.deepcopy(model).train()
    compiled = torch.compile(copy.deepcopy(training), backend="aot_eager", fullgraph=True)
    a, b = training(x), compiled(x)
    a.sum().backward(), b.sum().backward()
    assert torch.allclose(a, b, rtol=1e-10)
    for p, q in zip(training.parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-6, atol=1e-9)
    program = torch.export.export(model, (x,))
    assert torch.allclose(program.module()(x), expected, rtol=1e-10)
    zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    assert torch.func.functional_call(model, zeros, (x,)).eq(0).all()
    assert torch.allclose(fx.symbolic_trace(model)(x), expected, rtol=1e-10)


def test_costs() -> None:
    model, x = build("resnet20", 10), torch.randn(2, 3, 32, 32)
    fused = copy.deepcopy(model)
    fuse(fused)
    assert count_flops(fused, (x,)) == count_flops(model, (x,))
    assert batch_norm_bytes(fused, (x,)) == batch_norm_bytes(model, (x,))
    a, b = step_memory(fused, (x,)), step_memory(model, (x,))
    assert a.bytes(64) <= b.bytes(64)
