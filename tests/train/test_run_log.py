"""The run log's files: what is written comes back, a resumed run writes the same, damage is named."""

import io
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prunetrain_kernels.errors import CheckpointError, InputError
from prunetrain_kernels.train.run_log import CHANNEL_COLUMNS, LOG_COLUMNS, RunLog, read_run

LAYERS = {"conv1": 8, "epochs": 5, "block.0.conv": 3}  # "epochs": a layer may be called like the file's own array


def epoch_row(epoch: int) -> dict[str, Any]:
    row: dict[str, Any] = {name: 10 * epoch + position for position, name in enumerate(LOG_COLUMNS)}
    row.update(epoch=epoch, phase="train" if epoch < 3 else "fine-tune", loss=1 / 3 / epoch, train_flops=10**15 + epoch)
    row["unknown_costs"] = "memory: the model has moods, and none is good" if epoch == 3 else ""
    return row


def channel_rows(epoch: int) -> list[dict[str, Any]]:
    return [
        dict(
            zip(
                CHANNEL_COLUMNS,
                (epoch, float(epoch), layer, "conv", 3, 3, size - epoch, size, size <= epoch, 2, size - epoch),
                strict=True,
            )
        )
        for layer, size in LAYERS.items()
    ]


def slices(epoch: int) -> dict[str, torch.Tensor]:
    values = {layer: torch.arange(1.0, size + 1) / (7 * (epoch + 1)) for layer, size in LAYERS.items()}
    values["conv1"][:epoch] = math.nan
    return values


