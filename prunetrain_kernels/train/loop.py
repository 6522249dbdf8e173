"""The training loop (paper Algorithm 1), from a configuration to a run folder.

Read it from top to bottom: `train`; `begin`, before the first step; `train_epoch`, the steps and the reconfigurations;
`end_epoch`, the validation, the log and the checkpoint; `finish`. All are functions over a `Training`, which is what a
run is made of, and a `Progress`, which is how far it is.

The folder's `checkpoint.pt` carries everything, the log too, so a run killed at any moment goes on from its last
checkpoint to the same result. One is written after every epoch, and after the step at which the run is asked to stop.
Under torchrun the same loop runs in every process. Each makes its share of every batch, `DistributedDataParallel`
averages the gradients, and the first process writes the folder (`distributed.py`).
"""

import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from prunetrain_kernels.compiled import compiling, eagerly
from prunetrain_kernels.cost import share, share_text
from prunetrain_kernels.data import epoch_order
from prunetrain_kernels.data.dataset import seeded_generator
from prunetrain_kernels.errors import DivergedError, InputError, TrainingStopped
from prunetrain_kernels.train import setup
from prunetrain_kernels.train.config import TrainConfig
from prunetrain_kernels.train.distributed import Ranks, answering, telling_why
from prunetrain_kernels.train.forecast import Forecast
from prunetrain_kernels.train.layout import leave_channels_last
from prunetrain_kernels.train.logged import TensorBoard, check_tensorboard
from prunetrain_kernels.train.prune_report import PruneReport
from prunetrain_kernels.train.run_checkpoint import PREVIOUS, load_run, save_run, take_random_numbers, taking_up
from prunetrain_kernels.train.run_lock import check_held
from prunetrain_kernels.train.setup import Training
from prunetrain_kernels.train.step import CapturedStep
from prunetrain_kernels.train.stopping import StopRequest, name_of
from prunetrain_kernels.train.tally import Costs, EpochSums, Totals, costs_now, is_finite, summary_of

CHECK_EVERY = 20  # steps between looks at the loss: each look waits for the device
ASK_EVERY = 8  # steps on several GPUs between questions whether the run is to end
VALIDATION_BATCH = 500
SAID_AT_THE_END = "target of .* not met"  # by `finish`, so that PruneTrain need not warn of it


@dataclass
class Progress:
    """What changes between epochs, beside the objects of the `Training`.

    Attributes:
        channels_last: whether images are in that layout; a run may have to leave it.
        costs: of the network in its present shape.
        stop: whether the run is asked to stop.
        epoch: finished epochs; `totals`: sums over them.
        sums: over the steps of the epoch that runs.
        within: that epoch has begun and is not finished, as in a checkpoint that was written inside it; `trained`: its
            steps and reconfigurations are done, and it is being validated.
        loss, accuracy: of that epoch's images so far, as of the last look.
        ahead: where the lasso leads, as of the last epoch's end; None where there is none.
        mark: `time.perf_counter()` when the last epoch ended.
        bar: shows the images trained; `board`: TensorBoard's files, of --tensorboard.
    """

    channels_last: bool
    costs: Costs
    stop: StopRequest
    epoch: int = 0
    totals: Totals = field(default_factory=Totals)
    sums: EpochSums = field(init=False)
    within: bool = False
    trained: bool = False
    loss: float = math.nan
    accuracy: float = math.nan
    ahead: Forecast | None = None
    mark: float = 0.0
    bar: Any = None
    board: TensorBoard = field(default_factory=TensorBoard)


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    stop: StopRequest | None = None,
) -> Path:
    """Trains a network and returns its run folder.

    Args:
        config: what to train, and how.
        resume: go on from the folder's checkpoint if there is one.
        overwrite: start anew in a folder that holds a run.
        progress: show a progress bar (on a terminal) and a line per reconfiguration.
        stop: once its `number` is set, on any rank and from any thread, the run saves its checkpoint after the step
            that it is in, on all ranks, and raises `TrainingStopped`.

    Raises:
        InputError: an option, the data, the model or the folder cannot be used.
        CheckpointError: a checkpoint cannot be written or read, or is of other options.
        DivergedError: the loss is not a number.
        RanksDifferError, RankLostError: processes that train together hold different values, or one of them is gone.
        TrainingStopped: `stop` asked for it.
    """
    config.check()
    if config.tensorboard is not None:
        check_tensorboard()
    if resume and overwrite:
        raise InputError("--resume goes on with a run and --overwrite replaces it; choose one.")
    with (
        telling_why(),
        answering("the last checkpoint is kept, start again with --resume, on any number of processes"),
        compiling("leave --compile out"),
    ):
        device = setup.prepare_process(config)
        ranks = Ranks.of_environment(on_gpu=device.type == "cuda", timeout=config.rank_timeout)
        with setup.held_folder(config, ranks):
            saved = ranks.all_or_none(lambda: setup.saved_run(config, resume=resume, overwrite=overwrite))
            return _train(config, (device, ranks), saved, stop or StopRequest(), show=progress)


