"""The paper's tables and figures as lists of trainings, at three scales.

`full` is the paper's evaluation (section 5), with a reason beside every setting that its text leaves open. `medium` is
the paper's setting on all of CIFAR-10 with fewer epochs and smaller networks: hours of a CPU core for each training. It
has a table of its own, `claim`. `small` proves plumbing only: a subset of CIFAR-10 and minutes for each training show
that every mechanism works, not what it is worth. Trainings that several experiments need are the same object with the
same folder, and are trained once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from prunetrain_kernels.errors import InputError

SCALES = ("small", "medium", "full")
DATASETS = ("cifar10", "cifar100", "imagenet")
METHODS = (
    "dense", "prunetrain", "target", "proximal", "proximal-target", "unfocused-target", "once", "ssl", "adjusted",
)  # fmt: skip

# -- small scale: plumbing, in about two hours of two CPU cores --------------------------------------------------------

# Far above the paper's 0.25, because the lasso has 3,584 steps (VGG: 1,792) instead of 71,000 to bring a slice to zero,
# of an eighth of the paper's learning rate. lambda = ratio / (1 - ratio) * loss / R, and the networks' R differ, hence
# their ratios. lr * lambda is what it was in the committed runs, whose lr was 0.1 and whose ratios were 0.55, 0.84,
# 0.81, 0.82 and 0.33, 0.43, 0.53.
SMALL_RATIO = {"resnet32": 0.907, "resnet50": 0.977, "vgg11": 0.972, "vgg13": 0.973}
SMALL_SWEEP = (0.798, 0.858, 0.9)  # of ResNet-20, for the experiments that vary the ratio
SMALL_ONCE = (4, 8, 12)  # early, in the middle and late: where one reconfiguration could come
SMALL_INTERVALS = (1, 2, 4)  # a sixteenth to a quarter of the run; the paper's 10 epochs of 182 are an eighteenth

SMALL: dict[str, Any] = {
    "limit_train": 3584,  # of 50,000: one core needs minutes for a training, not hours
    "limit_val": 1000,
    "epochs": 16,
    "batch": 16,  # the lasso moves a slice by the same amount at every step: small batches give it more steps
    "lr": 0.0125,  # the paper's 0.1 for 128 images, by the linear rule
    "decay_at": (0.6, 0.85),  # late: a slice dies while the learning rate is high
    "interval": 1,  # 1/16 of the run, near the paper's 1/18
    # a dying slice hops by lr * lambda / (1 - momentum), here 0.001: the threshold must lie above (design section 4)
    "threshold": 2e-3,
    # so high a threshold may move the outputs by more than a percent: shown in every run's history
    "zeroing_tolerance": 1e6,
    "channels_last": True,  # what CPUs run faster
}
SMALL_SIDE = 16  # pixels of the ResNets' images: a quarter of the pixels is a quarter of the time
SMALL_VGG_EPOCHS = 8  # VGG needs 32 x 32 pixels, and takes ten times a ResNet-32's time for a step here

# -- medium scale: the paper's setting on all of CIFAR-10, in hours of a CPU core for each training --------------------

MEDIUM: dict[str, Any] = {
    "batch": 128,  # section 5
    "lr": 0.1,  # section 5
    "weight_decay": 5e-4,  # as at full scale
    "decay_at": (0.5, 0.75),  # as at full scale
    "threshold": 1e-4,  # section 4.1
    "amp": "bf16",
    "fuse": True,  # batch norms with what follows them, and the lasso inside the update
    "channels_last": True,
}
# (epochs, interval): a twentieth of the run (VGG: a fifteenth), as the paper's 10 epochs of 182
MEDIUM_LENGTH = {"resnet20": (60, 3), "vgg11": (30, 2), "resnet32": (60, 3)}
# Share of the inference FLOPs to end with: at the paper's ratio so short a training leaves most of a network. VGG-11 is
# to end as in Tab. 1; ResNets with half, where Tab. 1 has 0.34 of ResNet-32 after three times the epochs.
MEDIUM_TARGET = {"resnet20": 0.48, "vgg11": 0.38, "resnet32": 0.48}  # a run ends up to a point above
MEDIUM_UNFOCUSED = {"resnet20": 0.5, "vgg11": 0.35}  # trained before there was `--target-focus`: what it changes
MEDIUM_SEEDS = 2  # of the table `claim`, where --seeds does not say
MEDIUM_ONCE = 30  # epoch of the one reconfiguration: half of the run, where the learning rate falls
MEDIUM_INTERVALS = (1, 2, 8)  # times the usual one

# -- full scale: the paper's settings ----------------------------------------------------------------------------------

FULL_CIFAR: dict[str, Any] = {
    "epochs": 182,  # section 5.1
    "batch": 128,  # section 5
    "lr": 0.1,  # section 5
    "weight_decay": 5e-4,  # the text is silent; what CIFAR networks are usually trained with
    "decay_at": (0.5, 0.75),  # the text is silent; those of its reference for hyperparameters, He et al. [15]
    "interval": 10,  # section 5.3
    "threshold": 1e-4,  # section 4.1
}
FULL_IMAGENET: dict[str, Any] = {
    "epochs": 90,  # section 5.1
    "batch": 256,  # section 5: 64 per GPU on four; here on one device
    "lr": 0.1,  # section 5
    "weight_decay": 1e-4,  # the text is silent; He et al. [15]
    "decay_at": (0.3333, 0.6667),  # the text is silent; every 30 epochs is usual
    "interval": 5,  # section 5.3
    "threshold": 1e-4,  # section 4.1
    "image_size": 256,  # the text is silent; the usual crops
    "crop": 224,
}
RATIO = 0.25  # section 4.1: 0.20-0.25; ours where the text does not say
IMAGENET_RATIOS = (0.25, 0.2, 0.1)  # section 5.1
SWEEP = (0.05, 0.1, 0.15, 0.2)  # section 5.2
STRENGTHS = (*SWEEP, RATIO)  # Fig. 2 and 6 say "different" strengths only: those of Fig. 8 and Tab. 1, already trained
ONCE = (30, 60, 90, 120, 150)  # the text is silent; sixths of the run, on intervals' ends
INTERVALS = (5, 10, 20, 30)  # the text calls 10 good and names no other: half, double and triple
INTERVAL_RATIOS = (0.1, 0.15, 0.2)  # the text is silent; three points of Fig. 8's curve per interval
GRANULARITY = {"cifar100": 32, "imagenet": 128}  # section 5.3: 32 per GPU, on one and on four GPUs


@dataclass(frozen=True)
class Training:
    """One run of `prunetrain train`.

    Attributes:
        network: the paper's name for it; `options["model"]` is ours.
        ratio: the lasso penalty ratio; None for a dense run and one with a target.
        options: fields of TrainConfig that this training sets; not out, data, start_from, device, threads.
        start: the dense training that it starts from (SSL).
        target: share of the dense inference FLOPs to end with, to which lambda is steered; None where it is constant.
    """

    scale: str
    dataset: str
    network: str
    method: str
    ratio: float | None
    seed: int
    suffix: str = ""
    options: dict[str, Any] = field(default_factory=dict, compare=False)
    start: "Training | None" = field(default=None, compare=False)
    target: float | None = None

    @property
    def name(self) -> str:
        """The name of the training's folder."""
        kind = "dense" if self.ratio is None else f"ratio-{self.ratio:g}"
        if self.target is not None:
            kind = f"target-{self.target:g}"
        return f"{self.network}-{kind}-seed-{self.seed}{self.suffix}"

    @property
    def path(self) -> str:
        """The training's folder, relative to --runs."""
        return f"{self.scale}/{self.dataset}/{self.name}"

    @property
    def dense_path(self) -> str:
        """The folder of the dense run that it is compared with."""
        return f"{self.scale}/{self.dataset}/{self.network}-dense-seed-{self.seed}"


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper.

    Attributes:
        place: where it is in the paper.
        what: one line for humans.
        trainings: the trainings of one seed at a scale.
        differs: how the small scale differs from the paper's networks and data.
        scales: those that it has.
    """

    name: str
    place: str
    what: str
    trainings: Callable[[str, int], list[Training]]
    differs: str
    scales: tuple[str, ...] = ("small", "full")


# -- the kinds of trainings --------------------------------------------------------------------------------------------


def _options(scale: str, dataset: str, network: str) -> dict[str, Any]:
    if scale == "medium":
        epochs, interval = MEDIUM_LENGTH[network]
        return {"model": network, **MEDIUM, "epochs": epochs, "interval": interval}
    options = SMALL if scale == "small" else FULL_IMAGENET if dataset == "imagenet" else FULL_CIFAR
    model = "imagenet_resnet50" if dataset == "imagenet" else network
    of_network: dict[str, Any] = {}
    if scale == "small":
        of_network = {"epochs": SMALL_VGG_EPOCHS} if network.startswith("vgg") else {"image_size": SMALL_SIDE}
    return {"model": model, **options, **of_network}


def dense(scale: str, dataset: str, network: str, seed: int) -> Training:
    options = {**_options(scale, dataset, network), "dense": True, "seed": seed}
    return Training(scale, dataset, network, "dense", None, seed, options=options)


def prunetrain(scale: str, dataset: str, network: str, ratio: float, seed: int) -> Training:
    return _pruned(scale, dataset, network, "prunetrain", ratio, seed)


def proximal(scale: str, dataset: str, network: str, ratio: float, seed: int) -> Training:
    """The lasso by soft-thresholding after the update (`--proximal`), not by its subgradient."""
    return _pruned(scale, dataset, network, "proximal", ratio, seed, "-proximal", proximal=True)


def to_target(scale: str, dataset: str, network: str, target: float, seed: int, *, proximal: bool = False) -> Training:
    """Lambda is steered so that the run ends with this share of the dense inference FLOPs (`--target-flops`)."""
    options = {**_options(scale, dataset, network), "target_flops": target, "seed": seed}
    method, suffix = "target", ""
    if proximal:
        method, suffix, options["proximal"] = "proximal-target", "-proximal", True
    return Training(scale, dataset, network, method, None, seed, suffix, options, target=target)


def unfocused(scale: str, dataset: str, network: str, target: float, seed: int) -> Training:
    """By the proximal step to a target, with a lasso that pulls at all channels all the time (`--no-target-focus`)."""
    method, suffix = "unfocused-target", "-proximal-unfocused"
    changes = {"target_flops": target, "seed": seed, "proximal": True, "target_focus": False}
    options = {**_options(scale, dataset, network), **changes}
    return Training(scale, dataset, network, method, None, seed, suffix, options, target=target)


def with_interval(scale: str, dataset: str, network: str, ratio: float, interval: float, seed: int) -> Training:
    """The run with the scale's own interval is the plain one."""
    usual = prunetrain(scale, dataset, network, ratio, seed)
    if interval == usual.options["interval"]:
        return usual
    return _pruned(scale, dataset, network, "prunetrain", ratio, seed, f"-interval-{interval:g}", interval=interval)


