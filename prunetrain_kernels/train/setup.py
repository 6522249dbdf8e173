"""A `Training` is made here from options: device, ranks, data, network, PruneTrain, the checkpoint to go on from."""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, OneCycleLR, SequentialLR
from tqdm import tqdm

from prunetrain_kernels.compiled import Compilations, eagerly
from prunetrain_kernels.data import (
    ImageData,
    ImageFiles,
    ResizedCrop,
    batch,
    difference_of_data,
    load,
    read_ahead,
    record_of,
)
from prunetrain_kernels.data.decode import cores
from prunetrain_kernels.data.reader import CACHE_LIMIT
from prunetrain_kernels.data.record import SPLITS
from prunetrain_kernels.errors import CheckpointError, InputError
from prunetrain_kernels.files import is_folder, is_there, reason, remove_leftovers
from prunetrain_kernels.machine import processor
from prunetrain_kernels.models import build
from prunetrain_kernels.nn import synchronize_batch_norm
from prunetrain_kernels.optim import SGD, ProximalSGD
from prunetrain_kernels.probe import first_line
from prunetrain_kernels.train.config import AMP_DTYPES, TrainConfig, multipliers, other_option
from prunetrain_kernels.train.distributed import Ranks, SentBytes, distributed, one_after_the_other
from prunetrain_kernels.train.mini_batch import MiniBatch, scale_learning_rate
from prunetrain_kernels.train.prunetrain import PruneTrain
from prunetrain_kernels.train.run_checkpoint import (
    CHECKPOINT,
    PREVIOUS,
    has_checkpoint,
    is_finished,
    newest,
    options_of,
    what_differs,
)
from prunetrain_kernels.train.run_lock import locked
from prunetrain_kernels.train.run_log import RunLog
from prunetrain_kernels.train.step import Average, CapturedStep, Step
from prunetrain_kernels.train.tally import Stopwatch

SMALLEST_BATCH = 2  # batch norm refuses one image
RUN_FILES = ("config.json", "log.csv", "channels.csv", "slices.npz", "summary.json", CHECKPOINT, PREVIOUS)
# options that a resumed run, or another rank, may have otherwise: they decide no result
NOT_COMPARED = ("out", "cache", "tensorboard", "cache_limit", "workers", "threads", "rank_timeout", "zeroing_tolerance")
AHEAD = 3  # batches whose images are being read, the one that is asked for next included
FIT_ON_DEVICE = 4 << 30  # bytes of images that are worth keeping on a GPU whole


@dataclass(frozen=True)
class Batches:
    """The images of a run, batch by batch; each rank gets its share of a batch."""

    data: ImageData
    record: dict[str, Any]  # what the data are, for the checkpoint and later comparisons
    seed: int
    device: torch.device
    ranks: Ranks

    def share(
        self, indices: Tensor, epoch: int, step: int, *, train: bool, channels_last: bool, whole: bool = False
    ) -> tuple[Tensor, Tensor]:
        """This rank's images and labels of the given indices, on the device; with `whole` all of them."""
        share = slice(0, len(indices)) if whole else self.ranks.share(len(indices))
        images, labels = batch(
            self.data, indices, seed=self.seed, epoch=epoch, step=step, device=self.device, train=train, share=share
        )
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, labels

    def expect(self, order: Tensor, size: int, epoch: int, *, train: bool) -> None:
        """Has this rank's images of the next batches read, while the network works on those before.

        Args:
            order: the indices that are still to come, `size` of them in each batch.
        """
        if not isinstance(self.data.train_images, ImageFiles):
            return
        coming = order[: AHEAD * size].split(size)
        share = torch.cat([part[self.ranks.share(len(part))] for part in coming])
        read_ahead(self.data, share, seed=self.seed, epoch=epoch, train=train)

    def expect_nothing(self) -> None:
        """Gives up what was begun to be read."""
        read_ahead(self.data, torch.empty(0, dtype=torch.int64, device="cpu"), seed=0, epoch=0, train=True)