def _train(
    config: TrainConfig,
    place: tuple[torch.device, Ranks],
    saved: dict[str, Any] | None,
    stop: StopRequest,
    *,
    show: bool,
) -> Path:
    """Trains on a device, as one of the ranks, from a checkpoint or anew."""
    try:
        training, progress = begin(config, place, saved, stop, show=show)
    except torch.OutOfMemoryError:
        raise InputError(
            f"a step of {config.batch} images does not fit the device's memory; use a smaller --batch."
        ) from None
    try:
        stop.can_wait = True
        for epoch in range(progress.epoch, training.total_epochs):
            if epoch == config.epochs:
                training.prunetrain.regularizing = False
            train_epoch(training, progress, epoch)
            end_epoch(training, progress, epoch)
            if progress.epoch < training.total_epochs:
                stop_if_asked(training, progress)
    finally:
        progress.bar.close()
        progress.board.close()
        training.batches.expect_nothing()
    finish(training, progress)
    return training.folder


# -- before the first step ---------------------------------------------------------------------------------------------


def begin(
    config: TrainConfig,
    place: tuple[torch.device, Ranks],
    saved: dict[str, Any] | None,
    stop: StopRequest,
    *,
    show: bool,
) -> tuple[Training, Progress]:
    """Sets everything up, anew or from the folder's checkpoint, and writes the folder's first files.

    Args:
        place: the device, and the ranks.
        saved: the checkpoint, which is read again, into the network; None to begin anew.
        stop: as of `train`; `show`: its `progress`.
    """
    ranks = place[1]
    from_dense = saved is None and config.start_from is not None
    start = ranks.all_or_none(lambda: setup.dense_start(config)) if from_dense else None
    training = setup.training_of(config, place, saved, start, show=show)
    if saved is not None:
        with taking_up(training.checkpoint):
            progress = restore(training, stop)
        progress.board = board_of(training, after=progress.epoch)
    else:
        board = board_of(training)  # before the folder's first file: it may not be writable
        progress = begin_anew(training, None if start is None else start["model"], stop)
        progress.board = board
    if training.ranks.first:
        training.log.save()
    images = len(training.data.train_labels)
    progress.bar = tqdm(
        total=training.total_epochs * images,
        initial=progress.epoch * images + (progress.sums.images if progress.within else 0),
        unit="img",
        unit_scale=True,
        disable=None if show and training.ranks.first else True,
        dynamic_ncols=True,
    )
    if progress.costs.unknown:
        training.say(f"costs that stay unknown, here and in the log: {progress.costs.unknown}")
    if saved is not None:
        step = f", in the next one after step {progress.sums.steps}" if progress.within else ""
        training.say(f"resuming after epoch {progress.epoch} of {training.total_epochs}{step}")
    progress.mark = time.perf_counter()
    return training, progress


def board_of(training: Training, *, after: int = 0) -> TensorBoard:
    """TensorBoard's files, in the first process and if they are asked for; `after` so many epochs."""
    folder = training.config.tensorboard
    return TensorBoard(None if folder is None or not training.ranks.first else Path(folder), after)


