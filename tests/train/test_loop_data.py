"""A run remembers its data: what changes between two starts is refused by name, and nothing is written over."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_runs import command, nets, short_run, write_image  # noqa: F401  (a fixture among them)

from prunetrain_kernels import cli
from prunetrain_kernels.data import load, record_of
from prunetrain_kernels.errors import CheckpointError
from prunetrain_kernels.train import loop
from prunetrain_kernels.train.config import TrainConfig
from prunetrain_kernels.train.loop import train

OLDER_RUN = Path(__file__).with_name("older_run") / "checkpoint.pt"  # of a version that kept no record of its data


def write_tree(root: Path) -> None:
    """Three classes of 6 training and 2 validation images."""
    for number, name in enumerate("abc"):
        for split, count in (("train", 6), ("val", 2)):
            for i in range(count):
                write_image(root / split / name / f"{i}.bmp", seed=100 * number + 10 * i + (split == "val"))


def killed_after_one_epoch(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    original = loop.train_epoch

    def stop(training: Any, progress: Any, epoch: int) -> None:
        if epoch == 1:
            raise KeyboardInterrupt
        original(training, progress, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            train(replace(config, **changes), progress=False)


def content(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- trees of images ---------------------------------------------------------------------------------------------------


def rename(before: str, after: str) -> Callable[[Path], None]:
    def do(root: Path) -> None:
        for split in ("train", "val"):
            (root / split / before).rename(root / split / after)

    return do


def swap_two_classes(root: Path) -> None:
    for before, after in (("a", "x"), ("b", "a"), ("x", "b")):
        rename(before, after)(root)


def replace_one_in_silence(root: Path) -> None:
    """Writes a file of the size and the time of the former one in its place."""
    file = root / "train/b/3.bmp"
    times = file.stat().st_mtime_ns
    write_image(file, seed=9999)
    os.utime(file, ns=(times, times))


def add_class(root: Path) -> None:
    shutil.copytree(root / "train/c", root / "train/d")
    shutil.copytree(root / "val/c", root / "val/d")


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "renamed, so that labels swap": (
        rename("a", "x"),
        "the classes differ (3 then, 3 now): 'a' is gone and 'x' is new",
    ),
    "renamed, in the same place": (rename("b", "bee"), "'b' is gone and 'bee' is new"),
    "swapped": (swap_two_classes, "the training images have other pixels"),
    "class added": (add_class, "the classes differ (3 then, 4 now): 'd' is new"),
    "class gone": (
        lambda root: [shutil.rmtree(root / s / "c") for s in ("train", "val")],
        "(3 then, 2 now): 'c' is gone",
    ),
    "image added": (lambda root: write_image(root / "train/b/9.bmp", 1), "class 'b' had 6 training images and has 7"),
    "image gone": (lambda root: (root / "val/c/1.bmp").unlink(), "class 'c' had 2 validation images and has 1"),
    "moved": (
        lambda root: (root / "train/a/1.bmp").rename(root / "train/b/8.bmp"),
        "class 'a' had 6 training images and has 5",
    ),
    "replaced in silence": (replace_one_in_silence, "the training images have other pixels"),
    "validation image replaced": (
        lambda root: write_image(root / "val/a/0.bmp", 7),
        "the validation images have other",
    ),
    "copies added": (
        lambda root: [shutil.copy(root / "train/a/0.bmp", root / f"train/a/copy{i}.bmp") for i in range(8)],
        "class 'a' had 6 training images and has 14",
    ),
    "another order": (lambda root: (root / "train/a/0.bmp").rename(root / "train/a/7.bmp"), "other pixels"),
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, nets: Path) -> Path:
    """A folder with a tree, and a run on it that was killed in its second epoch."""
    folder = tmp_path_factory.mktemp("killed")
    write_tree(folder / "tree")
    with pytest.MonkeyPatch.context() as patch:
        killed_after_one_epoch(short_run(folder / "run", str(folder / "tree")), patch)
    return folder


@pytest.mark.parametrize("change", CHANGES)
def test_resuming_on_other_data_is_refused(change: str, killed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    act, says = CHANGES[change]
    tree, config = killed / "tree", short_run(killed / "run", str(killed / "tree"))
    shutil.copytree(tree, killed / "before")
    try:
        act(tree)
        before = content(killed / "run")
        capsys.readouterr()
        assert cli.main(command(config, "--resume", "--quiet")) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1, said
        assert said.startswith("prunetrain: error: ")
        assert says in said
        assert "restore the data, or choose another --out" in said
        assert content(killed / "run") == before
    finally:
        shutil.rmtree(tree)
        shutil.copytree(killed / "before", tree)
        shutil.rmtree(killed / "before")


@pytest.mark.parametrize("change", ["class added", "image gone", "replaced in silence"])
def test_starting_from_a_run_on_other_data_is_refused(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    act, says = CHANGES[change]
    write_tree(tmp_path / "tree")
    config = short_run(tmp_path / "dense", str(tmp_path / "tree"), epochs=1)
    assert cli.main(command(config, "--dense", "--quiet")) == 0
    act(tmp_path / "tree")
    capsys.readouterr()
    sparse = command(replace(config, out=str(tmp_path / "sparse")), f"--start-from={config.out}", "--quiet")
    assert cli.main(sparse) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1, said
    assert f"--start-from {config.out} was not trained on what" in said
    assert says in said
    assert not content(tmp_path / "sparse")
    if change != "class added":
        assert cli.main([*sparse, "--start-from-other-data"]) == 0


def test_the_same_data_resume(killed: Path, tmp_path: Path) -> None:
    """Whatever moved, was touched, or lies beside the images: the data are the same."""
    tree = killed / "tree"
    shutil.copytree(killed / "run", tmp_path / "run")
    os.utime(tree / "train/a/1.bmp", ns=(1, 1))
    (tree / "train/b/5.bmp").rename(tree / "train/b/6.bmp")  # its name decides nothing but its place
    (tree / "train/c/notes.txt").write_text("not an image")
    try:
        train(short_run(tmp_path / "run", str(tree), cache=str(tmp_path / "cache")), resume=True, progress=False)
    finally:
        (tree / "train/b/6.bmp").rename(tree / "train/b/5.bmp")
    extra = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["extra"]
    assert extra["epoch"] == 2
    saved = extra["data"]
    assert saved["class_names"] == ["a", "b", "c"]
    assert saved["train"]["counts"] == [6, 6, 6]
    assert saved["val"]["counts"] == [2, 2, 2]
    assert json.loads((killed / "run/config.json").read_text())["data_record"] == saved


def test_ranks_refuse_it_too(killed: Path, tmp_path: Path, nets: Path) -> None:
    write_tree(tmp_path / "tree")
    shutil.copytree(killed / "run", tmp_path / "run")
    payload = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    saved = {**json.loads(payload["extra"]["config"]), "data": str(tmp_path / "tree")}
    payload["extra"]["config"] = json.dumps(saved)
    torch.save(payload, tmp_path / "run/checkpoint.pt")
    rename("a", "x")(tmp_path / "tree")
    before = content(tmp_path / "run")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "prunetrain_kernels.cli"),
            *command(short_run(tmp_path / "run", str(tmp_path / "tree")), "--resume", "--quiet"),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(nets), *sys.path]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("prunetrain: ")]
    assert any("the classes differ" in line for line in said), done.stderr
    assert content(tmp_path / "run") == before


# -- other kinds of data -----------------------------------------------------------------------------------------------


def write_parquet(folder: Path, labels: list[int], seed: int = 0) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write_image(folder / "image.png", seed)
    image = (folder / "image.png").read_bytes()
    images = pa.array(
        [{"bytes": image, "path": ""} for _ in labels], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    for split in ("train", "test"):
        pq.write_table(pa.table({"image": images, "label": labels}), folder / f"{split}-00000-of-00001.parquet")


@pytest.mark.parametrize(
    ("after", "says"),
    [
        ({"labels": [1, 0, 0, 1, 0, 1, 0, 1]}, "the training images have other labels, or another order"),
        ({"labels": [0, 1, 0, 1, 0, 1, 0, 0]}, "class '0' had 4 training images and has 5"),
        ({"labels": [0, 1, 0, 1, 0, 1, 0, 2]}, "2 then, 3 now.*'2' is new"),
        ({"labels": [0, 1, 0, 1, 0, 1, 0, 1], "seed": 1}, "the training images have other pixels"),
    ],
)
def test_an_edited_parquet_file_is_refused(
    after: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "data", [0, 1] * 4)
    config = short_run(tmp_path / "run", str(tmp_path / "data"))
    killed_after_one_epoch(config, monkeypatch)
    write_parquet(tmp_path / "data", **after)
    with pytest.raises(CheckpointError, match=says):
        train(config, resume=True, progress=False)
    write_parquet(tmp_path / "data", [0, 1] * 4)
    train(config, resume=True, progress=False)


def write_cifar(folder: Path, labels: list[int], pixels: np.ndarray) -> None:
    """The files of CIFAR-10, with `labels` and (images, 3072) `pixels` in each batch."""
    folder.mkdir(exist_ok=True)
    batch = {"data": pixels, "labels": labels}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("ab")}))


def one_pixel(pixels: np.ndarray) -> np.ndarray:
    changed = pixels.copy()
    changed[1, 77] ^= 1
    return changed


@pytest.mark.parametrize(
    ("labels", "change", "says"),
    [
        ([0, 0, 1, 0], np.copy, "class 'a' had 10 training images and has 15"),
        ([1, 0, 1, 0], np.copy, "the training images have other labels, or another order"),
        ([0, 1, 0], lambda pixels: pixels[:3], "class 'b' had 10 training images and has 5"),
        ([0, 1, 0, 1, 1], lambda pixels: pixels[[0, 1, 2, 3, 3]], "class 'b' had 10 training images and has 15"),
        ([0, 1, 0, 1], one_pixel, "the training images have other pixels"),
    ],
    ids=["moved", "swapped", "removed", "copied", "one pixel"],
)
def test_an_edited_cifar_archive_is_refused(
    labels: list[int], change: Callable[[Any], Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    write_cifar(folder, [0, 1, 0, 1], pixels)
    config = short_run(tmp_path / "run", str(folder))
    killed_after_one_epoch(config, monkeypatch)
    write_cifar(folder, labels, change(pixels))
    before = content(tmp_path / "run")
    with pytest.raises(CheckpointError, match=says):
        train(config, resume=True, progress=False)
    assert content(tmp_path / "run") == before
    write_cifar(folder, [0, 1, 0, 1], pixels)
    train(config, resume=True, progress=False)


def test_a_file_changed_outside_of_what_validation_sees_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that stay files, of the same name and size; only the training's random crops see the corner."""
    write_tree(tmp_path / "tree")
    config = short_run(tmp_path / "run", str(tmp_path / "tree"), augment="resized-crop", crop=3, workers=1)
    killed_after_one_epoch(config, monkeypatch)
    file = tmp_path / "tree/train/b/3.bmp"
    before = file.read_bytes()
    file.write_bytes(before[:-3] + bytes([before[-3] ^ 1]) + before[-2:])
    with pytest.raises(CheckpointError, match="the files of the training images have other contents; restore"):
        train(config, resume=True, progress=False)
    file.write_bytes(before)
    train(config, resume=True, progress=False)


