"""A small training that is killed at random moments, also inside writes, and resumed: nothing may be lost.

    python -m tests.torture.kills --count 200

Every run is killed until one of its processes gets to the end; then its weights must be, bitwise, those of the run that
nobody disturbed.
"""

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first optimizer of a process loads it, for seconds: here once, not in each that is killed
from torch import nn

import prunetrain_kernels.files as files
from prunetrain_kernels.cli import main as command

WAYS = ("at a moment", "by SIGTERM", "inside a write", "before a rename", "after a rename")


class Tiny(nn.Module):
    """A residual network with dropout, of which the lasso prunes channels in a few steps."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.stem(x)))
        x = torch.relu(x + self.bn2(self.conv(self.drop(x))))
        return self.fc(x.mean((2, 3)))


def tiny(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    return Tiny(num_classes, in_channels)


@dataclass
class Figures:
    """What came of it.

    Attributes:
        kills: how often a process ended in each of `WAYS`.
        runs: that got to their end.
        lost: one sentence for each run that could not go on, or ended with other weights.
    """

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    lost: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        return self.lost

    def __str__(self) -> str:
        ways = ", ".join(f"{self.kills[way]} {way}" for way in WAYS if self.kills[way])
        told = f"{self.kills.total()} kills ({ways}) in {self.runs} runs: {len(self.lost)} lost"
        return "\n".join([told, *(f"  lost: {why}" for why in self.lost)])


def run(count: int, seed: int = 0) -> Figures:
    """Kills a training `count` times, resumes it each time, and compares what it ends with."""
    draw, figures = random.Random(seed), Figures()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begun = time.monotonic()
        code = _ended(_begun(folder / "undisturbed", None), None)
        seconds = time.monotonic() - begun
        assert code == 0, (folder / "undisturbed.said").read_text()
        expected = _tensors(folder / "undisturbed")
        while figures.kills.total() < count or figures.runs == 0:
            out = folder / f"run{figures.runs}"
            why = _one_run(out, (draw, seconds), figures, count)
            if why is None:
                now = _tensors(out)
                same = now.keys() == expected.keys() and all(torch.equal(now[n], expected[n]) for n in expected)
                why = None if same else "it ended with other weights"
            figures.runs += 1
            if why is not None:
                figures.lost.append(f"run {figures.runs}: {why}")
    return figures


def _one_run(run: Path, chance: tuple[random.Random, float], figures: Figures, count: int) -> str | None:
    """Has a run killed until it ends by itself; why it could not go on, or None."""
    draw, seconds = chance
    while True:
        way = draw.choice(WAYS) if figures.kills.total() < count else None
        by_itself = way if way in WAYS[2:] else None
        process = _begun(run, None if by_itself is None else (by_itself, draw.randrange(1, 12)))
        after = draw.uniform(0, seconds) if way in WAYS[:2] else None
        code = _ended(process, after, signal.SIGTERM if way == "by SIGTERM" else signal.SIGKILL)
        if code == 0:
            left = [path.name for path in run.iterdir() if path.name.startswith(".")]
            return f"files are left: {left}" if left else None
        # one that is asked to stop before it heeds signals ends by the signal itself
        usual = (128 + signal.SIGTERM, -signal.SIGTERM) if way == "by SIGTERM" else (-signal.SIGKILL,)
        if way is None or code not in usual:
            return f"exit code {code} {way}: {run.with_suffix('.said').read_text()[-500:]}"
        figures.kills[way] += 1


def _begun(run: Path, at_file: tuple[str, int] | None) -> int:
    """The number of a process that trains, or goes on; `at_file`: how, and at which of its writes or renames, it
    dies."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    try:
        said = os.open(run.with_suffix(".said"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        if at_file is not None:
            _die(*at_file)
        options = [f"--model={__name__}:tiny", "--data=synthetic:40x8x8", "--epochs=3", "--batch=16", "--lr=0.3"]
        options += ["--penalty-ratio=0.8", "--interval=0.5", "--device=cpu", "--threads=1", "--quiet"]
        os._exit(command(["train", *options, f"--out={run}", "--resume"]))
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(1)


def _ended(process: int, after: float | None, number: int = signal.SIGKILL) -> int:
    """The exit code of a process, which gets a signal after so many seconds; negative if a signal ended it."""
    until = None if after is None else time.monotonic() + after
    while True:
        ended, status = os.waitpid(process, 0 if until is None else os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if until is not None and time.monotonic() >= until:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
            until = None
        else:
            time.sleep(0.002)


def _die(way: str, when: int) -> None:
    """Has this process kill itself at the given write, or before or after the given rename."""
    counts: Counter[str] = Counter()
    replace: Callable[..., None] = os.replace
    write = files._DiskErrors.write

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(kind: str) -> bool:
        counts[kind] += 1
        return counts[kind] == when

    def half(self: Any, data: Any) -> int:
        if way == "inside a write" and counted("write"):
            self._file.write(memoryview(data)[: len(data) // 2])
            self._file.flush()
            die()
        return write(self, data)

    def renamed(*names: Any) -> None:
        now = counted("rename")
        if now and way == "before a rename":
            die()
        replace(*names)
        if now and way == "after a rename":
            die()

    files._DiskErrors.write = half  # type: ignore[method-assign]
    os.replace = renamed  # type: ignore[assignment]


def _tensors(run: Path) -> dict[str, torch.Tensor]:
    payload = torch.load(run / "checkpoint.pt", weights_only=True)
    momentum = {f"momentum {i}": state["momentum_buffer"] for i, state in payload["optimizer"]["state"].items()}
    return {**payload["model"], **momentum}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = run(options.count, options.seed)
    print(figures)
    return 1 if figures.lost else 0


if __name__ == "__main__":
    sys.exit(main())