def begin_anew(training: Training, start: dict[str, Tensor] | None, stop: StopRequest) -> Progress:
    """The first records of a new run; `start` has the tensors of the dense network that it starts from."""
    if start is not None:
        start_from(training, start)
    progress = Progress(training.config.channels_last, present_costs(training), stop)
    progress.totals.dense = asdict(progress.costs)
    begin_folder(training)
    log_channels(training)
    training.log.add_slices(0, training.prunetrain.slice_sizes())
    return progress


def begin_folder(training: Training) -> None:
    """Begins the run's folder: only now, when nothing in the options can fail any more, may an older run go."""
    if not training.ranks.first:
        return
    try:
        for path in (training.checkpoint.with_name(PREVIOUS), training.checkpoint):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot remove '{training.checkpoint}': {error.strerror or error}.") from error
    environment = setup.environment(training.device, training.ranks)
    training.log.write_config({**asdict(training.config), **environment, "data_record": training.batches.record})


def restore(training: Training, stop: StopRequest) -> Progress:
    """Takes up the folder's checkpoint."""
    states = {"scheduler": training.scheduler.state_dict(), "scaler": training.scaler.state_dict()}
    extra = load_run(training.folder, training.saved_parts, states)
    first, training.prunetrain.first_batch = training.prunetrain.first_batch, None
    if first is not None:  # this loop's batches are as large by themselves, but for an epoch's last one
        first.forget()
    if isinstance(training.step, CapturedStep):
        training.step.rates_to_device()
    training.scheduler.load_state_dict(extra["scheduler"])
    training.scaler.load_state_dict(extra["scaler"])
    training.log.load_state_dict(extra["log"])
    setup.take_smaller_batch(training, json.loads(extra["config"]))
    channels_last = stays_channels_last(training, channels_last=training.config.channels_last)
    progress = Progress(channels_last, present_costs(training), stop, extra["epoch"], Totals(**extra["totals"]))
    within = extra.get("within")  # absent from checkpoints of versions that wrote them between epochs only
    if within is not None:
        begin_epoch(training, progress)
        progress.trained, training.watch.seconds = within["trained"], within["lasso"]
        training.sent.total = within["sent"]
        progress.sums.load_state_dict(within["sums"], training.ranks.rank, training.ranks.world)
    take_random_numbers(extra, training.device)  # last: nothing may draw between here and the next step
    return progress


def start_from(training: Training, start: dict[str, Tensor]) -> None:
    """Sets lambda from the fresh network, as a run without a start would, then takes up the trained one's tensors.

    A trained network's first loss is next to nothing, and lambda by Eq. 3 with it; this is the lambda of the
    PruneTrain run with the same ratio and seed (paper section 5.2: "we apply our proposed mechanism to SSL").
    """
    config, model, prunetrain = training.config, training.model, training.prunetrain
    setup.check_dense_start(config, model, start)
    if prunetrain.penalty_ratio > 0:
        devices = [training.device] if training.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad(), training.autocast(), eagerly(model):
            order = epoch_order(len(training.data.train_labels), config.seed, 0)
            indices = order[: training.batch_size]
            images, labels = training.batches.share(indices, 0, 0, train=True, channels_last=config.channels_last)
            model.train()
            # of the mean loss of this share in the mean over ranks: 1, but where the batch has unequal shares
            weight = len(labels) * training.ranks.world / len(indices)
            loss = F.cross_entropy(model(images), labels) * weight
        prunetrain.set_coefficient(loss, prunetrain.lasso.penalty())
    for network in (model, *training.copies):
        network.load_state_dict(start)


# -- what a change of the network brings with it -----------------------------------------------------------------------


def present_costs(training: Training) -> Costs:
    images = training.batch_size // training.parts
    return costs_now(training.prunetrain, training.example, training.optimizer, images)


def stays_channels_last(training: Training, *, channels_last: bool) -> bool:
    """Whether images are in channels_last from now on; the model leaves it where a CPU would corrupt memory."""
    reason = leave_channels_last(training.model, training.ddp) if channels_last else ""
    if reason:
        training.say(reason)
    return channels_last and not reason


