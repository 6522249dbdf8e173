"""The checkpoint of a run folder: two generations, what else it holds, and what differs when a run goes on.

A new checkpoint leaves the one before as `checkpoint.previous.pt`, so a run takes twice the space of one. Where the
newest is damaged or missing, the run goes on from the one before, and says so.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunetrain_kernels.errors import CheckpointError, PruneTrainError
from prunetrain_kernels.files import is_folder, is_there
from prunetrain_kernels.probe import first_line
from prunetrain_kernels.prune.checkpoint import HasState, load_payload, payload_of, read_checkpoint, write_payload
from prunetrain_kernels.prune.schema import Place, alike, flag, listed, mapping, number, plain, tensor, text, whole
from prunetrain_kernels.train.tally import EpochSums, Totals
from prunetrain_kernels.versions import VERSION

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
TEXT_COLUMNS = ("phase", "unknown_costs")  # of log.csv; in the others are numbers
# Entries of schedulers in files that other versions of PyTorch wrote.
OF_OTHER_VERSIONS = ("verbose", "_is_initial", "_get_lr_called_within_step", "_initial_step")


def save_run(
    path: Path,
    parts: tuple[nn.Module, Optimizer, HasState, Sequence[nn.Module]],
    **extra: Any,
) -> None:
    """Writes a run's checkpoint, and keeps the one before.

    Args:
        parts: model, optimizer, PruneTrain and copies, as for `save_pruned`.
        extra: as for `save_pruned`.

    Raises:
        CheckpointError: as `save_pruned`.
    """
    extra = {**extra, "threads": torch.get_num_threads()}
    write_payload(path, payload_of(*parts, extra), previous=path.with_name(PREVIOUS))


def has_checkpoint(folder: Path) -> bool:
    """Whether a run folder holds a checkpoint, of whichever generation."""
    return any(is_there(folder / name) for name in (CHECKPOINT, PREVIOUS))


def newest(path: Path) -> tuple[Path, dict[str, Any], str]:
    """The newest checkpoint of a run that can be read: its path, its content, and a line to say if it is an older one.

    Args:
        path: the run folder, or a checkpoint in it; of another file than `checkpoint.pt` none is before.

    Raises:
        CheckpointError: none can be read; the message is about the newest.
    """
    path = path / CHECKPOINT if is_folder(path) else path
    previous = path.with_name(PREVIOUS)
    try:
        return path, read_run(path), ""
    except CheckpointError as error:
        if path.name != CHECKPOINT or not is_there(previous):
            raise
        failed = error
    try:
        payload = read_run(previous)
    except CheckpointError:
        raise failed from None
    epoch = payload["extra"].get("epoch")
    return previous, payload, f"{str(failed).rstrip('.')}; taking '{previous.name}' instead, of epoch {epoch}"


def read_run(path: Path) -> dict[str, Any]:
    """`read_checkpoint`, and what a run adds is checked too; other programs' files pass as they are."""
    payload = read_checkpoint(path)
    if "config" in payload["extra"]:
        _check_extra(payload["extra"], Place(f"'{path}'")["extra"])
    return payload


def load_run(
    folder: Path, parts: tuple[nn.Module, Optimizer, HasState, Sequence[nn.Module]], states: dict[str, Any]
) -> dict[str, Any]:
    """Takes up the newest checkpoint that can be read, as `load_pruned` does.

    Args:
        states: present states of what the caller loads by itself, by their names in the extra values: the saved ones
            must be of the same kinds.

    Raises:
        CheckpointError: it does not fit; nothing has been changed then.
    """
    path, payload, _ = newest(folder)
    for name, present in states.items():
        alike(payload["extra"].get(name), present, Place(f"'{path}'")["extra"][name], OF_OTHER_VERSIONS)
    model, optimizer, prunetrain, copies = parts
    return load_payload(path, payload, model, optimizer, (prunetrain, copies))


