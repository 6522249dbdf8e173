"""Every operation of the tables: a small network with it loses channels twice and computes as its masked twin does."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from twice import inner_reasons, shrink_twice
from zoo_kit import distance, kill, outputs_of, randomise

from prunetrain_kernels import ChannelGraph, reconfigure, trace_channels

Forward = Callable[[Any, Tensor], Tensor]


class Small(nn.Module):
    """Convs `a` and `c` (3 to 8), the operation, conv `b` (8 to 8) and a head, or only a larger head."""

    def __init__(self, forward: Forward, width: int = 8, head: int = 8, **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.b, self.fc = nn.Conv2d(width, 8, 3, padding=1), nn.Linear(head, 2)
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)
        self.operation, self.is_flat = forward, head > 8

    def forward(self, x: Tensor) -> Tensor:
        y = self.operation(self, x)
        return self.fc(y if self.is_flat else F.silu(self.b(y)).mean((2, 3)))


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(*shape) + 0.5)


def _unary(function: Callable[[Tensor], Tensor]) -> Forward:
    return lambda m, x: function(m.a(x).sigmoid() * 0.8 + 0.1)


def _by_sizes(x: Tensor, n: int, c: int, h: int, w: int) -> Tensor:
    return x.reshape(n, c, h * w).softmax(2).reshape(n, c, h, w) * 9


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    name: getattr(torch, name)
    for name in (
        "sin", "cos", "tan", "erf", "erfc", "log1p", "log", "log2", "expm1", "exp2", "reciprocal", "asin", "atan",
        "sinh", "tanh", "sign", "floor", "round", "frac", "lgamma", "logit", "nan_to_num", "square", "cosh",
    )
}  # fmt: skip
UNARY |= {
    "method-sin": lambda y: y.sin().log1p(), "in-place": lambda y: y.clone().neg_().abs_(),
    "special-erf": torch.special.erf, "special-expm1": torch.special.expm1,
}  # fmt: skip
FORWARDS: dict[str, Forward] = {
    "first-sizes": lambda m, x: m.a(x) * m.a(x).mean((2, 3)).view(*m.a(x).shape[:2], 1, 1).sigmoid(),
    "last-sizes": lambda m, x: m.a(x).flatten(2).reshape(x.size(0), -1, *m.a(x).shape[-2:]),
    "sizes-by-name": lambda m, x: _by_sizes(m.a(x), *m.a(x).size()[:2], *m.a(x).shape[1:4][-2:]),
    "mT": lambda m, x: (m.a(x).flatten(2).mT.contiguous().mH * 1.5).view(x.size(0), -1, 6, 6),
    "T": lambda m, x: (m.a(x).mean((2, 3)).T.sigmoid().t() * 2)[:, :, None, None] * m.c(x),
    "adjoint": lambda m, x: torch.adjoint(m.a(x).flatten(2)).adjoint().unflatten(2, (6, 6)),
    "pow": lambda m, x: (m.a(x).clamp(min=0.1) ** 3.0).pow(1 / 3),
    "torch-pow": lambda m, x: torch.pow(m.a(x).abs() + 0.1, 1.5),
    "number-to-the-power": lambda m, x: 2 ** m.a(x),
    "power-of-a-tensor": lambda m, x: (m.a(x).abs() + 0.1).pow(m.c(x)),
    "max-of-two": lambda m, x: torch.max(m.a(x), m.c(x)),
    "method-min-of-two": lambda m, x: m.a(x).min(m.c(x)),
    "maximum": lambda m, x: torch.maximum(m.a(x), m.c(x)),
    "fmin": lambda m, x: torch.fmin(m.a(x), m.c(x)),
    "where": lambda m, x: torch.where(m.a(x) > 0, m.c(x), m.a(x) * 0.1),
    "where-numbers": lambda m, x: torch.where(m.a(x) > 0, m.a(x), 0.5),
    "method-where": lambda m, x: m.a(x).where(m.c(x) < 0.2, m.c(x).exp()),
    "comparisons": lambda m, x: m.a(x) * (m.c(x).ge(0) & (m.a(x) < 0.5) | (m.c(x) != 0) & ~(m.a(x) > 1)).to(x.dtype),
    "masked-fill": lambda m, x: m.a(x).masked_fill(m.c(x) > 0, -1.0),
    "lerp": lambda m, x: torch.lerp(m.a(x), m.c(x), 0.3),
    "lerp-by-a-tensor": lambda m, x: torch.lerp(m.a(x), m.c(x), m.a(x).sigmoid()),
    "addcmul": lambda m, x: torch.addcmul(m.a(x), m.c(x), m.a(x), value=0.5),
    "addcdiv": lambda m, x: torch.addcdiv(m.a(x), m.c(x), m.a(x).exp(), value=0.5),
    "remainder": lambda m, x: torch.remainder(m.a(x), 0.7) + m.c(x) % 0.3,
    "atan2": lambda m, x: torch.atan2(m.a(x), m.c(x) + 2),
    "logaddexp": lambda m, x: torch.logaddexp(m.a(x), m.c(x)),
    "clamped-by-a-tensor": lambda m, x: m.a(x).clamp(min=m.c(x)),
    "largest-of-a-map": lambda m, x: m.a(x) - torch.max(m.a(x), 3, keepdim=True)[0],
    "values-of-largest": lambda m, x: m.a(x) * torch.max(m.a(x), -1, keepdim=True).values.sigmoid(),
    "median": lambda m, x: m.a(x) - m.a(x).median(2, keepdim=True).values,
    "var-mean": lambda m, x: m.a(x) - torch.stack(list(torch.var_mean(m.a(x), dim=(2, 3), keepdim=True))).sum(0),
    "norm": lambda m, x: m.a(x) / (torch.norm(m.a(x), 2, (2, 3), keepdim=True) + 1),
    "logsumexp": lambda m, x: m.a(x) - m.a(x).logsumexp((2, 3), keepdim=True),
    "prod": lambda m, x: m.a(x) + m.a(x).sigmoid().prod(3, keepdim=True),
    "argmax": lambda m, x: m.a(x) + m.a(x).argmax(3, keepdim=True).to(x.dtype),
    "flip": lambda m, x: m.a(x).flip(2, 3) + torch.flip(m.c(x), (3,)),
    "roll": lambda m, x: m.a(x).roll(1, 2) + torch.roll(m.c(x), (1, -1), (2, 3)),
    "repeat": lambda m, x: m.a(x).repeat(1, 1, 2, 1),
    "tile": lambda m, x: torch.tile(m.a(x), (2, 1)),
    "repeat-interleave": lambda m, x: m.a(x).repeat_interleave(2, 3),
    "cumsum": lambda m, x: m.a(x).cumsum(2) + torch.cumsum(m.c(x), dim=-1),
    "cummax": lambda m, x: m.a(x).cummax(2)[0],
    "sort": lambda m, x: m.a(x).sort(dim=3)[0] + torch.sort(m.c(x), dim=2, descending=True).values,
    "topk": lambda m, x: m.a(x).topk(3, 3)[0],
    "normalize-over-maps": lambda m, x: F.normalize(m.a(x), dim=3),
    "grid-sample": lambda m, x: F.grid_sample(
        m.a(x), F.affine_grid(m.theta(x.mean((2, 3))).view(-1, 2, 3), m.a(x).size(), align_corners=False),
        align_corners=False,
    ),
    "instance-norm": lambda m, x: F.instance_norm(m.a(x)),
    "randn-like": lambda m, x: m.a(x) + 0 * torch.randn_like(m.a(x)) + torch.ones_like(m.c(x)),
    "zeros-of-a-shape": lambda m, x: m.a(x) + torch.zeros(m.a(x).shape, dtype=x.dtype) + x.new_ones(m.c(x).size()),
    "new-zeros-of-counts": lambda m, x: m.a(x)
    + m.a(x).new_ones(m.a(x).shape[0], m.a(x).shape[1], 1, 1)
    + x.new_full((m.c(x).size(0), m.c(x).size(1), 6, 6), 0.5),
    "pooling-with-places": lambda m, x: F.max_unpool2d(*F.max_pool2d(m.a(x), 2, return_indices=True), 2),
    "adaptive-pooling-with-places": lambda m, x: F.adaptive_max_pool2d(m.a(x), 3, return_indices=True)[0],
}  # fmt: skip
WITH_PARTS: dict[str, Callable[[], Small]] = {
    "glu": lambda: Small(lambda m, x: F.glu(m.a(x), 1), 4),
    "glu-module": lambda: Small(lambda m, x: m.glu(m.a(x)), 4, glu=nn.GLU(1)),
    "glu-of-a-map": lambda: Small(lambda m, x: F.glu(m.a(x), 3)),
    "unpooling": lambda: Small(
        lambda m, x: m.up(*m.down(m.a(x)), output_size=m.a(x).size()),
        down=nn.MaxPool2d(2, return_indices=True), up=nn.MaxUnpool2d(2),
    ),
    "scale-and-shift": lambda: Small(
        lambda m, x: m.a(x) * m.g.view(1, -1, 1, 1) + m.s[None, :, None, None], g=_parameter(8), s=_parameter(8)
    ),
    "reshaped-scale": lambda: Small(
        lambda m, x: m.a(x) * m.g.reshape(1, -1, 1, 1) / m.s.unsqueeze(-1).unsqueeze(-1), g=_parameter(8),
        s=_parameter(8),
    ),
    "scale-of-four-dimensions": lambda: Small(
        lambda m, x: m.c(x) * m.beta + m.a(x) * m.gamma, beta=_parameter(1, 8, 1, 1), gamma=_parameter(1, 8, 1, 1)
    ),
    "frozen-norm": lambda: Small(
        lambda m, x: m.a(x) * (m.w * (m.v + 0.1).rsqrt()).view(1, -1, 1, 1)
        + (m.s - m.u * (m.w * (m.v + 0.1).rsqrt())).view(1, -1, 1, 1),
        w=torch.rand(8), v=torch.rand(8), u=torch.rand(8), s=torch.rand(8),
    ),
    "generalised-mean": lambda: Small(
        lambda m, x: F.avg_pool2d(m.a(x).clamp(min=1e-3).pow(m.p), (x.size(-2), x.size(-1))).pow(1.0 / m.p),
        p=nn.Parameter(torch.ones(1) * 3),
    ),
    "scale-behind-a-flatten": lambda: Small(lambda m, x: m.a(x).mean(3).flatten(1) * m.g, head=48, g=_parameter(48)),
    "map-per-channel": lambda: Small(lambda m, x: m.a(x) + m.place, place=_parameter(1, 8, 6, 6)),
    "lerp-by-a-parameter": lambda: Small(lambda m, x: torch.lerp(m.a(x), m.c(x), m.g), g=_parameter(8, 1, 1)),
    "instance-norm-with-scale": lambda: Small(
        lambda m, x: F.instance_norm(m.a(x), weight=m.n.weight, bias=m.n.bias), n=nn.InstanceNorm2d(8, affine=True)
    ),
    "instance-norm-with-a-scale-of-its-own": lambda: Small(
        lambda m, x: F.instance_norm(m.a(x), weight=m.g) + F.instance_norm(m.c(x), bias=m.s, weight=m.g),
        g=_parameter(8), s=_parameter(8),
    ),
    "instance-norm-with-statistics-of-its-own": lambda: Small(
        lambda m, x: F.instance_norm(m.a(x), m.u, m.v, use_input_stats=False), u=torch.rand(8), v=torch.rand(8) + 0.5
    ),
    "moved-dimensions": lambda: Small(lambda m, x: m.n(m.a(x).movedim(1, -1)).moveaxis((3, 1), (1, 2)), n=nn.ReLU()),
    "group-norm": lambda: Small(lambda m, x: m.n(m.a(x)), n=nn.GroupNorm(4, 8)),
    "group-norm-without-scale": lambda: Small(lambda m, x: m.n(m.a(x)), n=nn.GroupNorm(4, 8, affine=False)),
    "group-norm-of-a-sum": lambda: Small(
        lambda m, x: m.n(m.a(x) + m.c(x)) + m.k(m.a(x)), n=nn.GroupNorm(4, 8), k=nn.GroupNorm(8, 8)
    ),
    "group-norm-beside-groups": lambda: Small(
        lambda m, x: m.n(m.g(m.n(m.a(x)))), n=nn.GroupNorm(4, 8), g=nn.Conv2d(8, 8, 3, padding=1, groups=2)
    ),
    "group-norm-of-a-concatenation": lambda: Small(
        lambda m, x: m.n(torch.cat([m.a(x), m.c(x)], 1)), 16, n=nn.GroupNorm(4, 16)
    ),
    "functional-group-norm": lambda: Small(
        lambda m, x: F.group_norm(m.a(x), m.n.num_groups, m.n.weight, m.n.bias), n=nn.GroupNorm(4, 8)
    ),
    "equalised-convolution": lambda: Small(
        lambda m, x: F.conv2d(m.a(x), m.e.weight * 0.3, m.e.bias * 0.1), e=nn.Conv2d(8, 8, 1)
    ),
    "scaled-rows": lambda: Small(lambda m, x: F.conv2d(m.a(x), m.e.weight * m.g), e=nn.Conv2d(8, 8, 1, bias=False),
                                 g=_parameter(8, 1, 1, 1)),
    "generator": lambda: Small(lambda m, x: m.up(x.mean((2, 3))).view(x.shape[0], -1, 3, 3), up=nn.Linear(3, 72)),
    "unflattened": lambda: Small(lambda m, x: m.up(x.mean((2, 3))).unflatten(1, (-1, 3, 3)), up=nn.Linear(3, 72)),
    "unflatten-module": lambda: Small(
        lambda m, x: m.bn(m.u(m.up(x.mean((2, 3))))), up=nn.Linear(3, 72), u=nn.Unflatten(1, (-1, 3, 3)),
        bn=nn.BatchNorm2d(8),
    ),
}  # fmt: skip
NETWORKS: dict[str, Callable[[], Small]] = {
    **{name: lambda function=function: Small(_unary(function)) for name, function in UNARY.items()},  # type: ignore[misc]
    **{
        name: lambda forward=forward: Small(forward, theta=nn.Linear(3, 6))  # type: ignore[misc]
        for name, forward in FORWARDS.items()
    },
    **WITH_PARTS,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_channels_go_through(name: str) -> None:
    torch.manual_seed(0)
    model = randomise(NETWORKS[name]()).double()
    optimizer = SGD(model.parameters(), lr=1e-3, momentum=0.9)
    batches = [torch.randn(3, 3, 6, 6, dtype=torch.float64) for _ in range(3)]

    def look(graph: ChannelGraph) -> None:
        assert graph.tracer == "torch.fx"
        assert not inner_reasons(graph) or name == "grid-sample", str(graph)

    shrink_twice(model, optimizer, batches, look)


class Exported(Small):
    """The same for torch.export: torch.fx cannot follow a decision by a size."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[2] < 100 else x


