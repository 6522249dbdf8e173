"""Numbers that the paper's text gives (Lym et al., PruneTrain, SC'19), each with where it stands.

Values that the paper only draws are not here: reading them off its figures would be guessing. Its tables are in
bench/paper/numbers.py.
"""

from bench.paper.numbers import DENSE_ACCURACY, TAB1_CIFAR, TAB1_IMAGENET, Outcome

UNION_SPEEDUP = 1.9  # section 1: convolution layers under channel union against dense, on average
ONCE_OVERHEAD = 1.25  # section 3: one-time reconfiguration at the best epoch needs more than this, x PruneTrain's FLOPs
EARLY_EPOCHS = 90  # section 3: most FLOPs are pruned within these, of 182
THRESHOLD = 1e-4  # section 4.1
UNION_EXTRA = (0.01, 0.06)  # section 4.2: FLOPs of channel union above channel gating
BEST_MFLOPS, DENSE_MFLOPS = 150.0, 230.0  # section 5.2: ResNet-50's inference, most accurate and dense
COMMUNICATION_SAVING = 0.55  # section 5.3 and abstract: ResNet-50 on ImageNet, ratio 0.25, 16 to 256 GPUs
CHANNEL_DENSITY = 0.5  # section 5.3: "roughly half of all dense channels" remain
# Fig. 9's captions: (epoch, mini-batch from there on), per GPU
BATCHES = {
    ("imagenet", "resnet50"): ((0, 64), (10, 96), (30, 128)),
    ("cifar100", "resnet50"): ((0, 128), (20, 192), (30, 224), (50, 256), (70, 288), (120, 320)),
}
# Tab. 1 by (dataset, network); ImageNet at ratio 0.25, with the time on V100s
TAB1 = {**TAB1_CIFAR, ("imagenet", "resnet50"): TAB1_IMAGENET[0.25]}


def accuracy(dataset: str, network: str) -> float:
    """PruneTrain's validation accuracy in Tab. 1, percent."""
    return DENSE_ACCURACY[dataset, network] + TAB1[dataset, network].accuracy_delta


def outcome(dataset: str, network: str) -> Outcome | None:
    """The row of Tab. 1, or None for a network that it does not have."""
    return TAB1.get((dataset, network))
