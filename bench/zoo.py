"""The architectures that the zoo tests prune and docs/architectures.md lists: torchvision's, timm's, some of our own.

Nothing is imported or built before it is asked for, and no weights are ever downloaded.
"""

import importlib
import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetrain_kernels.models.missing_operators import with_torchvision


def import_torchvision() -> Any:
    """Imports torchvision beside any build of torch: its compiled operators need not load.

    Raises:
        ImportError: torchvision is not installed.
    """
    return with_torchvision(lambda: importlib.import_module("torchvision"))


@dataclass(frozen=True)
class Architecture:
    """One network.

    Attributes:
        source: "torchvision", "timm" or "own".
        build: makes the network as it is published (10 or 1000 classes, say), randomly initialised.
        size: height and width of its images, as small as its strides allow.
        small: the same architecture, narrower or shallower, where the published one is slow to test.
        channels: of its images.
        vocabulary: for a network that reads a text of `size` tokens instead of an image, the number of tokens.
        page_size: height and width at which docs/architectures.md counts FLOPs.
        slow: tested by `make zoo` only.
    """

    source: str
    build: Callable[[], nn.Module]
    size: int = 32
    small: Callable[[], nn.Module] | None = None
    channels: int = 3
    page_size: int = 224
    slow: bool = False
    vocabulary: int = 0

    def for_tests(self) -> nn.Module:
        return (self.small or self.build)()

    def images(self, batch: int, size: int | None = None, seed: int = 0) -> Tensor:
        """(batch, channels, size, size), fp32, normal; or tokens, (batch, size), int64."""
        generator = torch.Generator().manual_seed(seed)
        side = size or self.size
        if self.vocabulary:
            return torch.randint(self.vocabulary, (batch, side), generator=generator)
        return torch.randn(batch, self.channels, side, side, generator=generator)


_ONE_EACH = [1, 1, 1, 1]  # blocks in each stage

# -- torchvision -------------------------------------------------------------------------------------------------------


def _vision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        models = import_torchvision().models
        function = getattr(models, name, None) or getattr(models.segmentation, name)
        model: nn.Module = function(weights=None, **options)
        return model

    return build


def _vision_class(path: str, *arguments: Any, **options: Any) -> Callable[[], nn.Module]:
    """A class of torchvision.models; strings in `arguments` that begin with "." name others of its module."""

    def build() -> nn.Module:
        module, name = path.split(".")
        home = getattr(import_torchvision().models, module)
        values = [getattr(home, a[1:]) if isinstance(a, str) and a.startswith(".") else a for a in arguments]
        model: nn.Module = getattr(home, name)(*values, **options)
        return model

    return build


def _narrow_head(build: Callable[[], nn.Module], width: int = 48) -> Callable[[], nn.Module]:
    """AlexNet and VGG with hidden linear layers of `width` instead of 4096 features."""

    def narrow() -> Any:
        with torch.device("meta"):
            model: Any = build()
        linear = [name for name, m in model.classifier.named_modules() if isinstance(m, nn.Linear)]
        for name in linear:
            old = model.classifier.get_submodule(name)
            inputs = old.in_features if name == linear[0] else width
            setattr(model.classifier, name, nn.Linear(inputs, 10 if name == linear[-1] else width, device="meta"))
        model.to_empty(device="cpu")
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        return model

    return narrow


# -- timm --------------------------------------------------------------------------------------------------------------


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import_torchvision()
        import timm

        model: nn.Module = timm.create_model(name, pretrained=False, **options)
        return model

    return build


def _timm_module(name: str) -> Any:
    import_torchvision()
    return importlib.import_module(f"timm.models.{name}")


