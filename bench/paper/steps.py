"""Seconds of a training step in the shapes that finished runs ended with, beside the dense network's.

A run's own seconds were taken while other trainings shared the machine. Here three steps stand side by side in one
process, interleaved round by round, each made of what `prunetrain train` made the run of (precision, layout, fused
operators, optimizer), on random images:

    dense    the dense network, without a lasso: what one trains without PruneTrain
    pruned   the run's last shape, without a lasso: what its FLOPs alone save
    ours     the run's last shape with the run's own lasso inside the update: what PruneTrain's step takes

`flops_ratio` is of the training FLOPs of that shape. eta = (1 - time ratio) / (1 - FLOP ratio) compares ours with
dense: the lasso's time is inside ours.
"""

import copy
import csv
import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import profiles, rows, timing
from prunetrain_kernels.cost import count_flops
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.files import reason
from prunetrain_kernels.models.init import initialize
from prunetrain_kernels.train import setup
from prunetrain_kernels.train.config import AMP_DTYPES, TrainConfig
from prunetrain_kernels.train.layout import unsafe_in_channels_last
from prunetrain_kernels.train.prunetrain import PruneTrain
from prunetrain_kernels.train.run_log import Run
from prunetrain_kernels.train.tally import Stopwatch

FILE = "steps.csv"
PROVIDERS = ("dense", "pruned", "ours")
COLUMNS = (
    "run", "provider", "p20_s", "p50_s", "p80_s", "samples", "images", "train_flops_per_image", "amp", "layout",
    "threads", "load", "device", "date", "torch",
)  # fmt: skip
IDLE = 0.3  # processes that wanted a CPU in the last minute, at most
ROUNDS, MILLISECONDS = 7, 800.0
TIMED_LR = 1e-5  # many steps on one batch: weights stay where they are


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step, medians, and the share of the dense step's FLOPs that the last shape has."""

    dense: float
    pruned: float
    ours: float
    flops_ratio: float
    device: str
    date: str
    threads: str
    torch: str

    @property
    def eta(self) -> float:
        return eta(self.ours / self.dense, self.flops_ratio)


def eta(time_ratio: float, flops_ratio: float) -> float:
    """Share of the saved FLOPs that became saved time; NaN where none were saved."""
    return (1 - time_ratio) / (1 - flops_ratio) if flops_ratio < 1 else math.nan