def log_channels(training: Training) -> None:
    prunetrain = training.prunetrain
    number, epoch = len(prunetrain.history), round(prunetrain.epochs, 9)
    training.log.add_channels(
        [{"reconfiguration": number, "epoch": epoch, **row} for row in prunetrain.channel_table()]
    )


# -- one epoch ---------------------------------------------------------------------------------------------------------


def train_epoch(training: Training, progress: Progress, epoch: int) -> None:
    """Steps over all training images, with reconfigurations inside the epoch where the interval asks for it."""
    if not progress.within:
        begin_epoch(training, progress)
    training.model.train()
    progress.bar.set_description(f"epoch {epoch + 1}/{training.total_epochs}")
    images_in_epoch, sums = len(training.data.train_labels), progress.sums
    order = epoch_order(images_in_epoch, training.config.seed, epoch)
    position = sums.images
    while not progress.trained and images_in_epoch - position >= training.smallest_batch:
        size = min(training.batch_size, images_in_epoch - position)
        start = time.perf_counter()
        training.batches.expect(order[position:], training.batch_size, epoch, train=True)
        fits = True
        try:
            make_step(training, progress, order[position : position + size], epoch)
        except torch.OutOfMemoryError:
            fits = False  # dealt with below, where the exception no longer holds the step's tensors
        if not fits:
            fall_back(training)
            continue
        if size == training.batch_size:
            sums.step_times.append(time.perf_counter() - start)
        position += size
        count(training, progress, size)
        if sums.steps % CHECK_EVERY == 0:
            look(training, progress, epoch)
        if training.prunetrain.interval % 1 and reconfigures(training, epoch):
            advance(training, progress, epoch, epoch + position / images_in_epoch)
        if asks_after(sums.steps, training.ranks, training.device):
            stop_if_asked(training, progress)
    look(training, progress, epoch)
    if progress.trained:
        return
    sums.stop()
    if not is_finite(training.model):  # before it reaches a checkpoint: the last step's loss does not show it
        raise diverged(training, progress, epoch, "a weight became nan or infinite")
    if reconfigures(training, epoch):
        advance(training, progress, epoch, epoch + 1)
    bar = progress.bar
    bar.update((epoch + 1) * images_in_epoch - bar.n if not bar.disable else 0)


def begin_epoch(training: Training, progress: Progress) -> None:
    rate = float(training.optimizer.param_groups[0]["lr"])
    progress.sums = EpochSums(training.batch_size, rate, training.device)
    progress.within, progress.trained = True, False
    training.sent.total = 0


def make_step(training: Training, progress: Progress, indices: Tensor, epoch: int) -> None:
    """One update, on the images of the given numbers."""
    ranks, sums = training.ranks, progress.sums
    if ranks.world > 1:  # dropout: otherwise on every rank, and known without the steps before
        place = seeded_generator("dropout", training.config.seed, epoch, sums.steps, ranks.rank)
        torch.manual_seed(place.initial_seed())
    images, labels = training.batches.share(
        indices, epoch, sums.steps, train=True, channels_last=progress.channels_last
    )
    loss, hits = training.step(images, labels, len(indices))
    sums.loss += loss * (len(indices) / ranks.world)
    sums.correct += hits


def fall_back(training: Training) -> None:
    """Goes on with one granule fewer images after running out of memory, if PruneTrain manages the batch."""
    ranks, size = training.ranks, training.batch_size
    training.optimizer.zero_grad(set_to_none=True)
    training.step.reset()
    torch.cuda.empty_cache()
    if ranks.world > 1:  # the others are in the middle of this step, and wait for this rank's gradients
        raise InputError(
            f"a step of {size} images on {ranks.world} ranks does not fit the memory of rank "
            f"{ranks.rank}; go on from the last checkpoint with --resume and a smaller --batch"
            f"{' or --batch-limit' if training.prunetrain.batch is not None else ''}."
        )
    if training.prunetrain.batch is None or size <= training.smallest_batch:
        raise InputError(f"a step of {size} images does not fit the device's memory; use a smaller --batch.")
    training.prunetrain.batch.fall_back(training.optimizer, training.scheduler)
    training.say(f"out of memory: going on with {training.batch_size} images per step")