@dataclass(frozen=True)
class Training:
    """All that a run is made of. The objects change as it trains; which objects they are does not.

    Attributes:
        batches: the data; `example`: a few of its validation images, the same on every rank.
        model: the network itself, whose forward may be compiled; `ddp`: its `DistributedDataParallel`, or None.
        sent: counts the bytes that the ranks have averaged.
        amp: dtype of the forward's operations, None for the parameters'.
        average: the network's moving average, or None.
        step: one update; `watch`: takes the time of the lasso in it.
        compilations: counts what has been compiled since the last epoch.
        say: prints a line, in the first process and if the user wants progress shown.
    """

    config: TrainConfig
    device: torch.device
    ranks: Ranks
    batches: Batches
    model: nn.Module
    ddp: DistributedDataParallel | None
    sent: SentBytes
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    amp: torch.dtype | None
    scaler: torch.amp.GradScaler
    average: Average | None
    example: tuple[Tensor, ...]
    prunetrain: PruneTrain
    step: Step | CapturedStep
    watch: Stopwatch
    compilations: Compilations
    log: RunLog
    say: Callable[[str], None]

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    @property
    def checkpoint(self) -> Path:
        return self.folder / CHECKPOINT

    @property
    def data(self) -> ImageData:
        return self.batches.data

    @property
    def copies(self) -> list[nn.Module]:
        """What follows the model."""
        return [] if self.average is None else [self.average.network]

    @property
    def saved_parts(self) -> tuple[nn.Module, torch.optim.Optimizer, PruneTrain, list[nn.Module]]:
        """What a checkpoint holds the states of."""
        return self.model, self.optimizer, self.prunetrain, self.copies

    @property
    def parts(self) -> int:
        """Parts of a batch: side by side in the ranks, one after the other in each."""
        return self.ranks.world * self.config.accumulate

    @property
    def smallest_batch(self) -> int:
        return SMALLEST_BATCH * self.parts

    @property
    def batch_size(self) -> int:
        """Images per update, of all ranks and micro-batches together."""
        share = self.prunetrain.batch_size
        return self.config.batch if share is None else share * self.parts

    @property
    def total_epochs(self) -> int:
        return self.config.epochs + self.config.fine_tune_epochs

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.amp) if self.amp is not None else nullcontext()


# -- the training of a configuration -----------------------------------------------------------------------------------


