"""Which channels stay: thresholds, rounding, and dead branches."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetrain_kernels import InputError, Keep, reconfigure, trace_channels


class Chain(nn.Module):
    """conv a -> conv b -> linear; the edge between a and b has ten channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 10, 1), nn.Conv2d(10, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))


X = torch.ones(1, 3, 2, 2)


def chain(sizes: list[float], dtype: torch.dtype = torch.float32) -> Chain:
    """The largest weight of channel i on the edge a-b is sizes[i] in its writer and half of it in its reader."""
    torch.manual_seed(0)
    model = Chain().to(dtype)
    with torch.no_grad():
        model.a.weight.copy_(-torch.tensor(sizes).view(-1, 1, 1, 1).expand(-1, 3, 1, 1))
        model.b.weight.copy_(torch.tensor(sizes).view(1, -1, 1, 1).expand(6, -1, 1, 1) / 2)
    return model


def kept(model: nn.Module, layer: str = "a", **options: object) -> list[int]:
    graph = trace_channels(model, (X.to(next(model.parameters()).dtype),))
    keep = graph.keep(model, **options)  # type: ignore[arg-type]
    return keep.channels[graph.layers[layer].output].tolist()


LADDER = [1.0, 3e-5, 0.5, 9.9e-5, 1.01e-4, 1e-3, 0.0, 2e-2, 1e-6, 1e-2]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 2, 4, 5, 7, 9]),
        ({"threshold": 0.0}, [0, 1, 2, 3, 4, 5, 7, 8, 9]),
        ({"threshold": 5e-3}, [0, 2, 7, 9]),
        ({"threshold": 1e-2, "relative": True}, [0, 2, 7, 9]),
        ({"threshold": 0.3, "relative": True}, [0, 2]),
        ({"threshold": 0.99, "relative": True}, [0]),
        ({"round_to": 4}, [0, 1, 2, 3, 4, 5, 7, 9]),
        ({"round_to": 3}, [0, 2, 4, 5, 7, 9]),
        ({"round_to": 7}, [0, 2, 3, 4, 5, 7, 9]),
        ({"round_to": 8}, [0, 1, 2, 3, 4, 5, 7, 9]),
        ({"round_to": 16}, list(range(10))),
        ({"round_to": 4, "threshold": 0.7}, [0, 2, 7, 9]),
        ({"threshold": 100.0}, [0]),
        ({"threshold": 100.0, "round_to": 2}, [0, 2]),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_thresholds_and_rounding(options: dict[str, object], expected: list[int], dtype: torch.dtype) -> None:
    assert kept(chain(LADDER, dtype), **options) == expected


def test_relative_to_each_layers_largest_slice() -> None:
    model = chain(LADDER)
    model.a.weight.data *= 1e-6  # the whole layer has drifted towards the absolute threshold
    model.b.weight.data *= 1e6
    assert kept(model, threshold=1e-2, relative=True) == [0, 2, 7, 9]


def test_live_in_one_layer_is_enough() -> None:
    model = chain([0.0] * 10)
    model.a.weight.data[3, 1] = -1.0
    model.b.weight.data[5, 7] = 1.0
    assert kept(model) == [3, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("relative", [False, True])
def test_nan_is_never_cut(dtype: torch.dtype, relative: bool) -> None:
    model = chain([1.0, 0.0] * 5, dtype)
    model.a.weight.data[3, 0] = float("nan")
    model.b.weight.data[0, 5] = float("nan")
    channels = kept(model, relative=relative)
    assert {0, 2, 3, 4, 5, 6, 8} <= set(channels)
    assert kept(model, relative=relative, round_to=8) == sorted({*channels, 1})


def test_infinite_weights_do_not_make_others_sparse() -> None:
    model = chain(LADDER)
    model.a.weight.data[0] = float("inf")
    assert kept(model, threshold=0.1, relative=True) == [i for i in range(10) if i != 6]


def test_a_space_with_nothing_live_keeps_one() -> None:
    model = chain([0.0] * 10)
    assert len(kept(model)) == 1
    assert len(kept(model, round_to=4)) == 4
    before = model(X)
    graph = trace_channels(model, (X,))
    reconfigure(model, None, graph.keep(model))
    assert model.a.out_channels == model.b.in_channels == 1
    assert torch.equal(model(X), before)


def test_inputs_and_outputs_stay() -> None:
    model = chain([1.0] * 10)
    model.a.weight.data[:, 1] = 0
    model.fc.weight.data[2] = 0
    graph = trace_channels(model, (X,))
    keep = graph.keep(model)
    assert [len(c) for c in keep.channels] == [3, 10, 6, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -1e-4}, "threshold must be a number from 0 upwards"),
        ({"threshold": float("nan")}, "threshold must be"),
        ({"threshold": float("inf")}, "threshold must be"),
        ({"threshold": "1e-4"}, "threshold must be"),
        ({"threshold": None}, "threshold must be"),
        ({"threshold": 1.0, "relative": True}, "a relative threshold must be below 1"),
        ({"round_to": 0}, "round_to must be a whole number from 1 upwards"),
        ({"round_to": -8}, "round_to must be"),
        ({"round_to": 2.5}, "round_to must be"),
        ({"round_to": float("nan")}, "round_to must be"),
        ({"round_to": float("inf")}, "round_to must be"),
        ({"round_to": "8"}, "round_to must be"),
        ({"round_to": True}, "round_to must be"),
        ({"policy": "best"}, "policy 'best' is not known; the policies are: union"),
    ],
    ids=str,
)
def test_bad_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        kept(chain(LADDER), **options)


