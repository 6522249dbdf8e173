"""FLOPs against closed forms written down by hand."""

import logging

import pytest
import torch
from torch import Tensor, nn

from prunetrain_kernels import PruneTrain, reconfigure, trace_channels
from prunetrain_kernels.cost import Flops, count_flops, count_flops_by_layer, flop_table
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.models import build


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.fc = nn.Linear(5 * 6 * 4, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(torch.relu(self.norm(self.conv(x))), 1))


CONV = 2 * 3 * 5 * 9 * 6 * 4
FC = 2 * 5 * 6 * 4 * 7


@pytest.mark.parametrize("batch", [1, 3])
def test_two_layers_by_hand(batch: int) -> None:
    flops = count_flops(TwoLayers(), (torch.randn(batch, 3, 6, 4),))
    assert flops.inference == CONV + FC
    # the first convolution has a gradient for its weight only; the linear layer for weight and input
    assert flops.training == 2 * CONV + 3 * FC


def test_a_frozen_layer_needs_no_weight_gradient() -> None:
    model = TwoLayers()
    model.fc.requires_grad_(False)
    assert count_flops(model, (torch.randn(1, 3, 6, 4),)).training == 2 * CONV + 2 * FC
    model.requires_grad_(False)
    assert count_flops(model, (torch.randn(1, 3, 6, 4),)).training == CONV + FC


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_strided_and_transposed_convolution(groups: int, stride: int, transposed: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(8, 16, 3, stride=stride, padding=1, groups=groups)
    taps = 16 * (8 // groups) * 9 * (64 if transposed else (8 // stride) ** 2)
    flops = count_flops(nn.Sequential(nn.Conv2d(8, 8, 1), layer), (torch.randn(1, 8, 8, 8),))
    first = 2 * 8 * 8 * 64
    assert (flops.inference, flops.training) == (first + 2 * taps, 2 * first + 3 * 2 * taps)


@pytest.mark.parametrize(
    ("name", "classes", "size", "multiply_adds", "stem"),
    [
        ("resnet20", 10, 32, 40_813_184, 3 * 16 * 9 * 32**2),
        ("resnet50", 10, 32, 113_953_280, 3 * 16 * 9 * 32**2),
        ("vgg11", 10, 32, 152_769_536, 3 * 64 * 9 * 32**2),
        ("imagenet_resnet50", 1000, 224, 4_089_184_256, 3 * 64 * 49 * 112**2),
    ],
)
def test_networks(name: str, classes: int, size: int, multiply_adds: int, stem: int) -> None:
    flops = count_flops(build(name, classes), (torch.randn(1, 3, size, size),))
    assert flops.inference == 2 * multiply_adds
    assert flops.training == 2 * (3 * multiply_adds - stem)


def test_batch_norm_over_one_value_per_channel() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert count_flops(model, (torch.randn(1, 3, 1, 1),)).training == 2 * 2 * 3 * 4


class ManyOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 2, bias=False) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, object]:
        return {"a": self.a(x), "rest": (self.b(y), [self.c(y)]), "label": y.argmax(1), "name": "none"}


def test_every_output_is_differentiated() -> None:
    flops = count_flops(ManyOutputs(), (torch.randn(2, 3), torch.randn(2, 3)))
    assert flops.inference == 3 * 2 * 3 * 2
    assert flops.training == 2 * flops.inference