def once(scale: str, dataset: str, network: str, ratio: float, epoch: int, seed: int) -> Training:
    return _pruned(scale, dataset, network, "once", ratio, seed, f"-once-{epoch}", reconfigure_once=epoch)


def ssl(scale: str, dataset: str, network: str, ratio: float, seed: int) -> Training:
    """Wen et al. as in section 5.2: from the trained dense network, as many epochs again, reconfigured at the end."""
    epochs = _options(scale, dataset, network)["epochs"]
    start = dense(scale, dataset, network, seed)
    return _pruned(scale, dataset, network, "ssl", ratio, seed, "-ssl", start, interval=epochs)


def adjusted(scale: str, dataset: str, network: str, ratio: float, seed: int) -> Training:
    """A training with mini-batch adjustment; the memory budget is what the dense network needs (as in Fig. 9b)."""
    granularity = 4 if scale == "small" else GRANULARITY[dataset]  # of a batch of 16: the paper's quarter of 128
    changes: dict[str, Any] = {"grow_batch": True, "batch_granularity": granularity}
    return _pruned(scale, dataset, network, "adjusted", ratio, seed, "-adjusted", **changes)


def with_momentum(scale: str, dataset: str, network: str, ratio: float, seed: int) -> Training:
    """Slices that are zeroed but stay keep their momentum (`--keep-momentum`), and revive more often."""
    return _pruned(scale, dataset, network, "prunetrain", ratio, seed, "-keep-momentum", keep_momentum=True)