class Grouped(nn.Module):
    """conv a -> conv b in 4 groups of 6 -> conv c -> linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 1, groups=4), nn.Conv2d(24, 6, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.c(self.b(self.a(x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("dead", "round_to", "expected"),
    [
        ([0, 3], 1, [1, 2, 4, 5]),
        ([0, 3], 8, [1, 2, 4, 5]),  # four in each of four groups are 16 already
        ([0, 3, 4], 8, [1, 2, 4, 5]),  # three would be 12: the largest of the dead ones stays
        ([0, 1, 2, 4, 5], 1, [3, 5]),  # one in a group would be a depthwise convolution
        ([0, 1, 2, 3, 4, 5], 1, [4, 5]),
    ],
)
def test_every_group_keeps_the_same_channels(dead: list[int], round_to: int, expected: list[int]) -> None:
    torch.manual_seed(0)
    net = Grouped()
    with torch.no_grad():
        for i in dead:  # the higher, the larger
            net.a.weight[i::6] = 1e-5 * (i + 1)
            net.b.weight[:, i] = net.b.weight[i::6] = net.c.weight[:, i::6] = 0
    graph = trace_channels(net, (X,))
    keep = graph.keep(net, round_to=round_to)
    b = graph.layers["b"]
    assert (b.groups, graph.spaces[b.input].size, graph.spaces[b.output].size) == (4, 6, 24)
    assert keep.channels[b.input].tolist() == expected
    assert keep.channels[graph.layers["a"].output].tolist() == [g * 6 + i for g in range(4) for i in expected]
    outputs = keep.channels[b.output].tolist()
    assert outputs == keep.channels[graph.layers["c"].input].tolist()
    assert outputs == [g * 6 + i for g in range(4) for i in outputs if i < 6]
    assert set(range(6)) - set(dead) <= set(outputs)
    reconfigure(net, None, keep)
    assert (net.a.out_channels, net.b.in_channels, net.b.groups) == (4 * len(expected), 4 * len(expected), 4)
    assert net.b.weight.shape == (len(outputs), len(expected), 1, 1)
    assert net.b.out_channels == net.c.in_channels == len(outputs)


def test_a_channel_shuffle_keeps_two_channels_in_each_group() -> None:
    """With one channel left, `view(n, 2, 1, h, w)` would look like a number written out, and nothing could go."""

    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            n, channels, height, width = x.size()
            x = x.view(n, 2, channels // 2, height, width).transpose(1, 2).reshape(n, channels, height, width)
            return self.b(x)

    net = Shuffled()
    net.a.weight.data[torch.arange(12) % 6 != 2] = 0
    net.b.weight.data.zero_()
    net.b.weight.data[:, [4, 5]] = 1.0
    graph = trace_channels(net, (X,))
    keep = graph.keep(net)
    assert keep.channels[graph.layers["a"].output].tolist() == [0, 2, 6, 8]
    assert keep.channels[graph.layers["b"].input].tolist() == [0, 1, 4, 5]
    before = net(X)
    reconfigure(net, None, keep)
    assert torch.allclose(net(X), before)
    again = trace_channels(net, (X,))
    assert again.spaces[again.layers["a"].output].frozen is None


def test_another_model_is_refused() -> None:
    graph = trace_channels(Chain(), (X,))
    with pytest.raises(InputError, match="layer 'a' does not have the shape that was traced, 10 x 3 channels"):
        graph.keep(nn.Sequential(nn.Conv2d(3, 10, 1)))


# -- dead branches -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + norm2(conv2(relu(norm1(conv1(x)))))"""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)
        self.conv1, self.norm1 = nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5)
        self.conv2, self.norm2 = nn.Conv2d(5, 6, 1), nn.BatchNorm2d(6)

    def branch(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.branch(x))


