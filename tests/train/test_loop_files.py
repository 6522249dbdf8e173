"""Training on images that stay files (--augment resized-crop): resumed, shared out, exported, refused."""

import collections
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_runs import MODULE, command, nets, short_run, write_image  # noqa: F401  (a fixture among them)

from prunetrain_kernels import cli
from prunetrain_kernels.data import ImageFiles, batch, epoch_order, record_of
from prunetrain_kernels.errors import CheckpointError
from prunetrain_kernels.train import loop, setup
from prunetrain_kernels.train.config import TrainConfig
from prunetrain_kernels.train.distributed import Ranks
from prunetrain_kernels.train.loop import train
from prunetrain_kernels.train.trained import load_trained


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 training and 6 validation images of several sizes: two steps of 8 in an epoch, and one of 6."""
    root = tmp_path_factory.mktemp("images") / "tree"
    for split, count in (("train", 22), ("val", 6)):
        for i in range(count):
            write_image(root / split / "ab"[i % 2] / f"{i:02}.jpg", 50 * i + (split == "val"), 18 + i, 25 + i % 5)
    return root


def options(out: Path, tree: Path, **changes: Any) -> TrainConfig:
    of_files = {"augment": "resized-crop", "crop": 12, "workers": 1, "cache_limit": 0}
    return short_run(out, str(tree), **{"model": f"{MODULE}:WithNorm", "epochs": 3, **of_files, **changes})


def tensors_of(run: Path) -> dict[str, Any]:
    payload = torch.load(run / "checkpoint.pt", weights_only=True)
    momentum = {f"momentum {i}": state["momentum_buffer"] for i, state in payload["optimizer"]["state"].items()}
    return {**payload["model"], **momentum}


def assert_same_run(one: Path, other: Path) -> None:
    tensors, others = tensors_of(one), tensors_of(other)
    assert tensors.keys() == others.keys()
    assert len(tensors) > 10
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])] == []


@pytest.fixture(scope="module")
def undisturbed(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(options(run, tree), progress=False)
    return run


@pytest.mark.parametrize(("workers", "cache_limit"), [(1, 0), (3, 10**9)])
def test_a_resumed_run_is_the_undisturbed_one_bitwise(
    workers: int, cache_limit: int, undisturbed: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of its second epoch; with other threads, and then also from the cache."""
    config, original = options(tmp_path / "run", tree), loop.make_step

    def stop(training: Any, progress: Any, indices: Any, epoch: int) -> None:
        if epoch == 1 and progress.sums.steps == 1:
            raise KeyboardInterrupt
        original(training, progress, indices, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, progress=False)
    train(replace(config, workers=workers, cache_limit=cache_limit), resume=True, progress=False)
    assert_same_run(tmp_path / "run", undisturbed)
    assert (tmp_path / "cache").exists() == (cache_limit > 0)


def test_every_image_is_decoded_once_an_epoch(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: collections.Counter[tuple[int, int, Any]] = collections.Counter()
    lock, original, begin = threading.Lock(), ImageFiles._make, loop.begin

    def make(self: ImageFiles, row: int, crops: Any) -> np.ndarray:
        with lock:
            made[len(self), row, crops and crops.epoch] += 1
        return original(self, row, crops)

    def begun(*arguments: Any, **keywords: Any) -> Any:
        done = begin(*arguments, **keywords)
        made.clear()  # of the statistics, the record and the example
        return done

    monkeypatch.setattr(ImageFiles, "_make", make)
    monkeypatch.setattr(loop, "begin", begun)
    train(options(tmp_path / "run", tree), progress=False)
    assert made == {
        **{(22, row, epoch): 1 for row in range(22) for epoch in range(3)},
        **{(6, row, None): 3 for row in range(6)},
    }


@pytest.mark.parametrize("world", [2, 3])
def test_each_rank_decodes_its_share_and_together_they_make_the_batch(
    world: int, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, int]] = []
    original = ImageFiles._make
    device = torch.device("cpu")
    config = options(tmp_path / "run", tree)
    ranks = [Ranks(rank, world) for rank in range(world)]
    batches = [setup.Batches(setup.load_data(config, device), {}, 3, device, rank) for rank in ranks]
    alone, order = setup.load_data(config, device), epoch_order(22, 3, 1)
    of_rank = {id(each.data.train_images): each.ranks.rank for each in batches}

    def make(self: ImageFiles, row: int, crops: Any) -> np.ndarray:
        made.append((of_rank.get(id(self), -1), row))
        return original(self, row, crops)

    monkeypatch.setattr(ImageFiles, "_make", make)
    expected_share: dict[int, set[int]] = collections.defaultdict(set)
    for step, start in enumerate(range(0, 22, 8)):
        indices = order[start : start + 8]
        parts = []
        for each in batches:
            each.expect(order[start:], 8, 1, train=True)
            parts.append(each.share(indices, 1, step, train=True, channels_last=False)[0])
            expected_share[each.ranks.rank] |= set(indices[each.ranks.share(len(indices))].tolist())
        whole = batch(alone, indices, seed=3, epoch=1, step=step, device="cpu", train=True)[0]
        assert torch.equal(torch.cat(parts), whole)
    for rank, rows in expected_share.items():
        assert sorted(row for by, row in made if by == rank) == sorted(rows)
    assert set().union(*expected_share.values()) == set(range(22))