def count(training: Training, progress: Progress, size: int) -> None:
    progress.sums.count(size, training.parts, progress.costs)
    sizes = progress.totals.batch_sizes
    if not sizes or sizes[-1] != training.batch_size:
        sizes.append(training.batch_size)
    progress.bar.update(size)


def look(training: Training, progress: Progress, epoch: int) -> None:
    """Waits for the device, shows how it goes, and stops if the loss is not a number."""
    sums, prunetrain = progress.sums, training.prunetrain
    loss_sum, correct = training.ranks.sum(torch.stack([sums.loss, sums.correct])).tolist()
    progress.loss, progress.accuracy = loss_sum / max(sums.images, 1), correct / max(sums.images, 1)
    if not math.isfinite(progress.loss):
        raise diverged(training, progress, epoch, f"the loss became {progress.loss}")
    left = share_text(prunetrain.flops.of(prunetrain.dense_flops)[0])
    if progress.ahead is not None and not math.isnan(progress.ahead.inference):
        left += f" (inference {progress.ahead.inference:.0%} at the end)"
    progress.bar.set_postfix_str(
        f"loss {progress.loss:.3f}, accuracy {progress.accuracy:.1%}, FLOPs {left}, batch {training.batch_size}"
    )


def diverged(training: Training, progress: Progress, epoch: int, what: str) -> DivergedError:
    finished = progress.epoch
    kept = f"epoch {finished} is kept in '{training.checkpoint}'" if finished else "there is no checkpoint yet"
    return DivergedError(
        f"{what} in epoch {epoch + 1} (by step {progress.sums.steps}); {kept}. "
        "Start anew with a lower --lr or --penalty-ratio."
    )


# -- reconfigurations --------------------------------------------------------------------------------------------------


def reconfigures(training: Training, epoch: int) -> bool:
    """Whether the interval rules in this epoch."""
    config = training.config
    return not config.dense and config.reconfigure_once is None and epoch < config.epochs


def advance(training: Training, progress: Progress, epoch: int, reached: float) -> None:
    """Counts up to `reached` epochs; reconfigures if that is due."""
    prunetrain = training.prunetrain
    step = max(0.0, reached - prunetrain.epochs)
    if prunetrain.is_due(step):
        reconfigure(training, progress, epoch, lambda: prunetrain.advance(step))
        return
    if reached < training.config.epochs:  # with an interval below an epoch this runs at every step
        prunetrain.advance(step)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=SAID_AT_THE_END)
        prunetrain.advance(step)


def reconfigure(training: Training, progress: Progress, epoch: int, act: Callable[[], PruneReport | None]) -> None:
    """Runs a reconfiguration, with its time, log rows and new costs."""
    look(training, progress, epoch)  # waits for the steps, whose time is none of the reconfiguration's
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*in channels_last writes beyond")  # heeded below
        warnings.filterwarnings("ignore", message=SAID_AT_THE_END)
        report = act()
    assert report is not None
    progress.channels_last = stays_channels_last(training, channels_last=progress.channels_last)
    if report.reconfiguration.changed or report.batch != report.batch_before:
        training.step.reset()
    done = time.perf_counter()
    progress.sums.reconfigure_seconds += done - start
    if report.reconfiguration.changed:
        progress.costs = present_costs(training)
    log_channels(training)
    # for the log only: a user without one does not pay it
    progress.sums.measure_seconds += time.perf_counter() - done
    if report.reconfiguration.changed:
        training.say(str(report))


def reconfigure_at_the_end(training: Training, progress: Progress, epoch: int) -> None:
    """The single reconfiguration of --reconfigure-once, or the last one, of what the last epochs made sparse."""
    config, prunetrain, finished = training.config, training.prunetrain, epoch + 1
    if finished == config.reconfigure_once:
        prunetrain.epochs = finished
        reconfigure(training, progress, epoch, prunetrain.reconfigure)
    elif finished == config.epochs and reconfigures(training, epoch):
        history = prunetrain.history
        if not history or history[-1]["epoch"] < prunetrain.epochs - 1e-6:
            reconfigure(training, progress, epoch, prunetrain.reconfigure)