def prepare_process(config: TrainConfig) -> torch.device:
    """Threads, seeds and cuDNN's choices, for this process; returns the device to train on."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = device_of(config)
    if device.type == "cpu":
        torch.set_flush_denormal(True)  # before any worker thread starts, so that all of them inherit it
    torch.manual_seed(config.seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    return device


def training_of(
    config: TrainConfig,
    place: tuple[torch.device, Ranks],
    saved: dict[str, Any] | None,
    start: dict[str, Any] | None,
    *,
    show: bool,
) -> Training:
    """Builds all that a run is made of; nothing is written yet, and no saved tensor loaded.

    Args:
        place: the device, as `prepare_process` returned it, and the ranks.
        saved: the checkpoint to go on from; `start`: the dense network's to start from.
        show: whether `say` says anything.

    Raises:
        InputError, CheckpointError, RanksDifferError, RankLostError: as `train`.
    """
    device, ranks = place
    check_ranks(config, ranks)
    ranks.agree("the checkpoints to go on from", -1 if saved is None else saved["extra"]["epoch"])
    say: Callable[[str], None] = tqdm.write if show and ranks.first else _say_nothing
    log = RunLog(Path(config.out))
    batches = batches_of(config, place, say)
    data = batches.data
    if saved is not None:
        differs = what_differs(saved["extra"], saved.get("versions", {}), ranks=ranks.world, device=device.type)
        for line in filter(None, (saved["note"], *differs)):
            say(line)
    compare_data(config, batches.record, saved, start, say)
    model = build_model(config, data, device, ranks)
    optimizer = optimizer_of(config, model)
    average = None if config.ema is None else Average(model, config.ema)
    if config.compile:
        model.compile()
    ddp, sent = distributed(model, device, ranks)
    rates = scheduler(config, optimizer)
    amp = AMP_DTYPES[config.amp]
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    example = example_of(batches, channels_last=config.channels_last)
    prunetrain = PruneTrain(
        ddp or model,
        optimizer,
        example,
        scheduler=rates,
        batch=mini_batch(config, len(data.train_labels), ranks),
        also=[] if average is None else [average.network],
        amp=amp,
        **pruning_options(config),
    )
    check_logits(config, model, example, data.classes)
    watch, compilations = Stopwatch(device), Compilations()
    step = step_of(config, prunetrain, scaler, average, watch, device)
    return Training(
        config, device, ranks, batches, model, ddp, sent, optimizer, rates, amp, scaler, average, example, prunetrain,
        step, watch, compilations, log, say,
    )  # fmt: skip


def batches_of(config: TrainConfig, place: tuple[torch.device, Ranks], say: Callable[[str], None]) -> Batches:
    """The data, once all ranks have read the same."""
    device, ranks = place
    data = ranks.all_or_none(lambda: one_after_the_other(ranks, lambda: load_data(config, device, say)))
    record = ranks.all_or_none(lambda: record_of(data))
    of_files = {split: record[split]["contents"] for split in SPLITS}
    rest = {**record, **{split: {**record[split], "contents": None} for split in SPLITS}}
    ranks.agree("the data", data.image_shape, json.dumps(rest))
    ranks.agree("the image files", json.dumps(of_files))
    return Batches(data, record, config.seed, device, ranks)


def example_of(batches: Batches, *, channels_last: bool) -> tuple[Tensor, ...]:
    """A few validation images, the same on every rank, which then trace and measure the same."""
    indices = torch.arange(min(8, len(batches.data.val_labels)), device="cpu")
    return batches.share(indices, 0, 0, train=False, channels_last=channels_last, whole=True)[:1]


def step_of(
    config: TrainConfig,
    prunetrain: PruneTrain,
    scaler: torch.amp.GradScaler,
    average: Average | None,
    watch: Stopwatch,
    device: torch.device,
) -> Step | CapturedStep:
    """One update; `watch` takes the time of the lasso in it."""
    assert isinstance(prunetrain.optimizer, torch.optim.Optimizer)
    step = Step(
        prunetrain.ddp or prunetrain.model,
        prunetrain.optimizer,
        scaler,
        prunetrain,
        device,
        amp=AMP_DTYPES[config.amp],
        ranks=prunetrain.ranks.world,
        parts=config.accumulate,
        clip=config.clip_grad,
        average=average,
        watch=watch,
    )
    return CapturedStep(step) if config.cuda_graphs else step


def _say_nothing(text: str) -> None:
    pass


def pruning_options(config: TrainConfig) -> dict[str, Any]:
    """Those arguments of PruneTrain that are options of the configuration."""
    return {
        "penalty_ratio": 0 if config.dense else config.penalty_ratio,
        "coefficient": config.coefficient,
        "interval": config.interval,
        "threshold": config.threshold,
        "relative": config.relative,
        "policy": config.policy,
        "round_to": config.round_to,
        "fuse": config.fuse,
        "cost": config.policy_cost,
        "zeroing_tolerance": config.zeroing_tolerance,
        "keep_momentum": config.keep_momentum,
        "epochs": None if config.dense else config.epochs,
        "target": config.target_flops,
        "target_training": config.target_train_flops,
        "target_by": config.target_by,
        "target_focus": config.target_focus,
        "exclude": config.exclude,
        "min_channels": config.min_channels,
        "coefficients": multipliers(config.coefficients),
    }


# -- the checkpoint to go on from --------------------------------------------------------------------------------------


def saved_run(config: TrainConfig, *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """The checkpoint to go on from, if any; refuses to write over a run that nobody said to replace."""
    folder = Path(config.out)
    try:
        has_one = has_checkpoint(folder)
        if not (resume or overwrite) and (has_one or is_there(folder / "config.json")):
            raise InputError(f"'{folder}' holds a run already; add --resume to go on, --overwrite to replace it.")
        if is_folder(folder):
            remove_leftovers(folder, RUN_FILES)
    except OSError as error:
        raise InputError(f"the run folder '{folder}' cannot be used: {reason(error)}.") from error
    if overwrite or not has_one:
        return None
    checkpoint, saved, note = newest(folder)
    saved["note"] = note
    if "config" not in saved["extra"]:
        raise CheckpointError(f"'{checkpoint}' was not written by `prunetrain train`; choose another --out.")
    defaults = json.loads(json.dumps(asdict(TrainConfig(out=""))))  # of options that came later
    before = options_of(checkpoint, saved["extra"], defaults)
    for option, value in json.loads(json.dumps(asdict(config))).items():
        if option == "start_from" and value is not None and before[option] is not None:
            continue  # it is not read again, so it may have moved
        if option not in NOT_COMPARED and value != before[option] and not is_smaller_batch(option, value, before):
            raise CheckpointError(
                f"'{folder}' was trained {other_option(option, before[option], value)}; resume with the same options, "
                "or choose another --out."
            )
    return saved


@contextmanager
def held_folder(config: TrainConfig, ranks: Ranks) -> Iterator[None]:
    """Keeps other processes out of the run folder; the first rank holds it, for all of them."""
    with ExitStack() as stack:
        folder = Path(config.out)
        ranks.all_or_none(lambda: stack.enter_context(locked(folder, _say_to_user)) if ranks.first else None)
        yield


def _say_to_user(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def is_smaller_batch(option: str, value: Any, before: dict[str, Any]) -> bool:
    """Whether an option that a run goes on with only makes its steps smaller, so that they fit the memory."""
    if option == "batch":
        return bool(value < before[option])
    if option in ("batch_limit", "memory_budget"):
        return value is not None and (before[option] is None or value < before[option])
    return False


def take_smaller_batch(training: "Training", before: dict[str, Any]) -> None:
    """Makes the batch of a run that goes on as small as its options ask for now, and the learning rate with it.

    Args:
        before: the options that it had.
    """
    config, batch, parts = training.config, training.prunetrain.batch, training.parts
    was = before["batch"] if batch is None else batch.size * parts
    size = min(was, config.batch) if config.batch < before["batch"] else was
    if batch is not None and config.batch_limit is not None:
        size = min(size, config.batch_limit)
        batch.maximum = config.batch_limit // parts
    if batch is not None and config.memory_budget != before.get("memory_budget"):
        batch.budget_bytes = config.memory_budget
    if size == was:
        return
    if batch is not None:
        batch.size = size // parts
    ratio = {"linear": size / was, "sqrt": math.sqrt(size / was), "none": 1.0}[config.lr_rule]
    scale_learning_rate(training.optimizer, training.scheduler, ratio)
    training.say(f"going on with {size} images per step instead of {was}, and {ratio:.4g} times the learning rate")


def compare_data(
    config: TrainConfig,
    record: dict[str, Any],
    saved: dict[str, Any] | None,
    start: dict[str, Any] | None,
    say: Callable[[str], None],
) -> None:
    """Refuses data that are not those of the run that goes on, or that this one starts from; says what else differs."""
    known = [check_same_data(config, saved, record)] if saved is not None else []
    known += [check_start_data(config, start, record)] if start is not None else []
    if not all(known):
        what = f"'{Path(config.out)}'" if saved is not None else f"--start-from {config.start_from}"
        say(
            f"{what} was written by a version that kept no record of its data: they could not be compared with "
            f"'{config.data}'"
        )


def check_same_data(config: TrainConfig, saved: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether the data of a run that goes on could be compared: older runs have no record of theirs.

    Raises:
        CheckpointError: they are not what the run was trained on; says what differs.
    """
    differs = difference_from(Path(config.out) / CHECKPOINT, saved, now)
    if differs:
        raise CheckpointError(
            f"'{config.out}' was not trained on what '{config.data}' holds now: {differs}; restore the data, or choose "
            "another --out."
        )
    return saved["extra"].get("data") is not None


