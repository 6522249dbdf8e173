"""The networks have the paper's size, torchvision's names, and can be traced and trained."""

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from prunetrain_kernels.cli import main
from prunetrain_kernels.models import (
    MODELS,
    NAMES,
    OLD_NAMES,
    build,
    imagenet_resnet50,
    resnet20,
    resnet50,
    vgg7,
    vgg11,
)

# multiply-adds of one image in closed form, by formulas that share nothing with the networks' code


def basic_resnet_multiply_adds(blocks: int, classes: int) -> int:
    total = 3 * 16 * 9 * 32 * 32
    for stage, width in enumerate((16, 32, 64)):
        pixels = (32 >> stage) ** 2
        total += 2 * blocks * width * width * 9 * pixels
        if stage > 0:  # the first convolution reads half the channels; the shortcut is a 1x1
            total += -(width // 2) * width * 9 * pixels + (width // 2) * width * pixels
    return total + 64 * classes


def vgg_multiply_adds(stages: list[list[int]], classes: int) -> int:
    total, channels = 0, 3
    for stage, widths in enumerate(stages):
        for width in widths:
            total += channels * width * 9 * (32 >> stage) ** 2
            channels = width
    return total + channels * classes


VGG7 = [[32, 32], [64, 64], [128, 128]]
VGG11 = [[64], [128], [256, 256], [512, 512], [512, 512]]
VGG13 = [[64, 64], [128, 128], [256, 256], [512, 512], [512, 512]]


def measured_multiply_adds(name: str, size: int, classes: int) -> int:
    with torch.device("meta"):
        model, image = build(name, classes).eval(), torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet20", basic_resnet_multiply_adds(3, 10)),
        ("resnet32", basic_resnet_multiply_adds(5, 10)),
        ("resnet56", basic_resnet_multiply_adds(9, 10)),
        ("vgg7", vgg_multiply_adds(VGG7, 10)),
        ("vgg11", vgg_multiply_adds(VGG11, 10)),
        ("vgg13", vgg_multiply_adds(VGG13, 10)),
    ],
)
def test_multiply_adds_agree_with_the_closed_form(name: str, expected: int) -> None:
    assert measured_multiply_adds(name, 32, 10) == expected


def test_cifar_resnet50_is_the_papers_230_mflop() -> None:
    multiply_adds = measured_multiply_adds("resnet50", 32, 10)
    assert round(multiply_adds / 1e6) == 114
    assert 2 * multiply_adds == pytest.approx(230e6, rel=0.01)


def test_imagenet_resnet50_is_torchvisions() -> None:
    with torch.device("meta"):
        model = imagenet_resnet50()
    assert (
        measured_multiply_adds("imagenet_resnet50", 224, 1000) == 4_089_184_256
    )  # torchvision's documented 4.09 GFLOPS
    assert sum(p.numel() for p in model.parameters()) == 25_557_032  # torchvision's documented num_params
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == torchvision_resnet50_shapes()


def torchvision_resnet50_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's resnet50 state dict, written down independently."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv_bn(conv: str, bn: str, out_channels: int, in_channels: int, kernel: int) -> None:
        shapes[f"{conv}.weight"] = (out_channels, in_channels, kernel, kernel)
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{bn}.{tensor}"] = (out_channels,)
        shapes[f"{bn}.num_batches_tracked"] = ()

    conv_bn("conv1", "bn1", 64, 3, 7)
    channels = 64
    for stage, (width, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            conv_bn(f"{name}.conv1", f"{name}.bn1", width, channels, 1)
            conv_bn(f"{name}.conv2", f"{name}.bn2", width, width, 3)
            conv_bn(f"{name}.conv3", f"{name}.bn3", 4 * width, width, 1)
            if block == 0:
                conv_bn(f"{name}.downsample.0", f"{name}.downsample.1", 4 * width, channels, 1)
            channels = 4 * width
    return shapes | {"fc.weight": (1000, 2048), "fc.bias": (1000,)}


def test_bottlenecks_stride_in_the_3x3() -> None:
    for model in (resnet50(), imagenet_resnet50(num_classes=2)):
        strided = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
        in_blocks = {name.split(".", 2)[2] for name in strided if name.startswith("layer")}
        assert in_blocks == {"conv2", "downsample.0"}


@pytest.mark.parametrize("name", list(MODELS))
def test_traceable_without_a_channel_count(name: str) -> None:
    with torch.device("meta"):
        model = build(name, 7, in_channels=2)
        graph = fx.symbolic_trace(model).graph
        image = torch.empty(2, 2, 64, 64)
        assert model(image).shape == (2, 7)
    for node in graph.nodes:
        if node.op in ("call_function", "call_method"):
            numbers = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, int)]
            assert all(number in (0, 1) for number in numbers), node.format_node()


@pytest.mark.parametrize("name", list(MODELS))
def test_merges_and_activations_are_out_of_place(name: str) -> None:
    with torch.device("meta"):
        model = build(name, 10)
    assert not any(getattr(module, "inplace", False) for module in model.modules())
    for node in fx.symbolic_trace(model).graph.nodes:
        assert "iadd" not in str(node.target)
        assert not node.kwargs.get("inplace", False)


class Constant(nn.Module):
    """What is left of a removed branch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.value


@pytest.mark.parametrize("name", ["resnet20", "resnet50"])
def test_a_removed_branch_may_become_a_broadcast_constant(name: str) -> None:
    model = build(name, 10)
    block = model.get_submodule("layer1.1")
    last = "bn2" if name == "resnet20" else "bn3"
    setattr(block, last, Constant(getattr(block, last).num_features))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert block.get_submodule(last).value.grad is not None


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (3, 9)])
def test_resnets_accept_any_size(channels: int, size: int) -> None:
    model = resnet20(num_classes=5, in_channels=channels)
    loss = model(torch.randn(2, channels, size, size)).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_vgg_says_what_size_it_needs() -> None:
    for network, smallest in ((vgg11, 32), (vgg7, 8)):
        model = network().eval()
        assert model.minimum_input_size == smallest
        assert model(torch.randn(1, 3, smallest, smallest)).shape == (1, 10)
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 10)
        with pytest.raises(RuntimeError):
            model(torch.randn(1, 3, smallest - 1, smallest - 1))
    assert resnet20().minimum_input_size == 1


@pytest.mark.parametrize("name", ["resnet32", "vgg11"])
def test_initialisation(name: str) -> None:
    torch.manual_seed(0)
    model = build(name, 10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            expected = (2 / fan_out) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=4 / module.weight.numel() ** 0.5)


def test_the_seed_decides_the_weights() -> None:
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(resnet20().state_dict())
    assert torch.equal(models[0]["conv1.weight"], models[1]["conv1.weight"])
    assert not torch.equal(models[0]["conv1.weight"], models[2]["conv1.weight"])


def test_the_old_name_of_a_network_still_works_and_says_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(MODELS) - set(NAMES) == set(OLD_NAMES) == {"resnet50"}
    shapes = [[p.shape for p in build(name, 10).parameters()] for name in ("resnet50", "resnet50_cifar")]
    assert shapes[0] == shapes[1]
    assert main(["info", "--model", "resnet50", "--input", "3x8x8"]) == 0
    assert "now called resnet50_cifar; ImageNet's is imagenet_resnet50" in capsys.readouterr().err
    assert main(["info", "--model", "resnet50_cifar", "--input", "3x8x8"]) == 0
    assert capsys.readouterr().err == ""