# -- after each epoch --------------------------------------------------------------------------------------------------


def end_epoch(training: Training, progress: Progress, epoch: int) -> None:
    """Remaining reconfigurations, validation, log and checkpoint."""
    config, average = training.config, training.average
    if not progress.trained:
        reconfigure_at_the_end(training, progress, epoch)
    progress.trained = True
    accuracy = validate(training, progress, training.model)
    ema_accuracy = None if average is None else validate(training, progress, average.network)
    lasso = training.watch.take()
    compilations, compile_seconds = training.compilations.take()
    if config.schedule == "step" or epoch + 1 < config.epochs:  # other schedules end with the lasso
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")  # made before the resume
            training.scheduler.step()
    progress.epoch = epoch + 1
    now = time.perf_counter()
    progress.totals.add(progress.sums, lasso, now - progress.mark, training.sent.total)
    progress.totals.compilations += compilations
    progress.totals.compile += compile_seconds
    progress.mark = now
    log_epoch(
        training,
        progress,
        lasso,
        val_accuracy=accuracy,
        ema_accuracy=ema_accuracy,
        compilations=compilations,
        compile_seconds=compile_seconds,
    )
    progress.within = progress.trained = False
    save(training, progress)
    if progress.bar.disable:
        training.say(line_of_epoch(training, progress, accuracy, ema_accuracy))


def log_epoch(training: Training, progress: Progress, lasso: float, **cells: Any) -> None:
    """The epoch's row in log.csv, of which the last `cells` are given, and its sizes in slices.npz.

    Args:
        lasso: seconds that it took in this epoch.
    """
    prunetrain, finished = training.prunetrain, progress.epoch
    progress.ahead = prunetrain.forecast() if prunetrain.course is not None and prunetrain.active else None
    with torch.no_grad():
        penalty = float(prunetrain.lasso.penalty()) if prunetrain.penalty_ratio else None
    row = {
        "epoch": finished,
        "phase": "fine-tune" if finished > training.config.epochs else "train",
        "loss": progress.loss,
        "penalty": penalty,
        "train_accuracy": progress.accuracy,
        **cells,
        **progress.sums.row(progress.costs, lasso, training.sent.total),
        "wall_seconds": progress.totals.wall,
        **forecast_cells(training, progress.ahead),
    }
    training.log.add_epoch(row)
    progress.board.add(row, finished)
    training.log.add_slices(finished, prunetrain.slice_sizes())


def forecast_cells(training: Training, ahead: Forecast | None) -> dict[str, float]:
    """Lambda, the slices and where they lead, for the log; nothing where there is no lasso."""
    if ahead is None:
        return {}
    cells = {
        "lambda": training.prunetrain.coefficient or 0.0,
        "smallest_slice": ahead.smallest,
        "median_slice": ahead.median,
    }
    if math.isnan(ahead.inference):
        return cells
    return {**cells, "expected_inference": ahead.inference}


def line_of_epoch(training: Training, progress: Progress, accuracy: float, ema_accuracy: float | None) -> str:
    flops = share(progress.costs.training_flops, progress.totals.dense["training_flops"])
    return (
        f"epoch {progress.epoch}: loss {progress.loss:.4f}, accuracy {accuracy:.1%}"
        f"{'' if ema_accuracy is None else f' (average {ema_accuracy:.1%})'}, "
        f"training FLOPs {share_text(flops)}, batch {training.batch_size}, {progress.sums.seconds:.1f} s"
        f"{forecast_text(training, progress)}"
    )


def forecast_text(training: Training, progress: Progress) -> str:
    """Where the lasso will lead, as a part of the epoch's line; nothing where there is none."""
    if progress.ahead is None or progress.costs.unknown:
        return ""
    return f", lambda {training.prunetrain.coefficient or 0:.2g}, {progress.ahead}"


