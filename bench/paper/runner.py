"""Runs trainings as child processes: skips what is done, resumes what was cut off, keeps every child's output in a log.

A training's log, `NAME.log` beside its folder, is locked by the child that writes it for as long as that lives, so two
commands never train in one folder, not even where the first was killed and its child was not.
"""

import csv
import dataclasses
import fcntl
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from bench.paper.experiments import DATASETS, Training
from prunetrain_kernels.cli import train_config
from prunetrain_kernels.cost import share_text
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.files import reason
from prunetrain_kernels.train.config import TrainConfig

# What a finished run may have otherwise than asked for; where data lie is compared apart.
IGNORED = ("out", "cache", "threads", "start_from", "start_from_other_data", "zeroing_tolerance")
# A dense run never looks at these.
PRUNING = (
    "penalty_ratio", "interval", "reconfigure_once", "threshold", "relative", "policy", "round_to", "grow_batch",
    "batch_granularity", "memory_budget", "batch_limit", "lr_rule", "keep_momentum", "target_flops",
    "target_train_flops", "target_by", "target_focus", "exclude", "min_channels", "coefficients", "coefficient",
)  # fmt: skip
POLL_SECONDS = 0.5
LINES_OF_A_FAILURE = 8


@dataclass
class Job:
    """A training with its folder, and what is to be done: "done", "resume", "new" or "overwrite"."""

    training: Training
    config: TrainConfig
    state: str

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    @property
    def log(self) -> Path:
        return self.folder.parent / f"{self.folder.name}.log"

    @property
    def command(self) -> list[str]:
        how = "--overwrite" if self.state == "overwrite" else "--resume"
        return [sys.executable, "-m", "prunetrain_kernels.cli", "train", *arguments(self.config), how]


# -- data --------------------------------------------------------------------------------------------------------------


def parse_data(words: Sequence[str]) -> dict[str, str]:
    """{data set: what --data of `prunetrain train` takes} from [NAME=]PATH; NAME is guessed from the path's last part.

    Raises:
        InputError: a name that is unknown, cannot be guessed or comes twice, or a path that is not there.
    """
    paths: dict[str, str] = {}
    for text in words:
        name, equals, path = text.partition("=")
        if not equals:
            name, path = _guess(text), text
        if name not in DATASETS:
            raise InputError(f"--data {text}: {name!r} must be one of {', '.join(DATASETS)}.")
        if name in paths:
            raise InputError(f"--data {text}: {name} is given twice, {paths[name]} before; give it once.")
        if not re.match(r"[a-z0-9]+:", path) and path != "digits" and not Path(path).expanduser().exists():
            raise InputError(f"--data {text}: there is no {path}.")
        paths[name] = path
    return paths


def _guess(path: str) -> str:
    last = re.sub(r"[^a-z0-9]", "", path.rstrip("/").rsplit("/", 1)[-1].lower())
    for sign, name in (
        ("cifar100", "cifar100"),
        ("cifar10", "cifar10"),
        ("imagenet", "imagenet"),
        ("ilsvrc", "imagenet"),
    ):
        if sign in last:
            return name
    raise InputError(f"--data {path}: say which data set it is, as in cifar10={path}; there are {', '.join(DATASETS)}.")


def _same_data(one: str, other: str) -> bool:
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


# -- options -----------------------------------------------------------------------------------------------------------


def arguments(config: TrainConfig) -> list[str]:
    """The arguments of `prunetrain train` for a configuration: every field that is not the default."""
    words: list[str] = []
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        flag = f"--{option.name.replace('_', '-')}"
        if option.name == "out" or value != option.default:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            if isinstance(value, bool):
                words.append(flag if value else f"--no-{flag.removeprefix('--')}")
            else:
                words += [flag, text]
    return words


def configuration(
    training: Training, runs: Path, data: str, *, device: str = "auto", threads: int | None = None, extra: str = ""
) -> TrainConfig:
    """The options of `prunetrain train` for a training; `extra` are further ones, which win over the training's own.

    Raises:
        InputError: `extra` has quotes that do not close.
    """
    out = str(runs / training.path)
    start = None if training.start is None else str(runs / training.start.path)
    config = TrainConfig(out=out, data=data, start_from=start, device=device, threads=threads, **training.options)
    try:
        words = shlex.split(extra)
    except ValueError as error:
        raise InputError(f"--train-options {extra!r} cannot be split into words: {error}.") from error
    config = train_config([*arguments(config), *words, "--out", out])
    config.check()
    return config