def check_start_data(config: TrainConfig, start: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether the data that `--start-from` was trained on could be compared: older runs have no record of them.

    Raises:
        CheckpointError: they are not this run's, and nobody said that they need not be; says what differs.
    """
    assert config.start_from is not None
    differs = difference_from(Path(config.start_from), start, now)
    if differs and not config.start_from_other_data:
        raise CheckpointError(
            f"--start-from {config.start_from} was not trained on what '{config.data}' holds: {differs}; give the data "
            "of that run, or add --start-from-other-data."
        )
    return start["extra"].get("data") is not None


def difference_from(path: Path, payload: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What differs between the data that a checkpoint was trained on and those of the record `now`; None if nothing
    does, or where the checkpoint has no record.

    Raises:
        CheckpointError: the checkpoint's record is damaged.
    """
    before = payload["extra"].get("data")
    try:
        return None if before is None else difference_of_data(before, now)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the record of the data in '{path}' cannot be read; choose another --out.") from error


# -- parts of a training -----------------------------------------------------------------------------------------------


def device_of(config: TrainConfig) -> torch.device:
    """The device to train on; of several processes on a machine, each has a GPU of its own."""
    name, local, many = (
        config.device,
        int(os.environ.get("LOCAL_RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")) > 1,
    )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if many and name.startswith("cuda"):
        if name != "cuda":
            raise InputError(f"--device {name} is one GPU, and every process needs its own: use --device cuda.")
        if local >= torch.cuda.device_count():
            raise InputError(
                f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}; start as many "
                "processes as there are GPUs (torchrun --nproc-per-node=gpu), or use --device cpu."
            )
        name = f"cuda:{local}"
    try:
        device = torch.device(name)
        if config.cuda_graphs and device.type != "cuda":
            raise InputError(f"--cuda-graphs needs a GPU, and this run is on the {name}; leave it out.")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {config.device} cannot be used here: {first_line(error)}.") from error
    if many and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def check_ranks(config: TrainConfig, ranks: Ranks) -> None:
    """Raises where the batch cannot be shared out, or the ranks were started with different options."""
    if ranks.world > 1 and (config.batch % ranks.world or config.batch < SMALLEST_BATCH * ranks.world):
        raise InputError(
            f"--batch {config.batch} is the batch of all {ranks.world} processes together: it must be a multiple of "
            f"{ranks.world}, and at least {SMALLEST_BATCH * ranks.world}."
        )
    parts = ranks.world * config.accumulate
    if config.accumulate > 1 and (config.batch % parts or config.batch < SMALLEST_BATCH * parts):
        raise InputError(
            f"--batch {config.batch} is cut into --accumulate {config.accumulate} parts by each of {ranks.world} "
            f"processes: it must be a multiple of {parts}, and at least {SMALLEST_BATCH * parts}."
        )
    if config.cuda_graphs and ranks.world > 1:
        raise InputError("--cuda-graphs captures the step of one process only; leave it out under torchrun.")
    options = {name: value for name, value in asdict(config).items() if name not in NOT_COMPARED}
    ranks.agree("the options", json.dumps(options, sort_keys=True))


