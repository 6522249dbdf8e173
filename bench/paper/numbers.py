"""What the paper reports (Lym et al., SC'19), each number with its place in the text.

Shares of the dense network are 0..1, accuracy changes are points against the dense network. Where the paper only draws
a curve there is no number here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """A row of Tab. 1. `time` is that on a TITAN Xp for CIFAR, on V100s for ImageNet, with `time_1080ti` beside it."""

    accuracy_delta: float
    train_flops: float
    time: float
    inference_flops: float
    time_1080ti: float | None = None
    fine_tuned_delta: float | None = None

    @property
    def eta(self) -> float:
        """Share of the saved FLOPs that became saved time; not in the paper, computed from its row."""
        return (1 - self.time) / (1 - self.train_flops)


# Tab. 1. CIFAR: (dataset, network); the text does not give these rows' penalty ratio, section 4.1 recommends 0.2-0.25.
TAB1_CIFAR = {
    ("cifar10", "resnet32"): Outcome(-1.8, 0.47, 0.81, 0.34),
    ("cifar10", "resnet50"): Outcome(-1.1, 0.50, 0.81, 0.30),
    ("cifar10", "vgg11"): Outcome(-0.7, 0.43, 0.57, 0.35),
    ("cifar10", "vgg13"): Outcome(-0.6, 0.44, 0.57, 0.37),
    ("cifar100", "resnet32"): Outcome(-1.4, 0.68, 0.88, 0.54),
    ("cifar100", "resnet50"): Outcome(-0.7, 0.47, 0.66, 0.31),
    ("cifar100", "vgg11"): Outcome(-1.3, 0.53, 0.74, 0.43),
    ("cifar100", "vgg13"): Outcome(-1.1, 0.58, 0.67, 0.48),
}
# Tab. 1, ResNet50 on ImageNet, by penalty ratio (section 5.1 gives the three).
TAB1_IMAGENET = {
    0.25: Outcome(-1.87, 0.60, 0.66, 0.47, time_1080ti=0.71, fine_tuned_delta=-1.58),
    0.2: Outcome(-1.47, 0.70, 0.72, 0.56, time_1080ti=0.76, fine_tuned_delta=-1.16),
    0.1: Outcome(-0.24, 0.97, 0.98, 0.88, time_1080ti=0.98, fine_tuned_delta=+0.20),
}
# Tab. 1, caption: top-1 validation accuracy of the dense baselines, percent.
DENSE_ACCURACY = {
    ("cifar10", "resnet32"): 93.6,
    ("cifar10", "resnet50"): 94.2,
    ("cifar10", "vgg11"): 92.1,
    ("cifar10", "vgg13"): 93.9,
    ("cifar100", "resnet32"): 71.0,
    ("cifar100", "resnet50"): 73.1,
    ("cifar100", "vgg11"): 70.6,
    ("cifar100", "vgg13"): 74.1,
    ("imagenet", "resnet50"): 76.2,
}


def tab1(dataset: str, network: str, ratio: float | None) -> Outcome | None:
    """The row of Tab. 1 for this network; CIFAR rows whatever the ratio, ImageNet rows by it."""
    if dataset == "imagenet" and network == "resnet50" and ratio is not None:
        return TAB1_IMAGENET.get(ratio)
    return TAB1_CIFAR.get((dataset, network))


@dataclass(frozen=True)
class Compression:
    """A row of Tab. 3, ResNet56 on CIFAR10."""

    base_accuracy: float  # percent
    accuracy_delta: float
    inference_flops: float
    removed_layers: int | None = None
    removed_share: float | None = None


TAB3_PRUNETRAIN = Compression(94.5, -0.5, 0.34, 18, 0.21)
TAB3_AMC = Compression(92.8, -0.9, 0.50)  # "taken directly from" the AMC paper; removed layers "not known"


@dataclass(frozen=True)
class Adjustment:
    """A row of Tab. 4, ResNet50 with or without mini-batch adjustment; ImageNet's time on V100s as in `Outcome`."""

    time_reduction: float
    inference_flops: float
    accuracy_delta: float
    time_reduction_1080ti: float | None = None


# Tab. 4: (dataset, adjusted)
TAB4 = {
    ("cifar100", False): Adjustment(0.34, 0.31, -0.7),
    ("cifar100", True): Adjustment(0.43, 0.34, -0.4),
    ("imagenet", False): Adjustment(0.34, 0.474, -1.87, time_reduction_1080ti=0.29),
    ("imagenet", True): Adjustment(0.39, 0.464, -1.91, time_reduction_1080ti=0.34),
}

# What the text says of the figures.
FIGURES = {
    "fig2": "Paper, section 3: most FLOPs are pruned in the first 90 of 182 epochs; reconfiguring once, even at the "
    "best epoch, takes more than 25 % more training FLOPs than PruneTrain.",
    "fig4": "Paper, section 4.2: weights of zeroed channels almost never revive, and those that do stay near the "
    "threshold (layer 7 of its figure).",
    "fig6": "Paper, section 4.2: the FLOPs of union and gating differ by 1-6 % only.",
    "fig8": "Paper, section 5.2: dense ResNet50 takes 230 MFLOPs per inference, and accuracy is highest at around "
    "150; PruneTrain and SSL trade accuracy for cost alike; SSL's training costs almost 3 times the baseline's.",
    "fig9": "Paper, section 5.3 and Fig. 9: ImageNet, 64 images per GPU, 96 from epoch 10, 128 from epoch 30; "
    "CIFAR100, 128 images, then 192, 224, 256, 288, 320 from epochs 20, 30, 50, 70, 120.",
    "fig10": "Paper, section 5.3: compression and accuracy are insensitive to the reconfiguration interval.",
    "fig11": "Paper, section 5.3: 55 % of the communication saved on average at all scales from 16 to 256 GPUs "
    "(ratio 0.25).",
    "fig12": "Paper, section 5.3: roughly half of all channels remain, and roughly half of the weights inside them are "
    "near zero.",
}
