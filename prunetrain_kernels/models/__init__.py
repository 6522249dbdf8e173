"""The paper's networks, a small one for small images, and a way to name anybody's."""

from prunetrain_kernels.models.registry import MODELS, NAMES, OLD_NAMES, build
from prunetrain_kernels.models.resnet import imagenet_resnet50, resnet20, resnet32, resnet50, resnet56
from prunetrain_kernels.models.resnet import resnet50 as resnet50_cifar
from prunetrain_kernels.models.vgg import vgg7, vgg11, vgg13

__all__ = [
    "MODELS",
    "NAMES",
    "OLD_NAMES",
    "build",
    "imagenet_resnet50",
    "resnet20",
    "resnet32",
    "resnet50",
    "resnet50_cifar",
    "resnet56",
    "vgg7",
    "vgg11",
    "vgg13",
]