@pytest.mark.parametrize(
    "name", ["sin", "pow", "where", "masked-fill", "lerp", "max-of-two", "flip", "cumsum", "glu", "frozen-norm", "topk"]
)
def test_torch_export_knows_them_too(name: str) -> None:
    torch.manual_seed(0)
    model = randomise(NETWORKS[name]()).double()
    model.__class__ = Exported
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    graph = trace_channels(model, (x,))
    assert graph.tracer == "torch.export"
    assert graph.spaces[graph.layers["a"].output].frozen is None, str(graph)
    kill(graph, model, share=0.4, partly=0.1, seed=0)
    expected = outputs_of(copy.deepcopy(model), x)
    assert reconfigure(model, None, graph.keep(model, threshold=0)).changed
    assert distance(outputs_of(model, x), expected) <= 1e-9


FROZEN: dict[str, tuple[Callable[[], Small], str]] = {
    "flipped-channels": (lambda: Small(lambda m, x: m.a(x).flip(1)), "'flip'"),
    "rolled-channels": (lambda: Small(lambda m, x: m.a(x).roll(1, 1)), "'roll'"),
    "rolled-everywhere": (lambda: Small(lambda m, x: m.a(x).roll(1)), "'roll'"),
    "sum-of-earlier-channels": (lambda: Small(lambda m, x: m.a(x).cumsum(1)), "'cumsum'"),
    "sorted-channels": (lambda: Small(lambda m, x: m.a(x).sort(1)[0]), "'sort'"),
    "largest-channels": (lambda: Small(lambda m, x: m.a(x).topk(3, 1)[0], 3), "'topk'"),
    "largest-of-channels": (lambda: Small(lambda m, x: m.a(x) - torch.max(m.a(x), 1, keepdim=True)[0]), "'max'"),
    "largest-of-all": (lambda: Small(lambda m, x: m.a(x) - m.a(x).max()), "'max'"),
    "normalised-over-channels": (lambda: Small(lambda m, x: F.normalize(m.a(x))), "'normalize'"),
    "repeated-channels": (lambda: Small(lambda m, x: m.a(x).repeat(1, 2, 1, 1), 16), "repeats channels"),
    "layer-norm": (
        lambda: Small(lambda m, x: m.n(m.a(x).movedim(1, 3)).movedim(3, 1), n=nn.LayerNorm(8)),
        "'n' (LayerNorm) divides by",
    ),
    "one-group": (lambda: Small(lambda m, x: m.n(m.a(x)), n=nn.GroupNorm(1, 8)), "each is a part"),
    "groups-written-out": (lambda: Small(lambda m, x: F.group_norm(m.a(x), 4)), "number of groups"),
    "points-of-a-grid": (
        lambda: Small(lambda m, x: F.grid_sample(x, m.a(x)[:, :2].permute(0, 2, 3, 1), align_corners=False), 3),
        "picks channels by number",
    ),
    "buffer-that-is-not-saved": (lambda: _unsaved(Small(lambda m, x: m.a(x) * m.mask)), "'mul'"),
    "scale-of-a-written-size": (
        lambda: Small(lambda m, x: m.a(x) * m.g.view(1, 8, 1, 1), g=_parameter(8)),
        "written out",
    ),
    "scale-used-for-more": (
        lambda: Small(lambda m, x: m.a(x) * m.g.view(1, -1, 1, 1) + m.g.max(), g=_parameter(8)), "'max'"
    ),
    "scale-shared-by-name": (
        lambda: _shared(Small(lambda m, x: m.n(m.a(x)) * m.g.view(1, -1, 1, 1), n=nn.BatchNorm2d(8), g=_parameter(8))),
        "",
    ),
    "standardised-weight": (
        lambda: Small(lambda m, x: F.conv2d(m.a(x), _standardised(m.e.weight), m.e.bias), e=nn.Conv2d(8, 8, 1)),
        "computed from all of its input channels",
    ),
    "weight-by-its-norm": (
        lambda: Small(lambda m, x: F.conv2d(m.a(x), m.e.weight / m.e.weight.norm()), e=nn.Conv2d(8, 8, 1, bias=False)),
        "computed from all of its input channels",
    ),
}  # fmt: skip


