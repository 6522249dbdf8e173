"""The command line: what it says, what it refuses, and with which exit code."""

import argparse
import dataclasses
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prunetrain_kernels import cli
from prunetrain_kernels.models import MODELS
from prunetrain_kernels.prune.checkpoint import read_checkpoint
from prunetrain_kernels.train import loop
from prunetrain_kernels.train.config import TrainConfig

MODULE = """
import torch
from torch import nn


class Small(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.fc(torch.relu(self.conv2(torch.relu(self.conv1(x)))).mean((2, 3)))


class Forked(Small):
    def forward(self, x):
        if x.mean() > 0:
            x = -x
        return super().forward(x)


def small(num_classes, in_channels=3):
    return Small(num_classes, in_channels)


def forked(num_classes, in_channels=3):
    return Forked(num_classes, in_channels)


def colour_only(num_classes):
    return Small(num_classes, 3)


def stubborn(num_classes, in_channels=3):
    return Small(7, in_channels)


def failing(num_classes):
    raise RuntimeError("no weights\\nfor you")


def text(num_classes):
    return "a network"


def needs_depth(depth, num_classes):
    return Small(num_classes, 3)


def leaves(num_classes):
    raise SystemExit(0)


def talks(num_classes, in_channels):
    print("building a network")
    raise ValueError
"""


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("models")
    (folder / "small_net_for_cli_tests.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    torch.set_num_threads(1)
    yield folder
    sys.path.remove(str(folder))


def arguments(out: Path, *more: str) -> list[str]:
    short = "--model small_net_for_cli_tests:small --data synthetic:24x6x6 --epochs 2 --batch 8 --lr 0.05 --interval 1"
    return ["train", "--out", str(out), *short.split(), "--device", "cpu", "--threads", "1", "--quiet", *more]


def refusal(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """The one line with which a command refuses."""
    capsys.readouterr()
    assert cli.main(list(command)) == 2
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("prunetrain: error: ")
    assert "Traceback" not in said.err
    return lines[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, module: Path) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert cli.main(arguments(folder)) == 0
    return folder


# -- help --------------------------------------------------------------------------------------------------------------


def subparsers() -> dict[str, argparse.ArgumentParser]:
    action = next(a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


@pytest.mark.parametrize("command", ["train", "report", "info", "export"])
def test_help_explains_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for action in subparsers()[command]._actions:
        assert action.help, action.dest
        for option in action.option_strings:
            assert option in text
    assert "None" not in text
    assert "False" not in text
    assert "==" not in text


def test_the_top_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("train", "report", "info", "export"))


def test_every_field_of_the_configuration_has_an_option_with_the_same_default() -> None:
    fields = {f.name for f in dataclasses.fields(TrainConfig)}
    options = cli._parser().parse_args(["train", "--out", "x"])
    dests = {action.dest for action in subparsers()["train"]._actions}
    assert fields <= dests
    assert dests - fields == {"help", "resume", "overwrite", "quiet"}
    assert TrainConfig(**{name: getattr(options, name) for name in fields}) == TrainConfig("x")


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["paint"],
        ["train"],  # no --out
        ["train", "--out", "x", "--epochs", "many"],
        ["train", "--out", "x", "--decay-at", "half"],
        ["train", "--out", "x", "--memory-budget", "11Q"],
        ["train", "--out", "x", "--memory-budget", "nan"],
        ["train", "--out", "x", "--memory-budget", "inf"],
        ["train", "--out", "x", "--memory-budget", ""],
        ["train", "--out", "x", "--amp", "fp8"],
        ["train", "--out", "x", "--lr-rule", "cubic"],
        ["train", "--out", "x", "--resume", "--overwrite"],
        ["train", "--out", "x", "--colour"],
        ["report"],
        ["info", "--input", "32x32"],
        ["info", "--input", "3x0x32"],
        ["info", "--input", "3xAx32"],
    ],
)
def test_what_argparse_refuses_exits_with_2(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(command)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"), [("123", 123), ("2K", 2048), ("800M", 800 << 20), ("11G", 11 << 30), ("0.5g", 1 << 29)]
)
def test_bytes(text: str, expected: int) -> None:
    assert cli._bytes(text) == expected


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ("--epochs 0", "--epochs"),
        ("--fine-tune-epochs -1", "--fine-tune-epochs"),
        ("--batch 1", "--batch"),
        ("--lr 0", "--lr"),
        ("--lr nan", "--lr"),
        ("--momentum 1", "--momentum"),
        ("--weight-decay -1", "--weight-decay"),
        ("--decay 0", "--decay"),
        ("--decay-at 2", "--decay-at"),
        ("--penalty-ratio 1", "--penalty-ratio"),
        ("--coefficient 0", "--coefficient"),
        ("--coefficient nan", "--coefficient"),
        ("--coefficient 1e-4 --dense", "with --dense there is no lasso"),
        ("--coefficient 1e-4 --penalty-ratio 0", "with --penalty-ratio 0 there is no lasso"),
        ("--interval 0", "--interval"),
        ("--reconfigure-once 3", "--reconfigure-once"),
        ("--reconfigure-once 1 --dense", "--dense"),
        ("--threshold -1", "--threshold"),
        ("--policy both", "--policy"),
        ("--round-to 0", "--round-to"),
        ("--batch-granularity 0", "--batch-granularity"),
        ("--grow-batch --memory-budget 0", "--memory-budget"),
        ("--grow-batch --batch-limit 4", "--batch-limit"),
        ("--memory-budget 1G", "--grow-batch"),
        ("--threads 0", "--threads"),
        ("--device tpu9", "--device"),
        ("--classes 0", "--classes"),
        ("--limit-train 0", "--limit-train"),
        ("--limit-val 0", "--limit-val"),
        ("--limit-train 1", "too few"),
        ("--data digits --image-size 0", "--image-size"),
        ("--data synthetic:0x8x8", "synthetic"),
        ("--data synthetic:8", "synthetic"),
        ("--data ./nowhere", "nowhere"),
        ("--data digits --classes 11", "--classes says 11"),
        ("--model resnet19", "resnet20"),
        ("--model no_such_module:net", "no_such_module"),
        ("--model small_net_for_cli_tests:smal", "did you mean 'small'"),
        ("--model small_net_for_cli_tests:failing", "no weights for you"),
        ("--model small_net_for_cli_tests:text", "must return a torch.nn.Module"),
        ("--model small_net_for_cli_tests:needs_depth", "name a function that needs no argument but num_classes"),
        ("--model small_net_for_cli_tests:leaves", "failed with SystemExit: 0"),
        ("--model small_net_for_cli_tests:talks", "failed with ValueError"),
        ("--model small_net_for_cli_tests:Small.forward", "failed with TypeError"),
        ("--model small_net_for_cli_tests.small", "did you mean 'small_net_for_cli_tests:small'"),
        ("--model small_net_for_cli_tests:forked", "cannot be traced"),
        ("--model small_net_for_cli_tests:stubborn", "10 classes"),
        ("--model small_net_for_cli_tests:colour_only --data digits", "conv1"),
        ("--model vgg11", "32 x 32"),
    ],
)
def test_options_that_cannot_be_used(
    options: str, names: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert names in refusal(capsys, *arguments(tmp_path / "run", *options.split()))
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_truncated_parquet_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "data"
    folder.mkdir()
    encoded = io.BytesIO()
    image.new("RGB", (6, 6)).save(encoded, "PNG")
    rows = arrow.table(
        {"img": [{"bytes": encoded.getvalue(), "path": "a.png"}] * 20, "label": [i % 2 for i in range(20)]}
    )
    for split in ("train", "test"):
        parquet.write_table(rows, folder / f"{split}-00000.parquet")
    data = ("--data", str(folder), "--cache", str(tmp_path / "cache"))
    assert cli.main(arguments(tmp_path / "good", *data, "--epochs", "1")) == 0
    assert "--classes says 5" in refusal(capsys, *arguments(tmp_path / "run", *data, "--classes", "5"))
    whole = (folder / "train-00000.parquet").read_bytes()
    (folder / "train-00000.parquet").write_bytes(whole[: len(whole) // 2])
    assert "train-00000.parquet" in refusal(capsys, *arguments(tmp_path / "run", *data))


def test_an_output_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/nope/run"), tmp_path / ("x" * 300)):
        line = refusal(capsys, *arguments(out))
        assert out.name in line or str(out.parent) in line
    assert (tmp_path / "file").read_text() == ""


def test_a_run_folder_is_resumed_or_overwritten_only_if_asked(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    assert "--overwrite" in refusal(capsys, *arguments(folder))
    assert "--lr 0.05, not 0.07" in refusal(capsys, *arguments(folder, "--resume", "--lr", "0.07"))
    assert cli.main(arguments(folder, "--resume")) == 0
    assert cli.main(arguments(folder, "--overwrite", "--lr", "0.07")) == 0
    assert json.loads((folder / "config.json").read_text())["lr"] == 0.07


@pytest.mark.parametrize("damage", ["empty", "half", "text", "other"])
def test_a_damaged_checkpoint(damage: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    path = folder / "checkpoint.pt"
    whole = path.read_bytes()
    if damage == "other":
        torch.save({"state_dict": {}}, path)
    else:
        path.write_bytes({"empty": b"", "half": whole[: len(whole) // 2], "text": b"hello"}[damage])
    damaged = path.read_bytes()
    previous = folder / "checkpoint.previous.pt"
    before = previous.read_bytes()
    previous.write_bytes(before[:100])
    assert "checkpoint.pt" in refusal(capsys, *arguments(folder, "--resume"))
    assert path.read_bytes() == damaged
    if damage == "other":  # a whole file of something else: nobody's damaged checkpoint to go on behind
        return
    previous.write_bytes(before)
    assert cli.main([option for option in arguments(folder, "--resume") if option != "--quiet"]) == 0
    assert "taking 'checkpoint.previous.pt' instead, of epoch 1" in capsys.readouterr().out
    assert read_checkpoint(path)["extra"]["epoch"] == 2


def test_a_checkpoint_of_another_network(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    line = refusal(capsys, *arguments(folder, "--resume", "--model", "resnet20"))
    assert "--model small_net_for_cli_tests:small, not resnet20" in line


def test_a_loss_that_is_no_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "there is no checkpoint yet" in refusal(capsys, *arguments(tmp_path / "a", "--lr", "9e19"))
    original = loop.train_epoch

    def explode(training: Any, progress: Any, epoch: int) -> None:
        if epoch == 1:
            training.optimizer.param_groups[0]["lr"] = 1e35
        original(training, progress, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_epoch", explode)
        assert "epoch 1 is kept" in refusal(capsys, *arguments(tmp_path / "b"))
    assert not (tmp_path / "b" / "summary.json").exists()
    assert cli.main(arguments(tmp_path / "b", "--resume")) == 0


def test_an_interrupt_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(training: Any, progress: Any, epoch: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train_epoch", interrupt)
    assert cli.main(arguments(tmp_path / "run")) == 130
    assert "--resume" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(training: Any, progress: Any, epoch: int) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(loop, "train_epoch", defect)
    with pytest.raises(ZeroDivisionError):
        cli.main(arguments(tmp_path / "run"))


def test_a_full_disk_exits_with_2_and_keeps_the_old_checkpoint(tmp_path: Path, module: Path) -> None:
    folder = tmp_path / "run"
    script = f"""
import resource, signal, sys
sys.path.insert(0, {str(module)!r})
from prunetrain_kernels import cli
from prunetrain_kernels.train import loop
save, saves = loop.save, []
def full(*arguments):
    saves.append(1)
    if len(saves) == 2:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    save(*arguments)
loop.save = full
sys.exit(cli.main({arguments(folder)!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=_environment(), check=False
    )
    assert done.returncode == 2
    assert [line[:32] for line in without_warnings(done.stderr)] == ["prunetrain: error: cannot write "]
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["extra"]["epoch"] == 1
    assert cli.main(arguments(folder, "--resume")) == 0
    assert (folder / "summary.json").exists()


def without_warnings(stderr: str) -> list[str]:
    """The lines, but for those that say that so short a training will prune nothing."""
    return [line for line in stderr.splitlines() if not line.startswith("prunetrain: warning: the lasso can move")]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


# -- what is said ------------------------------------------------------------------------------------------------------


def test_training_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loud = [option for option in arguments(tmp_path / "run") if option != "--quiet"]
    assert cli.main(loud) == 0
    said = capsys.readouterr()
    assert "epoch 1:" in said.out
    assert "epoch 2:" in said.out
    assert f"prunetrain report {tmp_path / 'run'}" in said.out
    assert cli.main([*loud, "--resume"]) == 0
    assert "resuming after epoch 2 of 2" in capsys.readouterr().out
    assert cli.main(arguments(tmp_path / "quiet")) == 0
    said = capsys.readouterr()
    assert said.out == said.err == ""


@pytest.mark.parametrize("name", MODELS)
def test_info_on_every_model(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    side = "64" if name.startswith("imagenet") else "32"
    assert cli.main(["info", "--model", name, "--input", f"3x{side}x{side}"]) == 0
    text = capsys.readouterr().out
    for piece in ("space", "produced by", "parameters", "MFLOP", "MiB", "all-reduce"):
        assert piece in text
    with torch.device("meta"):
        parameters = sum(p.numel() for p in MODELS[name](num_classes=10).parameters())
    assert f"{parameters:,}" in text


def test_info_layer_by_layer_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--model", "resnet20", "--layers", "--classes", "7", "--batch", "4"]) == 0
    text = capsys.readouterr().out
    table = text.split("inference MFLOP per image\n")[1].splitlines()
    values = {line.split()[1]: float(line.split()[0].replace(",", "")) for line in table}
    assert {"conv1", "layer1.0.conv1", "fc"} <= values.keys()
    total = float(next(line for line in text.splitlines() if line.startswith("inference ")).split()[1])
    assert sum(values.values()) == pytest.approx(total, abs=0.1)
    assert "per step of 4 images" in text


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ("--batch 0", "--batch"),
        ("--classes 0", "--classes"),
        ("--model vgg11 --input 3x16x16", "32"),
        ("--model small_net_for_cli_tests:forked", "traced"),
        ("--model small_net_for_cli_tests:colour_only --input 1x8x8", "conv1"),
        ("--model nothing", "nothing"),
    ],
)
def test_info_refuses(options: str, names: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert names in refusal(capsys, "info", *options.split())


# -- networks of other libraries ---------------------------------------------------------------------------------------


def in_a_process(folder: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    """A user's process, in which nothing has imported torchvision yet."""
    pytest.importorskip("PIL")
    return subprocess.run(
        [sys.executable, "-m", "prunetrain_kernels.cli", *command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


LAZY = """
def inside(num_classes):
    from torchvision.models import squeezenet1_1
    return squeezenet1_1(num_classes=num_classes)
"""


@pytest.mark.parametrize("model", ["torchvision.models:resnet18", "timm.models:resnet18", "lazy_nets:inside"])
def test_info_on_networks_of_other_libraries(model: str, tmp_path: Path) -> None:
    """Also where torchvision's compiled part does not load beside this PyTorch."""
    for package in ("torchvision", "timm"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"pip install {package}")
    (tmp_path / "lazy_nets.py").write_text(LAZY)
    done = in_a_process(tmp_path, "info", "--model", model, "--input", "3x64x64")
    assert done.returncode == 0, done.stderr
    assert "MFLOP per image" in done.stdout
    assert "Traceback" not in done.stderr


def test_training_torchvisions_resnet(tmp_path: Path) -> None:
    """README's own example of a network that is not ours, for two steps, and taken up again."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("pip install torchvision")
    out = tmp_path / "run"
    command = ["--model", "torchvision.models:resnet18", "--data", "synthetic:16x3x32x32", "--epochs", "1"]
    command += ["--batch", "8", "--device", "cpu", "--threads", "1", "--lr", "0.01", "--out", str(out)]
    done = in_a_process(tmp_path, "train", *command)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert saved["extra"]["epoch"] == 1
    assert saved["model"]["fc.weight"].shape == (10, 512)
    done = in_a_process(tmp_path, "export", str(out), "--out", str(tmp_path / "net.pt"))
    assert done.returncode == 0, done.stderr


def test_report_on_a_finished_and_an_unfinished_run(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.train_epoch

    def interrupt(training: Any, progress: Any, epoch: int) -> None:
        if epoch == 1:
            raise KeyboardInterrupt
        original(training, progress, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_epoch", interrupt)
        assert cli.main(arguments(tmp_path / "unfinished")) == 130
    capsys.readouterr()
    assert cli.main(["report", str(finished), str(tmp_path / "unfinished"), "--out", str(tmp_path / "report")]) == 0
    text = capsys.readouterr().out
    page = Path(text.splitlines()[-1].removeprefix("report: "))
    assert page.exists()
    assert page.is_relative_to(tmp_path / "report")
    assert "unfinished" in text


def test_report_refuses(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere" in refusal(capsys, "report", str(tmp_path / "nowhere"))
    assert str(tmp_path) in refusal(capsys, "report", str(tmp_path))
    (tmp_path / "file").write_text("")
    assert "file" in refusal(capsys, "report", str(finished), "--out", str(tmp_path / "file" / "x"))


@pytest.mark.parametrize(("command", "code"), [("info", 0), ("train", 128 + signal.SIGPIPE)])
def test_a_reader_that_goes_away(command: str, code: int, tmp_path: Path, module: Path) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(module)!r})
from prunetrain_kernels import cli
sys.exit(cli.main(sys.argv[1:]))
"""
    info = ["info", "--model", "small_net_for_cli_tests:small", "--input", "3x6x6"]
    options = info if command == "info" else [a for a in arguments(tmp_path / "run") if a != "--quiet"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", script, *options],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(),
        check=False,
    )
    os.close(writing)
    assert done.returncode == code
    assert without_warnings(done.stderr) == []


@pytest.mark.parametrize("layers", [[], ["--layers"]])
def test_info_says_what_it_cannot_count(
    layers: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("it is a secret\nof two lines")

    for place in ("flops.dry_run", "dry_run.dry_run", "memory.dry_run"):
        monkeypatch.setattr(f"prunetrain_kernels.cost.{place}", fails)
    assert cli.main(["info", "--model", "resnet20", *layers]) == 0
    out, err = capsys.readouterr()
    for name in ("inference", "training", "batch norm", "memory"):
        assert re.search(rf"^{name} +unknown: it is a secret$", out, re.M), name
    assert out.count("unknown: it is a secret") == 4 + len(layers)
    assert "parameters" in out
    assert err == ""


def test_info_under_mixed_precision_halves_what_batch_norm_moves(capsys: pytest.CaptureFixture[str]) -> None:
    moved = []
    for amp in ("off", "bf16"):
        assert cli.main(["info", "--model", "resnet20", "--amp", amp]) == 0
        line = re.search(r"^batch norm +([\d.,]+) MiB", capsys.readouterr().out, re.M)
        assert line is not None
        moved.append(float(line[1].replace(",", "")))
    assert moved[0] == pytest.approx(2 * moved[1], rel=1e-3)
