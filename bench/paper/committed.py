"""Finished medium runs as small folders in the repository: OUT/medium/RUN, from which the tables are made.

    config.json, summary.json, log.csv    as the run wrote them, without this machine's paths
    channels.csv                          before training and after the last reconfiguration only
    gating.json                           FLOPs under union and gating (Fig. 6), which need the weights
    slices.npz                            of the runs of Fig. 4, the layers that it shows

No weights: whoever wants those trains the run again. A run that was trained elsewhere, by `prunetrain train` with the
same options, is adopted the same way.
"""

import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.paper.experiments import EXPERIMENTS, Training
from bench.paper.networks import COUNTS, gating_counts
from bench.paper.results import date_of, path_in_the_middle
from bench.paper.runner import IGNORED, differences, recorded_options
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.files import reason, write_atomically
from prunetrain_kernels.train.config import TrainConfig
from prunetrain_kernels.train.run_log import SLICE_PREFIX, Run, read_run
from prunetrain_kernels.train.run_numbers import column_of

SCALE = "medium"
IMAGES = {"train": 50_000, "val": 10_000}  # all of CIFAR-10


def folder_of(out: Path, training: Training) -> Path:
    """The folder in which a run is committed."""
    return out / training.scale / training.name


def is_committed(out: Path, training: Training) -> bool:
    """Whether a finished run with the training's options is there.

    Raises:
        InputError: a damaged config.json.
    """
    recorded = recorded_options(folder_of(out, training))
    finished = (folder_of(out, training) / "summary.json").exists()
    return finished and recorded is not None and not differences(recorded, wanted(training))


def wanted(training: Training) -> dict[str, Any]:
    """All options that decide a training's result."""
    options = {f.name: f.default for f in dataclasses.fields(TrainConfig)} | training.options
    return {name: value for name, value in options.items() if name not in (*IGNORED, "data", "device", "rank_timeout")}


# -- taking runs in ----------------------------------------------------------------------------------------------------


def matching(folder: Path, trainings: Sequence[Training]) -> Training:
    """The training that a run folder is one of, whatever the folder is called.

    Raises:
        InputError: no run folder, or its options are none of these trainings'; says which comes nearest, and how the
            run differs.
    """
    recorded = recorded_options(folder)
    if recorded is None:
        raise InputError(f"{folder} is no run folder: it has no config.json; name what `prunetrain train` wrote.")
    differing = {training.path: differences(recorded, wanted(training)) for training in trainings}
    for training in trainings:
        if (recorded.get("start_from") is None) != (training.start is None):
            differing[training.path].append(f"--start-from {recorded.get('start_from')}")
    nearest = min(trainings, key=lambda training: len(differing[training.path]))
    if differing[nearest.path]:
        raise InputError(
            f"{folder} is none of the {nearest.scale} scale's trainings; {nearest.name} comes nearest, but the run has "
            f"{'; '.join(differing[nearest.path])}."
        )
    return nearest


def adopt(folder: Path, training: Training, out: Path) -> list[Path]:
    """Copies what is to be committed of a finished run into OUT/SCALE/RUN; returns the files that changed.

    Raises:
        InputError: the run is unfinished, damaged, or not of all of CIFAR-10; or files cannot be written.
    """
    run = read_run(folder)
    if run.summary is None:
        raise InputError(f"{folder} is unfinished: it has no summary.json; finish it with `prunetrain train --resume`.")
    _check_data(run)
    target, changed = folder_of(out, training), []
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, content in contents(run, training).items():
            path = target / name
            if not path.exists() or path.read_bytes() != content:
                write_atomically(path, content)
                changed.append(path)
    except OSError as error:
        raise InputError(f"cannot write {target}: {reason(error)}.") from error
    return changed


def _check_data(run: Run) -> None:
    record = run.config.get("data_record")
    if record is not None:
        counts = {split: sum(record[split]["counts"]) for split in IMAGES}
        if counts != IMAGES:
            raise InputError(
                f"{run.directory} was trained on {counts['train']:,} and validated on {counts['val']:,} images, not on "
                f"CIFAR-10's {IMAGES['train']:,} and {IMAGES['val']:,}."
            )
        return
    images = int((column_of(run, "steps") * column_of(run, "batch"))[0])  # the last batch may be left out, or short
    if abs(images - IMAGES["train"]) > int(column_of(run, "batch")[0]):
        raise InputError(f"{run.directory} was trained on about {images:,} images, not on CIFAR-10's 50,000.")


def contents(run: Run, training: Training) -> dict[str, bytes]:
    """{file name: what is committed of it}."""
    assert run.summary is not None
    names = {str(run.config.get("out", run.directory)): training.name, str(run.directory): training.name}
    if run.config.get("start_from") and training.start is not None:
        names[str(run.config["start_from"])] = training.start.name
    if run.config.get("data"):
        names[str(run.config["data"])] = training.dataset
    config = {**run.config, "cache": None, "date": date_of(run)}
    files = {
        "config.json": _json(config, names),
        "summary.json": _json(run.summary, names),
        "log.csv": (run.directory / "log.csv").read_bytes(),
    }
    if len(run.channels):
        which = run.channels["reconfiguration"]
        ends = run.channels[which.isin([which.min(), which.max()])]
        files["channels.csv"] = ends.to_csv(index=False, lineterminator="\n").encode()
    counts = None if training.method == "dense" else gating_counts(run)
    if counts is not None:
        files[COUNTS] = _json(counts, {})
    if run.slices and training.path in {t.path for t in EXPERIMENTS["fig4"].trainings(training.scale, training.seed)}:
        files["slices.npz"] = _slices(run)
    return files


def _json(content: Mapping[str, Any], names: Mapping[str, str]) -> bytes:
    return (json.dumps(_without_paths(dict(content), names), indent=1, ensure_ascii=False) + "\n").encode()


def _without_paths(value: Any, names: Mapping[str, str]) -> Any:
    """The same without a machine's paths: known ones by name, others by their last part."""
    if isinstance(value, dict):
        return {key: _without_paths(part, names) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_paths(part, names) for part in value]
    if isinstance(value, str) and value in names:
        return names[value]
    if isinstance(value, str) and (Path(value).is_absolute() or value.startswith("~")):
        return Path(value).name
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _slices(run: Run) -> bytes:
    data = io.BytesIO()
    layers = {SLICE_PREFIX + layer: run.slices[layer] for layer in path_in_the_middle(run)}
    np.savez_compressed(data, allow_pickle=False, epochs=run.slice_epochs, **layers)  # type: ignore[arg-type]
    return data.getvalue()
