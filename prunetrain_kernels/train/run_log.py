"""The record of one training run: a folder of small files that a report, a spreadsheet or a colleague can open.

    config.json    the training options                                        once, at the start
    log.csv        one row per finished epoch (LOG_COLUMNS)                    at every save
    channels.csv   kept channels per layer and reconfiguration                 at every save
    slices.npz     max |weight| of every output channel over epochs (Fig. 4)   at every save
    summary.json   the outcome; a run without it is unfinished                 once, at the end

Every file is written whole, aside, and renamed: whoever reads while the run trains, or after it was killed, finds the
last complete version. The training checkpoint carries `RunLog.state_dict()`, so a resumed run forgets the epochs that
came after that checkpoint and writes the same files as a run that was never killed.
"""

import contextlib
import csv
import io
import json
import math
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from prunetrain_kernels.errors import CheckpointError, InputError
from prunetrain_kernels.files import is_folder, is_there, read_regular, reason, write_atomically
from prunetrain_kernels.probe import first_line

if TYPE_CHECKING:
    import pandas as pd

LOG_COLUMNS = (
    "epoch",  # finished epochs, from 1
    "phase",  # "train" | "fine-tune"
    "loss",  # mean cross-entropy
    "penalty",  # R(W), without lambda
    "train_accuracy",  # 0..1
    "val_accuracy",  # 0..1
    "ema_accuracy",  # 0..1, that of the average of the weights; empty without --ema
    "train_flops",  # per step: one mini-batch, forward and backward
    "train_flops_per_image",
    "inference_flops",  # per image
    "params",
    "bn_bytes",  # per step
    "memory_bytes",  # per step
    "gradient_bytes",  # per step, modelled: those of the parameters
    "all_reduced_bytes",  # per step, counted by each rank where DDP sends them; 0 on one process
    "steps",  # in this epoch
    "batch",
    "lr",
    "train_seconds",  # in this epoch; lasso and reconfiguration not included
    "lasso_seconds",  # in this epoch
    "reconfigure_seconds",  # in this epoch
    "compilations",  # graphs that torch.compile compiled in this epoch
    "compile_seconds",  # in this epoch, inside the other times
    "wall_seconds",  # since the start of the run, time before a resume included
    "unknown_costs",  # text: which cannot be counted, and why; their cells are empty
    "lambda",  # of the lasso from now on; empty where there is none
    "smallest_slice",  # norm of the smallest slice that has a lasso
    "median_slice",
    "expected_inference",  # forecast: FLOPs per image at the end, as a share of the dense network's
)
CHANNEL_COLUMNS = (
    "reconfiguration",  # 0: the network before training
    "epoch",
    "layer",
    "kind",  # "conv" | "linear"
    "in_kept",
    "in_total",
    "out_kept",
    "out_total",
    "removed",  # 0 | 1
    "in_live",  # of those kept, computed by this layer: fewer than are kept under gating
    "out_live",
)
# columns that older runs lack, and what held there
LATER_LOG_COLUMNS = {
    "all_reduced_bytes": 0,
    "ema_accuracy": None,
    "compilations": 0,
    "compile_seconds": 0.0,
    "unknown_costs": None,
    "lambda": None,
    "smallest_slice": None,
    "median_slice": None,
    "expected_inference": None,
}
COMPUTED = {"in_kept": "in_live", "out_kept": "out_live"}  # the latter came later: runs before gating have none
TEXT_COLUMNS = frozenset({"phase", "layer", "kind", "unknown_costs"})

# a layer may be called anything, "epochs" too: so its array's name in slices.npz starts with this
SLICE_PREFIX = "layer/"
_MOST_UNPACKED = 100  # bytes of slices.npz unpacked for each of its own; it is written without compression

Cell = int | float | str | None