def _pruned(
    scale: str,
    dataset: str,
    network: str,
    method: str,
    ratio: float,
    seed: int,
    suffix: str = "",
    start: Training | None = None,
    **changes: Any,
) -> Training:
    options = {**_options(scale, dataset, network), "penalty_ratio": ratio, "seed": seed, **changes}
    return Training(scale, dataset, network, method, ratio, seed, suffix, options, start)


# -- the medium scale's ------------------------------------------------------------------------------------------------


def _medium(network: str, seed: int, *methods: str) -> list[Training]:
    """The main trainings of a network, or those of them that are by one of some methods."""
    who, target = ("medium", "cifar10", network), MEDIUM_TARGET[network]
    trainings = [
        dense(*who, seed),
        prunetrain(*who, RATIO, seed),
        to_target(*who, target, seed),
        proximal(*who, RATIO, seed),
        to_target(*who, target, seed, proximal=True),
    ]
    if seed == 0 and network in MEDIUM_UNFOCUSED:
        trainings.append(unfocused(*who, MEDIUM_UNFOCUSED[network], seed))
    return [training for training in trainings if not methods or training.method in methods]


PRUNED = ("prunetrain", "target", "proximal", "proximal-target")


def _claim(scale: str, seed: int) -> list[Training]:
    return [training for network in MEDIUM_LENGTH for training in _medium(network, seed)]