def _csp(name: str) -> Callable[[], nn.Module]:
    """A CSPNet or DarkNet of timm with one block in each stage and a quarter of the channels."""

    def build() -> nn.Module:
        cspnet = _timm_module("cspnet")
        config = cspnet.model_cfgs[name]
        stages = config.stages
        narrow = tuple(channels // 4 for channels in stages.out_chs)
        stages = replace(stages, depth=(1,) * len(stages.depth), out_chs=narrow)
        model: nn.Module = cspnet.CspNet(replace(config, stages=stages))
        return model

    return build


def _byob(name: str) -> Callable[[], nn.Module]:
    """A network of timm's ByobNet family with one block in each stage and half of the channels."""

    def build() -> nn.Module:
        byobnet = _timm_module("byobnet")
        config = byobnet.model_cfgs[name]
        blocks = tuple(replace(block, d=1, c=block.c // 2) for block in config.blocks)
        model: nn.Module = byobnet.ByobNet(replace(config, blocks=blocks))
        return model

    return build


def _small_nf_resnet() -> nn.Module:
    nfnet = _timm_module("nfnet")
    config = nfnet.model_cfgs["nf_resnet50"]
    narrow = tuple(channels // 4 for channels in config.channels)
    model: nn.Module = nfnet.NormFreeNet(replace(config, depths=(1,) * 4, channels=narrow))
    return model


# -- our own -----------------------------------------------------------------------------------------------------------


def _twice(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before in (inputs, outputs):
        layers += [nn.Conv2d(before, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Segmentation: a path down, a path up by transposed convolutions, the one's maps concatenated to the other's.

    With `any_size` maps are padded where halving has rounded, so the forward branches on sizes.
    """

    def __init__(self, classes: int = 4, width: int = 16, depth: int = 3, *, any_size: bool = False) -> None:
        super().__init__()
        self.any_size = any_size
        widths = [width * 2**i for i in range(depth + 1)]
        self.down = nn.ModuleList(
            [_twice(a, b) for a, b in zip([3, *widths[:-1]], widths, strict=True)],
        )
        self.up = nn.ModuleList([nn.ConvTranspose2d(widths[i + 1], widths[i], 2, stride=2) for i in range(depth)])
        self.merge = nn.ModuleList([_twice(2 * widths[i], widths[i]) for i in range(depth)])
        self.last = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, classes, H, W), H and W multiples of 2^depth unless `any_size`."""
        maps = [self.down[0](x)]
        for block in self.down[1:]:
            maps.append(block(F.max_pool2d(maps[-1], 2)))
        x = maps.pop()
        for up, merge in zip(reversed(self.up), reversed(self.merge), strict=True):
            skip, x = maps.pop(), up(x)
            if self.any_size and x.shape[2:] != skip.shape[2:]:
                x = F.pad(x, (0, skip.shape[3] - x.shape[3], 0, skip.shape[2] - x.shape[2]))
            x = merge(torch.cat([skip, x], dim=1))
        return self.last(x)


class Generator(nn.Module):
    """A DCGAN's generator: noise through transposed convolutions to an image."""

    def __init__(self, noise: int = 100, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = [noise, 8 * width, 4 * width, 2 * width, width]
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            stride, padding = (1, 0) if i == 0 else (2, 1)
            layers += [nn.ConvTranspose2d(before, after, 4, stride, padding, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        """(N, noise, 1, 1) to (N, 3, 64, 64)."""
        return self.main(z)


class ESPCN(nn.Module):
    """Super-resolution: convolutions at the small size, then a pixel shuffle."""

    def __init__(self, factor: int = 3, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 5, padding=2),
            nn.Tanh(),
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(width // 2, width // 4 * factor**2, 3, padding=1),
            nn.PixelShuffle(factor),
            nn.Tanh(),
            nn.Conv2d(width // 4, 1, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) to (N, 1, factor * H, factor * W)."""
        return self.body(x)


def _unit(inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.SiLU(inplace=True))


class _CrossStage(nn.Module):
    """Half of the channels goes through residual blocks, and what each of them gives is kept."""

    def __init__(self, inputs: int, outputs: int, blocks: int, *, residual: bool = True) -> None:
        super().__init__()
        half = outputs // 2
        self.first, self.last = _unit(inputs, outputs), _unit((2 + blocks) * half, outputs)
        self.blocks = nn.ModuleList(nn.Sequential(_unit(half, half, 3), _unit(half, half, 3)) for _ in range(blocks))
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        kept = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            kept.append(kept[-1] + block(kept[-1]) if self.residual else block(kept[-1]))
        return self.last(torch.cat(kept, 1))


class Detector(nn.Module):
    """One-stage object detection: cross-stage backbone, pyramid pooling, paths up and down again, three heads."""

    def __init__(self, classes: int = 80, width: int = 16, bins: int = 16) -> None:
        super().__init__()
        w = [width * 2**i for i in range(5)]
        self.stem = nn.Sequential(_unit(3, w[0], 3, 2), _unit(w[0], w[1], 3, 2), _CrossStage(w[1], w[1], 1))
        self.stage3 = nn.Sequential(_unit(w[1], w[2], 3, 2), _CrossStage(w[2], w[2], 2))
        self.stage4 = nn.Sequential(_unit(w[2], w[3], 3, 2), _CrossStage(w[3], w[3], 2))
        self.stage5 = nn.Sequential(_unit(w[3], w[4], 3, 2), _CrossStage(w[4], w[4], 1))
        self.squeeze, self.expand = _unit(w[4], w[3]), _unit(4 * w[3], w[4])
        self.pool, self.up = nn.MaxPool2d(5, 1, 2), nn.Upsample(scale_factor=2, mode="nearest")
        self.up4 = _CrossStage(w[4] + w[3], w[3], 1, residual=False)
        self.up3 = _CrossStage(w[3] + w[2], w[2], 1, residual=False)
        self.down3, self.down4 = _unit(w[2], w[2], 3, 2), _unit(w[3], w[3], 3, 2)
        self.out4 = _CrossStage(w[2] + w[3], w[3], 1, residual=False)
        self.out5 = _CrossStage(w[3] + w[4], w[4], 1, residual=False)
        self.boxes = nn.ModuleList(nn.Sequential(_unit(c, w[2], 3), nn.Conv2d(w[2], 4 * bins, 1)) for c in w[2:])
        self.classes = nn.ModuleList(nn.Sequential(_unit(c, w[2], 3), nn.Conv2d(w[2], classes, 1)) for c in w[2:])

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, 3, H, W), multiples of 32, to maps of boxes and classes at strides 8, 16 and 32."""
        fine = self.stage3(self.stem(x))
        middle = self.stage4(fine)
        pooled = [self.squeeze(self.stage5(middle))]
        for _ in range(3):
            pooled.append(self.pool(pooled[-1]))
        coarse = self.expand(torch.cat(pooled, 1))
        middle = self.up4(torch.cat([self.up(coarse), middle], 1))
        fine = self.up3(torch.cat([self.up(middle), fine], 1))
        middle = self.out4(torch.cat([self.down3(fine), middle], 1))
        coarse = self.out5(torch.cat([self.down4(middle), coarse], 1))
        heads = zip((fine, middle, coarse), self.boxes, self.classes, strict=True)
        return [torch.cat([box(x), name(x)], 1) for x, box, name in heads]


def _of_class(make: Callable[..., nn.Module], **options: Any) -> Callable[[], nn.Module]:
    return lambda: make(**options)


# -- the list ----------------------------------------------------------------------------------------------------------

_VGG = [16, "M", 24, "M", 32, 32, "M", 48, 48, "M", 48, 48, "M"]


def _dilated_backbone() -> Any:
    resnet = import_torchvision().models.resnet
    stride_or_dilation = [False, True, True]
    return resnet.ResNet(resnet.Bottleneck, _ONE_EACH, replace_stride_with_dilation=stride_or_dilation)


def _small_segmentation(name: str) -> Callable[[], nn.Module]:
    """FCN or DeepLabV3 on a ResNet of four blocks, with the auxiliary head."""

    def build() -> nn.Module:
        backbone = _dilated_backbone()
        home = getattr(import_torchvision().models.segmentation, name)
        model: nn.Module = getattr(home, f"_{name}_resnet")(backbone, 5, aux=True)
        return model

    return build


def _small_convnext() -> nn.Module:
    convnext = import_torchvision().models.convnext
    widths = [24, 48, 64, 96]
    blocks = [convnext.CNBlockConfig(a, b, 1) for a, b in zip(widths, [*widths[1:], None], strict=True)]
    model: nn.Module = convnext.ConvNeXt(blocks, stochastic_depth_prob=0.1)
    return model


def _small_vgg() -> Any:
    vgg = import_torchvision().models.vgg
    model = vgg.VGG(vgg.make_layers(_VGG, batch_norm=True))
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier[0] = nn.Linear(48 * 4, 64)
    model.classifier[3] = nn.Linear(64, 64)
    model.classifier[6] = nn.Linear(64, 10)
    return model


ZOO: dict[str, Architecture] = {
    "alexnet": Architecture("torchvision", _vision("alexnet"), 64, _narrow_head(_vision("alexnet"))),
    "vgg11_bn": Architecture("torchvision", _vision("vgg11_bn"), 32, _small_vgg),
    "resnet18": Architecture("torchvision", _vision("resnet18")),
    "resnet50": Architecture(
        "torchvision", _vision("resnet50"), 32, _vision_class("resnet.ResNet", ".Bottleneck", [2, 1, 1, 1])
    ),
    "wide_resnet50_2": Architecture(
        "torchvision",
        _vision("wide_resnet50_2"),
        32,
        _vision_class("resnet.ResNet", ".Bottleneck", _ONE_EACH, width_per_group=128),
        slow=True,
    ),
    "resnext50_32x4d": Architecture(
        "torchvision",
        _vision("resnext50_32x4d"),
        32,
        _vision_class("resnet.ResNet", ".Bottleneck", _ONE_EACH, groups=32, width_per_group=4),
    ),
    "densenet121": Architecture(
        "torchvision",
        _vision("densenet121"),
        32,
        _vision_class("densenet.DenseNet", 12, (3, 3, 3, 2), 24, num_classes=10),
    ),
    "googlenet": Architecture("torchvision", _vision("googlenet", aux_logits=True, init_weights=False), slow=True),
    "inception_v3": Architecture(
        "torchvision",
        _vision("inception_v3", aux_logits=True, init_weights=False),
        75,
        _vision("inception_v3", aux_logits=False, init_weights=False),
        page_size=299,
        slow=True,
    ),
    "squeezenet1_1": Architecture("torchvision", _vision("squeezenet1_1"), 48),
    "mobilenet_v2": Architecture("torchvision", _vision("mobilenet_v2"), 32, _vision("mobilenet_v2", width_mult=0.5)),
    "mobilenet_v3_small": Architecture("torchvision", _vision("mobilenet_v3_small")),
    "shufflenet_v2_x1_0": Architecture("torchvision", _vision("shufflenet_v2_x1_0")),
    "mnasnet0_5": Architecture("torchvision", _vision("mnasnet0_5")),
    "efficientnet_b0": Architecture("torchvision", _vision("efficientnet_b0"), slow=True),
    "efficientnet_v2_s": Architecture("torchvision", _vision("efficientnet_v2_s"), slow=True),
    "regnet_y_400mf": Architecture("torchvision", _vision("regnet_y_400mf")),
    "regnet_x_400mf": Architecture("torchvision", _vision("regnet_x_400mf"), slow=True),
    "convnext_tiny": Architecture("torchvision", _vision("convnext_tiny"), 32, _small_convnext),
    "fcn_resnet50": Architecture(
        "torchvision",
        _vision("fcn_resnet50", weights_backbone=None, num_classes=21, aux_loss=True),
        32,
        _small_segmentation("fcn"),
        slow=True,
    ),
    "deeplabv3_resnet50": Architecture(
        "torchvision",
        _vision("deeplabv3_resnet50", weights_backbone=None, num_classes=21, aux_loss=True),
        32,
        _small_segmentation("deeplabv3"),
        slow=True,
    ),
    "lraspp_mobilenet_v3_large": Architecture(
        "torchvision", _vision("lraspp_mobilenet_v3_large", weights_backbone=None, num_classes=21)
    ),
    "unet": Architecture("own", _of_class(UNet), 16, _of_class(UNet, width=8)),
    "unet_any_size": Architecture(
        "own", _of_class(UNet, any_size=True), 18, _of_class(UNet, width=8, any_size=True), page_size=220
    ),
    "dcgan_generator": Architecture(
        "own", _of_class(Generator), 1, _of_class(Generator, width=8), channels=100, page_size=1
    ),
    "espcn": Architecture("own", _of_class(ESPCN), 12, channels=1),
    "detector": Architecture("own", _of_class(Detector), 32, _of_class(Detector, classes=5, width=8, bins=2)),
    "timm:resnetv2_50": Architecture(
        "timm", _timm("resnetv2_50"), 32, _timm("resnetv2_50", layers=_ONE_EACH, channels=(64, 128, 256, 512))
    ),
    "timm:resnet26t": Architecture("timm", _timm("resnet26t"), slow=True),
    "timm:seresnet18": Architecture("timm", _timm("seresnet18"), 32, _timm("seresnet18", layers=_ONE_EACH)),
    "timm:skresnet18": Architecture("timm", _timm("skresnet18"), 32, _timm("skresnet18", layers=_ONE_EACH)),
    "timm:resnest14d": Architecture("timm", _timm("resnest14d")),
    "timm:res2net50_26w_4s": Architecture(
        "timm", _timm("res2net50_26w_4s"), 32, _timm("res2net50_26w_4s", layers=(1, 2, 1, 1))
    ),
    "timm:nf_resnet50": Architecture("timm", _timm("nf_resnet50"), 32, _small_nf_resnet),
    "timm:nfnet_l0": Architecture("timm", _timm("nfnet_l0"), slow=True),
    "timm:dla34": Architecture("timm", _timm("dla34"), 32, _timm("dla34", channels=[8, 8, 16, 32, 64, 96])),
    "timm:dpn68": Architecture("timm", _timm("dpn68"), 32, _timm("dpn68", k_sec=_ONE_EACH)),
    "timm:hrnet_w18_small": Architecture("timm", _timm("hrnet_w18_small"), slow=True),
    "timm:darknet53": Architecture("timm", _timm("darknet53"), 32, _csp("darknet53")),
    "timm:cspresnet50": Architecture("timm", _timm("cspresnet50"), 32, _csp("cspresnet50")),
    "timm:cspdarknet53": Architecture("timm", _timm("cspdarknet53"), slow=True),
    "timm:repvgg_a0": Architecture("timm", _timm("repvgg_a0"), 32, _byob("repvgg_a0")),
    "timm:gernet_s": Architecture("timm", _timm("gernet_s"), slow=True),
    "timm:selecsls42": Architecture("timm", _timm("selecsls42"), slow=True),
    "timm:ese_vovnet19b_dw": Architecture("timm", _timm("ese_vovnet19b_dw"), slow=True),
    "timm:hgnet_tiny": Architecture("timm", _timm("hgnet_tiny"), slow=True),
    "timm:xception41": Architecture("timm", _timm("xception41"), slow=True),
    "timm:inception_v4": Architecture("timm", _timm("inception_v4"), 75, page_size=299, slow=True),
    "timm:ghostnet_100": Architecture("timm", _timm("ghostnet_100"), slow=True),
    "timm:mobilenetv4_conv_small": Architecture("timm", _timm("mobilenetv4_conv_small"), slow=True),
    "timm:tf_efficientnet_lite0": Architecture("timm", _timm("tf_efficientnet_lite0"), slow=True),
    "timm:mixnet_s": Architecture("timm", _timm("mixnet_s"), slow=True),
    "timm:hardcorenas_a": Architecture("timm", _timm("hardcorenas_a"), slow=True),
    "timm:lcnet_050": Architecture("timm", _timm("lcnet_050"), slow=True),
    "timm:rexnet_100": Architecture("timm", _timm("rexnet_100"), slow=True),
    "timm:starnet_s1": Architecture("timm", _timm("starnet_s1"), 32, _timm("starnet_s1", depths=_ONE_EACH)),
    "timm:convnext_atto": Architecture("timm", _timm("convnext_atto"), 32, _timm("convnext_atto", depths=_ONE_EACH)),
    "timm:convmixer_768_32": Architecture("timm", _timm("convmixer_768_32"), slow=True),
    "timm:repvit_m0_9": Architecture("timm", _timm("repvit_m0_9"), slow=True),
    "timm:fastvit_t8": Architecture("timm", _timm("fastvit_t8"), slow=True),
    "timm:edgenext_xx_small": Architecture("timm", _timm("edgenext_xx_small")),
    "timm:efficientvit_b0": Architecture("timm", _timm("efficientvit_b0"), slow=True),
    "timm:levit_128s": Architecture("timm", _timm("levit_128s"), 224, slow=True),
}