class RunLog:
    """The record of one training run, kept in memory and written to `directory` by `save`.

    The folder is made if it is not there. Raises InputError where it cannot be.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the run folder {self.directory}: {reason(error)}") from error
        self._epochs: list[dict[str, Cell]] = []
        self._channels: list[dict[str, Cell]] = []
        self._slice_epochs: list[float] = []
        self._slices: dict[str, list[np.ndarray]] = {}

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write the training options to config.json; a summary that an earlier run left in the folder is removed.

        Values: anything JSON knows, paths, and numpy or torch scalars and arrays; a number that is not finite becomes
        null. Raises InputError for other values and where the file cannot be written.
        """
        self._write_json("config.json", config)
        # left in place, it would call this run finished before it has begun
        try:
            (self.directory / "summary.json").unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"cannot remove {self.directory / 'summary.json'}: {reason(error)}") from error

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the run's outcome to summary.json, which marks it finished. Values and errors as for `write_config`."""
        self._write_json("summary.json", summary)

    def add_epoch(self, row: Mapping[str, Any]) -> None:
        """Add one row of log.csv. Keys: any of LOG_COLUMNS, `epoch` always; one that is left out is an empty cell.

        Raises InputError for an unknown key, a value that is not a number or text, or an epoch not after the last one.
        """
        cells = _row(row, LOG_COLUMNS, "an epoch")
        epoch = cells["epoch"]
        if isinstance(epoch, str) or epoch is None:
            raise InputError(f"an epoch's row needs the number of finished epochs as `epoch`, not {epoch!r}")
        last = self._epochs[-1]["epoch"] if self._epochs else 0
        assert isinstance(last, int | float)
        if not epoch > last:
            raise InputError(f"epoch {epoch} does not come after epoch {last}, the last one of {self.directory}")
        self._epochs.append(cells)

    def add_channels(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows of channels.csv: one per layer after a reconfiguration (or before training: reconfiguration 0).

        Keys: any of CHANNEL_COLUMNS. Raises InputError for an unknown key or a value that is not a number or text;
        then no row is added.
        """
        self._channels.extend([_channel_row(row) for row in rows])

    def add_slices(self, epoch: float, slices: Mapping[str, torch.Tensor | np.ndarray]) -> None:
        """Add the max |weight| of every output channel at `epoch` (fractions of an epoch are welcome; 0 = untrained).

        slices: {layer: [K] float32}, K = the layer's *original* number of output channels, NaN where pruned. A layer
        left out is NaN at this epoch. The same epoch again replaces its values. Raises InputError for another shape
        or an epoch before the last one; then nothing is added.
        """
        values = {layer: _vector(layer, slice_) for layer, slice_ in slices.items()}
        for layer, vector in values.items():
            known = self._slices.get(layer)
            if known and known[0].size != vector.size:
                raise InputError(f"layer {layer} had {known[0].size} output channels, now {vector.size} are given")
        if self._slice_epochs and epoch < self._slice_epochs[-1]:
            raise InputError(f"slices of epoch {epoch:g} come after those of epoch {self._slice_epochs[-1]:g}")

        if self._slice_epochs and epoch == self._slice_epochs[-1]:
            self._slice_epochs.pop()
            self._slices = {layer: rows[:-1] for layer, rows in self._slices.items() if len(rows) > 1}
        for layer, vector in values.items():
            if layer not in self._slices:
                self._slices[layer] = [np.full_like(vector, np.nan) for _ in self._slice_epochs]
        for layer, rows in self._slices.items():
            rows.append(values[layer] if layer in values else np.full_like(rows[0], np.nan))
        self._slice_epochs.append(float(epoch))

    def save(self) -> None:
        """Write slices.npz, channels.csv and log.csv, each whole. Raises InputError; older files then stay as they are.

        log.csv comes last: an epoch that it lists has its slices and channels on disk.
        """
        arrays = {SLICE_PREFIX + layer: rows for layer, rows in self._stacked().items()}
        arrays["epochs"] = np.array(self._slice_epochs, np.float64)
        packed = io.BytesIO()
        np.savez(packed, **arrays)  # type: ignore[arg-type]  # mypy takes the arrays for savez's own options
        write_atomically(self.directory / "slices.npz", packed.getvalue())
        write_atomically(self.directory / "channels.csv", _csv(CHANNEL_COLUMNS, self._channels))
        write_atomically(self.directory / "log.csv", _csv(LOG_COLUMNS, self._epochs))

    def state_dict(self) -> dict[str, Any]:
        """Everything recorded so far, of plain containers, numbers, text and tensors: passes `weights_only=True`."""
        return {
            "epochs": [dict(row) for row in self._epochs],
            "channels": [dict(row) for row in self._channels],
            "slice_epochs": list(self._slice_epochs),
            "slices": {layer: torch.from_numpy(rows) for layer, rows in self._stacked().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace what is recorded by a `state_dict`; files change at the next `save`.

        Raises CheckpointError for anything else; the record is then unchanged.
        """
        try:
            epochs = [_row(LATER_LOG_COLUMNS | dict(row), LOG_COLUMNS, "an epoch") for row in state["epochs"]]
            channels = [_channel_row(row) for row in state["channels"]]
            slice_epochs = [float(epoch) for epoch in state["slice_epochs"]]
            slices = {
                str(layer): torch.as_tensor(rows, device="cpu").float().numpy().copy()
                for layer, rows in state["slices"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint's run log cannot be read: {type(error).__name__} {error}") from error
        for layer, rows in slices.items():
            if rows.ndim != 2 or len(rows) != len(slice_epochs):
                expected = f"({len(slice_epochs)}, output channels)"
                raise CheckpointError(f"the checkpoint's run log has {layer} as {rows.shape} where {expected} belongs")
        self._epochs, self._channels, self._slice_epochs = epochs, channels, slice_epochs
        self._slices = {layer: list(rows) for layer, rows in slices.items()}

    def _stacked(self) -> dict[str, np.ndarray]:
        """{layer: [epochs, K] float32}."""
        return {layer: np.stack(rows) for layer, rows in self._slices.items()}

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        try:
            plain = _jsonable(dict(content))
            text = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False)
            try:
                data = (text + "\n").encode()
            except UnicodeEncodeError:  # a file's name that is no UTF-8: its odd bytes as escapes of JSON
                data = (json.dumps(plain, indent=2, allow_nan=False) + "\n").encode()
        except (TypeError, ValueError) as error:
            raise InputError(f"{name} cannot hold this: {error}") from error
        write_atomically(self.directory / name, data)


@dataclass(frozen=True, eq=False)  # tables and arrays have no truth value to compare by
class Run:
    """A run folder, read.

    config: the training options. log: LOG_COLUMNS, one row per finished epoch. channels: CHANNEL_COLUMNS.
    slices: {layer: [slice_epochs, K] float32}, NaN where pruned. slice_epochs: [n] float64. summary: None for a run
    that has not finished.
    """

    directory: Path
    config: dict[str, Any]
    log: "pd.DataFrame"
    channels: "pd.DataFrame"
    slices: dict[str, np.ndarray]
    slice_epochs: np.ndarray
    summary: dict[str, Any] | None


def read_run(directory: Path) -> Run:
    """Read the folder that a RunLog wrote, of a run that still trains too.

    config.json and log.csv must be there; channels.csv and slices.npz may have been left behind (they are empty then).
    Raises InputError when `directory` is no run folder (says what is missing), when a file is damaged (names it), and
    without pandas.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise InputError(f"reading runs needs pandas ({error}): pip install 'prunetrain-kernels[demo]'") from error
    directory = Path(directory)
    if not is_folder(directory):
        what = "is a file, not a run folder" if is_there(directory) else "does not exist"
        raise InputError(f"{directory} {what}; name the folder that `prunetrain train` wrote")
    missing = [name for name in ("config.json", "log.csv") if not is_there(directory / name)]
    if missing == ["log.csv"]:
        raise InputError(f"{directory} has no log.csv yet: its run has not finished an epoch")
    if missing:
        raise InputError(f"{directory} is not a run folder: {' and '.join(missing)} missing")

    slices, slice_epochs = _read_slices(directory / "slices.npz")
    return Run(
        directory=directory,
        config=_read_json(directory / "config.json"),
        log=pd.DataFrame(_read_log(directory / "log.csv")),
        channels=pd.DataFrame(_read_channels(directory / "channels.csv")),
        slices=slices,
        slice_epochs=slice_epochs,
        summary=_read_json(directory / "summary.json") if is_there(directory / "summary.json") else None,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_regular(path).decode("utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from error
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not even text
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: it holds a {type(content).__name__} where an object belongs")
    return content


def _read_csv(path: Path, columns: Sequence[str]) -> dict[str, Any]:
    """{column: list or array}; an absent file is an empty table."""
    if not is_there(path) and path.name != "log.csv":
        return {column: [] for column in columns}
    try:
        text = read_regular(path).decode("utf-8")
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except OSError as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    header = rows[0] if rows else []
    lacking = [column for column in columns if column not in header]
    if lacking:
        raise InputError(f"{path} is damaged or of another version: no column {', '.join(lacking)}")
    if not text.endswith("\n") or any(len(row) != len(header) for row in rows):
        raise InputError(f"{path} is damaged: it ends, or a row of it ends, before its last column")

    table: dict[str, Any] = {}
    for position, column in enumerate(header):
        cells = [row[position] for row in rows[1:]]
        table[column] = cells if column not in columns or column in TEXT_COLUMNS else _numbers(path, column, cells)
    return table


def _read_log(path: Path) -> dict[str, Any]:
    table = _read_csv(path, [column for column in LOG_COLUMNS if column not in LATER_LOG_COLUMNS])
    for column, value in LATER_LOG_COLUMNS.items():
        cells, absent = table.pop(column, None), math.nan if value is None else value
        if column in TEXT_COLUMNS:
            table[column] = [""] * len(table["epoch"]) if cells is None else cells
        else:
            table[column] = np.full(len(table["epoch"]), absent) if cells is None else _numbers(path, column, cells)
    return {column: table.pop(column) for column in LOG_COLUMNS} | table


def _read_channels(path: Path) -> dict[str, Any]:
    table = _read_csv(path, [column for column in CHANNEL_COLUMNS if column not in COMPUTED.values()])
    for kept, live in COMPUTED.items():
        if live not in table:
            table[live] = table[kept]
        elif isinstance(table[live], list):
            table[live] = _numbers(path, live, table[live])
    return table


def _numbers(path: Path, column: str, cells: list[str]) -> np.ndarray:
    """[rows] int64 where every cell is a whole number, else float64; an empty cell is NaN."""
    try:
        return np.array([int(cell) for cell in cells], np.int64)
    except (ValueError, OverflowError):
        pass
    try:
        return np.array([float(cell) if cell else math.nan for cell in cells], np.float64)
    except ValueError as error:
        raise InputError(f"{path} is damaged: column {column}: {error}") from error


def _read_slices(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    if not is_there(path):
        return {}, np.empty(0)
    try:
        packed = read_regular(path)
        with zipfile.ZipFile(io.BytesIO(packed)) as entries:
            unpacked = sum(entry.file_size for entry in entries.infolist())
        if unpacked > _MOST_UNPACKED * len(packed):
            raise ValueError(f"its {len(packed):,} bytes would unpack to {unpacked:,}")
        with np.load(io.BytesIO(packed), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        epochs = arrays.pop("epochs")
    except OSError as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from error
    except Exception as error:  # a damaged archive can raise almost anything: struct.error, zlib.error, SyntaxError
        raise InputError(f"{path} is damaged: {first_line(error)}") from error
    for name, values in {"epochs": epochs, **arrays}.items():
        shape = "(epochs, output channels)" if name != "epochs" else "(epochs,)"
        if values.ndim != (1 if name == "epochs" else 2) or len(values) != len(epochs):
            raise InputError(f"{path} is damaged: {name} has the shape {values.shape}, not {shape}")
        if values.dtype.kind != "f":
            raise InputError(f"{path} is damaged: {name} holds {values.dtype}, not floating-point numbers")
    if not np.isfinite(epochs).all():
        raise InputError(f"{path} is damaged: an epoch in it is no number")
    return {name.removeprefix(SLICE_PREFIX): values for name, values in arrays.items()}, epochs


def _row(row: Mapping[str, Any], columns: Sequence[str], what: str) -> dict[str, Cell]:
    """The row with every column, in order, of plain Python values."""
    unknown = [key for key in row if key not in columns]
    if unknown:
        raise InputError(f"{what} has no column {', '.join(map(str, unknown))}; there are {', '.join(columns)}")
    return {column: _cell(column, row.get(column)) for column in columns}


def _channel_row(row: Mapping[str, Any]) -> dict[str, Cell]:
    """A row of channels.csv; one that says nothing of gating is of a layer that computes what is kept."""
    full = {COMPUTED[column]: row.get(column) for column in COMPUTED} | dict(row)
    return _row(full, CHANNEL_COLUMNS, "a layer's channels")


def _cell(column: str, value: Any) -> Cell:
    if hasattr(value, "item") and getattr(value, "size", None) != 0:
        with contextlib.suppress(ValueError, RuntimeError):  # more than one element: refused below
            value = value.item()
    if isinstance(value, bool):
        return int(value)
    if value is None or isinstance(value, int | float | str):
        return value
    raise InputError(f"column {column} takes a number or text, not {type(value).__name__}")


def _vector(layer: str, values: torch.Tensor | np.ndarray) -> np.ndarray:
    """[K] float32, a copy that later updates of the weights do not reach."""
    if isinstance(values, torch.Tensor):
        values = values.detach().float().cpu().numpy()
    vector = np.array(values, np.float32)
    if vector.ndim != 1:
        raise InputError(f"layer {layer} needs one value per output channel, not shape {vector.shape}")
    return vector


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, Cell]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_jsonable(part) for part in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return _jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no NaN, and what writes one is refused by strict readers
    return value