def environment(device: torch.device, ranks: Ranks) -> dict[str, Any]:
    """What the numbers of a run were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "device_name": name,
        "processor": processor(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "threads_used": torch.get_num_threads(),
        "ranks": ranks.world,
    }


def optimizer_class(config: TrainConfig) -> type[torch.optim.SGD]:
    if config.proximal:
        return ProximalSGD
    return SGD if config.fuse or config.cuda_graphs else torch.optim.SGD


def optimizer_of(config: TrainConfig, model: nn.Module) -> torch.optim.SGD:
    return optimizer_class(config)(
        parameter_groups(config, model), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )


def parameter_groups(config: TrainConfig, model: nn.Module) -> list[Any]:
    """All parameters; with --no-decay-norms the vectors (normalisation and biases) in a group without weight decay."""
    parameters = list(model.parameters())
    if not config.no_decay_norms:
        return parameters
    vectors = [p for p in parameters if p.dim() <= 1]
    return [{"params": [p for p in parameters if p.dim() > 1]}, {"params": vectors, "weight_decay": 0.0}]


def scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """The learning rate's scheduler, to be stepped after each epoch: an epoch has fewer steps as the batch grows."""
    if config.schedule == "onecycle":
        return OneCycleLR(optimizer, config.lr, total_steps=config.epochs, cycle_momentum=False)
    warmup = config.warmup
    after: LRScheduler
    if config.schedule == "cosine":
        after = CosineAnnealingLR(optimizer, config.epochs - warmup)
    else:
        milestones = sorted({max(1, round(config.epochs * share)) for share in config.decay_at})
        after = MultiStepLR(optimizer, [max(0, epoch - warmup) for epoch in milestones], config.decay)
    if not warmup:
        return after
    rising = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [rising, after], [warmup])


def dense_start(config: TrainConfig) -> dict[str, Any]:
    """The checkpoint of the dense network that `config.start_from` names."""
    assert config.start_from is not None
    path = Path(config.start_from)
    if is_folder(path):
        path = path / CHECKPOINT
    if path.parent.resolve() == Path(config.out).resolve():
        raise InputError(f"--start-from {config.start_from} is the run folder itself; choose another --out.")
    path, payload, _ = newest(path)
    if "config" not in payload["extra"]:
        raise CheckpointError(f"'{path}' was not written by `prunetrain train`; --start-from needs one that was.")
    trained = options_of(path, payload["extra"], json.loads(json.dumps(asdict(TrainConfig(out="")))))
    if trained["model"] != config.model:
        raise CheckpointError(
            f"--start-from {config.start_from} is a {trained['model']}, not a {config.model}; give the same --model."
        )
    if not trained["dense"] or payload["stand_ins"]:
        raise CheckpointError(
            f"--start-from {config.start_from} was pruned while it trained; give a run trained with --dense."
        )
    if not is_finished(payload["extra"], trained):
        raise CheckpointError(
            f"--start-from {config.start_from} is unfinished, {payload['extra']['epoch']} of {trained['epochs']} "
            "epochs; finish it first with --resume."
        )
    return payload