def _standardised(weight: Tensor) -> Tensor:
    mean = weight.mean((1, 2, 3), keepdim=True)
    return (weight - mean) / (weight.var((1, 2, 3), keepdim=True) + 1e-3).sqrt()


def _unsaved(model: Small) -> Small:
    model.register_buffer("mask", torch.rand(8, 1, 1), persistent=False)
    return model


def _shared(model: Any) -> Small:
    model.n.weight = model.g
    return model


@pytest.mark.parametrize("name", FROZEN)
def test_operations_that_mix_channels_freeze_them_and_say_so(name: str) -> None:
    torch.manual_seed(0)
    make, reason = FROZEN[name]
    model, x = randomise(make()).double(), torch.randn(3, 3, 6, 6, dtype=torch.float64)
    graph = trace_channels(model, (x,))
    assert graph.tracer == "torch.fx"
    frozen = graph.spaces[graph.layers["a"].output].frozen
    assert frozen
    assert reason in frozen
    assert not graph.doubts  # the rule has said so, not the trial
    kill(graph, model, share=0.4, partly=0.1, seed=0)
    expected = outputs_of(copy.deepcopy(model), x)
    reconfigure(model, None, graph.keep(model, threshold=0))
    assert distance(outputs_of(model, x), expected) <= 1e-9