class Blocks(nn.Module):
    """Modules in a list (never called itself), the same one twice, and a product in the root's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, n), nn.ReLU(), nn.Linear(n, 4)) for n in (2, 3))
        self.shared = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.shared(block(x))
        return x @ self.weight


def test_by_layer() -> None:
    model, x = Blocks(), torch.randn(1, 4)
    by_layer = count_flops_by_layer(model, (x,))
    assert by_layer == {
        "": 2 * 4 * 5,
        "blocks.0.0": 2 * 4 * 2,
        "blocks.0.2": 2 * 2 * 4,
        "blocks.1.0": 2 * 4 * 3,
        "blocks.1.2": 2 * 3 * 4,
        "shared": 2 * 2 * 4 * 4,
    }
    assert sum(by_layer.values()) == count_flops(model, (x,)).inference


def test_by_layer_of_a_network() -> None:
    model, x = build("resnet20", 10), torch.randn(1, 3, 32, 32)
    by_layer = count_flops_by_layer(model, (x,))
    assert by_layer["conv1"] == 2 * 3 * 16 * 9 * 32**2
    assert by_layer["layer2.0.downsample.0"] == 2 * 16 * 32 * 16**2
    assert set(by_layer) == {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert sum(by_layer.values()) == count_flops(model, (x,)).inference


@pytest.mark.parametrize("inputs", [(), torch.randn(0, 3), [], (torch.tensor(1.0),), (3,), {}])
def test_example_inputs_must_hold_batches(inputs: object) -> None:
    with pytest.raises(InputError, match="example"):
        count_flops(nn.Linear(3, 2), inputs)  # type: ignore[arg-type]


def test_inputs_that_do_not_fit(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"CifarVGG does not run on example inputs of shape .* too small"):
        count_flops(build("vgg11", 10), (torch.randn(1, 3, 8, 8),))
    assert capfd.readouterr().err == ""
    assert not logging.getLogger("torch._subclasses.fake_tensor").disabled


class Decides(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


def test_a_model_that_looks_at_its_data_is_run_for_real() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), Decides(3, 3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    nn.init.constant_(model[1].bias, 1)  # so that it decides for its weights
    before["1.bias"].fill_(1)
    # 9 multiply-adds a layer; backward: two weight gradients and one input gradient
    assert count_flops(model, (torch.ones(1, 3),)) == Flops(training=2 * 9 * 5, inference=2 * 9 * 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_returns_no_tensor() -> None:
    class Empty(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    with pytest.raises(InputError, match="no floating-point tensor"):
        count_flops(Empty(), (torch.randn(1, 3),))


# -- the table, from which a pruned network's FLOPs follow -------------------------------------------------------------


class OfAllKinds(nn.Module):
    """Groups, depthwise, transposed, linear behind a flatten, a layer called twice, a frozen one, one for training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped, self.depthwise = nn.Conv2d(8, 12, 1, groups=2), nn.Conv2d(12, 24, 3, padding=1, groups=12)
        self.up, self.fc, self.side = nn.ConvTranspose2d(24, 6, 2, stride=2), nn.Linear(6 * 16, 5), nn.Linear(8, 5)
        self.grouped.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = torch.relu(self.norm(self.twice(self.twice(self.first(x)))))
        y = torch.flatten(nn.functional.adaptive_avg_pool2d(self.up(self.depthwise(self.grouped(x))), 4), 1)
        return (self.fc(y), self.side(x.mean((2, 3)))) if self.training else self.fc(y)


@pytest.mark.parametrize("name", ["all kinds", "resnet20", "vgg11", "imagenet_resnet50"])
def test_a_pruned_networks_flops_from_the_table(name: str) -> None:
    torch.manual_seed(0)
    model, x = (OfAllKinds() if name == "all kinds" else build(name, 10)), (torch.randn(2, 3, 32, 32),)
    counted, table = flop_table(model, x)
    assert counted == count_flops(model, x)
    assert table is not None
    for turn in range(2):
        graph = trace_channels(model, x)
        with torch.no_grad():
            for i, layer in enumerate(graph.layers.values()):
                weight = model.get_submodule(layer.name).weight
                assert isinstance(weight, Tensor)
                for dim in layer.dims:
                    weight.transpose(0, dim)[:: 2 + (i + turn) % 2].zero_()
        reconfigure(model, None, graph.keep(model))
        assert table.flops(model) == count_flops(model, x)
    assert table.flops(model).training < counted.training


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.weight * x.flatten(2)
        return x @ x.transpose(1, 2)


class Projects(nn.Module):
    """Its own weight's FLOPs look like a layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) @ self.weight.t()


@pytest.mark.parametrize("kind", [Attends, Projects])
def test_no_table_where_flops_may_not_follow_from_weights(kind: type[nn.Module]) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), kind()), (torch.randn(2, 3, 4, 4),)
    counted, table = flop_table(model, x)
    assert counted == count_flops(model, x)
    assert table is None


@pytest.mark.parametrize("policy", ["union", "gating"])
def test_prunetrain_counts_what_a_dry_run_counts(policy: str) -> None:
    """Also when a layer was removed, or when the user has frozen one."""
    torch.manual_seed(0)
    model, x = build("resnet20", 10), torch.randn(2, 3, 16, 16)
    prunetrain = PruneTrain(model, torch.optim.SGD(model.parameters(), lr=0.1), (x,), policy=policy, fuse=True)
    for turn in range(4):
        with torch.no_grad():
            model.get_submodule(f"layer{1 + turn % 3}.1.conv1").weight[::3] = 0
            model.get_submodule(f"layer{1 + turn % 3}.1.conv2").weight[:, ::3] = 0
            if turn == 1:
                model.get_submodule("layer2.2.conv2").weight.zero_()
        if turn == 2:
            model.get_submodule("layer3.0.conv2").requires_grad_(False)
        report = prunetrain.reconfigure()
        assert report.reconfiguration.changed
        assert bool(report.reconfiguration.branches) == (turn == 1)
        assert prunetrain.flops == count_flops(model, (x,))