@torch.no_grad()
def validate(training: Training, progress: Progress, network: nn.Module) -> float:
    """Share of validation images that a network classifies correctly, 0..1."""
    training.ranks.share_buffers(network)
    network.eval()
    total = len(training.data.val_labels)
    correct = torch.zeros((), device=training.device)
    order = torch.arange(total, device="cpu")
    for position in range(0, total, VALIDATION_BATCH):
        stop_if_asked(training, progress)
        training.batches.expect(order[position:], VALIDATION_BATCH, 0, train=False)
        indices = order[position : position + VALIDATION_BATCH]
        images, labels = training.batches.share(indices, 0, 0, train=False, channels_last=progress.channels_last)
        if len(labels):
            with training.autocast():
                correct += (network(images).argmax(1) == labels).sum()
    network.train()
    return float(training.ranks.sum(correct)) / total


def asks_after(steps: int, ranks: Ranks, device: torch.device) -> bool:
    """Whether `stop_if_asked` is called after this step. Ranks have to agree, for which the host waits for a GPU: there
    not after every step, but after so few that the signal's grace (`stopping.GRACE`) is not over."""
    return ranks.world == 1 or device.type != "cuda" or steps % ASK_EVERY == 0


def stop_if_asked(training: Training, progress: Progress) -> None:
    """Ends the run between two steps, on all ranks, if one of them is asked to; raises TrainingStopped then."""
    ranks = training.ranks
    number = -ranks.least(-progress.stop.number)
    if not number:
        return
    after = f"epoch {progress.epoch}"
    if progress.within:  # else the checkpoint has just been written
        after = f"step {progress.sums.steps} of epoch {progress.epoch + 1}"
        look(training, progress, progress.epoch)
        if not is_finite(training.model):
            raise diverged(training, progress, progress.epoch, "a weight became nan or infinite")
        now = time.perf_counter()
        progress.totals.wall += now - progress.mark
        progress.mark = now
        save(training, progress)
    raise TrainingStopped(f"stopped by {name_of(number)} after {after}, which '{training.checkpoint}' holds", number)


def state_within(training: Training, progress: Progress) -> dict[str, Any] | None:
    """What a checkpoint holds of an epoch that is not finished; None between epochs. Every rank must ask."""
    if not progress.within:
        return None
    losses = training.ranks.gather(torch.stack([progress.sums.loss, progress.sums.correct]))
    return {
        "sums": progress.sums.state_dict(losses),
        "trained": progress.trained,
        "lasso": training.watch.take(),
        "sent": training.sent.total,
    }


def save(training: Training, progress: Progress) -> None:
    """Has the first rank write the checkpoint, which carries everything, and the log; the others wait."""
    within = state_within(training, progress)
    if training.ranks.first:
        check_held(training.folder, training.say)
        write_checkpoint(training, progress, within)
        training.log.save()
    training.ranks.wait()


def write_checkpoint(training: Training, progress: Progress, within: dict[str, Any] | None) -> None:
    device = training.device
    save_run(
        training.checkpoint,
        training.saved_parts,
        epoch=progress.epoch,
        within=within,
        scheduler=training.scheduler.state_dict(),
        scaler=training.scaler.state_dict(),
        log=training.log.state_dict(),
        totals=asdict(progress.totals),
        rng=torch.get_rng_state(),
        cuda_rng=torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        config=json.dumps(asdict(training.config)),
        data=training.batches.record,
        ranks=training.ranks.world,
        device=device.type,
    )


def finish(training: Training, progress: Progress) -> None:
    """Writes summary.json, which marks the run as finished."""
    prunetrain = training.prunetrain
    if prunetrain.steering is not None:
        training.say(prunetrain.verdict())
    full, rest = divmod(len(training.data.train_labels), training.config.batch)
    dense_steps = progress.epoch * (full + (rest >= training.smallest_batch))
    epochs = training.log.state_dict()["epochs"]
    if training.ranks.first:
        training.log.write_summary(
            {
                **summary_of(progress.totals, progress.costs, dense_steps, epochs),
                "lambda": prunetrain.coefficient,
                "target": None if prunetrain.steering is None else prunetrain.verdict(),
                "removed_layers": training.prunetrain.removed,
                "reconfigurations": training.prunetrain.history,
                **setup.environment(training.device, training.ranks),
            }
        )
    training.ranks.wait()
    training.ranks.close()
