"""VGGs with batch norm for small images: convolutions all the way, one linear layer."""

import torch
from torch import Tensor, nn

from prunetrain_kernels.models.init import initialize


class CifarVGG(nn.Module):
    """3x3 convolutions, each with batch norm and ReLU; max pooling after each stage; one linear layer.

    Maps images (N, in_channels, H, W) to logits (N, num_classes). Each pooling halves the image: H and W must be at
    least `minimum_input_size`, 32 for five stages (the command line checks it, because forward stays traceable). There
    the last feature map is 1 x 1; a larger one is averaged.
    """

    def __init__(self, stages: tuple[tuple[int, ...], ...], num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.minimum_input_size = 2 ** len(stages)
        layers: list[nn.Module] = []
        channels = in_channels
        for widths in stages:
            for width in widths:
                # no bias: the batch norm behind it would subtract it again
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def vgg7(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """A small VGG for images from 8 x 8 on (not in the paper): 39 million multiply-adds at 32 x 32. Maps
    (N, in_channels, H, W) to logits."""
    return CifarVGG(((32, 32), (64, 64), (128, 128)), num_classes, in_channels)


def vgg11(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """CIFAR VGG-11 (paper Tab. 1): 153 million multiply-adds at 32 x 32. Maps (N, in_channels, H, W) to logits."""
    return CifarVGG(((64,), (128,), (256, 256), (512, 512), (512, 512)), num_classes, in_channels)


def vgg13(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """CIFAR VGG-13 (paper Tab. 1): 228 million multiply-adds at 32 x 32. Maps (N, in_channels, H, W) to logits."""
    return CifarVGG(((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)), num_classes, in_channels)
