"""Derivatives of derivatives, many gradients at a time, vmap, forward mode: the values are PyTorch's, on every path."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad, gradgradcheck
from torch.autograd.functional import hvp, vhp

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.models import build
from prunetrain_kernels.nn import BatchNormAct2d, GatedConv2d, fuse, pair
from prunetrain_kernels.ops import (
    ChannelIndex,
    Groups,
    add_group_lasso_gradient_,
    batch_norm_act,
    batch_norm_apply,
    batch_norm_backward_apply,
    batch_norm_backward_sums,
    batch_norm_statistics,
    channel_gather,
    channel_scatter,
    channel_scatter_add,
    conv2d,
    group_lasso,
    slice_statistics,
)

t0 = pytest.mark.t0
T0_BACKENDS = ("kernels", "native", "reference")

Function = Callable[..., Tensor]
Case = tuple[Function, Function, tuple[tuple[int, ...], ...]]  # ours, PyTorch's, shapes of the inputs


def _place(x: Tensor, index: ChannelIndex, channels: int) -> Tensor:
    with_zero = torch.cat([x, torch.zeros_like(x[:, :1])], 1)
    return with_zero[:, [i if i >= 0 else x.shape[1] for i in index.inverse.tolist()][:channels]]


def _batch_norm(training: bool, relu: bool, residual: bool, scatter: str, features: int = 4) -> Case:
    index = {"": None, "run": ChannelIndex([1, 2, 3], 5)}.get(scatter, ChannelIndex([4, 0, 2], 5))
    channels = 5 if scatter in ("padded", "run") else 3
    plane = (2, 2)[: features - 2]
    shapes = [(3, 3, *plane), (channels,), (channels,)]
    shapes += [(3, 5 if index is not None else 3, *plane)] * residual
    torch.manual_seed(1)
    statistics = (None, None) if training else (torch.randn(channels).double(), torch.rand(channels).double() + 0.5)

    def running(x: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.to(x.device) for t in statistics)

    def ours(x: Tensor, w: Tensor, b: Tensor, *r: Tensor) -> Tensor:
        scattered = None if index is None else index.to(x.device)
        given = {"residual": r[0] if r else None, "relu": relu, "scatter": scattered}
        return batch_norm_act(x, *running(x), w, b, training=training, **given)

    def torchs(x: Tensor, w: Tensor, b: Tensor, *r: Tensor) -> Tensor:
        x = _place(x, index, 5) if index is not None and channels == 5 else x
        y = F.batch_norm(x, *running(x), w, b, training)
        y = _place(y, index, 5) if index is not None and channels == 3 else y
        y = y + r[0] if r else y
        return F.relu(y) if relu else y

    return ours, torchs, tuple(shapes)


def _conv(backend: str, stride: int, gated: bool, base: bool) -> Case:
    inputs, outputs = (ChannelIndex([4, 0, 2], 5), ChannelIndex([1, 3], 4)) if gated else (None, None)
    shapes = [(2, 5 if gated else 3, 4, 4), (2, 3, 3, 3)]
    shapes += [(2, 4 if gated else 2, 4 // stride, 4 // stride)] * base

    def ours(x: Tensor, w: Tensor, *b: Tensor) -> Tensor:
        sides = {"input_index": inputs and inputs.to(x.device), "output_index": outputs and outputs.to(x.device)}
        y = conv2d(x, w, stride, 1, **sides, base=b[0] if b else None, backend=backend)
        assert isinstance(y, Tensor)
        return y

    def torchs(x: Tensor, w: Tensor, *b: Tensor) -> Tensor:
        y = F.conv2d(x[:, [4, 0, 2]] if gated else x, w, None, stride, 1)
        y = _place(y, outputs, 4) if outputs is not None else y
        return y + b[0] if b else y

    return ours, torchs, tuple(shapes)


def _lasso(eps: float) -> Case:
    groups = [Groups(), Groups(2, inputs=True, outputs=False)]

    def torchs(w: Tensor, v: Tensor) -> Tensor:
        v = v.view(3, 2, 2)
        norms = [w.square().sum((1, 2, 3)), w.square().sum((0, 2, 3)), v.square().sum((0, 2))]
        return torch.cat([(n + eps).sqrt() for n in norms]).sum()

    return lambda w, v: group_lasso([w, v], groups, eps), torchs, ((4, 3, 2, 2), (3, 4))


_INDEX = ChannelIndex([4, 0, 2], 5)
CASES: dict[str, Case] = {
    f"batch norm {'train' if training else 'eval'}{' + residual' * residual}{' + ReLU' * relu} {scatter}".strip():
        _batch_norm(training, relu, residual, scatter)
    for training in (True, False)
    for relu in (True, False)
    for residual in (True, False)
    for scatter in ("", "live", "padded", "run")
    if residual or scatter != "live"
}  # fmt: skip
CASES["batch norm of (N, C)"] = _batch_norm(True, True, True, "", features=2)
CASES |= {
    f"conv2d {backend}, stride {stride}{', gated' * gated}{' + base' * base}": _conv(backend, stride, gated, base)
    for backend in ("triton", "naive", "expanded")
    for stride, gated, base in ((1, True, True), (2, True, False), (1, False, True), (2, False, False))
}
CASES["lasso"] = _lasso(1e-8)
CASES["lasso with a large eps"] = _lasso(0.5)
CASES["gather"] = (
    lambda x: channel_gather(x, _INDEX.to(x.device)), lambda x: x[:, [4, 0, 2]], ((2, 5, 3),),
)  # fmt: skip
CASES["scatter"] = (
    lambda x: channel_scatter(x, _INDEX.to(x.device)), lambda x: _place(x, _INDEX, 5), ((2, 3, 3),),
)  # fmt: skip
CASES["scatter-add"] = (
    lambda b, x: channel_scatter_add(b, x, _INDEX.to(x.device)),
    lambda b, x: b + _place(x, _INDEX, 5),
    ((2, 5, 3), (2, 3, 3)),
)


def _inputs(shapes: tuple[tuple[int, ...], ...], device: torch.device, *more: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(*more, *shape, dtype=torch.float64, device=device) for shape in shapes)


def _same(a: Any, b: Any) -> bool:
    flat_a, flat_b = torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b)
    return len(flat_a) == len(flat_b) and all(
        torch.allclose(x, y, rtol=1e-9, atol=1e-10) for x, y in zip(flat_a, flat_b, strict=True)
    )


def _penalty(f: Function, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of a gradient penalty (WGAN-GP): all second derivatives, mixed ones too, in one number each."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    first = torch.autograd.grad(f(*leaves).pow(3).sum(), leaves, create_graph=True)
    total = sum((i + 1) * g.square().sum() for i, g in enumerate(first))
    assert isinstance(total, Tensor)
    second = torch.autograd.grad(total, leaves, allow_unused=True)
    return tuple(torch.zeros_like(t) if g is None else g for g, t in zip(second, leaves, strict=True))


def _accumulated(f: Function, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """By `backward(create_graph=True)`, of which `.grad` is differentiated again."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    f(*leaves).pow(3).sum().backward(create_graph=True)
    total = sum(leaf.grad.sin().sum() for leaf in leaves if leaf.grad is not None)
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    for leaf in leaves:
        leaf.grad = None  # or the graph would hold itself
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)]