def _medium_fig2(seed: int) -> list[Training]:
    once_only = [once("medium", "cifar10", "resnet20", RATIO, MEDIUM_ONCE, seed)] if seed == 0 else []
    return _medium("resnet20", seed, *PRUNED) + once_only


def _medium_fig6(seed: int) -> list[Training]:
    return [training for network in ("resnet20", "resnet32") for training in _medium(network, seed, *PRUNED)]


def _medium_fig8(seed: int) -> list[Training]:
    ssl_only = [ssl("medium", "cifar10", "resnet20", RATIO, seed)] if seed == 0 else []
    return [training for network in ("resnet20", "resnet32") for training in _medium(network, seed)] + ssl_only


def _medium_fig10(seed: int) -> list[Training]:
    usual = MEDIUM_LENGTH["resnet20"][1]
    who = ("medium", "cifar10", "resnet20", RATIO)
    return [dense(*who[:3], seed), *(with_interval(*who, times * usual, seed) for times in MEDIUM_INTERVALS)]


def _medium_fig11(seed: int) -> list[Training]:
    return [run for network in MEDIUM_LENGTH for run in _medium(network, seed, "prunetrain", "target", "proximal")]


# -- the experiments ---------------------------------------------------------------------------------------------------


def _tab1(scale: str, seed: int) -> list[Training]:
    trainings = []
    for dataset in ("cifar10",) if scale == "small" else ("cifar10", "cifar100"):
        for network in ("resnet32", "resnet50", "vgg11", "vgg13"):
            ratio = SMALL_RATIO[network] if scale == "small" else RATIO
            trainings += [dense(scale, dataset, network, seed), prunetrain(scale, dataset, network, ratio, seed)]
    return trainings + (_imagenet(seed) if scale == "full" else [])


def _imagenet(seed: int) -> list[Training]:
    pruned = [prunetrain("full", "imagenet", "resnet50", ratio, seed) for ratio in IMAGENET_RATIOS]
    return [dense("full", "imagenet", "resnet50", seed), *pruned]


