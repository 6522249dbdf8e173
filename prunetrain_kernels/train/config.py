"""The options of a training run."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.graph.gating import COSTS
from prunetrain_kernels.graph.keep import POLICIES
from prunetrain_kernels.train.mini_batch import LEARNING_RATE_RULES
from prunetrain_kernels.train.target import BY, interval_of

AUGMENTATIONS = ("crop", "resized-crop")
SCHEDULES = ("step", "cosine", "onecycle")
MOST_EPOCHS = 100_000  # forecasts walk through all of them
MOST_THREADS = 1024  # the system has no room for many more, and OpenMP then ends the process without a word
LONGEST_WAIT = 1e9  # seconds, which are 31 years
LARGEST = 1e20  # of a rate or weight decay: what fp32 holds, with room for the growth of the batch
RATE = f"be a positive number below {LARGEST:g}"
AMP_DTYPES = {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _all(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, list | tuple) and all(map(kind, values))


# the type of an option, as it is written below: what its values are like, and what that is called
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int": (_is_whole, "a whole number"),
    "float": (_is_number, "a number"),
    "bool": (lambda value: isinstance(value, bool), "True or False"),
    "str": (lambda value: isinstance(value, str), "text"),
    "tuple[float, ...]": (_all(_is_number), "numbers in a tuple"),
    "tuple[str, ...]": (_all(lambda value: isinstance(value, str)), "names in a tuple"),
}


@dataclass
class TrainConfig:
    """Everything that decides a run; saved as its config.json. Defaults are the paper's CIFAR settings (section 5)."""

    out: str
    model: str = "resnet20"
    data: str = "digits"
    classes: int | None = None
    image_size: int | None = None
    crop: int | None = None
    augment: str = "crop"
    workers: int | None = None
    cache_limit: int | None = None
    limit_train: int | None = None
    limit_val: int | None = None
    cache: str | None = None
    tensorboard: str | None = None
    epochs: int = 182
    fine_tune_epochs: int = 0
    batch: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_at: tuple[float, ...] = (0.5, 0.75)
    decay: float = 0.1
    schedule: str = "step"
    warmup: int = 0
    no_decay_norms: bool = False
    accumulate: int = 1
    clip_grad: float | None = None
    ema: float | None = None
    dense: bool = False
    penalty_ratio: float = 0.25
    coefficient: float | None = None
    interval: float | None = None
    target_flops: float | None = None
    target_train_flops: float | None = None
    target_by: float = BY
    target_focus: bool = True
    exclude: tuple[str, ...] = ()
    min_channels: int = 1
    coefficients: tuple[str, ...] = ()
    reconfigure_once: int | None = None
    threshold: float = 1e-4
    relative: bool = False
    zeroing_tolerance: float = 0.01
    keep_momentum: bool = False
    policy: str = "union"
    policy_cost: str = "roof"
    round_to: int = 1
    proximal: bool = False
    start_from: str | None = None
    start_from_other_data: bool = False
    grow_batch: bool = False
    batch_granularity: int = 32
    memory_budget: int | None = None
    batch_limit: int | None = None
    lr_rule: str = "linear"
    amp: str = "off"
    channels_last: bool = False
    fuse: bool = False
    compile: bool = False
    cuda_graphs: bool = False
    sync_batch_norm: bool = False
    rank_timeout: float = 60
    device: str = "auto"
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """An interval that is left out becomes a number: the paper's 10, or with a target a twentieth of the epochs."""
        if self.interval is None:
            self.interval = interval_of(None, self.epochs if self.has_target else None)

    @property
    def has_target(self) -> bool:
        return self.target_flops is not None or self.target_train_flops is not None

    def check(self) -> None:
        """Raises InputError for the first option that is out of range, or of another kind than it must be."""
        self._check_kinds()
        for name, is_in_range, must in self._ranges():
            if not is_in_range:
                raise InputError(f"--{name} must {must}, not {getattr(self, name.replace('-', '_'))}.")
        multipliers(self.coefficients)
        self._check_together()

    def _check_kinds(self) -> None:
        """Raises InputError for an option of another kind: a fraction where images are counted, text for a number."""
        for field in dataclasses.fields(self):
            value, kinds = (
                getattr(self, field.name),
                str(field.type).removeprefix("<class '").removesuffix("'>").split(" | "),
            )
            if value is None and "None" in kinds:
                continue
            is_kind, must = KINDS[kinds[0]]
            if not is_kind(value):
                raise InputError(f"--{field.name.replace('_', '-')} must be {must}, not {value!r}.")
            largest = 2**63 if field.name in ("seed", "memory_budget", "cache_limit") else 2**31
            if kinds[0] == "int" and value >= largest:
                raise InputError(f"--{field.name.replace('_', '-')} must be below {largest}, not {value}.")
        if any("\0" in str(value) for value in dataclasses.astuple(self)):
            raise InputError("no option may hold the character NUL, which no file's name can; leave it out.")
        for name in ("out", "cache", "tensorboard", "start_from"):
            if getattr(self, name) == "":
                raise InputError(f"--{name.replace('_', '-')} must name a folder, not ''.")

    def _ranges(self) -> tuple[tuple[str, bool, str], ...]:
        """Each option that has a range: its name, whether it is in it, and what it must do."""
        return (
            ("epochs", 1 <= self.epochs <= MOST_EPOCHS, f"be from 1 to {MOST_EPOCHS:,}"),
            ("fine-tune-epochs", 0 <= self.fine_tune_epochs <= MOST_EPOCHS, f"be from 0 to {MOST_EPOCHS:,}"),
            ("batch", self.batch >= 2, "be at least 2 (batch norm needs more than one image)"),
            ("lr", 0 < self.lr < LARGEST, RATE),
            ("momentum", 0 <= self.momentum < 1, "be from 0 up to, but not including, 1"),
            ("weight-decay", 0 <= self.weight_decay < LARGEST, f"be 0 or more, and below {LARGEST:g}"),
            ("decay", 0 < self.decay < math.inf, "be a positive number"),
            ("schedule", self.schedule in SCHEDULES, f"be one of {', '.join(SCHEDULES)}"),
            ("warmup", 0 <= self.warmup < max(self.epochs, 1), "be 0 or more, and fewer than the --epochs"),
            ("accumulate", self.accumulate >= 1, "be at least 1"),
            ("clip-grad", self.clip_grad is None or 0 < self.clip_grad < math.inf, "be a positive number"),
            ("ema", self.ema is None or 0 <= self.ema < 1, "be from 0 up to, but not including, 1"),
            ("decay-at", all(0 < d <= 1 for d in self.decay_at), "be shares of the epochs, between 0 and 1"),
            ("penalty-ratio", 0 <= self.penalty_ratio < 1, "be from 0 up to, but not including, 1"),
            ("coefficient", self.coefficient is None or 0 < self.coefficient < LARGEST, RATE),
            ("interval", 0 < (self.interval or 0) < math.inf, "be a positive number of epochs"),
            *(
                (name, value is None or 0 < value < 1, "be a share of the dense network's, between 0 and 1")
                for name, value in (
                    ("target-flops", self.target_flops),
                    ("target-train-flops", self.target_train_flops),
                )
            ),
            ("target-by", 0 < self.target_by <= 1, "be a share of the epochs, above 0 and up to 1"),
            ("min-channels", self.min_channels >= 1, "be at least 1"),
            ("threshold", 0 <= self.threshold < math.inf, "be 0 or more (paper: 1e-4)"),
            (
                "zeroing-tolerance",
                self.zeroing_tolerance >= 0,
                "be a share of the output's scale, 0 or more (inf: any)",
            ),
            ("policy", self.policy in POLICIES, f"be one of {', '.join(POLICIES)}"),
            ("policy-cost", self.policy_cost in COSTS, f"be one of {', '.join(COSTS)}"),
            ("round-to", self.round_to >= 1, "be at least 1"),
            ("batch-granularity", self.batch_granularity >= 1, "be at least 1"),
            ("memory-budget", self.memory_budget is None or self.memory_budget >= 1, "be a positive number of bytes"),
            (
                "batch-limit",
                self.batch_limit is None or self.batch_limit >= self.batch,
                f"be at least the --batch to start with, {self.batch}",
            ),
            ("lr-rule", self.lr_rule in LEARNING_RATE_RULES, f"be one of {', '.join(LEARNING_RATE_RULES)}"),
            ("amp", self.amp in AMP_DTYPES, f"be one of {', '.join(AMP_DTYPES)}"),
            (
                "reconfigure-once",
                self.reconfigure_once is None or 1 <= self.reconfigure_once <= self.epochs,
                f"be an epoch of the run, 1 to {self.epochs}",
            ),
            ("augment", self.augment in AUGMENTATIONS, f"be one of {', '.join(AUGMENTATIONS)}"),
            ("workers", self.workers is None or 1 <= self.workers <= MOST_THREADS, f"be from 1 to {MOST_THREADS}"),
            ("cache-limit", self.cache_limit is None or self.cache_limit >= 0, "be a number of bytes, 0 or more"),
            ("threads", self.threads is None or 1 <= self.threads <= MOST_THREADS, f"be from 1 to {MOST_THREADS}"),
            ("rank-timeout", 0 < self.rank_timeout < LONGEST_WAIT, f"be a positive number below {LONGEST_WAIT:g}"),
            ("seed", -(2**63) <= self.seed < 2**63, "be a whole number of 64 bits"),
        )

    def _check_together(self) -> None:
        """Raises InputError for options that are in range, but cannot go together."""
        if self.augment == "resized-crop" and self.crop is None:
            raise InputError("--augment resized-crop scales parts of the images to --crop N; give it too, such as 224.")
        for name, number in (("workers", self.workers), ("cache-limit", self.cache_limit)):
            if number is not None and self.augment != "resized-crop":
                raise InputError(f"--{name} is about images that stay files; add --augment resized-crop.")
        if self.dense and self.reconfigure_once is not None:
            raise InputError("--dense never reconfigures, so it cannot go with --reconfigure-once; choose one.")
        if self.target_flops is not None and self.target_train_flops is not None:
            raise InputError("--target-flops and --target-train-flops each decide lambda by themselves; choose one.")
        target = "target-flops" if self.target_flops is not None else "target-train-flops"
        if self.has_target and self.dense:
            raise InputError(f"--dense prunes nothing, so it cannot go with --{target}; choose one.")
        if self.coefficient is not None and (self.dense or not self.penalty_ratio):
            other = "--dense" if self.dense else "--penalty-ratio 0"
            raise InputError(f"--coefficient is a lambda, but with {other} there is no lasso; leave one of them out.")
        if self.has_target and not self.penalty_ratio:
            raise InputError(f"--{target} needs a lasso to begin with: a --penalty-ratio above 0.")
        if self.has_target and self.reconfigure_once is not None:
            raise InputError(f"--{target} decides when to reconfigure; leave --reconfigure-once out.")
        if self.dense and self.proximal:
            raise InputError("--dense has no lasso, so it cannot go with --proximal; choose one.")
        if self.start_from_other_data and self.start_from is None:
            raise InputError("--start-from-other-data allows --start-from a run on other data; give --start-from too.")
        if self.schedule == "onecycle" and (self.warmup or self.epochs < 2):
            raise InputError("--schedule onecycle has a warm-up of its own and needs 2 epochs; leave --warmup out.")
        if (
            self.schedule == "step"
            and self.warmup
            and self.warmup >= round(self.epochs * min(self.decay_at, default=1))
        ):
            raise InputError(f"--warmup {self.warmup} ends after the first decay (--decay-at); make it shorter.")
        growth = len(self.decay_at) * math.log(max(1.0, self.decay)) if self.schedule == "step" else 0.0
        if math.log(self.lr) + growth >= math.log(LARGEST):
            raise InputError(f"--decay {self.decay} makes the learning rate grow beyond {LARGEST:g}; give one below 1.")
        if self.batch % self.accumulate:
            raise InputError(f"--batch {self.batch} cannot be cut into {self.accumulate} equal parts (--accumulate).")
        if self.fuse and self.sync_batch_norm:
            raise InputError("--fuse has no batch norm that is synchronised over ranks; leave --sync-batch-norm out.")
        for name, value in (("memory-budget", self.memory_budget), ("batch-limit", self.batch_limit)):
            if value is not None and not self.grow_batch:
                raise InputError(f"--{name} limits the growth of the batch; add --grow-batch.")


def multipliers(words: Sequence[str]) -> dict[str, float]:
    """{layer: multiplier of lambda} from words such as "layer3=2".

    Raises:
        InputError: a word that is not NAME=NUMBER, or a second one for the same name.
    """
    parsed: dict[str, float] = {}
    for word in words:
        name, _, number = word.rpartition("=")
        if name in parsed:
            raise InputError(f"--coefficients gives {name} twice; say once how many times lambda it gets.")
        try:
            if not name:
                raise ValueError
            parsed[name] = float(number)
        except ValueError:
            raise InputError(
                f"--coefficients {word}: say how many times lambda a layer gets, as in layer3=2."
            ) from None
    return parsed


def other_option(option: str, before: Any, now: Any) -> str:
    """What an option was and is, in words: "with --lr 0.1, not 0.2", "without --fuse, not with it"."""
    name = f"--{option.replace('_', '-')}"
    if before is None or before is False:
        return f"without {name}, not with {'it' if now is True else f'{name} {now}'}"
    given = f"with {name}" if before is True else f"with {name} {before}"
    return f"{given}, not without it" if now is None or now is False else f"{given}, not {now}"