def choose(model: nn.Module) -> Keep:
    return trace_channels(model, (torch.ones(1, 3, 4, 4),)).keep(model)


@pytest.mark.parametrize("how", ["zero", "below-the-threshold", "every-output", "every-input"])
def test_a_dead_branch_is_found(how: str) -> None:
    model = Block()
    model.conv2.weight.data.fill_(9e-5 if how == "below-the-threshold" else 0)
    (branch,) = choose(model).branches
    assert (branch.last, branch.batch_norm, branch.in_place) == ("conv2", "norm2", False)
    assert branch.upstream == ("conv1", "norm1")
    assert branch.layers == ("conv1", "norm1", "conv2")


def test_one_live_weight_keeps_a_branch() -> None:
    model = Block()
    model.conv2.weight.data.zero_()
    model.conv2.weight.data[3, 2] = 1.1e-4
    assert choose(model).branches == ()


def test_all_first_convolutions_dead_is_no_dead_branch() -> None:
    model = Block()
    model.conv1.weight.data.zero_()
    assert choose(model).branches == ()


class SharedInner(Block):
    """A block whose branch has an inner value that is also used elsewhere, so only the branch's end goes."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        inner = F.relu(self.norm1(self.conv1(x)))
        return self.head(x + self.norm2(self.conv2(inner))) + inner.mean()


class SharedEnd(Block):
    """The branch's end is used twice, so it is no branch."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = self.branch(x)
        return self.head(x + out) + self.head(out)


class CalledTwice(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.branch(x)
        return self.head(x + self.branch(x))


class Pooled(Block):
    """A max pool stands between the convolution and the merge."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + F.max_pool2d(self.branch(x), 3, 1, 1))


class OddInside(Block):
    """An operation that would not work on a removed layer's one channel: the layers before it stay."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.GroupNorm(1, 5)

    def branch(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.extra(F.relu(self.norm1(self.conv1(x))))))


class WritesInside(Block):
    """An in-place addition inside the branch needs the full number of channels; what follows it can go."""

    def __init__(self) -> None:
        super().__init__()
        self.side, self.after = nn.Conv2d(6, 5, 1), nn.Conv2d(5, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        side = self.side(x)
        out = self.conv1(x)
        out += side
        return self.head(x + self.norm2(self.conv2(self.after(out)))) + side.mean()


class GateInside(Block):
    """Both factors of an in-place product come from removed layers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(5, 5, 1)

    def branch(self, x: Tensor) -> Tensor:
        out = self.norm1(self.conv1(x))
        out *= torch.sigmoid(self.gate(F.adaptive_avg_pool2d(out, 1)))
        return self.norm2(self.conv2(out))


@pytest.mark.parametrize(
    ("model", "removed"),
    [
        (Block, {"conv1", "norm1", "conv2"}),
        (SharedInner, {"conv2"}),
        (SharedEnd, set()),
        (CalledTwice, set()),
        (Pooled, set()),
        (OddInside, {"conv2"}),
        (WritesInside, {"after", "conv2"}),
        (GateInside, {"conv1", "norm1", "gate", "conv2"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_only_what_nobody_else_needs_is_removed(model: type[Block], removed: set[str]) -> None:
    torch.manual_seed(0)
    net = model().double()
    x = torch.randn(2, 3, 4, 4).double()
    net.norm2.bias.data.normal_()
    net.conv2.weight.data.zero_()
    keep = trace_channels(net, (x,)).keep(net)
    assert keep.removed == removed
    for training in (False, True):
        before = net.train(training)(x)
        if not training:
            reconfigure(net, None, keep)
        assert torch.allclose(net(x), before, rtol=1e-12)
