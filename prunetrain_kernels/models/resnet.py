"""Residual networks: the paper's CIFAR ResNet-20/32/50/56 and ImageNet ResNet-50.

Submodules carry torchvision's names (`conv1`, `bn1`, `layer1.0.conv1`, `layer1.0.downsample.0`, `fc`), so its ResNet-50
checkpoints load. Merges are out of place and nothing in a forward names a channel count: channels are pruned in place,
and a removed branch may hand the merge a (1, C, 1, 1) constant that broadcasts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetrain_kernels.models.init import initialize


def _convolution(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    # no bias: the batch norm behind every convolution would subtract it again
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if in_channels == out_channels and stride == 1:
        return nn.Identity()
    return nn.Sequential(_convolution(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (N, in_channels, H, W) -> (N, width, H / stride, W / stride)."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _convolution(in_channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _convolution(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        # The branch stands on the right: torch.fx cannot tell `out += x` from `out + x`, so a removed branch on the
        # left would have to be given its full size.
        return F.relu(self.downsample(x) + out)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut: (N, in_channels, H, W) -> (N, 4 * width, H / stride, W / stride).

    The stride sits in the 3x3 (torchvision's "v1.5"), so no input pixel is thrown away by a strided 1x1.
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = _convolution(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _convolution(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _convolution(width, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(self.downsample(x) + out)


def _stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, width: int, blocks: int, stride: int
) -> nn.Sequential:
    out_channels = width * block.expansion
    rest = [block(out_channels, width) for _ in range(blocks - 1)]
    return nn.Sequential(block(in_channels, width, stride), *rest)


class CifarResNet(nn.Module):
    """Residual network for small images: a 3x3 stem of 16 channels and three stages of widths 16, 32, 64.

    Maps images (N, in_channels, H, W) to logits (N, num_classes). The average pooling is adaptive, so any H and W do
    (32 x 32 is CIFAR's, 8 x 8 the digits'); the later stages run at a half and a quarter of the resolution.
    """

    minimum_input_size = 1

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], blocks_per_stage: int, num_classes: int, in_channels: int
    ) -> None:
        super().__init__()
        expansion = block.expansion
        self.conv1 = _convolution(in_channels, 16, 3)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(block, 16, 16, blocks_per_stage, stride=1)
        self.layer2 = _stage(block, 16 * expansion, 32, blocks_per_stage, stride=2)
        self.layer3 = _stage(block, 32 * expansion, 64, blocks_per_stage, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64 * expansion, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class ImageNetResNet(nn.Module):
    """Residual network for large images: a strided 7x7 stem, max pooling, four stages of widths 64 to 512.

    Maps images (N, in_channels, H, W), 224 x 224 as a rule, to logits (N, num_classes). The state dict has
    torchvision's names and shapes.
    """

    minimum_input_size = 1

    def __init__(self, blocks_per_stage: tuple[int, int, int, int], num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = _convolution(in_channels, 64, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _stage(Bottleneck, 64, 64, blocks_per_stage[0], stride=1)
        self.layer2 = _stage(Bottleneck, 256, 128, blocks_per_stage[1], stride=2)
        self.layer3 = _stage(Bottleneck, 512, 256, blocks_per_stage[2], stride=2)
        self.layer4 = _stage(Bottleneck, 1024, 512, blocks_per_stage[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2048, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet20(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """CIFAR ResNet-20: three stages of three basic blocks, convolution shortcuts; 41 million multiply-adds at 32 x 32.

    Maps (N, in_channels, H, W) to (N, num_classes).
    """
    return CifarResNet(BasicBlock, 3, num_classes, in_channels)


def resnet32(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """CIFAR ResNet-32 (paper Tab. 1): three stages of five basic blocks; 69 million multiply-adds at 32 x 32.

    Maps (N, in_channels, H, W) to (N, num_classes).
    """
    return CifarResNet(BasicBlock, 5, num_classes, in_channels)


def resnet56(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """CIFAR ResNet-56 (paper Tab. 3): three stages of nine basic blocks; 126 million multiply-adds at 32 x 32.

    Maps (N, in_channels, H, W) to (N, num_classes).
    """
    return CifarResNet(BasicBlock, 9, num_classes, in_channels)


def resnet50(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """CIFAR ResNet-50 (paper Tab. 1): three stages of eight bottlenecks; 114 million multiply-adds at 32 x 32.

    Those are the paper's 230 MFLOP per inference (Fig. 8). By depth it is what others call ResNet-74: the six-block
    stages that "50" suggests for CIFAR would be 87 million. Maps (N, in_channels, H, W) to (N, num_classes).
    """
    return CifarResNet(Bottleneck, 8, num_classes, in_channels)


def imagenet_resnet50(num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """ImageNet ResNet-50 (paper Tab. 1), torchvision's v1.5: 4.09 billion multiply-adds at 224 x 224.

    Maps (N, in_channels, H, W) to (N, num_classes); torchvision's `resnet50` checkpoints load into it.
    """
    return ImageNetResNet((3, 4, 6, 3), num_classes, in_channels)
