"""FLOPs against closed forms written down by hand."""

import logging

import pytest
import torch
from torch import Tensor, nn

from prunetrain_kernels.cost import Flops, count_flops, count_flops_by_layer
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


@pytest.mark.parametrize("inputs", [(), torch.randn(1, 3), [torch.randn(1, 3)], (torch.tensor(1.0),), (3,)])
def test_example_inputs_must_be_a_tuple_of_batches(inputs: object) -> None:
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