# -- the file ----------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, StepTimes]:
    """The newest measurement of each run, by the name in its column `run`; nothing where there is no file.

    Raises:
        InputError: a damaged file.
    """
    newest: dict[str, dict[str, dict[str, str]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                newest.setdefault(row["run"], {})[row["provider"]] = row
        return {run: _times(by_provider) for run, by_provider in newest.items()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"cannot read {path}: {reason(error)}.") from error
    except (ValueError, KeyError, TypeError, ZeroDivisionError, csv.Error) as error:
        raise InputError(
            f"{path} is damaged ({type(error).__name__}: {error}); restore it, or measure anew."
        ) from error


def _times(by_provider: Mapping[str, Mapping[str, str]]) -> StepTimes:
    dense, pruned, ours = (by_provider[provider] for provider in PROVIDERS)
    seconds = [float(row["p50_s"]) for row in (dense, pruned, ours)]
    flops = [float(row["train_flops_per_image"]) for row in (ours, dense)]
    where = (ours["device"], ours["date"], ours["threads"], ours["torch"])
    return StepTimes(seconds[0], seconds[1], seconds[2], flops[0] / flops[1], *where)


def append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Appends rows to the file, which is whole at every moment.

    Raises:
        InputError: it has other columns, or cannot be written.
    """
    rows.append_as(COLUMNS, path, lines)


# -- measuring ---------------------------------------------------------------------------------------------------------


def load_of_an_idle_machine(*, even_if_busy: bool = False) -> float:
    """Processes that wanted a CPU in the last minute.

    Raises:
        InputError: more than on an idle machine, where seconds would mean nothing.
    """
    load = os.getloadavg()[0]
    if load > IDLE and not even_if_busy:
        raise InputError(
            f"the machine is busy: {load:.2f} processes wanted a CPU in the last minute, and an idle one has at most "
            f"{IDLE}; wait until other work has ended, or measure all the same with --even-if-busy."
        )
    return load


def measure(name: str, run: Run, device: str, load: float, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Times the three steps of a finished run's last shape; returns their rows.

    Args:
        name: for the column `run`.
        run: with its channels.csv.
        device: as --device of `prunetrain train`; threads are the run's own.

    Raises:
        InputError: channels.csv is not there or not of the network that the summary counted.
    """
    config = _config(run, device)
    torch_device = setup.prepare_process(config)
    profile = profiles.parse(str(run.directory / "channels.csv"))
    shapes = profiles.prune(profile)
    image = torch.zeros(2, 3, profile.image, profile.image)
    flops = {name: count_flops(model, (image,)) for name, model in (("dense", shapes.dense), ("ours", shapes.model))}
    flops["pruned"] = flops["ours"]
    recorded = (run.summary or {}).get("inference_flops_ratio")
    counted = flops["ours"].inference / flops["dense"].inference
    if recorded is None or not math.isclose(recorded, counted, rel_tol=1e-6):
        raise InputError(
            f"{run.directory}/channels.csv leaves {counted:.2%} of the inference FLOPs, and summary.json beside it "
            f"says {recorded}; restore both."
        )
    without = dataclasses.replace(config, dense=True, proximal=False)
    data = _images(config.batch, profile, torch_device)
    made = {
        "dense": _step(shapes.dense, without, data, torch_device),
        "pruned": _step(shapes.model, without, data, torch_device),
        "ours": _step(shapes.model, config, data, torch_device),
    }
    timings = timing.side_by_side(
        {k: step for k, (step, _) in made.items()}, torch_device, MILLISECONDS, rounds, one_pool=True
    )
    environment = rows.environment(torch_device)
    return [
        {
            "run": name, "provider": provider, "p20_s": t.p20 / 1e6, "p50_s": t.p50 / 1e6, "p80_s": t.p80 / 1e6,
            "samples": t.samples, "images": config.batch, "train_flops_per_image": flops[provider].training,
            "amp": config.amp, "layout": made[provider][1], "load": load,
            **{column: environment[column] for column in ("threads", "device", "date", "torch")},
        }
        for provider, t in timings.items()
    ]  # fmt: skip


def _config(run: Run, device: str) -> TrainConfig:
    """The run's options, but for what only a whole training has: data, a target, a batch that grows."""
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    options: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in run.config.items() if name in known
    }
    options |= {"target_flops": None, "target_train_flops": None}
    options |= {"out": str(run.directory), "device": device, "threads": run.config.get("threads_used") or 1}
    options |= {"lr": TIMED_LR, "start_from": None, "grow_batch": False, "cuda_graphs": False}
    return TrainConfig(**options)


def _images(count: int, profile: profiles.Profile, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device="cpu").manual_seed(0)
    images = torch.randn(count, 3, profile.image, profile.image, generator=generator, device="cpu")
    labels = torch.randint(profile.classes, (count,), generator=generator, device="cpu")
    return images.to(device), labels.to(device)


def _step(
    shape: nn.Module, config: TrainConfig, data: tuple[Tensor, Tensor], device: torch.device
) -> tuple[Callable[[], object], str]:
    """One update of a copy of a network, as `prunetrain train` makes it, and the layout that it is in."""
    model = copy.deepcopy(shape).to(device).train()
    initialize(model)
    last = config.channels_last and not unsafe_in_channels_last(model)
    memory = torch.channels_last if last else torch.contiguous_format
    model.to(memory_format=memory)  # type: ignore[call-overload]
    images, labels = data[0].contiguous(memory_format=memory), data[1]
    optimizer = setup.optimizer_of(config, model)
    amp = AMP_DTYPES[config.amp]
    prunetrain = PruneTrain(model, optimizer, (images[:8],), amp=amp, **setup.pruning_options(config))
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    update = setup.step_of(config, prunetrain, scaler, None, Stopwatch(device), device)

    def step() -> Tensor:
        loss, _ = update(images, labels, len(labels))
        return loss

    if not bool(torch.isfinite(step())):  # the first one also sets lambda
        raise InputError("a step on random images gave a loss that is not finite: nothing was timed.")
    return step, "channels_last" if last else "contiguous"
