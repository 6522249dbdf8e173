"""Two generations of a run's checkpoint, and what is said where something differs."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from whole_runs import SHORT, checkpoint_of, config, tiny_module  # noqa: F401 - a fixture

from prunetrain_kernels import CheckpointError
from prunetrain_kernels.errors import TrainingStopped
from prunetrain_kernels.files import write_atomically
from prunetrain_kernels.train import loop
from prunetrain_kernels.train.loop import train
from prunetrain_kernels.train.run_checkpoint import CHECKPOINT, PREVIOUS, newest
from prunetrain_kernels.train.stopping import StopRequest


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_module: Any) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(config(folder, **SHORT, data="synthetic:40x6x6"), progress=False)
    return folder


def resumed(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[str]:
    """The lines that a resumed run says."""
    said: list[str] = []
    monkeypatch.setattr(loop.setup.tqdm, "write", lambda text, **_: said.append(text))
    train(config(folder, **{**SHORT, "data": "synthetic:40x6x6", **changes}), resume=True)
    return said


def test_a_damaged_or_missing_newest_gives_way_to_the_one_before(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs = [torch.load(whole / n, weights_only=True)["extra"]["epoch"] for n in (CHECKPOINT, PREVIOUS)]
    assert epochs == [2, 1]
    expected = checkpoint_of(whole)["model"]
    for damage in ("flip", "half", "gone", "contents"):
        run = tmp_path / damage
        shutil.copytree(whole, run)
        path = run / CHECKPOINT
        content = bytearray(path.read_bytes())
        if damage == "flip":
            place = content.find(expected["fc.weight"].numpy().tobytes())
            assert place > 0
            content[place] ^= 64
            path.write_bytes(content)
        elif damage == "half":
            path.write_bytes(content[: len(content) // 2])
        elif damage == "gone":
            path.unlink()
        else:
            payload = torch.load(path, weights_only=True)
            torch.save({**payload, "sizes": {"fc": {"forward": 1}}}, path)
        lines = [line for line in resumed(run, monkeypatch) if "taking 'checkpoint.previous.pt' instead" in line]
        assert len(lines) == 1
        assert lines[0].endswith("of epoch 1")
        again = checkpoint_of(run)["model"]
        assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


def test_both_damaged_is_refused_with_the_reason_of_the_newest(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for name in (CHECKPOINT, PREVIOUS):
        (run / name).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt' is damaged"):
        newest(run)


def test_other_threads_processes_devices_and_versions_are_said(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    payload = checkpoint_of(run)
    assert payload["extra"]["threads"] == 1
    payload["extra"]["threads"] = 7
    assert (payload["extra"]["ranks"], payload["extra"]["device"]) == (1, "cpu")
    payload["extra"] |= {"ranks": 3, "device": "cuda"}
    payload["versions"]["torch"] = "1.0"
    torch.save(payload, run / CHECKPOINT)
    said = "\n".join(resumed(run, monkeypatch))
    assert "the run had 7 threads and has 1 now" in said
    assert "the run had 3 processes and has 1 now: each makes another share of a batch" in said
    assert "the run was on cuda and is on cpu now" in said
    assert "the run had torch 1.0 and has" in said


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory, tiny_module: Any) -> Path:  # noqa: F811
    """A run that was stopped inside its first epoch."""
    folder, stop = tmp_path_factory.mktemp("inside") / "run", StopRequest()
    stop.number = signal.SIGTERM
    with pytest.raises(TrainingStopped, match="after step 1 of epoch 1"):
        train(config(folder, **SHORT, data="synthetic:40x6x6"), progress=False, stop=stop)
    return folder


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trained", 1),
        ("lasso", "x"),
        ("sent", None),
        ("sums", []),
        ("sums/steps", -1),
        ("sums/batch", 2.5),
        ("sums/lr", None),
        ("sums/flops", True),
        ("sums/unknown", 3),
        ("sums/forward", 3),
        ("sums/step_times", [None]),
        ("sums/losses", torch.zeros(2)),
        ("sums/losses", torch.zeros(0, 2)),
    ],
    ids=str,
)
def test_wrong_contents_of_an_epoch_that_is_not_finished(name: str, value: Any, inside: Path, tmp_path: Path) -> None:
    payload = checkpoint_of(inside)
    assert payload["extra"]["epoch"] == 0
    torch.save(payload, path := tmp_path / CHECKPOINT)
    newest(path)
    within = payload["extra"]["within"]
    part, _, last = name.rpartition("/")
    (within[part] if part else within)[last] = value
    torch.save(payload, path)
    with pytest.raises(CheckpointError, match=rf"within.*\['{last}'\] is "):
        newest(path)


def test_the_file_before_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path, previous = tmp_path / "a", tmp_path / "b"
    for content in (b"one", b"two", b"three"):
        write_atomically(path, content, previous=previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"three", b"two")

    def fails(file: Any) -> None:
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_atomically(path, fails, previous=previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"three", b"two")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