def check_dense_start(config: TrainConfig, model: nn.Module, start: dict[str, Tensor]) -> None:
    """Raises CheckpointError unless `start` has tensors of the model's names and shapes, and no others."""
    fresh = model.state_dict()
    for name in (*fresh, *start):
        new, trained = (tuple(state[name].shape) if name in state else "absent" for state in (fresh, start))
        if new != trained:
            raise CheckpointError(
                f"--start-from {config.start_from}: '{name}' is {trained} there and {new} in this network; it must be "
                "a dense run of the same --model, with as many classes."
            )


def load_data(config: TrainConfig, device: torch.device, say: Callable[[str], None] | None = None) -> ImageData:
    """`say` is told what will be decoded, and where it will be kept, before that begins."""
    recipe = recipe_of(config)
    data = load(
        config.data,
        image_size=config.image_size if recipe is None else None,
        cache=None if config.cache is None else Path(config.cache),
        limit_train=config.limit_train,
        limit_val=config.limit_val,
        seed=config.seed,
        classes=config.classes,
        recipe=recipe,
        say=say,
    )
    if config.crop is not None and recipe is None:
        data = dataclasses.replace(data, crop=config.crop, padding=0)
    if len(data.train_labels) < 2 or len(data.val_labels) < 1:
        raise InputError(f"'{config.data}' has too few images: training needs 2 and validation 1; raise the limits.")
    if isinstance(data.train_images, ImageFiles):
        return data
    small = data.train_images.numel() + data.val_images.numel() <= FIT_ON_DEVICE
    return data.to(device) if device.type == "cuda" and small else data


def recipe_of(config: TrainConfig) -> ResizedCrop | None:
    """How images that stay files are read; None where they do not. The processes of a machine share its cores."""
    if config.augment != "resized-crop":
        return None
    assert config.crop is not None
    workers = config.workers or max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    limit = CACHE_LIMIT if config.cache_limit is None else config.cache_limit
    return ResizedCrop(config.crop, config.image_size, workers, limit)


def build_model(config: TrainConfig, data: ImageData, device: torch.device, ranks: Ranks) -> nn.Module:
    channels, height, width = data.image_shape
    with torch.device("cpu"):  # the same weights on every device
        model = build(config.model, data.classes, in_channels=channels)
    least = getattr(model, "minimum_input_size", 1)
    if min(height, width) < least:
        raise InputError(
            f"{config.model} needs images of at least {least} x {least} pixels, and those of '{config.data}' are "
            f"{height} x {width}; choose another --model, or --image-size."
        )
    model.to(device)
    if config.sync_batch_norm and ranks.world > 1:
        synchronize_batch_norm(model)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def check_logits(config: TrainConfig, model: nn.Module, example: tuple[Tensor, ...], classes: int) -> None:
    model.eval()
    with torch.no_grad(), eagerly(model):
        logits = model(*example)
    model.train()
    if not isinstance(logits, Tensor) or logits.shape != (len(example[0]), classes):
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(
            f"{config.model} must return one logit for each of the data's {classes} classes, shape "
            f"({len(example[0])}, {classes}) for {len(example[0])} images, but returned {got}."
        )


def mini_batch(config: TrainConfig, images: int, ranks: Ranks) -> MiniBatch | None:
    """One micro-batch of one rank that grows, or None; the options are of all together, but for the memory."""
    parts = ranks.world * config.accumulate
    if config.dense or not config.grow_batch:
        return None
    limit = config.batch_limit if config.batch_limit is not None else max(images, config.batch)
    return MiniBatch(
        config.batch // parts,
        granularity=math.lcm(config.batch_granularity, parts) // parts,
        budget_bytes=config.memory_budget,
        maximum=limit // parts,
        learning_rate=config.lr_rule,
    )
