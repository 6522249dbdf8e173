"""Channel spaces of networks of all kinds: what is understood is shared rightly, what is not stays as it is."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graph_nets import Net, frozen, images, pool, prune_half_of_everything, simple, space_of
from torch import Tensor, nn
from torch.nn.utils import prune

from prunetrain_kernels import TraceError, trace_channels
from prunetrain_kernels.models import build

# -- the paper's networks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers", "spaces"),
    # spaces: input, output, one per stage (with stem), one per inner edge of each block
    [
        ("resnet20", 22, 2 + 3 + 9),
        ("resnet50", 1 + 3 * (8 * 3 + 1) + 1, 2 + 4 + 2 * 24),
        ("vgg7", 7, 8),
        ("vgg11", 9, 10),
        ("vgg13", 11, 12),
    ],
)
def test_spaces_of_the_papers_networks(name: str, layers: int, spaces: int) -> None:
    graph = trace_channels(build(name, 10), (torch.randn(1, 3, 32, 32),))
    assert len(graph.layers) == layers
    assert len(graph.spaces) == spaces
    assert not graph.opaque
    assert [s.size for s in graph.spaces if s.frozen] == [3, 10]
    assert [s.is_input for s in graph.spaces].count(True) == [s.is_output for s in graph.spaces].count(True) == 1
    if name == "resnet20":
        stage = graph.spaces[space_of(graph, "conv1")]
        assert stage.producers == ["conv1", "layer1.0.conv2", "layer1.1.conv2", "layer1.2.conv2"]
        assert stage.consumers == [f"layer1.{i}.conv1" for i in range(3)] + ["layer2.0.conv1", "layer2.0.downsample.0"]
        assert len(graph.merges) == 9


def test_prints_as_a_table() -> None:
    graph = trace_channels(build("resnet20", 10), (torch.randn(1, 3, 8, 8),))
    lines = str(graph).splitlines()
    assert lines[0].split()[:2] == ["space", "channels"]
    assert len(lines) == 2 + len(graph.spaces)
    assert lines[2].split()[:2] == ["0", "3"]
    assert lines[2].endswith("it is the network's input")
    assert "conv1, layer1.0.conv2 and 2 more" in lines[3]


# -- understood --------------------------------------------------------------------------------------------------------

UNDERSTOOD: dict[str, Callable[[], nn.Module]] = {
    "sequential": lambda: Net(lambda m, x: m.fc(pool(m.b(F.relu(m.a(x)))))),
    "view": lambda: Net(lambda m, x: m.fc(F.adaptive_avg_pool2d(m.b(m.a(x)), 1).view(x.size(0), -1))),
    "view-shape": lambda: Net(lambda m, x: m.fc(F.adaptive_avg_pool2d(m.b(m.a(x)), 1).view(x.shape[0], -1))),
    "view-own-shape": lambda: Net(lambda m, x: (y := F.max_pool2d(m.b(m.a(x)), 6), m.fc(y.view(y.shape[0], -1)))[1]),
    "reshape": lambda: Net(lambda m, x: m.fc(m.b(m.a(x)).amax((2, 3), True).reshape(x.size(0), -1))),
    "squeeze": lambda: Net(lambda m, x: m.fc(F.avg_pool2d(m.b(m.a(x)), 6).squeeze(3).squeeze(-1))),
    "block": lambda: Net(lambda m, x: m.fc(torch.flatten(F.max_pool2d(m.b(m.a(x)), 2), 1)), features=72),
    "block-module": lambda: Net(lambda m, x: m.fc(m.flat(m.b(m.a(x)))), features=8 * 36, flat=nn.Flatten()),
    "block-batch-norm": lambda: Net(
        lambda m, x: m.fc(m.norm(torch.flatten(F.max_pool2d(m.b(m.a(x)), 3), 1))),
        features=32,
        norm=nn.BatchNorm1d(32),
    ),
    "functional": lambda: Net(
        lambda m, x: m.fc(pool(F.gelu(m.b(F.pad(F.interpolate(F.leaky_relu(m.a(x), 0.1), scale_factor=2), (1, 1))))))
    ),
    "interpolate-to-a-size": lambda: Net(
        lambda m, x: m.fc(pool(F.interpolate(m.b(F.max_pool2d(m.a(x), 2)), size=x.shape[-2:])))
    ),
    "dropout": lambda: Net(
        lambda m, x: m.fc(F.dropout(pool(m.b(m.drop(m.a(x)))), 0.0, m.training)), drop=nn.Dropout2d(0.0)
    ),
    "multiply-by-a-number": lambda: Net(lambda m, x: m.fc(pool(0.5 * m.b(2 * m.a(x) + 1)) / 3 - 1)),
    "difference": lambda: Net(lambda m, x: m.fc(pool(torch.sub(m.b(m.a(x)), m.a(x)).mul(m.a(x)).abs()))),
    "called-twice": lambda: Net(lambda m, x: m.fc(pool(m.b(F.relu(m.b(m.a(x))))))),
    "depthwise": lambda: Net(
        lambda m, x: m.fc(pool(m.b(m.act(m.depthwise(m.a(x)))))),
        depthwise=nn.Conv2d(8, 8, 3, groups=8),
        act=nn.PReLU(8),
    ),
    "one-map-gate": lambda: Net(lambda m, x: m.fc(pool(m.b(m.a(x)) * torch.sigmoid(m.one(x)))), one=nn.Conv2d(3, 1, 1)),
    "setting": lambda: WithSettings(),
    "cat": lambda: Net(lambda m, x: m.fc(pool(torch.cat([y := m.a(x), m.b(y)], 1))), features=16),
    "cat-then-convolution": lambda: Net(
        lambda m, x: m.fc(pool(m.n(F.relu(torch.cat((y := m.a(x), m.b(y), y), dim=1))))), n=nn.Conv2d(24, 8, 1)
    ),
    "cat-of-flattened": lambda: Net(
        lambda m, x: m.fc(torch.cat([F.max_pool2d(y := m.a(x), 3).flatten(1), pool(m.b(y))], 1)), features=40
    ),
    "cat-of-pixels": lambda: Net(lambda m, x: m.fc(pool(torch.cat([y := m.a(x), m.b(y)], dim=2)))),
    "cat-with-the-input": lambda: Net(lambda m, x: m.fc(pool(torch.cat([x, m.b(m.a(x))], 1))), features=11),
    "sum-of-cats": lambda: Net(
        lambda m, x: m.fc(pool(m.n(x) + torch.cat([y := m.a(x), m.b(y)], 1))), features=16, n=nn.Conv2d(3, 16, 1)
    ),
    "chunk": lambda: Net(lambda m, x: m.fc(pool((p := m.b(m.a(x)).chunk(2, 1), p[0] * p[1].sigmoid())[1])), features=4),
    "chunk-unpacked": lambda: Net(
        lambda m, x: m.fc(pool(torch.cat([p.relu() for p in torch.chunk(m.b(m.a(x)), chunks=2, dim=1)], 1)))
    ),
    "chunk-in-a-list": lambda: Net(
        lambda m, x: m.fc(
            pool(m.n(torch.cat([*(p := list(m.a(x).chunk(2, 1))), (lambda a, b: a * b)(*p), m.one(p[-1])], 1)))
        ),
        n=nn.Conv2d(16, 8, 1),
        one=nn.Conv2d(4, 4, 1),
    ),
    "split-by-count": lambda: Net(
        lambda m, x: m.fc(pool((y := m.b(m.a(x)), p := y.split(y.shape[1] // 4, dim=1), p[0] + p[3])[2])), features=2
    ),
    "grouped": lambda: Net(lambda m, x: m.fc(pool(m.n(m.a(x)))), n=nn.Conv2d(8, 8, 3, groups=2)),
    "grouped-wider": lambda: Net(
        lambda m, x: m.fc(pool(m.norm(m.n(m.a(x))))),
        features=24,
        n=nn.Conv2d(8, 24, 3, groups=2),
        norm=nn.BatchNorm2d(24),
    ),
    "depthwise-multiplied": lambda: Net(
        lambda m, x: m.fc(pool(m.act(m.norm(m.n(m.a(x)))))),
        features=24,
        n=nn.Conv2d(8, 24, 3, groups=8),
        norm=nn.BatchNorm2d(24),
        act=nn.PReLU(24),
    ),
    "depthwise-multiplied-then-convolution": lambda: Net(
        lambda m, x: m.fc(pool(m.o(m.n(m.a(x))))), n=nn.Conv2d(8, 24, 3, groups=8), o=nn.Conv2d(24, 8, 1)
    ),
    "depthwise-transposed": lambda: Net(
        lambda m, x: m.fc(pool(m.b(m.n(m.a(x))))), n=nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8)
    ),
    "transposed": lambda: Net(
        lambda m, x: m.fc(pool(m.norm(m.n(m.a(x))))), features=6, n=nn.ConvTranspose2d(8, 6, 2), norm=nn.BatchNorm2d(6)
    ),
    "pixel-shuffle": lambda: Net(lambda m, x: m.fc(pool(m.n(m.b(m.a(x))))), features=2, n=nn.PixelShuffle(2)),
    "pixel-unshuffle": lambda: Net(lambda m, x: m.fc(pool(F.pixel_unshuffle(m.b(m.a(x)), 2))), features=32),
    "channel-shuffle-module": lambda: Net(lambda m, x: m.fc(pool(m.n(m.b(m.a(x))))), n=nn.ChannelShuffle(2)),
    "channel-shuffle": lambda: Net(lambda m, x: m.fc(pool(m.b(shuffled(m.a(x), 2))))),
    "channel-shuffle-of-a-chunk": lambda: Net(
        lambda m, x: m.fc(pool(m.b(shuffled(torch.cat(m.a(x).chunk(2, 1)[::-1], 1), 2))))
    ),
    "squeeze-excite-with-views": lambda: Net(viewed_squeeze_excite, fc1=nn.Linear(8, 6), fc2=nn.Linear(6, 8)),
    "indices-of-none": lambda: Net(
        lambda m, x: m.fc(pool((y := m.a(x)) * m.n(pool(y)).sigmoid()[:, :, None, None])), n=nn.Linear(8, 8)
    ),
    "unsqueezed": lambda: Net(
        lambda m, x: m.fc(pool((y := m.a(x)) + m.n(pool(y)).unsqueeze(-1).unsqueeze(3))), n=nn.Linear(8, 8)
    ),
    "cut-pixels": lambda: Net(lambda m, x: m.fc(pool(m.b(m.a(x))[:, :, 1:-1, ::2][..., 0:1]))),
    "slice-of-all": lambda: Net(lambda m, x: m.fc(pool(m.b(m.a(x))[:, :8]))),
    "channels-last-linear": lambda: Net(
        lambda m, x: m.fc(pool(m.b(m.n(m.a(x).permute(0, 2, 3, 1)).relu().permute(0, 3, 1, 2)))), n=nn.Linear(8, 8)
    ),
    "tokens": lambda: Net(
        lambda m, x: m.fc(m.n(m.a(x).flatten(2).transpose(1, 2)).softmax(1).sum(1)), n=nn.Linear(8, 8)
    ),
    "unflattened": lambda: Net(
        lambda m, x: m.fc(pool(m.b(m.n(m.a(x).flatten(1)).view(x.shape[0], -1, 6, 6)))), n=nn.BatchNorm1d(288)
    ),
    "stack": lambda: Net(
        lambda m, x: m.fc(pool((s := torch.stack([y := m.a(x), m.b(y)], 1), (s * s.softmax(1)).sum(1))[1]))
    ),
    "split-attention": lambda: Net(
        lambda m, x: m.fc(
            pool((y := m.a(x), g := y.view(y.size(0), 2, y.size(1) // 2, 6, 6), g.softmax(1).mean(1))[2])
        ),
        features=4,
    ),
    "expand": lambda: Net(
        lambda m, x: m.fc(pool(m.b(y := m.a(x)) + F.adaptive_avg_pool2d(y, 1).expand(-1, -1, 6, 6))),
    ),
    "instance-norm": lambda: Net(lambda m, x: m.fc(pool(m.b(m.n(m.a(x))))), n=nn.InstanceNorm2d(8, affine=True)),
    "group-norm-of-single-channels": lambda: Net(lambda m, x: m.fc(pool(m.b(m.n(m.a(x))))), n=nn.GroupNorm(8, 8)),
    "functional-convolution": lambda: Net(
        lambda m, x: m.fc(pool(F.conv2d(m.a(x), m.b.weight, m.b.bias, padding=1))),
    ),
    "functional-linear": lambda: Net(lambda m, x: F.linear(pool(m.b(m.a(x))), m.fc.weight, m.fc.bias)),
    "functional-batch-norm": lambda: Net(
        lambda m, x: m.fc(
            pool(m.b(F.batch_norm(m.a(x), m.n.running_mean, m.n.running_var, m.n.weight, m.n.bias, m.training)))
        ),
        n=nn.BatchNorm2d(8),
    ),
    "own-weight": lambda: Net(lambda m, x: m.fc(pool(m.b(m.n(m.a(x))))), n=OwnWeight()),
    "layer-scale": lambda: Net(lambda m, x: m.fc(pool(m.b(y := m.a(x)) * m.n.weight + y)), n=Scales(8, 1, 1)),
    "layer-scale-in-the-second-dimension": lambda: Net(lambda m, x: m.fc(m.n.weight * pool(m.a(x))), n=Scales(1, 8)),
    "multiplied-by-a-mask": lambda: Net(
        lambda m, x: m.fc(pool(m.b(m.a(x) * x.new_ones((2, 1, 1, 1)) * torch.ones(6, 6)))),
    ),
}


class Scales(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(shape))


class OwnWeight(nn.Module):
    """A convolution that is none of PyTorch's classes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, stride=2)


