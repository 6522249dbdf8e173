"""VGG-11 and VGG-13 with batch norm for CIFAR: convolutions all the way, one linear layer."""

import torch
from torch import Tensor, nn

from prunetrain_kernels.models.init import initialize


class CifarVGG(nn.Module):
    """3x3 convolutions, each with batch norm and ReLU; max pooling after each of five stages; one linear layer.

    Maps images (N, in_channels, H, W) to logits (N, num_classes). Five poolings halve the image five times: H and W
    must be at least `minimum_input_size` (the command line checks it, because forward stays traceable). At 32 x 32 the
    last feature map is 1 x 1; a larger one is averaged.
    """

    minimum_input_size = 32

    def __init__(self, stages: tuple[tuple[int, ...], ...], num_classes: int, in_channels: int) -> None:
        super().__init__()
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


def vgg11(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """CIFAR VGG-11 (paper Tab. 1): 153 million multiply-adds at 32 x 32. Maps (N, in_channels, H, W) to logits."""
    return CifarVGG(((64,), (128,), (256, 256), (512, 512), (512, 512)), num_classes, in_channels)


def vgg13(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """CIFAR VGG-13 (paper Tab. 1): 228 million multiply-adds at 32 x 32. Maps (N, in_channels, H, W) to logits."""
    return CifarVGG(((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)), num_classes, in_channels)
