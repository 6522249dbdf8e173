"""Inputs of the wrong kind: one sentence, exit code 2, no traceback, and no waiting."""

import dataclasses
import gzip
import io
import os
import socket
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from prunetrain_kernels import PruneTrain
from prunetrain_kernels.cli import main
from prunetrain_kernels.data import load, loaders
from prunetrain_kernels.errors import CheckpointError, InputError
from prunetrain_kernels.files import write_atomically
from prunetrain_kernels.train import report
from prunetrain_kernels.train.config import TrainConfig
from prunetrain_kernels.train.mini_batch import MiniBatch

KINDS = ("pipe", "socket", "folder", "link to nothing", "device")


def put(path: Path, kind: str) -> None:
    """Something that is no regular file, at a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            before = os.getcwd()
            os.chdir(path.parent)  # the name of a socket may not be long
            bound.bind(path.name)
            os.chdir(before)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere")


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which the command line refuses."""
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    return said[0]


# -- a run folder ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    options = ["--model=vgg7", "--data=synthetic:20x32x32", "--limit-val=10", "--epochs=1", "--batch=10", "--dense"]
    assert main(["train", *options, "--device=cpu", "--quiet", f"--out={run}"]) == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "run"
    copy.mkdir()
    for file in finished.iterdir():
        os.link(file, copy / file.name)
    return copy


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "link to nothing"])
@pytest.mark.parametrize("name", ["config.json", "log.csv", "channels.csv", "slices.npz", "summary.json"])
def test_a_file_of_a_run_that_is_no_file(name: str, kind: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(run / name, kind)
    assert name in refused(["report", str(run)], capsys)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_is_no_file(kind: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(run / "checkpoint.pt", kind)
    assert "checkpoint.pt" in refused(["export", str(run), "--out", str(run / "x.pt2")], capsys)


def bomb() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("layer/x.npy", bytes(30 << 20))
    return packed.getvalue()


def saved(**arrays: Any) -> bytes:
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    return packed.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 half",
        bomb(),
        saved(a=np.zeros((2, 2))),
        saved(epochs=np.array(["a", "b"])),
        saved(epochs=np.array([np.nan])),
        saved(epochs=np.float64(1)),
        saved(epochs=np.zeros(1), **{"layer/x": np.zeros((1, 2), int)}),
        saved(epochs=np.zeros(2), **{"layer/x": np.zeros((1, 2))}),
    ],
    ids=["empty", "half", "bomb", "no epochs", "text", "nan", "one number", "integers", "shape"],
)
def test_damaged_slices(content: bytes, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "slices.npz").unlink()
    (run / "slices.npz").write_bytes(content)
    assert "slices.npz is damaged: " in refused(["report", str(run)], capsys)