def shuffled(x: Tensor, groups: int) -> Tensor:
    """ShuffleNet's."""
    n, channels, height, width = x.size()
    x = x.view(n, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(n, channels, height, width)


def viewed_squeeze_excite(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    n, channels, _, _ = y.size()
    gate = m.fc2(F.relu(m.fc1(F.adaptive_avg_pool2d(y, 1).view(n, channels)))).sigmoid().view(n, channels, 1, 1)
    return m.fc(pool(m.b(y * gate.expand_as(y))))


class WithSettings(Net):
    """Plain defaults decide how it flows."""

    def __init__(self) -> None:
        super().__init__(lambda m, x: m.fc(pool(m.b(m.a(x)))))

    def forward(self, x: Tensor, features: bool = False, scale: float | None = None, *, mode: str = "a") -> Tensor:
        y = super().forward(x) if mode == "a" else x
        if features or scale is not None:
            return y * 2
        return y


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_understood(name: str) -> None:
    model = UNDERSTOOD[name]()
    graph = prune_half_of_everything(model, images(size=6))
    assert frozen(graph, "a") is None
    assert "b" not in graph.layers or frozen(graph, "b") is None
    assert graph.spaces[space_of(graph, "a", "input")].is_input
    assert graph.spaces[space_of(graph, "fc")].is_output
    if name.startswith("block"):
        assert graph.layers["fc"].block == model.fc.weight.shape[1] // len(model.b.weight)
    if name == "called-twice":
        assert space_of(graph, "a") == space_of(graph, "b", "input") == space_of(graph, "b")


def test_a_functional_batch_norm_takes_one_image_of_one_pixel() -> None:
    model = UNDERSTOOD["functional-batch-norm"]()
    graph = trace_channels(model, (images(batch=1, size=1),))
    assert not frozen(graph, "a")


# -- not understood: frozen --------------------------------------------------------------------------------------------


class Times(nn.Conv2d):
    """A convolution that does something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(1))


class Flow(nn.Module):
    """Its flow depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.inner(x)
        return x


class Scale(nn.Module):
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.max() > 1e9 else x


def tie(model: Net, first: str, second: str) -> Net:
    model.get_submodule(second).weight = model.get_submodule(first).weight
    return model


def replaced_forward(model: Net) -> Net:
    model.b.forward = lambda x: x.roll(1, 1)  # type: ignore[method-assign]
    return model


def masked(model: Net) -> Net:
    prune.random_unstructured(model.n, "weight", 0.3)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        model(images())  # the weight it holds has a graph until then, with which nothing can be copied
    return model


class ReadsCount(Net):
    def __init__(self) -> None:
        super().__init__(lambda m, x: m.fc(pool(m.b((y := m.a(x)) / y.shape[1]))))


# name -> (model, layer whose output must be frozen, words of the reason)
FROZEN: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "view-written-out": (lambda: Net(lambda m, x: m.fc(m.b(m.a(x)).view(-1, 288)), features=288), "b", "written out"),
    "groups-written-out": (
        lambda: Net(lambda m, x: m.fc(pool(m.a(x).view(-1, 2, 4, 6, 6).transpose(1, 2).flatten(1, 2)))),
        "a",
        "written out",
    ),
    "split-written-out": (
        lambda: Net(lambda m, x: m.fc(pool((p := m.a(x).split(4, 1), p[0] - p[1])[1])), features=4),
        "a",
        "written out",
    ),
    "rows-mixed": (lambda: Net(lambda m, x: m.fc(pool(m.a(x).reshape(-1, 6, 6, 8).transpose(1, 3)))), "a", "'reshape'"),
    "rounded-count": (
        lambda: Net(lambda m, x: m.fc(pool(m.a(x).unflatten(1, (m.a(x).shape[1] // 3 * 2, 2)).sum(2))), features=4),
        "a",
        "number of channels is read",
    ),
    "softmax-over-a-grid": (
        lambda: Net(lambda m, x: m.fc(pool(m.a(x).unflatten(1, (2, -1)).softmax(2).flatten(1, 2)))),
        "a",
        "'softmax'",
    ),
    "groups-transposed": (
        lambda: Net(lambda m, x: m.fc(pool(m.n(m.a(x)))), n=nn.ConvTranspose2d(8, 8, 2, groups=2)),
        "a",
        "in groups",
    ),
    "local-response-norm": (
        lambda: Net(lambda m, x: m.fc(pool(m.n(m.a(x)))), n=nn.LocalResponseNorm(3)),
        "a",
        "'n' (LocalResponseNorm) divides by",
    ),
    "layer-norm": (
        lambda: Net(lambda m, x: m.fc(m.n(m.a(x).permute(0, 2, 3, 1)).mean((1, 2))), n=nn.LayerNorm(8)),
        "a",
        "'n' (LayerNorm) divides by",
    ),
    "depthwise-with-groups-written-out": (
        lambda: Net(lambda m, x: m.fc(pool(F.conv2d(m.a(x), m.n.weight, groups=8))), n=Scales(8, 1, 3, 3)),
        "a",
        "groups that is written out",
    ),
    "functional-and-not-followed": (
        lambda: Net(
            lambda m, x: m.fc(pool(m.b(m.a(x)))) + F.conv2d(x.repeat(1, 3, 1, 1)[:, 1:], m.b.weight, m.b.bias).sum()
        ),
        "b",
        "",
    ),
    "functional-with-a-computed-weight": (
        lambda: Net(lambda m, x: m.fc(pool(F.conv2d(m.a(x), m.b.weight / m.b.weight.norm(), m.b.bias)))),
        "a",
        "'conv2d'",
    ),
    "cdist": (lambda: Net(lambda m, x: m.fc(pool(torch.cdist(m.b(m.a(x)), m.a(x))))), "a", "'cdist'"),
    "channel-slice": (
        lambda: Net(lambda m, x: m.fc(pool(m.b(m.a(x))[:, 2:])), features=6),
        "b",
        "picks channels by number",
    ),
    "softmax-over-channels": (lambda: Net(lambda m, x: m.fc(pool(m.a(x).softmax(1)))), "a", "'softmax'"),
    "mean-over-channels": (lambda: Net(lambda m, x: m.fc(pool(m.a(x) - m.a(x).mean(1, keepdim=True)))), "a", "'mean'"),
    "flip": (lambda: Net(lambda m, x: m.fc(pool(m.a(x).flip(1)))), "a", "'flip'"),
    "group-norm": (
        lambda: Net(lambda m, x: m.fc(pool(m.n(m.a(x)))), n=nn.GroupNorm(1, 8)),
        "a",
        "'n' (GroupNorm) divides by",
    ),
    "overridden-forward": (lambda: Net(lambda m, x: m.fc(pool(m.n(m.a(x)))), n=Times(8, 8, 1)), "a", "'flip'"),
    "replaced-forward": (lambda: replaced_forward(Net(simple)), "a", "'b' (Conv2d)"),
    "masked": (
        lambda: masked(Net(lambda m, x: m.fc(pool(m.n(m.a(x)))), n=nn.Conv2d(8, 8, 1))),
        "a",
        "'n' (Conv2d)",
    ),
    "closed": (lambda: Net(lambda m, x: m.fc(pool(m.n(m.a(x)))), n=Flow()), "a", "'n' (Flow)"),
    "tied": (lambda: tie(Net(lambda m, x: m.fc(pool(m.n(m.b(m.a(x))))), n=nn.Conv2d(8, 8, 3)), "b", "n"), "a", "share"),
    "weight-read": (
        lambda: Net(lambda m, x: m.fc(pool(m.b(m.a(x)))) + m.b.weight.sum()),
        "a",
        "the forward reads 'b.weight' directly",
    ),
    "layer-inside-a-closed-module": (
        lambda: (lambda m: (setattr(m, "n", Scale(m.b)), m)[1])(Net(lambda m, x: m.fc(pool(m.b(m.n(m.a(x))))))),
        "b",
        "it also works inside 'n'",
    ),
    "channel-count": (ReadsCount, "a", "its number of channels is read by the forward"),
    "size-1": (lambda: Net(lambda m, x: m.fc(pool(m.a(x)).mul(m.a(x).size(1)))), "a", "number of channels is read"),
    "numel": (lambda: Net(lambda m, x: m.fc(pool(m.a(x)) / m.a(x).numel())), "a", "'numel'"),
    "whole-shape": (
        lambda: Net(lambda m, x: m.fc(pool(m.b(m.a(x)) + x.new_ones(1).expand(m.a(x).shape)))),
        "a",
        "number of",
    ),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_is_not_understood_freezes(name: str) -> None:
    make, layer, reason = FROZEN[name]
    graph = prune_half_of_everything(make(), images())
    assert reason in (frozen(graph, layer) or "not frozen")
    assert reason in str(graph)


def test_a_compiled_network_is_refused_by_name() -> None:
    with pytest.raises(TraceError, match=r"a OptimizedModule is a wrapper; pass the network inside, model._orig_mod"):
        trace_channels(torch.compile(Net(simple)), (images(),))


def test_a_module_that_cannot_be_traced_is_left_closed_and_named() -> None:
    graph = trace_channels(FROZEN["closed"][0](), (images(),))
    assert list(graph.opaque) == ["n"]
    assert "depends on the data" in graph.opaque["n"]
    assert "if x.sum() > 0:" in graph.opaque["n"]
    assert "not looked into: n (" in str(graph)
    assert "n.inner" not in graph.layers


def test_a_forward_that_cannot_be_traced_is_an_error_that_names_the_line(capfd: pytest.CaptureFixture[str]) -> None:
    class Root(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if y.mean() > 0:
                y = -y
            return self.fc(pool(y))

    with pytest.raises(
        TraceError,
        match=r"the forward of Root cannot be traced .*'if y.mean\(\) > 0:'.*torch.export says.*Move the part",
    ):
        trace_channels(Root(simple), (images(),))

    assert capfd.readouterr() == ("", "")  # torch.export would print the program

    with pytest.raises(TraceError, match="the model takes 1 inputs but example_inputs has 2"):
        trace_channels(Net(simple), (images(), images()))