def record(log: RunLog, epochs: range) -> None:
    for epoch in epochs:
        log.add_epoch(epoch_row(epoch))
        log.add_channels(channel_rows(epoch))
        log.add_slices(epoch, slices(epoch))
        log.save()


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run of three epochs."""
    log = RunLog(tmp_path / "runs" / "a")
    log.write_config({"model": "resnet32", "epochs": 3})
    record(log, range(1, 4))
    log.write_summary({"val_accuracy": 0.9})
    return log.directory


# --- what is written comes back --------------------------------------------------------------------------------------


def test_log_and_channels_round_trip(folder: Path) -> None:
    run = read_run(folder)
    assert list(run.log.columns) == list(LOG_COLUMNS)
    assert list(run.channels.columns) == list(CHANNEL_COLUMNS)
    assert run.log.to_dict("records") == [epoch_row(epoch) for epoch in (1, 2, 3)]
    assert run.channels.to_dict("records") == [row for epoch in (1, 2, 3) for row in channel_rows(epoch)]
    assert run.log["train_flops"].dtype == np.int64
    assert set(run.channels["removed"]) == {0, 1}


def test_slices_round_trip(folder: Path) -> None:
    run = read_run(folder)
    assert run.slice_epochs.tolist() == [1, 2, 3]
    assert list(run.slices) == list(LAYERS)
    for layer in LAYERS:
        assert run.slices[layer].dtype == np.float32
        np.testing.assert_array_equal(run.slices[layer], np.stack([slices(epoch)[layer] for epoch in (1, 2, 3)]))


def test_config_and_summary_round_trip(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    config = {"model": "vgg11", "seed": 3, "dense": False, "data": None, "decays": [1, 2], "é": "ü"}
    log.write_config(config | {"path": Path("/data/x"), "ratio": np.float32(0.25), "t": torch.tensor([1, 2])})
    log.save()
    log.write_summary({"val_accuracy": torch.tensor(0.5), "max_abs_dy": math.nan, "layers": ("a", "b"), "lambda": 1e-4})
    run = read_run(tmp_path)
    assert run.config == config | {"path": "/data/x", "ratio": 0.25, "t": [1, 2]}
    assert run.summary == {"val_accuracy": 0.5, "max_abs_dy": None, "layers": ["a", "b"], "lambda": 1e-4}
    assert "NaN" not in (tmp_path / "summary.json").read_text()


def test_numbers_from_tensors_and_missing_cells(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.write_config({})
    log.add_epoch({"epoch": np.int64(1), "loss": torch.tensor(0.5, dtype=torch.float64), "penalty": math.nan})
    log.add_epoch({"epoch": 2, "loss": math.inf})
    log.save()
    table = read_run(tmp_path).log
    assert table["epoch"].tolist() == [1, 2]
    assert table["loss"].tolist() == [0.5, math.inf]
    assert table[["penalty", "lr"]].isna().all(axis=None)


def test_a_new_run_in_the_folder_is_unfinished_again(folder: Path) -> None:
    assert read_run(folder).summary == {"val_accuracy": 0.9}
    log = RunLog(folder)
    log.write_config({"model": "resnet50"})
    log.save()
    run = read_run(folder)
    assert run.summary is None
    assert len(run.log) == len(run.channels) == len(run.slice_epochs) == 0


def test_only_the_named_files_are_left(folder: Path) -> None:
    assert set(files(folder)) == {"config.json", "log.csv", "channels.csv", "slices.npz", "summary.json"}


# --- slices ----------------------------------------------------------------------------------------------------------


def test_slices_of_layers_that_come_and_go(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.write_config({})
    log.add_slices(0, {"a": np.ones(2)})
    log.add_slices(0.5, {"b": np.ones(3)})
    log.save()
    run = read_run(tmp_path)
    assert run.slice_epochs.tolist() == [0, 0.5]
    np.testing.assert_array_equal(run.slices["a"], [[1, 1], [math.nan] * 2])
    np.testing.assert_array_equal(run.slices["b"], [[math.nan] * 3, [1, 1, 1]])


def test_the_same_epoch_replaces_its_slices(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for value in (1.0, 2.0):  # the only epoch so far, then the last of two
        log.add_slices(0, {"a": np.full(2, value)})
    for value in (3.0, 4.0):
        log.add_slices(1, {"a": np.full(2, value)})
    state = log.state_dict()
    assert state["slice_epochs"] == [0, 1]
    assert state["slices"]["a"].tolist() == [[2, 2], [4, 4]]

    other = RunLog(tmp_path)
    other.add_slices(0, {"a": np.ones(2)})
    other.add_slices(0, {"b": np.ones(3)})
    assert {layer: rows.tolist() for layer, rows in other.state_dict()["slices"].items()} == {"b": [[1, 1, 1]]}


def test_slices_are_copied(tmp_path: Path) -> None:
    log, weight = RunLog(tmp_path), torch.ones(2)
    log.add_slices(0, {"a": weight})
    weight.zero_()
    assert log.state_dict()["slices"]["a"].tolist() == [[1, 1]]


@pytest.mark.parametrize(
    ("epoch", "values", "message"),
    [
        (2, {"a": torch.ones(3)}, "layer a had 2 output channels, now 3"),
        (2, {"b": torch.ones(2, 2)}, r"layer b needs one value per output channel"),
        (0.5, {"a": torch.ones(2)}, "0.5 come after"),
    ],
)
def test_wrong_slices_change_nothing(tmp_path: Path, epoch: float, values: Any, message: str) -> None:
    log = RunLog(tmp_path)
    log.add_slices(1, {"a": torch.ones(2)})
    with pytest.raises(InputError, match=message):
        log.add_slices(epoch, {"new": torch.ones(1)} | values)
    assert log.state_dict()["slice_epochs"] == [1]
    assert list(log.state_dict()["slices"]) == ["a"]


# --- wrong rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"epoch": 2, "los": 1}, "no column los"),
        ({"epoch": 1}, "epoch 1 does not come after epoch 1"),
        ({"loss": 1}, "needs the number of finished epochs"),
        ({"epoch": 2, "loss": [1]}, "column loss takes a number"),
        ({"epoch": 2, "loss": torch.ones(2)}, "column loss takes a number"),
    ],
)
def test_wrong_epoch_rows_are_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    log = RunLog(tmp_path)
    log.add_epoch({"epoch": 1})
    with pytest.raises(InputError, match=message):
        log.add_epoch(row)
    assert len(log.state_dict()["epochs"]) == 1


def test_wrong_channel_rows_add_none(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    with pytest.raises(InputError, match="no column kept"):
        log.add_channels([*channel_rows(1), {"kept": 3}])
    assert log.state_dict()["channels"] == []


def test_a_config_that_json_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json cannot hold this.*object"):
        RunLog(tmp_path).write_config({"model": object()})
    assert files(tmp_path) == {}


def test_a_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the run folder"):
        RunLog(tmp_path / "file" / "run")


# --- resume ----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_writes_the_same_files(tmp_path: Path) -> None:
    straight, killed = RunLog(tmp_path / "straight"), RunLog(tmp_path / "killed")
    record(straight, range(1, 6))

    record(killed, range(1, 4))
    torch.save(killed.state_dict(), tmp_path / "checkpoint.pt")
    record(killed, range(4, 5))  # an epoch after the last checkpoint: on disk, but lost
    resumed = RunLog(tmp_path / "killed")
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    resumed.save()
    assert resumed.state_dict()["slice_epochs"] == [1, 2, 3]
    record(resumed, range(4, 6))

    assert files(tmp_path / "killed") == files(tmp_path / "straight")


def test_a_state_dict_does_not_follow_the_log(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    record(log, range(1, 2))
    state = log.state_dict()
    other = RunLog(tmp_path / "other")
    other.load_state_dict(state)
    record(other, range(2, 3))
    record(log, range(2, 4))
    assert len(state["epochs"]) == len(state["slice_epochs"]) == len(state["slices"]["conv1"]) == 1
    assert len(other.state_dict()["epochs"]) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("epochs"),
        lambda state: state.update(channels=3),
        lambda state: state["slice_epochs"].append(9.0),
        lambda state: state.update(slices={"a": "text"}),
        lambda state: state["epochs"].append({"unknown": 1}),
    ],
)
def test_a_damaged_state_dict_changes_nothing(tmp_path: Path, damage: Callable[[dict[str, Any]], Any]) -> None:
    log = RunLog(tmp_path)
    record(log, range(1, 3))
    state = log.state_dict()
    damage(state)
    with pytest.raises(CheckpointError, match="the checkpoint's run log"):
        log.load_state_dict(state)
    assert len(log.state_dict()["epochs"]) == 2


# --- writing atomically ----------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_files(folder: Path) -> None:
    """A limit on file sizes stands in for a full disk; in a process of its own, since it cannot be lifted again."""
    before = files(folder)
    script = textwrap.dedent("""
        import resource, sys
        from pathlib import Path
        import numpy as np, torch
        from prunetrain_kernels.errors import CheckpointError, InputError
        from prunetrain_kernels.files import write_atomically
        from prunetrain_kernels.train.run_log import RunLog

        folder = Path(sys.argv[1])
        log = RunLog(folder)
        log.add_slices(1, {"a": np.ones(100_000)})
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        for error, write in (
            (InputError, log.save),
            (InputError, lambda: log.write_summary({"text": "x" * 20_000})),
            (CheckpointError, lambda: write_atomically(folder / "log.csv", bytes(20_000), CheckpointError)),
            (InputError, lambda: write_atomically(folder / "log.csv", lambda f: torch.save(torch.ones(9_999), f))),
        ):
            try:
                write()
            except error as failure:
                print(failure)
    """)
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [
        f"cannot write {folder / name}: File too large" for name in ("slices.npz", "summary.json", "log.csv", "log.csv")
    ], done.stderr
    assert files(folder) == before


# --- reading what is not a run ---------------------------------------------------------------------------------------


def test_what_is_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file, not a run folder"):
        read_run(tmp_path / "file")
    with pytest.raises(InputError, match=r"not a run folder: config\.json and log\.csv missing"):
        read_run(tmp_path)
    RunLog(tmp_path).write_config({})
    with pytest.raises(InputError, match="has not finished an epoch"):
        read_run(tmp_path)


def test_files_that_were_left_behind_are_empty(folder: Path) -> None:
    (folder / "slices.npz").unlink()
    (folder / "channels.csv").unlink()
    run = read_run(folder)
    assert (run.slices, len(run.slice_epochs), len(run.channels), len(run.log)) == ({}, 0, 0, 3)
    assert list(run.channels.columns) == list(CHANNEL_COLUMNS)


@pytest.mark.parametrize("name", ["config.json", "log.csv", "channels.csv", "slices.npz", "summary.json"])
@pytest.mark.parametrize("damage", ["truncated", "cut short", "empty", "garbage", "zeros"])
def test_damaged_files_are_named(folder: Path, name: str, damage: str) -> None:
    path = folder / name
    data = path.read_bytes()
    path.write_bytes(
        {
            "truncated": data[: len(data) // 2],
            "cut short": data[:-2],
            "empty": b"",
            "garbage": bytes(range(256)) * 4,
            "zeros": bytes(len(data)),
        }[damage]
    )
    with pytest.raises(InputError, match=f"{name} is damaged"):
        read_run(folder)


def npz(**arrays: Any) -> bytes:
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    return packed.getvalue()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("config.json", b"[1]"),
        ("config.json", b"[" * 100_000),
        ("log.csv", ",".join(LOG_COLUMNS).encode() + b"\n" + b"x," * (len(LOG_COLUMNS) - 1) + b"1\n"),
        ("log.csv", b"epoch,loss\n1,2\n"),
        ("channels.csv", b'"' + ",".join(CHANNEL_COLUMNS).encode()),
        ("slices.npz", npz(a=np.ones((1, 2)))),
        ("slices.npz", npz(epochs=np.arange(2), a=np.ones((1, 2)))),
        ("slices.npz", npz(epochs=np.array([{}], dtype=object))),
    ],
)
def test_files_of_another_content_are_named(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)
    with pytest.raises(InputError, match=f"{name} is damaged"):
        read_run(folder)


def test_a_file_that_may_not_be_read_is_named(folder: Path) -> None:
    (folder / "summary.json").unlink()
    (folder / "summary.json").mkdir()
    with pytest.raises(InputError, match=r"cannot read .*summary\.json: a folder, not a regular file"):
        read_run(folder)


def test_a_log_of_a_later_version_is_read(folder: Path) -> None:
    lines = (folder / "log.csv").read_text().splitlines()
    (folder / "log.csv").write_text("".join(f"{line},{extra}\n" for line, extra in zip(lines, "ABCD", strict=True)))
    assert read_run(folder).log["A"].tolist() == ["B", "C", "D"]


def test_a_run_from_before_gating_computes_what_it_keeps(folder: Path) -> None:
    path = folder / "channels.csv"
    lines = [line.rsplit(",", 2)[0] for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")
    channels = read_run(folder).channels
    assert channels.in_live.tolist() == channels.in_kept.tolist()
    assert channels.out_live.tolist() == channels.out_kept.tolist()
    log = RunLog(folder)
    old = [{k: v for k, v in row.items() if not k.endswith("_live")} for row in channel_rows(1)]
    log.load_state_dict({"epochs": [], "channels": old, "slice_epochs": [], "slices": {}})
    assert [row["out_live"] for row in log.state_dict()["channels"]] == [row["out_kept"] for row in old]


def test_without_pandas(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    record(RunLog(folder), range(1, 3))  # training does without
    with pytest.raises(InputError, match=r"pip install 'prunetrain-kernels\[demo\]'"):
        read_run(folder)


def test_every_column_is_used() -> None:
    """The rows above have all columns, in order, so that a column that goes astray is seen."""
    assert list(epoch_row(1)) == list(LOG_COLUMNS)
    assert list(channel_rows(1)[0]) == list(CHANNEL_COLUMNS)