@pytest.mark.parametrize("out", ["", "file", "file/below", "a\0b", "pipe"])
def test_an_out_that_is_no_folder(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    os.mkfifo(tmp_path / "pipe")
    path = str(tmp_path / out) if out else ""
    refused(["train", "--data=synthetic:20x8x8", "--model=vgg7", "--device=cpu", f"--out={path}"], capsys)
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_never_replaces_what_is_no_file(
    kind: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Renaming a file over /dev/null would take it from the whole machine."""
    place = tmp_path / "there.pt"
    put(place, kind)
    before = os.lstat(place)
    export = ["export", str(run), "--out", str(place)]
    if kind == "link to nothing":
        assert main(export) == 0
        return
    assert "there.pt: it is a" in refused(export, capsys)
    for error in (InputError, CheckpointError):
        for data in (b"x", lambda file: file.write(b"x")):
            with pytest.raises(error, match=r"cannot write .*there\.pt: it is a"):
                write_atomically(place, data, error)
            with pytest.raises(error, match=r"cannot write .*there\.pt: it is a"):
                write_atomically(tmp_path / "new.pt", data, error, previous=place)
    now = os.lstat(place)
    assert (now.st_ino, now.st_mode) == (before.st_ino, before.st_mode)
    assert not (tmp_path / "new.pt").exists()
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


LONG = "x" * 5000
IN_A_RUN = {
    "report": ["report", "{}"],
    "report out": ["report", "RUN", "--out", "{}"],
    "info": ["info", "--run", "{}"],
    "export": ["export", "{}", "--out", "x.pt"],
    "export out": ["export", "RUN", "--format", "torchscript", "--out", "{}"],
    "train": ["train", "--data=synthetic:20x8x8", "--model=vgg7", "--device=cpu", "--out", "{}"],
    "cache": ["train", "--data={}", "--model=vgg7", "--device=cpu", "--out", "new"],
    "start": ["train", "--data=synthetic:20x32x32", "--model=vgg7", "--device=cpu", "--out=new", "--start-from={}"],
}


@pytest.mark.parametrize("name", [LONG, f"{LONG}/a", "file/a", "loop", "pipe"], ids=lambda name: name[-6:])
@pytest.mark.parametrize("command", IN_A_RUN)
def test_names_that_cannot_be_used(
    command: str, name: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent)
    (run.parent / "file").write_bytes(b"mine")
    (run.parent / "loop").symlink_to("loop")
    os.mkfifo(run.parent / "pipe")
    before = {path: os.lstat(path).st_ino for path in run.parent.rglob("*")}
    refused([part.replace("{}", name).replace("RUN", str(run)) for part in IN_A_RUN[command]], capsys)
    after = {path: os.lstat(path).st_ino for path in run.parent.rglob("*") if path.name not in ("new", "report")}
    assert {path: number for path, number in after.items() if path in before} == before
    assert all(path.is_dir() for path in after.keys() - before.keys())


@pytest.mark.parametrize("command", [name for name in IN_A_RUN if name not in ("train", "cache", "start")])
def test_an_empty_name(command: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([part.replace("{}", "").replace("RUN", str(run)) for part in IN_A_RUN[command]])
    assert "'' is no name of a file or folder" in capsys.readouterr().err


def test_names_that_are_no_utf8(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pillow = pytest.importorskip("PIL.Image", reason="pip install pillow")
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    for split in ("train", "val"):
        for name in (b"b\xfc", b"plain"):
            folder = Path(os.fsdecode(os.fsencode(odd / split) + b"/" + name))
            folder.mkdir(parents=True)
            for i in range(4):
                pillow.new("RGB", (32, 32), (60 * i, 9, 9)).save(folder / f"{i}.png")
    options = ["train", "--model=vgg7", "--epochs=1", "--batch=4", "--device=cpu", "--dense", f"--cache={odd}"]
    options += [f"--data={odd}", f"--out={odd}/run"]
    assert main(options) == 0
    assert main([*options, "--resume", "--quiet"]) == 0
    assert main(["report", f"{odd}/run"]) == 0
    monkeypatch.setattr(report, "FIGURES", ())
    assert main(["report", f"{odd}/run", str(finished), "--out", f"{odd}/both"]) == 0
    capsys.readouterr()
    assert "is not a folder" not in refused(["train", f"--data={odd}/missing", f"--out={odd}/x"], capsys)


# -- data --------------------------------------------------------------------------------------------------------------


def tree(root: Path, classes: str = "ab") -> Path:
    pillow = pytest.importorskip("PIL.Image", reason="pip install pillow")
    for split in ("train", "val"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                pillow.new("RGB", (8, 8), (60 * i, 9, 9)).save(root / split / name / f"{i}.png")
    return root


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("name", ["z.png", "train-00000-of-00001.parquet"])
def test_data_that_are_no_files(name: str, kind: str, tmp_path: Path) -> None:
    if name.endswith("png"):
        put(tree(tmp_path / "data") / "train/a" / name, kind)
    else:
        pytest.importorskip("pyarrow", reason="pip install pyarrow")
        put(tmp_path / "data" / name, kind)
        put(tmp_path / "data" / name.replace("train", "test"), kind)
    with pytest.raises(InputError, match=rf"{name} is a (pipe|socket|device), not a"):
        load(str(tmp_path / "data"), cache=tmp_path)


def test_links_in_circles_end(tmp_path: Path) -> None:
    """Ten folders that each link to all: without memory of those passed, ten factorial ways lead through them."""
    root = tree(tmp_path / "data")
    for i in range(10):
        (tmp_path / "more" / str(i)).mkdir(parents=True)
        (tmp_path / "more" / str(i) / "x.png").write_bytes((root / "train/a/0.png").read_bytes())
        for j in range(10):
            (tmp_path / "more" / str(i) / f"to{j}").symlink_to(tmp_path / "more" / str(j))
    (root / "train/a/out").symlink_to(tmp_path / "more/3")
    (root / "train/b/itself").symlink_to("itself")
    assert load(str(root), cache=tmp_path).train_labels.bincount().tolist() == [3 + 10, 3]


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "_LARGEST_MEMBER", 1 << 20)
    monkeypatch.setattr(loaders, "_LARGEST_ARCHIVE", 4 << 20)


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("where", ["a member", "many members", "the tail"])
def test_archives_that_unpack_without_end(where: str, tmp_path: Path) -> None:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        sizes = {"a member": [2 << 20], "many members": [1 << 19] * 10, "the tail": [9]}[where]
        for i, size in enumerate(sizes):
            member = tarfile.TarInfo(f"other/{i}")
            member.size = size
            archive.addfile(member, io.BytesIO(bytes(size)))
    data = plain.getvalue() + bytes(8 << 20 if where == "the tail" else 0)
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(gzip.compress(data))
    assert path.stat().st_size < 1 << 16
    with pytest.raises(InputError, match="GiB unpacked, which no part of CIFAR does"):
        load(str(path))


def test_tables_that_unpack_without_end(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for split in ("train", "test"):
        table = arrow.table({"image": arrow.array([b"same"] * 2_000_000), "label": [0] * 2_000_000})
        parquet.write_table(table, tmp_path / f"{split}.parquet", compression="zstd")
    with pytest.raises(InputError, match=r"train.parquet has .* bytes and says that they are 2,000,000 rows"):
        load(str(tmp_path), cache=tmp_path)


def test_images_of_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path / "data")
    monkeypatch.setattr(pytest.importorskip("PIL.Image"), "MAX_IMAGE_PIXELS", 30)
    with pytest.raises(InputError, match=r"0\.png has more than 60 pixels, the most that Pillow decodes"):
        load(str(root), cache=tmp_path)


@pytest.mark.parametrize("where", [os.fsdecode(b"caf\xe9"), "pipe", LONG])
def test_a_folder_for_tensorboard(where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    os.mkfifo(tmp_path / "pipe")
    options = ["train", "--model=vgg7", "--data=synthetic:20x32x32", "--device=cpu", f"--out={tmp_path}/run"]
    said = refused([*options, f"--tensorboard={tmp_path}/{where}", "--quiet"], capsys)
    assert "cannot write TensorBoard's files to" in said
    assert list((tmp_path / "run").iterdir()) == [], "no run has begun"


# -- options -----------------------------------------------------------------------------------------------------------

WRONG: dict[str, list[Any]] = {
    "int": [2.5, 2.0, True, "2", float("nan"), [2], 10**20],
    "float": [True, "0.5", float("nan"), [0.5], 1j],
    "bool": [1, "yes", 0.0],
    "str": [5, b"x", ["x"]],
    "tuple": ["0.5", 0.5, (None,), (float("nan"), "x")],
}


@pytest.mark.parametrize("field", dataclasses.fields(TrainConfig), ids=lambda field: field.name)
def test_every_option_of_another_kind_is_refused(field: Any) -> None:
    kind = next(kind for kind in WRONG if str(field.type).removeprefix("<class '").startswith(kind))
    for value in [*WRONG[kind], *([] if "None" in str(field.type) else [None])]:
        config = TrainConfig(out="run")
        setattr(config, field.name, value)
        with pytest.raises(InputError, match=rf"--{field.name.replace('_', '-')} must be "):
            config.check()


@pytest.mark.parametrize(
    "changes",
    [
        {"threads": 2**31 - 1},
        {"threads": -1},
        {"workers": 2**31 - 1, "augment": "resized-crop", "crop": 8},
        {"epochs": 2**31 - 1},
        {"fine_tune_epochs": 2**31 - 1},
        {"lr": 1e308},
        {"weight_decay": 1e308},
        {"coefficient": 1e308},
        {"decay": 1e308},
        {"decay": 1e15, "decay_at": (0.1, 0.2)},
        {"rank_timeout": 1e308},
        {"cache": ""},
        {"tensorboard": ""},
        {"start_from": ""},
    ],
    ids=str,
)
def test_absurd_values(changes: dict[str, Any]) -> None:
    name = next(iter(changes)).replace("_", "-")
    with pytest.raises(InputError, match=rf"^--{name} "):
        TrainConfig(**{"out": "run", **changes}).check()


@pytest.mark.parametrize(
    "shape", ["3x99999x99999", "999999999999x3x3", "\u00b2x3x3", "\u0663x8x8", "3x8x8x8", "3x8x-8"]
)
@pytest.mark.parametrize("command", [["info"], ["export", "run", "--out=x.pt"]], ids=["info", "export"])
def test_images_that_nobody_has(command: list[str], shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*command, f"--input={shape}"])
    assert "argument --input: '" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch": 2.5},
        {"batch": True},
        {"batch": "8"},
        {"penalty_ratio": "0.5"},
        {"penalty_ratio": float("nan")},
        {"penalty_ratio": None},
        {"interval": float("inf")},
        {"interval": "1"},
        {"threshold": float("nan")},
        {"threshold": True},
        {"round_to": 1.5},
        {"min_channels": "2"},
        {"fuse": "no"},
        {"relative": 1},
        {"keep_momentum": None},
        {"zeroing_tolerance": "0.1"},
    ],
    ids=str,
)
def test_arguments_of_another_kind_are_refused(arguments: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match=next(iter(arguments))):
        PruneTrain(model, optimizer, (torch.ones(1, 3, 8, 8),), **arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"size": 2.5}, {"size": True}, {"granularity": 1.5}, {"maximum": "9"}, {"budget_bytes": float("nan")}],
    ids=str,
)
def test_a_mini_batch_of_another_kind(arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"a mini-batch's|memory budget"):
        MiniBatch(**{"size": 4, **arguments})


@pytest.mark.parametrize("later", [False, True])
def test_a_loss_per_image(later: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prunetrain = PruneTrain(model, optimizer, (torch.ones(1, 3, 8, 8),))
    if later:
        prunetrain.add_gradient_(torch.tensor(1.0))
    for add in (prunetrain.regularize, prunetrain.add_gradient_):
        with pytest.raises(InputError, match=r"must be one number, but has the shape \(4,\)"):
            add(torch.ones(4))