def test_a_standardised_convolution_loses_the_outputs_that_nobody_reads() -> None:
    """Its own slices are no measure: a small one is as loud as a large one once it is standardised."""
    torch.manual_seed(0)
    model: Any = Small(
        lambda m, x: F.conv2d(m.a(x), _standardised(m.e.weight), m.e.bias), e=nn.Conv2d(8, 8, 1)
    ).double()
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        model.e.weight[:4] *= 1e-6
        model.b.weight[:, 2:6] = 0
    expected = outputs_of(copy.deepcopy(model), x)
    graph = trace_channels(model, (x,))
    assert "e" not in graph.layers
    reconfigure(model, None, graph.keep(model, threshold=1e-4), zeroing_tolerance=1e-9)
    assert model.e.weight.shape == (4, 8, 1, 1)
    assert model.e.bias.shape == (4,)
    assert (model.e.out_channels, model.b.in_channels) == (4, 4)
    assert distance(outputs_of(model, x), expected) <= 1e-9


def test_group_norm_tells_the_truth() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.GroupNorm(4, 12),
        nn.Conv2d(12, 8, 1),
        nn.GroupNorm(2, 8, affine=False),
        nn.Conv2d(8, 2, 1),
    ).double()
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        for channels in ([3, 4, 5], [6, 7], [9]):  # a whole group, and parts of two
            model[0].weight[channels], model[2].weight[:, channels] = 0, 0
        model[2].weight[:4], model[4].weight[:, :4] = 0, 0
    expected = outputs_of(copy.deepcopy(model), x)
    reconfigure(model, None, trace_channels(model, (x,)).keep(model))
    assert (model[1].num_groups, model[1].num_channels, len(model[1].weight)) == (3, 9, 9)
    assert (model[3].num_groups, model[3].num_channels) == (1, 4)
    assert distance(outputs_of(model, x), expected) <= 1e-9