def test_a_batch_that_grows_gives_up_what_was_begun_for_nothing(tree: Path, tmp_path: Path) -> None:
    device = torch.device("cpu")
    data = setup.load_data(options(tmp_path / "run", tree), device)
    batches, order = setup.Batches(data, {}, 3, device, Ranks(1, 2)), epoch_order(22, 3, 1)
    images = data.train_images
    assert isinstance(images, ImageFiles)
    batches.expect(order, 4, 1, train=True)
    assert [row for row, _ in images._begun] == order[[2, 3, 6, 7, 10, 11]].tolist()
    batches.expect(order, 10, 1, train=True)
    assert {row for row, _ in images._begun} == set(order[[*range(5, 10), *range(15, 20), 21]].tolist())
    batches.expect_nothing()
    assert not images._begun


def test_two_processes_train(nets: Path, tree: Path, tmp_path: Path, undisturbed: Path) -> None:
    config = options(tmp_path / "run", tree, cache_limit=10**9)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "prunetrain_kernels.cli", *command(config)),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(nets), *sys.path]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("22 training and 6 validation images") == 1
    records = [json.loads((run / "config.json").read_text())["data_record"] for run in (tmp_path / "run", undisturbed)]
    assert records[0] == records[1]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_one_line_comes_first_and_export_knows_the_images(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.main(command(options(run, tree, epochs=1))) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("22 training and 6 validation images, ")
    assert said[0].endswith("of --cache-limit: nothing is cached; 1 threads read them batch by batch")
    config = json.loads((run / "config.json").read_text())
    assert config["data_record"]["image"] == [3, 12, 12]
    trained = load_trained(run)
    data = setup.load_data(options(run, tree), torch.device("cpu"))
    assert trained.note == ""
    assert torch.equal(
        trained.examples, batch(data, torch.arange(6), seed=0, epoch=0, step=0, device="cpu", train=False)[0]
    )
    assert config["data_record"] == record_of(data)
    assert cli.main(["export", str(run), "--out", str(tmp_path / "net.pt")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "input: float32 images (N, 3, 12, 12)" in said[1]
    assert not (tmp_path / "cache").exists()


def test_export_caches_nothing_and_lives_without_the_images(tree: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(options(run, tree, epochs=1, cache_limit=None), progress=False)
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 2
    for file in files:
        file.unlink()
    assert load_trained(run).note == ""
    assert not list((tmp_path / "cache").iterdir())
    payload = torch.load(run / "checkpoint.pt", weights_only=True)
    payload["extra"]["config"] = json.dumps({**json.loads(payload["extra"]["config"]), "data": str(tmp_path / "gone")})
    torch.save(payload, run / "checkpoint.pt")
    trained = load_trained(run)
    assert "cannot be read" in trained.note
    assert trained.examples.shape == (8, 3, 12, 12)


def test_a_truncated_image_ends_the_run_with_its_name(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in tree.rglob("*.jpg"):
        copy = tmp_path / "tree" / file.relative_to(tree)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    bad = tmp_path / "tree/train/a/20.jpg"
    bad.write_bytes(bad.read_bytes()[:-200])
    assert cli.main(command(options(tmp_path / "run", tmp_path / "tree"), "--quiet")) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert f"{bad} is a damaged image (" in said[0]
    bad.write_bytes(b"")
    assert cli.main(command(options(tmp_path / "run", tmp_path / "tree"), "--quiet", "--overwrite")) == 2
    assert f"{bad} is empty; replace or remove it" in capsys.readouterr().err


def test_other_files_are_refused_when_a_run_goes_on(undisturbed: Path, tree: Path, tmp_path: Path) -> None:
    config = replace(options(undisturbed, tree), cache=str(tmp_path / "cache"))
    for changes, says in (
        (
            {"augment": "crop", "image_size": None, "workers": None, "cache_limit": None},
            "--augment resized-crop, not crop",
        ),
        ({"crop": 11}, "--crop 12, not 11"),
        ({"image_size": 16}, "without --image-size, not with --image-size 16"),
    ):
        with pytest.raises(CheckpointError, match=says):
            train(replace(config, **changes), resume=True, progress=False)
    file = tree / "val/a/02.jpg"
    before = file.read_bytes()
    try:
        file.write_bytes(before + b"\0")
        with pytest.raises(
            CheckpointError, match="the files of the validation images have other names or sizes; restore"
        ):
            train(config, resume=True, progress=False)
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ("--augment=resized-crop", "--augment resized-crop scales parts of the images to --crop N; give it too"),
        ("--workers=2", "--workers is about images that stay files; add --augment resized-crop"),
        ("--cache-limit=2G", "--cache-limit is about images that stay files; add --augment resized-crop"),
        ("--augment=resized-crop --crop=8 --workers=0", "--workers must be from 1 to 1024, not 0"),
        (
            "--augment=resized-crop --crop=8 --cache-limit=-1",
            "--cache-limit must be a number of bytes, 0 or more, not -1",
        ),
        ("--augment=resized-crop --crop=8 --image-size=7", "--image-size 7 is what the shorter side is scaled to"),
        ("--augment=resized-crop --crop=0", "--crop must be at least 1, not 0"),
        ("--augment=resized-crop --crop=8 --data=digits", "'digits' is no folder of these"),
    ],
)
def test_options_that_cannot_be_used(
    changes: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["train", "--out", str(tmp_path / "run"), "--model=net_for_files:Net", "--device=cpu", "--quiet"]
    assert cli.main([*base, *changes.split()]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert says in said
    assert not (tmp_path / "run/config.json").exists()