def recorded_options(folder: Path) -> dict[str, Any] | None:
    """config.json with the defaults of options that came later; None where no training has begun.

    Raises:
        InputError: the file is damaged.
    """
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no object")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read {folder / 'config.json'}: {reason(error)}.") from error
    except ValueError as error:
        raise InputError(f"{folder / 'config.json'} is damaged; remove that folder or use --overwrite.") from error
    defaults = {f.name: list(v) if isinstance(v := f.default, tuple) else v for f in dataclasses.fields(TrainConfig)}
    return {**defaults, **content}


def differences(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Options in which a run is not what is wanted, as sentences' parts such as "--lr 0.2, not 0.1"."""
    ignored = IGNORED + (PRUNING if recorded.get("dense") and wanted.get("dense", True) else ())
    texts = []
    for name, value in json.loads(json.dumps(dict(wanted))).items():
        before = recorded.get(name)
        if name in ignored or before == value or (name == "data" and _same_data(str(before), str(value))):
            continue
        texts.append(f"--{name.replace('_', '-')} {before}, not {value}")
    return texts


# -- planning ----------------------------------------------------------------------------------------------------------


def plan(
    trainings: Sequence[Training],
    runs: Path,
    data: Mapping[str, str],
    *,
    device: str = "auto",
    threads: int | None = None,
    extra: str = "",
    overwrite: bool = False,
) -> list[Job]:
    """The jobs of some trainings, in order; a training that starts from another one comes after it.

    Raises:
        InputError: a folder holds a run with other options and `overwrite` is not set, or an option is bad.
    """
    jobs: list[Job] = []
    anew: set[str] = set()
    for training in trainings:
        config = configuration(training, runs, data[training.dataset], device=device, threads=threads, extra=extra)
        folder = Path(config.out)
        try:
            recorded = recorded_options(folder)
        except InputError:
            if not overwrite:
                raise
            recorded = {}
        other = [] if recorded is None else differences(recorded, asdict(config))
        start_is_new = training.start is not None and training.start.path in anew
        if recorded is None:
            state = "new"
        elif other or (overwrite and start_is_new):
            if not overwrite:
                raise InputError(
                    f"'{folder}' was trained with {'; '.join(other)}: ask for the same options, name another folder "
                    "with --runs, or train it anew with --overwrite."
                )
            state = "overwrite"
        else:
            state = "done" if (folder / "summary.json").exists() else "resume"
            # spelt as before, where it may differ: `train --resume` compares more strictly
            same = ("data", *(PRUNING if config.dense else ()))
            kept: dict[str, Any] = {name: tuple(v) if isinstance(v := recorded[name], list) else v for name in same}
            config = dataclasses.replace(config, **kept)
        if state in ("new", "overwrite"):
            anew.add(training.path)
        jobs.append(Job(training, config, state))
    return jobs


# -- running -----------------------------------------------------------------------------------------------------------


@dataclass
class _Child:
    job: Job
    process: "subprocess.Popen[bytes]"
    epoch: int  # the last one that was shown
    old_log: int  # when the log.csv that was there at the start was written, in ns


class Interrupted(Exception):
    """Ctrl-C or SIGTERM; all children have ended."""


def run(jobs: Sequence[Job], parallel: int = 1, say: Callable[[str], None] = print) -> list[Job]:
    """Trains what is not done, `parallel` at a time, with a line per epoch; returns the jobs that failed.

    A training whose start failed counts as failed too. Ctrl-C and SIGTERM end the children as Ctrl-C ends a training
    (the last epoch's checkpoint is kept), wait for them, and raise Interrupted; a second one does not wait.
    """
    planned = {job.training.path for job in jobs}
    done = {job.training.path for job in jobs if job.state == "done"}
    waiting = [job for job in jobs if job.state != "done"]
    running: list[_Child] = []
    failed: dict[str, Job] = {}

    def progress(job: Job, text: str) -> None:
        say(f"[{len(done)}/{len(jobs)} done] {job.training.path}: {text}")

    def fail(job: Job, text: str) -> None:
        failed[job.training.path] = job
        progress(job, text)

    with _signals() as signals:
        try:
            while (waiting or running) and not signals:
                for job in list(waiting):
                    start = None if job.training.start is None else job.training.start.path
                    if start in failed:
                        waiting.remove(job)
                        fail(job, f"not trained, because {start} failed")
                    elif len(running) < parallel and (start in done or start not in planned):
                        waiting.remove(job)
                        child = _begin(job, fail)
                        if child is not None:
                            running.append(child)
                            progress(job, "begins" if job.state != "resume" else f"goes on after epoch {child.epoch}")
                if running:
                    signals.wait(POLL_SECONDS)
                for child in list(running):
                    code = child.process.poll()
                    _show_epochs(child, progress)
                    if code is None:
                        continue
                    running.remove(child)
                    job = child.job
                    if code == 0 and (job.folder / "summary.json").exists():
                        done.add(job.training.path)
                        progress(job, "finished")
                    else:
                        fail(job, f"failed with exit code {code}; {job.log} ends with\n{_tail(job.log)}")
            if signals:
                say(f"interrupted: ending {len(running)} running, each keeps its last finished epoch ...")
        finally:
            _end(running, signals)
    if signals:
        left = len(jobs) - len(done)
        say(f"{len(done)} of {len(jobs)} are done, {left} left; the same command goes on where this one stopped.")
        raise Interrupted
    return list(failed.values())


def _begin(job: Job, fail: Callable[[Job, str], None]) -> _Child | None:
    try:
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        log = job.log.open("ab")
    except OSError as error:
        raise InputError(f"cannot write {job.log}: {reason(error)}.") from error
    with log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fail(job, "not trained, because another process is training it; wait for that, or end it")
            return None
        if job.state != "resume":
            log.truncate(0)
        log.write(f"$ {shlex.join(job.command)}\n".encode())
        log.flush()
        epoch = _last_epoch(job.folder)[0] if job.state == "resume" else 0
        old_log = _written(job.folder / "log.csv")
        # a session of its own: Ctrl-C on the terminal reaches this process only, which then ends its children in turn
        process = subprocess.Popen(
            job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    return _Child(job, process, epoch, old_log)


class _Signals(list[int]):
    """The signals that came, in order."""

    def wait(self, seconds: float) -> None:
        """Sleeps, but not through a signal."""
        end = time.monotonic() + seconds
        before = len(self)
        while len(self) == before and time.monotonic() < end:
            time.sleep(0.05)


@contextmanager
def _signals() -> Iterator[_Signals]:
    """Collects SIGINT and SIGTERM instead of dying of them.

    Because they are caught here, children begin with their defaults, even where a shell started this process with
    SIGINT ignored (as for `command &` in a script): so a child's Ctrl-C works.
    """
    came = _Signals()
    before = {n: signal.signal(n, lambda number, frame: came.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(running: Sequence[_Child], signals: _Signals) -> None:
    """SIGINT to all, and waiting; SIGKILL, from which they recover too, after one more signal."""
    for child in running:
        child.process.send_signal(signal.SIGINT)
    first = len(signals)
    while any(child.process.poll() is None for child in running):
        if len(signals) > first:
            for child in running:
                child.process.kill()
        signals.wait(0.2)


def _written(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _last_epoch(folder: Path) -> tuple[int, float, float]:
    """Finished epochs, validation accuracy and share of the training FLOPs (NaN where they are unknown), from log.csv;
    zeros before the first."""
    try:
        with (folder / "log.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        last, first = (float(rows[row]["train_flops_per_image"] or math.nan) for row in (-1, 0))
        share = last / first
        return int(rows[-1]["epoch"]), float(rows[-1]["val_accuracy"]), share
    except (OSError, IndexError, KeyError, ValueError, ZeroDivisionError):
        return 0, 0.0, 0.0


def _show_epochs(child: _Child, progress: Callable[[Job, str], None]) -> None:
    if _written(child.job.folder / "log.csv") == child.old_log:
        return  # still that of the run that goes on or is replaced
    epoch, accuracy, share = _last_epoch(child.job.folder)
    if epoch > child.epoch:
        child.epoch = epoch
        total = child.job.config.epochs + child.job.config.fine_tune_epochs
        progress(
            child.job, f"epoch {epoch} of {total}, accuracy {accuracy:.1%}, training FLOPs {share_text(share)} of dense"
        )


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as file:
            _seek_near_end(file)
            lines = file.read().decode(errors="replace").splitlines()
    except OSError as error:
        return f"    (cannot read it: {reason(error)})"
    return "\n".join(f"    {line}" for line in lines[-LINES_OF_A_FAILURE:])


def _seek_near_end(file: IO[bytes], most: int = 1 << 16) -> None:
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - most))
