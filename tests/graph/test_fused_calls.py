"""The channel graph takes a fused batch norm's call apart: batch norm, sum, ReLU."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetrain_kernels import ChannelGraph, reconfigure, trace_channels
from prunetrain_kernels.nn import BatchNormAct2d, ChannelGather, ChannelScatter, ChannelScatterAdd
from prunetrain_kernels.ops.channel_index import ChannelIndex


class Plain(nn.Module):
    """A residual network of one block, in plain modules."""

    norm: type[nn.BatchNorm2d] = nn.BatchNorm2d

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.bn0 = nn.Conv2d(3, 6, 3, padding=1), self.norm(6)
        self.conv1, self.bn1 = nn.Conv2d(6, 5, 3, padding=1), self.norm(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 6, 3, padding=1), self.norm(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(x)))
        out = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.relu(torch.add(self.bn2(self.conv2(out)), x)).mean((2, 3)))


class Fused(Plain):
    """The same network with fused batch norms, called by default, by keyword, and by position."""

    norm = BatchNormAct2d

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self.conv0(x))
        out = self.bn1(self.conv1(x), relu=True)
        return self.fc(self.bn2(self.conv2(out), x).mean((2, 3)))


class FusedFirst(Fused):
    """The residual made after the branch."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self.conv0(x))
        branch = self.conv2(self.bn1(self.conv1(x), None, True))
        return self.fc(self.bn2(branch, residual=x, relu=True).mean((2, 3)))


def spaces(graph: ChannelGraph) -> list[tuple[object, ...]]:
    return [
        (s.size, s.producers, s.consumers, sorted(s.followers), s.frozen, s.is_input, s.is_output) for s in graph.spaces
    ]


@pytest.mark.parametrize("cls", [Fused, FusedFirst])
def test_same_spaces_and_merges(cls: type[Plain]) -> None:
    x = torch.randn(2, 3, 4, 4)
    plain, fused = trace_channels(Plain(), (x,)), trace_channels(cls(), (x,))
    assert spaces(fused) == spaces(plain)
    assert len(fused.merges) == len(plain.merges) == 1
    assert not fused.not_followed
    assert {f.kind for f in fused.followers.values()} == {"batch_norm"}


@pytest.mark.parametrize("dead", ["conv2", "conv0"])
@pytest.mark.parametrize("cls", [Fused, FusedFirst])
def test_dead_branches_go_and_the_function_stays(cls: type[Plain], dead: str) -> None:
    torch.manual_seed(0)
    plain, fused, x = Plain().double(), cls().double(), torch.randn(2, 3, 4, 4).double()
    for tensor in plain.state_dict().values():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.3, 1.0)
    with torch.no_grad():
        plain.get_submodule(dead).weight.zero_()
        plain.bn2.bias.sub_(2)  # or the ReLU has nothing to do
    fused.load_state_dict(plain.state_dict())
    reports = [reconfigure(m, None, trace_channels(m, (x,)).keep(m)) for m in (plain, fused)]
    assert reports[0].removed == reports[1].removed == (("conv1", "bn1", "conv2") if dead == "conv2" else ())
    for turn in range(2):
        for training in (True, False):
            assert torch.allclose(plain.train(training)(x), fused.train(training)(x), rtol=1e-12)
        if not turn:
            reconfigure(fused, None, trace_channels(fused, (x,)).keep(fused))  # what was removed can be traced again


def test_a_shortcut_that_died_is_added_as_one_value_per_channel() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 6, 3, padding=1), BatchNormAct2d(6)
            self.short, self.short_bn = nn.Conv2d(3, 6, 1), BatchNormAct2d(6, relu=False)
            self.head = nn.Conv2d(6, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.bn(self.conv(x), self.short_bn(self.short(x)))).mean((2, 3))

    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(2, 3, 4, 4).double()
    nn.init.uniform_(model.short_bn.bias)
    with torch.no_grad():
        model.short.weight.zero_()
    expected = [model.train(training)(x).detach() for training in (True, False)]
    model.short_bn.reset_running_stats(), model.bn.reset_running_stats()
    assert reconfigure(model, None, trace_channels(model, (x,)).keep(model)).removed == ("short",)
    assert model.short_bn(model.short(x)).shape == (1, 6, 1, 1)
    for training, value in zip((True, False), expected, strict=True):
        assert torch.allclose(model.train(training)(x), value, rtol=1e-12)
    model(x).sum().backward()
    assert model.short_bn.bias.grad is not None


class Gated(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        index = ChannelIndex([4, 0, 2], 6)
        self.way = way
        self.conv0 = nn.Conv2d(3, 6, 1)
        self.gather, self.scatter, self.add = ChannelGather(index), ChannelScatter(index), ChannelScatterAdd(index)
        self.conv1 = nn.Conv2d(3, 3, 1)
        self.bn = BatchNormAct2d(3)
        self.conv2 = nn.Conv2d(6, 4, 1)
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv0(x)
        branch = self.conv1(self.gather(x))
        if self.way == "batch norm":
            x = self.bn(branch, x, scatter=self.index)
        else:
            x = self.scatter(branch) + x if self.way == "scatter" else self.add(x, branch)
        return self.conv2(x)


@pytest.mark.parametrize("way", ["scatter", "add", "batch norm"])
def test_indexed_channels_stay_as_they_are(way: str) -> None:
    graph = trace_channels(Gated(way), (torch.randn(2, 3, 4, 4),))
    assert all(s.frozen for s in graph.spaces)
    assert {s.size for s in graph.spaces} == {3, 4, 6}