def test_another_release_of_a_library_that_brings_data_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    config = short_run(tmp_path / "run", "digits", limit_train=40, limit_val=20)
    killed_after_one_epoch(config, monkeypatch)
    digits = datasets.load_digits()
    digits.images = digits.images[:, ::-1]
    monkeypatch.setattr(datasets, "load_digits", lambda: digits)
    with pytest.raises(CheckpointError, match="the training images have other pixels; restore the data"):
        train(config, resume=True, progress=False)


def test_another_draw_of_synthetic_images_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = short_run(tmp_path / "run", "synthetic:24x6x6")
    killed_after_one_epoch(config, monkeypatch)
    other = load("synthetic:24x6x6", seed=5)
    monkeypatch.setattr(loop.setup, "load", lambda *_, **__: other)
    with pytest.raises(CheckpointError, match="the training images have other labels, or another order"):
        train(config, resume=True, progress=False)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda record: record["mean"].__setitem__(0, 0.125), r"the mean of the training images was 0.125, .* and is"),
        (lambda record: record["std"].pop(), "the std of the training images was"),
        (lambda record: record.pop("val"), "the record of the data in .* cannot be read"),
        (lambda record: record.update(train=3), "the record of the data in .* cannot be read"),
        (lambda record: record["image"].__setitem__(0, 1), r"were 1x6x6 and are 3x6x6"),
        (lambda record: record["class_names"].reverse(), "class 0 was 'c' and is 'a'"),
    ],
)
def test_every_part_of_the_record_is_compared(
    edit: Callable[[dict[str, Any]], Any], says: str, killed: Path, tmp_path: Path
) -> None:
    shutil.copytree(killed / "run", tmp_path / "run")
    payload = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    edit(payload["extra"]["data"])
    torch.save(payload, tmp_path / "run/checkpoint.pt")
    with pytest.raises(CheckpointError, match=says):
        train(short_run(tmp_path / "run", str(killed / "tree")), resume=True, progress=False)


# -- runs of the version before ----------------------------------------------------------------------------------------


def test_a_run_without_a_record_goes_on_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(OLDER_RUN, tmp_path / "run/checkpoint.pt")
    assert "data" not in torch.load(OLDER_RUN, weights_only=True)["extra"]
    config = short_run(tmp_path / "run", "synthetic:24x6x6")
    assert cli.main(command(config, "--resume")) == 0
    assert "kept no record of its data: they could not be compared with 'synthetic:24x6x6'" in capsys.readouterr().out
    saved = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["extra"]
    assert saved["epoch"] == 2
    assert saved["data"] == record_of(load("synthetic:24x6x6"))  # from now on there is one