def _batched_gradients(f: Function, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    y = f(*leaves)
    basis = torch.stack([torch.full_like(y, v) for v in (1.0, -2.0)])
    return torch.autograd.grad(y.pow(2), leaves, basis, is_grads_batched=True)


def _dual(f: Function, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    with forward_ad.dual_level():
        y = f(*(forward_ad.make_dual(t, t.cos()) for t in inputs))
        return tuple(forward_ad.unpack_dual(y))


def _by_first(f: Function, inputs: tuple[Tensor, ...]) -> Function:
    return lambda x: f(x, *inputs[1:]).pow(3).sum()


WAYS: dict[str, Callable[[Function, tuple[Tensor, ...]], Any]] = {
    "gradient penalty": _penalty,
    "backward(create_graph)": _accumulated,
    "hvp": lambda f, i: hvp(lambda *a: f(*a).pow(3).sum(), i, tuple(t.sin() for t in i))[1],
    "vhp": lambda f, i: vhp(lambda *a: f(*a).pow(3).sum(), i, tuple(t.sin() for t in i))[1],
    "functional.jvp": lambda f, i: torch.autograd.functional.jvp(f, i, tuple(t.sin() for t in i))[1],
    "hessian, vectorised": lambda f, i: torch.autograd.functional.hessian(_by_first(f, i), i[0], vectorize=True),
    "is_grads_batched": _batched_gradients,
    "dual numbers": _dual,
    "func.grad": lambda f, i: torch.func.grad(_by_first(f, i))(i[0]),
    "func.jvp": lambda f, i: torch.func.jvp(f, i, tuple(t.sin() for t in i)),
    "func.jacrev": lambda f, i: torch.func.jacrev(f, tuple(range(len(i))))(*i),
    "func.jacfwd": lambda f, i: torch.func.jacfwd(f, tuple(range(len(i))))(*i),
    "func.hessian": lambda f, i: torch.func.hessian(_by_first(f, i))(i[0]),
}  # fmt: skip


# Paths differ in what computes the forward: this says most about it. The other ways differ in who calls.
MOST_TELLING = "gradient penalty"

# In the interpreter, which takes a second where the others take a millisecond: each operator, each of its kernels' ways
# to read places, with and without what may be absent.
IN_THE_INTERPRETER = {
    *(name for name in CASES if name.startswith("conv2d triton")),
    *(f"batch norm train + residual + ReLU{scatter}" for scatter in ("", " live", " padded", " run")),
    *("batch norm eval", "batch norm eval + ReLU padded", "batch norm of (N, C)"),
    *("lasso", "gather", "scatter", "scatter-add"),
}


@t0
@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_torch(name: str, path: str, device: torch.device) -> None:
    if path == "kernels" and device.type == "cpu" and name not in IN_THE_INTERPRETER:
        pytest.skip("IN_THE_INTERPRETER has another case of the same kernels")
    ours, torchs, shapes = CASES[name]
    inputs = _inputs(shapes, device)
    for way in WAYS if path == "reference" else (MOST_TELLING,):
        assert _same(WAYS[way](ours, inputs), WAYS[way](torchs, inputs)), way


@t0
@pytest.mark.parametrize(
    "name", ["batch norm train + residual + ReLU", "conv2d triton, stride 1, gated + base", "lasso"]
)
def test_many_gradients_at_a_time(name: str, path: str, device: torch.device) -> None:
    """On every path: that backward is told from others by the gradient it is handed."""
    ours, torchs, shapes = CASES[name]
    inputs = _inputs(shapes, device)
    assert _same(_batched_gradients(ours, inputs), _batched_gradients(torchs, inputs))


CHECKED = [
    name for name in CASES if name.startswith("conv2d triton") or "batch norm train + residual + ReLU" in name
] + ["batch norm eval + ReLU", "batch norm train + ReLU padded", "lasso"]  # fmt: skip


@pytest.mark.parametrize("name", CHECKED)
def test_gradgradcheck(name: str, device: torch.device) -> None:
    ours, _, shapes = CASES[name]
    assert gradgradcheck(ours, tuple(t.requires_grad_() for t in _inputs(shapes, device)), fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_vmap_of_gradients_and_of_ensembles(name: str) -> None:
    ours, torchs, shapes = CASES[name]
    inputs = _inputs(shapes, torch.device("cpu"), 3)
    for f in (lambda g: g, lambda g: torch.func.grad(lambda *a: g(*a).pow(2).sum(), tuple(range(len(shapes))))):
        assert _same(torch.func.vmap(f(ours))(*inputs), torch.func.vmap(f(torchs))(*inputs))


def test_third_derivative() -> None:
    """Against the formula: that of `F.batch_norm` takes the statistics for constants there (1 % off)."""
    ours, _, shapes = CASES["batch norm train + residual + ReLU"]

    def formula(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        return F.relu((x - mean) * (var + 1e-5).rsqrt() * w.view(1, -1, 1, 1) + b.view(1, -1, 1, 1) + r)

    inputs = _inputs(shapes, torch.device("cpu"))
    thirds = []
    for f in (ours, formula):
        x = inputs[0].clone().requires_grad_()
        value: Tensor = f(x, *inputs[1:]).pow(4).mean()
        for _ in range(3):
            (value,) = torch.autograd.grad(value.sin().sum(), x, create_graph=True)
        thirds.append(value.detach() / value.detach().abs().max())
    assert _same(*thirds)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_in_other_precisions(dtype: torch.dtype) -> None:
    _, torchs, shapes = CASES["batch norm train + residual + ReLU"]
    ours = CASES["batch norm train + residual + ReLU"][0]
    inputs = tuple(t.to(dtype) for t in _inputs(shapes, torch.device("cpu")))
    leaves = [t.clone().requires_grad_() for t in inputs]
    first = torch.autograd.grad(ours(*leaves).float().pow(2).sum(), leaves, create_graph=True)
    assert [g.dtype for g in first] == [dtype] * len(leaves)
    found = torch.autograd.grad(sum(g.float().square().sum() for g in first), leaves)
    wide = [t.double().requires_grad_() for t in inputs]
    first = torch.autograd.grad(torchs(*wide).pow(2).sum(), wide, create_graph=True)
    exact = torch.autograd.grad(sum(g.square().sum() for g in first), wide)
    unit = torch.finfo(dtype).eps
    for a, b in zip(found, exact, strict=True):
        assert float((a.double() - b).abs().max()) <= 64 * unit * float(b.abs().max())


# -- modules -----------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {}, "cumulative": {"momentum": None}, "not affine": {"affine": False},
    "no statistics": {"track_running_stats": False}, "neither": {"affine": False, "track_running_stats": False},
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [None, (2, 3, 2, 2), (1, 3, 1, 1), (2, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_modules(options: str, residual: tuple[int, ...] | None, training: bool) -> None:
    found = []
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(3, **OPTIONS[options]).double()
    for p in plain.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    fused = BatchNormAct2d(3, **OPTIONS[options]).double()
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    r = torch.zeros(1, 1, 1, 1).double() if residual is None else torch.randn(residual, dtype=torch.float64)
    for module in (fused.train(training), plain.train(training)):
        leaves = [x.clone().requires_grad_(), r.clone().requires_grad_(residual is not None), *module.parameters()]
        if module is fused:
            y = module(leaves[0], None if residual is None else leaves[1])
        else:
            y = F.relu(module(leaves[0]) + leaves[1])
        leaves = [leaf for leaf in leaves if leaf.requires_grad]
        first = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)
        found.append([*second, *module.buffers()])
    assert _same(*found)


def test_a_fused_network_s_hessian() -> None:
    torch.manual_seed(0)
    plain = build("resnet20", 10).double()
    fused, x = copy.deepcopy(plain), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    fuse(fused)
    products = []
    for model in (plain, fused):
        parameters = list(model.parameters())
        first = torch.autograd.grad(F.cross_entropy(model(x), torch.arange(4)), parameters, create_graph=True)
        along = sum((g * g.detach().sign()).sum() for g in first)
        products.append(torch.autograd.grad(along, parameters))
    for a, b in zip(*products, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-9 * float(b.abs().max() + 1))


def test_a_fused_network_under_the_transforms() -> None:
    torch.manual_seed(0)
    plain = build("resnet20", 10).double().eval()
    fused, x = copy.deepcopy(plain), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    fuse(fused)
    ways: list[Callable[[nn.Module], Any]] = [
        lambda m: torch.func.jvp(m, (x,), (x.sin(),)),
        lambda m: torch.func.vmap(torch.func.grad(lambda x: m(x[None]).square().sum()))(x),
        lambda m: torch.func.vmap(  # gradients per example, by every parameter
            torch.func.grad(lambda p, x: torch.func.functional_call(m, p, (x[None],)).square().sum()), (None, 0)
        )({n: p.detach() for n, p in m.named_parameters()}, x),
    ]
    for way in ways:
        assert _same(way(fused), way(plain))


def test_a_gated_pair_of_modules() -> None:
    torch.manual_seed(0)
    conv, norm = GatedConv2d(5, 4, 3, padding=1, input_index=[4, 0, 2], output_index=[1, 3]), BatchNormAct2d(4)
    pair(conv.double(), norm.double())
    x = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    weight, places = conv.weight.detach(), ChannelIndex([1, 3], 4)
    for backend in ("triton", "naive", "expanded", None):
        conv.backend = backend
        leaves = [x.clone().requires_grad_(), conv.weight, norm.weight]

        def torchs(x: Tensor, w: Tensor, g: Tensor) -> Tensor:
            y = F.conv2d(x[:, [4, 0, 2]], w, padding=1)
            return F.relu(F.batch_norm(_place(y, places, 4), None, None, g, norm.bias, True))

        first = torch.autograd.grad(norm(conv(leaves[0])).pow(3).sum(), leaves, create_graph=True)
        ours = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        assert _same(ours, _second(torchs, (x, weight, norm.weight.detach())))


def _second(f: Function, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    first = torch.autograd.grad(f(*leaves).pow(3).sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


def test_running_statistics_are_as_without_forward_mode() -> None:
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    plain, fused = nn.BatchNorm2d(3).double(), BatchNormAct2d(3).double()
    plain(x)
    with forward_ad.dual_level():
        fused(forward_ad.make_dual(x, torch.ones_like(x)))
        assert forward_ad.unpack_dual(fused.running_mean).tangent is None
    assert _same(list(fused.buffers()), list(plain.buffers()))


# -- what is refused, in one sentence ----------------------------------------------------------------------------------


def _refusals() -> Iterator[tuple[str, Callable[[], Any], str]]:
    x, c = torch.randn(2, 3, 2, 2), torch.ones(3)
    norm = BatchNormAct2d(3)
    bare = (c, c, c, c, None, None, 1e-5, True)
    for name, f in {
        "batch_norm_statistics": lambda x: batch_norm_statistics(x)[0],
        "batch_norm_apply": lambda x: batch_norm_apply(x, *bare[:4], None, None, 1e-5, True, False)[0],
        "batch_norm_backward_sums": lambda x: batch_norm_backward_sums(x, x, *bare)[0],
        "batch_norm_backward_apply": lambda x: batch_norm_backward_apply(
            x, x, *bare[:6], None, None, 1.0, 1e-5, True, False
        )[0],
    }.items():  # fmt: skip
        yield name, lambda f=f: torch.func.jvp(f, (x,), (x,)), f"{name} has no rule for the transforms"
        yield name, lambda f=f: _dual(f, (x,)), f"{name} has no rule for forward-mode"
        yield name, lambda f=f: torch.func.vmap(f)(x[None]), f"{name} has no rule for the transforms"
        yield name, lambda f=f: f(x.clone().requires_grad_()).sum().backward(), f"{name} has no derivative; use"
        yield name, lambda f=f: torch.func.grad(lambda x: f(x).sum())(x), f"{name} has no rule for the transforms"
    yield "training", lambda: torch.func.grad(lambda x: norm(x).sum())(x), "BatchNormAct2d in training .* eval mode"
    yield "training", lambda: torch.func.vmap(norm)(x[None]), "batch_norm_act cannot update running .* eval mode"
    weight = torch.randn(3, 3)
    yield (
        "add_group_lasso_gradient_",
        lambda: torch.func.vmap(lambda w: add_group_lasso_gradient_([w], [Groups()], 0.1))(weight[None]),
        "writes .grad.*group_lasso",
    )


@pytest.mark.parametrize("number", range(len(list(_refusals()))))
def test_refusals(number: int) -> None:
    _, call, says = list(_refusals())[number]
    with pytest.raises(InputError, match=says) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_slice_statistics_of_an_ensemble() -> None:
    weights = torch.randn(3, 4, 5, dtype=torch.float64)
    norms, sizes = torch.func.vmap(lambda w: slice_statistics([w], [Groups()]))(weights)
    for i, w in enumerate(weights):
        alone = slice_statistics([w], [Groups()])
        assert _same(
            [[side[i] for side in norms[0]], [side[i] for side in sizes[0]]], [list(alone[0][0]), list(alone[1][0])]
        )