def _tab3(scale: str, seed: int) -> list[Training]:
    network, ratio = ("resnet20", SMALL_SWEEP[-1]) if scale == "small" else ("resnet56", RATIO)
    return [dense(scale, "cifar10", network, seed), prunetrain(scale, "cifar10", network, ratio, seed)]


def _tab4(scale: str, seed: int) -> list[Training]:
    trainings = []
    for dataset in ("cifar10",) if scale == "small" else ("cifar100", "imagenet"):
        ratio = SMALL_RATIO["resnet50"] if scale == "small" else RATIO
        trainings.append(dense(scale, dataset, "resnet50", seed))
        trainings += [kind(scale, dataset, "resnet50", ratio, seed) for kind in (prunetrain, adjusted)]
    return trainings


def _fig2(scale: str, seed: int) -> list[Training]:
    if scale == "medium":
        return _medium_fig2(seed)
    network, ratios, epochs = (
        ("resnet20", SMALL_SWEEP, SMALL_ONCE) if scale == "small" else ("resnet50", STRENGTHS, ONCE)
    )
    trainings = [prunetrain(scale, "cifar10", network, ratio, seed) for ratio in ratios]
    return trainings + [once(scale, "cifar10", network, ratios[-1], epoch, seed) for epoch in epochs]


def _fig4(scale: str, seed: int) -> list[Training]:
    if scale == "medium":
        return _medium("resnet20", seed, "prunetrain", "proximal") if seed == 0 else []
    ratio = SMALL_RATIO["resnet50"] if scale == "small" else RATIO
    return [kind(scale, "cifar10", "resnet50", ratio, seed) for kind in (prunetrain, with_momentum)]


def _fig6(scale: str, seed: int) -> list[Training]:
    if scale == "medium":
        return _medium_fig6(seed)
    if scale == "small":
        return [prunetrain(scale, "cifar10", "resnet20", ratio, seed) for ratio in SMALL_SWEEP]
    networks = ("resnet32", "resnet50")
    return [prunetrain(scale, "cifar10", network, ratio, seed) for network in networks for ratio in STRENGTHS]


def _fig8(scale: str, seed: int) -> list[Training]:
    if scale == "medium":
        return _medium_fig8(seed)
    small = scale == "small"
    trainings = []
    for dataset in ("cifar10",) if small else ("cifar10", "cifar100"):
        for network in ("resnet20",) if small else ("resnet32", "resnet50"):
            trainings.append(dense(scale, dataset, network, seed))
            for kind in (prunetrain, ssl):
                trainings += [kind(scale, dataset, network, ratio, seed) for ratio in (SMALL_SWEEP if small else SWEEP)]
    return trainings


def _fig9(scale: str, seed: int) -> list[Training]:
    return [training for training in _tab4(scale, seed) if training.method != "dense"]


def _fig10(scale: str, seed: int) -> list[Training]:
    if scale == "medium":
        return _medium_fig10(seed) if seed == 0 else []
    small = scale == "small"
    trainings = []
    for network in ("resnet20",) if small else ("resnet32", "resnet50"):
        trainings.append(dense(scale, "cifar10", network, seed))
        for interval in SMALL_INTERVALS if small else INTERVALS:
            ratios = SMALL_SWEEP[1:] if small else INTERVAL_RATIOS  # at the weakest next to nothing is pruned
            trainings += [with_interval(scale, "cifar10", network, ratio, interval, seed) for ratio in ratios]
    return trainings


def _fig11(scale: str, seed: int) -> list[Training]:
    if scale == "medium":
        return _medium_fig11(seed) if seed == 0 else []
    if scale == "small":
        return _fig9(scale, seed)
    grown = [adjusted(scale, "imagenet", "resnet50", ratio, seed) for ratio in (0.25, 0.2)]  # the dotted lines
    return _imagenet(seed)[1:] + grown


