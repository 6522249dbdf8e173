"""`prunetrain export`: from a run folder to a program that gives what the run's validation saw."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from prunetrain_kernels import cli
from prunetrain_kernels.data import ImageData, batch, load
from prunetrain_kernels.train import setup
from prunetrain_kernels.train.config import TrainConfig
from prunetrain_kernels.train.loop import train
from prunetrain_kernels.train.trained import load_trained

DATA = "synthetic:40x1x8x8"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose network has lost channels; a relative threshold takes some in so few steps."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = {
        "relative": True,
        "threshold": 0.75,
        "policy": "gating",
        "fuse": True,
        "interval": 1,
        "zeroing_tolerance": 1e6,
    }
    train(TrainConfig(out=str(folder), data=DATA, epochs=2, batch=20, lr=0.05, **options), progress=False)  # type: ignore[arg-type]
    return folder


def test_a_run_comes_back_as_it_was_saved(run: Path) -> None:
    trained = load_trained(run)
    data = load(DATA)
    images, labels = batch(data, torch.arange(len(data.val_labels)), seed=0, epoch=0, step=0, device="cpu", train=False)
    assert torch.equal(trained.examples, images[:8])
    assert (trained.mean, trained.std, trained.epoch) == (data.mean, data.std, 2)
    assert not trained.model.training
    assert sum(p.numel() for p in trained.model.parameters()) < 230_000  # of 272,186
    with torch.no_grad():
        correct = (trained.model(images).argmax(1) == labels).sum()
    rows = (run / "log.csv").read_text().splitlines()
    accuracy = float(rows[-1].split(",")[rows[0].split(",").index("val_accuracy")])
    assert float(correct) / len(labels) == pytest.approx(accuracy)


@pytest.mark.parametrize("format", ["torch", "torchscript", "onnx"])
def test_export_writes_what_it_says(format: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if format == "onnx":
        for name in ("onnx", "onnxscript"):
            pytest.importorskip(name)
    path = tmp_path / "net.bin"
    assert cli.main(["export", str(run), "--format", format, "--out", str(path)]) == 0
    said = capsys.readouterr().out
    assert f"{path}: {format}, " in said
    assert "epoch 2; input: float32 images (N, 1, 8, 8), (image / 255 - mean) / std with mean 0." in said
    assert path.stat().st_size > 10_000
    if format == "torchscript":
        trained = load_trained(run)
        loaded = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
        with torch.no_grad():
            expected = trained.model(trained.examples)
            assert torch.allclose(loaded(trained.examples), expected, atol=1e-5 * float(expected.abs().max()))


def test_export_without_the_data(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.pt"
    checkpoint = str(run / "checkpoint.pt")
    assert cli.main(["export", checkpoint, "--input", "1x8x8", "--classes", "10", "--out", str(path)]) == 0
    said = capsys.readouterr().out
    mean, std = (f"{value[0]:.6g}" for value in (load(DATA).mean, load(DATA).std))  # which the run wrote down
    assert said.endswith(f"images (N, 1, 8, 8), (image / 255 - mean) / std with mean {mean} and std {std}\n")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--out net.bin", "does not say the format"),
        ("--out nowhere/net.pt", "there is no folder"),
        ("--out net.pt --classes 7", "--classes is 7, but in the run's data it is 10; leave it out"),
        ("--out net.pt --input 3x8x8", "--input is (3, 8, 8), but in the run's data it is (1, 8, 8)"),
        ("--out net.pt --input 3x8x8 --classes 10", "the network does not take images of (3, 8, 8)"),
    ],
)
def test_export_refuses(
    options: str,
    says: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", str(run), *options.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith("prunetrain: error: ")
    assert says in said
    assert len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def forget_the_data(run: Path) -> None:
    """Makes it a run of a version that did not write its data down."""
    payload = torch.load(run / "checkpoint.pt", weights_only=True)
    del payload["extra"]["data"]
    torch.save(payload, run / "checkpoint.pt")


@pytest.mark.parametrize("now", ["others", "gone"])
def test_a_run_whose_data_have_changed_keeps_its_mean(
    now: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Today's mean, applied to the images, would be another than the network was trained with."""

    def today(*_: object, **__: object) -> ImageData:
        if now == "gone":
            raise setup.InputError("there is no data at 'images'")
        return dataclasses.replace(load(DATA), mean=(0.1,), std=(0.9,), class_names=tuple("abcdefghij"))

    then = load(DATA)
    monkeypatch.setattr(setup, "load", today)
    trained = load_trained(run)
    assert (trained.mean, trained.std, trained.class_names) == (then.mean, then.std, then.class_names)
    assert trained.examples.shape == (8, 1, 8, 8)
    assert cli.main(["export", str(run), "--out", str(tmp_path / "net.pt")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].endswith(f"mean {then.mean[0]:.6g} and std {then.std[0]:.6g}")
    why = {"others": "are no longer what it was trained on (the classes differ", "gone": "cannot be read"}[now]
    assert why in said[2]


def test_a_run_without_a_record_is_exported_with_its_data_as_they_are(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    forget_the_data(copy)
    trained, data = load_trained(copy), load(DATA)
    assert (trained.mean, trained.std, trained.class_names, trained.note) == (data.mean, data.std, data.class_names, "")
    assert load_trained(copy, (1, 8, 8), 10).mean is None


def test_export_refuses_what_is_no_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(tmp_path), "--out", "net.pt"]) == 2
    assert "there is no checkpoint" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)

    def gone(*_: object, **__: object) -> None:
        raise setup.InputError("'images' is not there.")

    monkeypatch.setattr(setup, "load", gone)
    forget_the_data(copy)
    assert cli.main(["export", str(copy), "--out", str(tmp_path / "net.pt")]) == 2
    said = capsys.readouterr().err
    assert "the run's data cannot be read: 'images' is not there; give --input CxHxW and --classes N instead" in said