def options_of(path: Path, extra: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The options that a run was started with, each of the kind that it has now.

    Args:
        defaults: of options that came later.

    Raises:
        CheckpointError: the file does not tell them.
    """
    options = _json_of(extra["config"], Place(f"'{path}'")["extra"]["config"])
    for name, value in options.items():
        if name in defaults and value is not None and not _of_kind(value, defaults[name]):
            raise Place(f"'{path}'")["extra"]["config"][name].wrong(value, f"something like {defaults[name]!r}")
    return {**defaults, **options}


def _of_kind(value: Any, default: Any) -> bool:
    kinds = ((bool, bool), (int | float, int | float), (str, str), (list | tuple, list | tuple), (dict, dict))
    return default is None or any(isinstance(default, a) and isinstance(value, b) for a, b in kinds)


def what_differs(extra: dict[str, Any], versions: dict[str, str], *, ranks: int, device: str) -> Iterator[str]:
    """Lines on what changes a resumed run's results: threads, processes, device, versions. Older files tell none.

    Args:
        ranks, device: the number of processes and the kind of device, such as "cpu", that it has now.
    """
    threads, processes, kind = (extra.get(name) for name in ("threads", "ranks", "device"))
    if threads is not None and threads != torch.get_num_threads():
        yield (
            f"the run had {threads} threads and has {torch.get_num_threads()} now: sums in another order, so its "
            f"results differ by rounding from those of a run that was never stopped (--threads {threads})"
        )
    if processes is not None and processes != ranks:
        yield (
            f"the run had {processes} process{'es' * (processes > 1)} and has {ranks} now: each makes another share of "
            "a batch, so its results differ by rounding, and without --sync-batch-norm by the batches' statistics too, "
            "from those of a run that was never stopped"
        )
    if kind is not None and kind != device:
        yield f"the run was on {kind} and is on {device} now: its results differ by rounding"
    for name, now in (("torch", str(torch.__version__)), ("prunetrain_kernels", VERSION)):
        if versions.get(name, now) != now:
            yield f"the run had {name} {versions[name]} and has {now} now: its results may differ by rounding"


# -- what a run adds to a checkpoint -----------------------------------------------------------------------------------


def _check_extra(extra: dict[str, Any], place: Place) -> None:
    mapping(extra, place, ("epoch", "scheduler", "scaler", "log", "totals", "rng", "cuda_rng", "config"))
    whole(extra["epoch"], place["epoch"])
    for name in ("scheduler", "scaler", "log"):
        mapping(extra[name], place[name])
    rows = listed(mapping(extra["log"], place["log"], ("epochs",))["epochs"], place["log"]["epochs"])
    if len(rows) != extra["epoch"]:
        raise place["log"]["epochs"].wrong(rows, f"a list of {extra['epoch']} epochs, as many as are finished,")
    for i, row in enumerate(rows):
        for name, value in mapping(row, place["log"]["epochs"][i]).items():
            _check_cell(value, place["log"]["epochs"][i][name], is_text=name in TEXT_COLUMNS)
    _check_totals(extra["totals"], place["totals"])
    for name, needed in (("rng", True), ("cuda_rng", False)):
        if needed or extra[name] is not None:
            state = tensor(extra[name], place[name])
            if state.dtype != torch.uint8 or state.dim() != 1:
                raise place[name].wrong(state, "the state of a random number generator")
    if extra["rng"].shape != torch.get_rng_state().shape:
        raise place["rng"].wrong(extra["rng"], f"a state of {len(torch.get_rng_state())} bytes")
    _json_of(extra["config"], place["config"])
    if extra.get("data") is not None:
        mapping(extra["data"], place["data"])
    if extra.get("within") is not None:
        _check_within(extra["within"], place["within"])
    for name in ("threads", "ranks"):
        if extra.get(name) is not None:
            whole(extra[name], place[name], least=1)
    if extra.get("device") is not None:
        text(extra["device"], place["device"])


def _check_within(within: Any, place: Place) -> None:
    """What a checkpoint holds of an epoch that is not finished."""
    mapping(within, place, ("sums", "trained", "lasso", "sent"))
    flag(within["trained"], place["trained"])
    number(within["lasso"], place["lasso"], least=0)
    number(within["sent"], place["sent"], least=0)
    sums, there = within["sums"], place["sums"]
    fresh = EpochSums(1, 0.0, torch.device("cpu")).state_dict(torch.zeros(1, 2, device="cpu"))
    mapping(sums, there, tuple(fresh))
    for name, value in sums.items():
        if name not in fresh:
            raise there[name].wrong(value, "nothing")
        if name not in ("losses", "step_times"):
            _check_cell(value, there[name], is_text=name == "unknown")
            if value is None or isinstance(value, bool):  # what is unknown is NaN
                raise there[name].wrong(value, "a number")
    for name in ("batch", "steps", "images"):
        whole(sums[name], there[name])
    number(sums["passed"], there["passed"])
    for one in listed(sums["step_times"], there["step_times"]):
        number(one, there["step_times"], least=0)
    losses = tensor(sums["losses"], there["losses"])
    if losses.dim() != 2 or not len(losses) or losses.shape[1] != 2 or not losses.is_floating_point():
        raise there["losses"].wrong(losses, "the losses and hits of each rank, in two columns,")


def _check_cell(value: Any, place: Place, *, is_text: bool) -> None:
    """A cell of log.csv: empty, or of its column's kind."""
    plain(value, place)
    if value is not None and isinstance(value, str) != is_text:
        raise place.wrong(value, "a text" if is_text else "a number")


def _json_of(value: Any, place: Place) -> dict[str, Any]:
    try:
        options = json.loads(text(value, place))
    except (ValueError, RecursionError):
        raise place.wrong(value, "JSON") from None
    return mapping(options, place)


def _check_totals(saved: Any, place: Place) -> None:
    known = {field.name: field for field in fields(Totals)}
    present = vars(Totals())
    for name, value in mapping(saved, place).items():
        if name not in known:
            raise place[name].wrong(value, "nothing")
        if isinstance(present[name], list):
            for one in listed(value, place[name]):
                if not isinstance(one, int | float) or isinstance(one, bool):
                    raise place[name].wrong(one, "a number")
        elif isinstance(present[name], dict):
            for key, one in mapping(value, place[name]).items():
                _check_cell(one, place[name][key], is_text=key in ("unknown", "why"))
                if one is None and key not in ("unknown", "why"):  # what is unknown is NaN
                    raise place[name][key].wrong(one, "a number")
        elif isinstance(value, bool) or not isinstance(value, int | float):  # unknown sums are NaN
            raise place[name].wrong(value, "a number")


@contextmanager
def taking_up(path: Path) -> Iterator[None]:
    """Turns what a file with wrong contents leads to, inside, into a CheckpointError."""
    try:
        yield
    except (PruneTrainError, torch.OutOfMemoryError):
        raise
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"'{path}' has wrong contents, which cannot be taken up ({first_line(error)}); take a copy from before it "
            "was changed."
        ) from error


def take_random_numbers(extra: dict[str, Any], device: torch.device) -> None:
    """Puts the random number generators into their saved states; last, so that nothing draws before the next step."""
    state: Tensor = extra["rng"]
    try:
        torch.set_rng_state(state)
        if device.type == "cuda" and extra["cuda_rng"] is not None:
            torch.cuda.set_rng_state(extra["cuda_rng"], device)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError("the checkpoint's random number state is none of this PyTorch; start anew.") from error


def is_finished(extra: dict[str, Any], options: dict[str, Any]) -> bool:
    """Whether a run had made all epochs that its options ask for."""
    total = options["epochs"] + options["fine_tune_epochs"]
    return math.isfinite(total) and extra["epoch"] >= total