def _fig12(scale: str, seed: int) -> list[Training]:
    return _fig4(scale, seed)[:1] if scale == "small" else [prunetrain(scale, "imagenet", "resnet50", RATIO, seed)]


_SWEEP_DIFFERS = "ResNet-20 on CIFAR-10, where the paper has "
EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment("claim", "Tab. 1's claims, section 5.1", "what PruneTrain saves, by ratio and to a target", _claim,
                   "", ("medium",)),
        Experiment("tab1", "Tab. 1, section 5.1", "training FLOPs and time, inference FLOPs, accuracy", _tab1,
                   "CIFAR-10 only; the paper has CIFAR-100 and ImageNet too"),
        Experiment("tab3", "Tab. 3, section 5.2", "PruneTrain beside AMC", _tab3, _SWEEP_DIFFERS + "ResNet-56"),
        Experiment("tab4", "Tab. 4, section 5.3", "with and without mini-batch adjustment", _tab4,
                   "CIFAR-10, where the paper has CIFAR-100 and ImageNet"),
        Experiment("fig2", "Fig. 2, section 3", "when FLOPs are pruned, and what one reconfiguration misses", _fig2,
                   _SWEEP_DIFFERS + "ResNet-50", SCALES),
        Experiment("fig4", "Fig. 4, section 4.2", "largest weight of output channels, momentum zeroed or kept", _fig4,
                   "the paper's network, ResNet-50 on CIFAR-10", SCALES),
        Experiment("fig6", "Fig. 6, section 4.2", "FLOPs of channel union and channel gating", _fig6,
                   _SWEEP_DIFFERS + "ResNet-32 and ResNet-50", SCALES),
        Experiment("fig8", "Fig. 8, section 5.2", "accuracy against inference and training cost; SSL", _fig8,
                   _SWEEP_DIFFERS + "ResNet-32 and ResNet-50 on CIFAR-10 and CIFAR-100", SCALES),
        Experiment("fig9", "Fig. 9, section 5.3", "memory of a training step over epochs", _fig9,
                   "CIFAR-10, where the paper has CIFAR-100 and ImageNet"),
        Experiment("fig10", "Fig. 10, section 5.3", "reconfiguration intervals", _fig10,
                   _SWEEP_DIFFERS + "ResNet-32 and ResNet-50", SCALES),
        Experiment("fig11", "Fig. 11, section 5.3", "communication of data-parallel training, modelled", _fig11,
                   "ResNet-50 on CIFAR-10, where the paper has ImageNet", SCALES),
        Experiment("fig12", "Fig. 12, section 5.3", "density of channels, and of weights inside them", _fig12,
                   "ResNet-50 on CIFAR-10, where the paper has ImageNet"),
    )
}  # fmt: skip


def names_at(scale: str) -> list[str]:
    """The experiments that a scale has."""
    return [name for name, experiment in EXPERIMENTS.items() if scale in experiment.scales]


def trainings_of(names: Iterable[str], scale: str, seeds: int) -> list[Training]:
    """The trainings of some experiments, each once, those that others start from before them.

    Raises:
        InputError: an unknown experiment or scale, an experiment that the scale does not have, or no seed.
    """
    if scale not in SCALES:
        raise InputError(f"--scale must be one of {', '.join(SCALES)}, not {scale!r}.")
    if seeds < 1:
        raise InputError(f"--seeds must be at least 1, not {seeds}.")
    by_path: dict[str, Training] = {}
    for seed in range(seeds):
        for name in names:
            if name not in EXPERIMENTS:
                raise InputError(f"there is no experiment {name!r}; there are {', '.join(EXPERIMENTS)} and all.")
            if scale not in EXPERIMENTS[name].scales:
                raise InputError(f"{name} has no {scale} scale; {scale} has {', '.join(names_at(scale))}.")
            for training in EXPERIMENTS[name].trainings(scale, seed):
                for one in (training.start, training):
                    if one is not None:
                        by_path.setdefault(one.path, one)
    return list(by_path.values())
