"""`python -m bench paper`: what it trains, skips, resumes and refuses, and the numbers in its tables."""

import csv
import fcntl
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_kit import paper, rows_of

from bench.paper import experiments, numbers, results, runner, tables
from bench.paper.experiments import EXPERIMENTS, Training, names_at, trainings_of
from bench.paper.networks import densities, final_network
from prunetrain_kernels.cli import train_config
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.prune.checkpoint import read_checkpoint
from prunetrain_kernels.train.config import TrainConfig
from prunetrain_kernels.train.loop import train
from prunetrain_kernels.train.run_log import RunLog, read_run

# three steps an epoch, a threshold that half of the largest slice is below: something is pruned in seconds
SHORT = "--epochs 3 --limit-train 48 --limit-val 20 --batch 16 --threshold 0.6 --relative --lr 0.05"
DATA = "synthetic:48x8x8"


@pytest.fixture(scope="module", autouse=True)
def images_of_the_datas_size() -> Any:
    """Synthetic images cannot be scaled, as the small scale does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "SMALL", {**experiments.SMALL, "image_size": None})
        patch.setattr(experiments, "SMALL_SIDE", None)
        yield


# -- the list of trainings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", experiments.SCALES)
def test_one_folder_is_one_training_whoever_asks_for_it(scale: str) -> None:
    seen: dict[str, Training] = {}
    for name in names_at(scale):
        for training in trainings_of([name], scale, seeds=2):
            other = seen.setdefault(training.path, training)
            assert other == training
            assert other.options == training.options
            assert other.start == training.start
    assert len(seen) == len(trainings_of(names_at(scale), scale, seeds=2))
    assert {path.split("/")[1] for path in seen} == (set(experiments.DATASETS) if scale == "full" else {"cifar10"})


@pytest.mark.parametrize("scale", experiments.SCALES)
def test_every_training_is_one_that_the_command_line_takes(scale: str) -> None:
    for training in trainings_of(names_at(scale), scale, seeds=1):
        config = runner.configuration(training, Path("runs"), "digits", device="cpu", threads=1)
        config.check()
        assert train_config(runner.arguments(config)) == config
        assert {name: getattr(config, name) for name in training.options} == training.options
        assert config.dense == (training.method == "dense")
        assert config.seed == training.seed
        assert (config.start_from is not None) == (training.method == "ssl")
        assert (config.reconfigure_once is not None) == (training.method == "once")
        assert config.grow_batch == (training.method == "adjusted")


def test_the_full_scale_is_the_papers() -> None:
    by_path = {training.path: training for training in trainings_of(names_at("full"), "full", 1)}
    cifar = by_path["full/cifar10/resnet32-ratio-0.25-seed-0"].options
    assert (cifar["epochs"], cifar["batch"], cifar["lr"], cifar["interval"]) == (182, 128, 0.1, 10)
    imagenet = by_path["full/imagenet/resnet50-ratio-0.1-seed-0"].options
    assert (imagenet["epochs"], imagenet["batch"], imagenet["interval"]) == (90, 256, 5)
    assert (imagenet["weight_decay"], imagenet["image_size"], imagenet["crop"]) == (1e-4, 256, 224)
    assert imagenet["model"] == "imagenet_resnet50"
    ssl = by_path["full/cifar100/resnet32-ratio-0.05-seed-0-ssl"]
    assert ssl.options["interval"] == ssl.options["epochs"] == 182
    assert ssl.start == by_path["full/cifar100/resnet32-dense-seed-0"]
    assert "full/cifar10/resnet50-ratio-0.25-seed-0-once-60" in by_path
    assert "full/cifar10/resnet32-ratio-0.1-seed-0-interval-5" in by_path
    assert "full/cifar10/resnet32-ratio-0.1-seed-0-interval-10" not in by_path
    assert "full/cifar100/resnet50-ratio-0.25-seed-0-adjusted" in by_path
    paths = list(by_path)
    assert all(t.start is None or paths.index(t.start.path) < paths.index(t.path) for t in by_path.values())


def test_the_papers_numbers_agree_with_each_other_and_with_its_text() -> None:
    etas = [round(numbers.TAB1_CIFAR["cifar10", network].eta, 2) for network in ("resnet32", "resnet50", "vgg11")]
    assert etas == [0.36, 0.38, 0.75]
    assert round(numbers.TAB1_IMAGENET[0.25].eta, 2) == 0.85
    assert numbers.tab1("imagenet", "resnet50", 0.25) is numbers.TAB1_IMAGENET[0.25]
    assert numbers.tab1("imagenet", "resnet50", 0.15) is None
    assert numbers.tab1("cifar10", "resnet20", 0.25) is None
    # Tab. 4's naive rows repeat Tab. 1
    for dataset in ("cifar100", "imagenet"):
        row = numbers.tab1(dataset, "resnet50", 0.25)
        assert row is not None
        naive = numbers.TAB4[dataset, False]
        assert naive.time_reduction == pytest.approx(1 - row.time)
        assert naive.accuracy_delta == row.accuracy_delta
        assert naive.inference_flops == pytest.approx(row.inference_flops, abs=0.005)


# -- data --------------------------------------------------------------------------------------------------------------


def test_data_are_named_or_guessed(tmp_path: Path) -> None:
    for name in ("cifar10", "cifar-100-python", "ILSVRC2012", "mine"):
        (tmp_path / name).mkdir()
    assert runner.parse_data([f"{tmp_path}/cifar10/", f"{tmp_path}/cifar-100-python"]) == {
        "cifar10": f"{tmp_path}/cifar10/",
        "cifar100": f"{tmp_path}/cifar-100-python",
    }
    assert runner.parse_data([f"imagenet={tmp_path}/mine"]) == {"imagenet": f"{tmp_path}/mine"}
    assert runner.parse_data([f"{tmp_path}/ILSVRC2012"]) == {"imagenet": f"{tmp_path}/ILSVRC2012"}
    for words, says in (
        ([f"{tmp_path}/mine"], f"as in cifar10={tmp_path}/mine"),
        ([f"mnist={tmp_path}/mine"], "'mnist' must be one of"),
        (["cifar10=/nowhere/at/all"], "there is no /nowhere/at/all"),
        ([f"{tmp_path}/cifar10", f"cifar10={tmp_path}/mine"], "given twice"),
    ):
        with pytest.raises(InputError, match=says):
            runner.parse_data(words)


# -- what is to be done ------------------------------------------------------------------------------------------------


def some(*methods: str, scale: str = "small") -> list[Training]:
    trainings = [t for t in trainings_of(["fig8"], scale, 1) if t.method in methods and t.network == "resnet20"]
    return [t for i, t in enumerate(trainings) if t.method not in [u.method for u in trainings[:i]]]


def pretend(training: Training, runs: Path, *, finished: bool = True, **changes: Any) -> Path:
    """A run folder as far as planning looks at it."""
    config = asdict(runner.configuration(training, runs, DATA)) | changes
    folder = runs / training.path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if finished:
        (folder / "summary.json").write_text("{}")
    return folder


def states(trainings: Sequence[Training], runs: Path, **options: Any) -> list[str]:
    return [job.state for job in runner.plan(trainings, runs, {"cifar10": DATA}, **options)]


def test_done_cut_off_and_new_trainings_are_told_apart(tmp_path: Path) -> None:
    trainings = some("dense", "prunetrain", "ssl")
    assert states(trainings, tmp_path) == ["new"] * 3
    pretend(trainings[0], tmp_path, out="elsewhere", cache="x", threads=7)
    pretend(trainings[1], tmp_path, finished=False)
    pretend(trainings[2], tmp_path, start_from="moved/dense")
    assert states(trainings, tmp_path) == ["done", "resume", "done"]
    # a run from before an option came was as if its default had been given
    path = tmp_path / trainings[2].path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in ("exclude", "fuse")}))
    assert states(trainings, tmp_path) == ["done", "resume", "done"]


@pytest.mark.parametrize(
    ("option", "value"), [("lr", 0.3), ("epochs", 13), ("device", "cuda"), ("amp", "fp16"), ("data", "digits")]
)
def test_a_run_with_other_options_is_refused_or_overwritten(tmp_path: Path, option: str, value: Any) -> None:
    trainings = some("dense", "prunetrain", "ssl")
    for training in trainings:
        pretend(training, tmp_path)
    pretend(trainings[1], tmp_path, **{option: value})
    with pytest.raises(InputError, match=f"--{option} {value}, not .*--runs.*--overwrite"):
        states(trainings, tmp_path)
    assert states(trainings, tmp_path, overwrite=True) == ["done", "overwrite", "done"]
    # SSL from a dense network that is trained anew is trained anew
    pretend(trainings[1], tmp_path)
    pretend(trainings[0], tmp_path, **{option: value})
    assert states(trainings, tmp_path, overwrite=True) == ["overwrite", "done", "overwrite"]


def test_a_dense_run_is_the_same_whatever_the_pruning_options(tmp_path: Path) -> None:
    [dense, pruned] = some("dense", "prunetrain")
    pretend(dense, tmp_path, finished=False, threshold=0.7, interval=3)
    [job] = runner.plan([dense], tmp_path, {"cifar10": DATA})
    assert job.state == "resume"
    assert (job.config.threshold, job.config.interval) == (0.7, 3)  # `train --resume` compares these
    pretend(pruned, tmp_path, threshold=0.7)
    with pytest.raises(InputError, match=r"--threshold 0\.7"):
        states([pruned], tmp_path)


def test_the_same_data_may_be_spelt_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cifar10").mkdir()
    [dense] = some("dense")
    pretend(dense, tmp_path, data=str(tmp_path / "cifar10"), finished=False)
    monkeypatch.chdir(tmp_path)
    [job] = runner.plan([dense], tmp_path, {"cifar10": "cifar10"})
    assert (job.state, job.config.data) == ("resume", str(tmp_path / "cifar10"))


def test_a_damaged_config_is_one_sentence(tmp_path: Path) -> None:
    [dense] = some("dense")
    (pretend(dense, tmp_path) / "config.json").write_text("[1")
    with pytest.raises(InputError, match="is damaged"):
        states([dense], tmp_path)
    assert states([dense], tmp_path, overwrite=True) == ["overwrite"]


def test_further_options_win_but_not_over_the_folder(tmp_path: Path) -> None:
    [dense] = some("dense")
    config = runner.configuration(dense, tmp_path, DATA, extra="--amp bf16 --epochs 5 --out elsewhere")
    assert (config.amp, config.epochs, config.out) == ("bf16", 5, str(tmp_path / dense.path))
    with pytest.raises(InputError, match="cannot be split"):
        runner.configuration(dense, tmp_path, DATA, extra="--amp 'fp16")
    with pytest.raises(InputError, match=r"^--epochs must"):
        runner.configuration(dense, tmp_path, DATA, extra="--epochs 0")


# -- children ----------------------------------------------------------------------------------------------------------

FAILS = "print('first line'); print('the reason'); raise SystemExit(3)"
SUCCEEDS = "import pathlib, sys; pathlib.Path(sys.argv[1], 'summary.json').write_text('{}')"
WAITS = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
try:
    (folder / "begun").touch()
    time.sleep(600)
except KeyboardInterrupt:
    (folder / "ended").touch()
    sys.exit(130)
"""


def instead_of_training(monkeypatch: pytest.MonkeyPatch, scripts: dict[str, str]) -> None:
    """Children run a script by their training's method, in a folder that is there."""

    def command(job: runner.Job) -> list[str]:
        job.folder.mkdir(parents=True, exist_ok=True)
        return [sys.executable, "-c", scripts[job.training.method], str(job.folder)]

    monkeypatch.setattr(runner.Job, "command", property(command))
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)


def jobs(tmp_path: Path, *methods: str) -> list[runner.Job]:
    return runner.plan(some(*methods), tmp_path, {"cifar10": DATA})


def test_a_failure_is_shown_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instead_of_training(monkeypatch, {"dense": FAILS, "prunetrain": SUCCEEDS, "ssl": SUCCEEDS})
    said: list[str] = []
    failed = runner.run(jobs(tmp_path, "dense", "prunetrain", "ssl"), 1, said.append)
    assert [job.training.method for job in failed] == ["dense", "ssl"]
    text = "\n".join(said)
    assert "failed with exit code 3" in text
    assert "    the reason" in text
    assert "not trained, because small/cifar10/resnet20-dense-seed-0 failed" in text
    [pruned] = some("prunetrain")
    assert f"[1/3 done] {pruned.path}: finished" in text
    assert states(some("prunetrain"), tmp_path) == ["new"]  # the stand-in wrote no config.json
    assert (tmp_path / f"{pruned.path}.log").read_text().startswith("$ ")


def test_without_a_summary_nothing_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instead_of_training(monkeypatch, {"dense": "pass"})
    assert len(runner.run(jobs(tmp_path, "dense"), 1, lambda text: None)) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_children_and_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    instead_of_training(monkeypatch, {"dense": WAITS, "prunetrain": WAITS, "ssl": WAITS})
    planned = jobs(tmp_path, "dense", "prunetrain", "ssl")
    begun = [job.folder / "begun" for job in planned[:2]]

    def interrupt() -> None:
        while not all(path.exists() for path in begun):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    said: list[str] = []
    before = signal.getsignal(number)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(runner.Interrupted):
        runner.run(planned, 2, said.append)
    thread.join()
    assert signal.getsignal(number) is before
    assert all((job.folder / "ended").exists() for job in planned[:2])
    assert not (planned[2].folder / "begun").exists()
    assert "0 of 3 are done, 3 left; the same command goes on" in said[-1]


def test_a_folder_that_another_process_trains_in_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instead_of_training(monkeypatch, {"dense": SUCCEEDS})
    [job] = jobs(tmp_path, "dense")
    job.log.parent.mkdir(parents=True)
    job.log.write_text("of the other\n")
    with job.log.open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        said: list[str] = []
        assert runner.run([job], 1, said.append) == [job]
    assert "another process is training it" in said[-1]
    assert job.log.read_text() == "of the other\n"
    assert runner.run([job], 1, said.append) == []


def test_a_child_holds_the_lock_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = "import fcntl; fcntl.flock(open(sys.argv[1] + '.log', 'ab'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    instead_of_training(monkeypatch, {"dense": f"import sys; {check}"})
    said: list[str] = []
    runner.run(jobs(tmp_path, "dense"), 1, said.append)
    assert "BlockingIOError" in said[-1]


# -- the whole command -------------------------------------------------------------------------------------------------


def test_trains_skips_and_tabulates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    ratio = f"ratio-{experiments.SMALL_SWEEP[0]:g}"
    words = ["fig8", "--scale", "small", "--data", f"cifar10={DATA}", *folders, "--only", f"{ratio}-seed-0-ssl"]
    words += ["--device", "cpu", "--train-options", SHORT.replace("--epochs 3", "--epochs 1 --interval 1")]
    assert paper(*words, "--dry-run") == 0
    assert not (tmp_path / "runs").exists()
    listed = capsys.readouterr().out
    assert listed.count("\nnew") + listed.startswith("new") == 2  # SSL and the dense run that it starts from
    assert paper(*words) == 0
    said = capsys.readouterr().out
    dense, ssl = "small/cifar10/resnet20-dense-seed-0", f"small/cifar10/resnet20-{ratio}-seed-0-ssl"
    assert said.index(f"{dense}: finished") < said.index(f"{ssl}: begins")
    assert f"{ssl}: epoch 1 of 1, accuracy" in said
    assert "Missing: 5 of 7 trainings" in said
    config = read_run(tmp_path / "runs" / ssl).config
    assert config["start_from"] == str(tmp_path / "runs" / dense)
    assert config["threads"] == 1
    table = rows_of(tmp_path / "out/small/fig8.csv")
    assert [row["method"] for row in table] == ["dense", "ssl"]
    assert float(table[1]["train_flops_ratio"]) == 2
    assert "--relative" in (tmp_path / "out/small/fig8.md").read_text()

    before = (tmp_path / "out/small/fig8.csv").read_bytes()
    assert paper(*words) == 0
    assert "begins" not in capsys.readouterr().out
    assert paper("fig8", "--scale", "small", *folders, "--tabulate", "--train-options", words[-1]) == 0
    assert (tmp_path / "out/small/fig8.csv").read_bytes() == before
    # without these options the runs are not the experiment's, and nothing is written over
    capsys.readouterr()
    assert paper("fig8", "--scale", "small", *folders, "--tabulate") == 0
    said = capsys.readouterr().out
    assert "has other options: " in said
    assert f"--epochs 1, not {experiments.SMALL['epochs']}" in said
    assert "no table is written" in said
    assert (tmp_path / "out/small/fig8.csv").read_bytes() == before
    with pytest.raises(InputError, match="was trained with"):
        paper(*words[:-2])


def test_a_failed_training_is_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instead_of_training(monkeypatch, {"dense": FAILS, "prunetrain": FAILS})
    folders = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert paper("tab3", "--scale", "small", "--data", f"cifar10={DATA}", *folders) == 1
    assert not (tmp_path / "out").exists()


def test_what_has_no_data_is_skipped_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert paper("tab1", "--scale", "full", "--data", f"cifar10={DATA}", "--runs", str(tmp_path), "--dry-run") == 0
    said = capsys.readouterr().out
    assert "skipped: 8 trainings on cifar100" in said
    assert "skipped: 4 trainings on imagenet" in said
    assert "8 trainings, 0 of them done" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["fig99", "--data", f"cifar10={DATA}"], "there is no experiment 'fig99'"),
        (["tab1"], "give --data cifar10=PATH"),
        (["tab1", "--data", f"cifar10={DATA}", "--jobs", "0"], "--jobs must be at least 1"),
        (["tab1", "--data", f"cifar10={DATA}", "--seeds", "0"], "--seeds must be at least 1"),
        (["tab1", "--data", f"cifar10={DATA}", "--only", "lenet"], "no training's folder has 'lenet'"),
        (["tab1", "--tabulate", "--dry-run"], "choose one"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, words: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        paper(*words, "--scale", "small", "--runs", str(tmp_path))


# -- the trained networks ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ResNet-20 by every method, in short: real folders, with channels and layers pruned."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("paper")
    for training in every_method():
        config = runner.configuration(training, folder, DATA, device="cpu", threads=1, extra=SHORT)
        if training.method == "ssl":
            config.interval = config.epochs
        train(config, progress=False)
    return folder


def every_method() -> list[Training]:
    plain = ("small", "cifar10", "resnet20")
    ratio = experiments.SMALL_SWEEP[-1]
    return [
        experiments.dense(*plain, 0),
        experiments.prunetrain(*plain, ratio, 0),
        experiments.ssl(*plain, ratio, 0),
        experiments.once(*plain, ratio, 2, 0),
        experiments.adjusted(*plain, ratio, 0),
    ]


def collected_in(runs: Path, name: str, *methods: str) -> results.Collected:
    chosen = [training for training in every_method() if training.method in methods]
    read = [results.Result(training, read_run(runs / training.path), "2020-02-02") for training in chosen]
    return results.Collected(EXPERIMENTS[name], "small", read, {})


METHODS_OF = {
    "tab1": ("dense", "prunetrain"),
    "tab3": ("dense", "prunetrain"),
    "tab4": ("dense", "prunetrain", "adjusted"),
    "fig2": ("prunetrain", "once"),
    "fig4": ("prunetrain",),
    "fig6": ("prunetrain",),
    "fig8": ("dense", "prunetrain", "ssl"),
    "fig9": ("prunetrain", "adjusted"),
    "fig10": ("dense", "prunetrain"),
    "fig11": ("prunetrain", "adjusted"),
    "fig12": ("prunetrain",),
}


def test_something_was_pruned(runs: Path) -> None:
    """Else the tests below would compare ones with ones."""
    for training in every_method():
        summary = read_run(runs / training.path).summary
        assert summary is not None
        assert (summary["inference_flops_ratio"] < 1) == (training.method != "dense"), training.path


@pytest.mark.parametrize("name", METHODS_OF)
def test_every_table_is_written_from_real_runs(runs: Path, tmp_path: Path, name: str) -> None:
    collected = collected_in(runs, name, *METHODS_OF[name])
    text = tables.write(collected, tmp_path)
    assert text is not None
    assert (tmp_path / "small" / f"{name}.md").read_text() == text
    table = list(csv.reader((tmp_path / "small" / f"{name}.csv").open(newline="")))
    assert table[0] == [*results.RUN_COLUMNS, *results.COLUMNS[name]]
    rows = [dict(zip(table[0], line, strict=True)) for line in table[1:]]
    assert {row["method"] for row in rows if "quoted" not in row["method"]} == set(METHODS_OF[name])
    assert all(row["experiment"] == name and row["scale"] == "small" for row in rows)
    ours = [row for row in rows if row["run"]]
    assert all(row["device"].endswith(", 1 thread") and row["date"] == "2020-02-02" and row["torch"] for row in ours)
    assert all((row["ratio"] == "") == (row["method"] == "dense") for row in ours)
    assert not any(cell in ("nan", "inf", "None") for line in table for cell in line)
    assert "nan" not in text
    assert EXPERIMENTS[name].place in text
    assert "2020-02-02" in text
    assert "cannot show" in text
    widths = {len(line) for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1  # a table that is readable as text


def test_tables_do_not_come_from_nothing(tmp_path: Path) -> None:
    collected = results.collect("tab1", "small", 1, tmp_path)
    assert tables.write(collected, tmp_path / "out") is None
    assert not (tmp_path / "out").exists()
    assert set(collected.missing.values()) == {"not trained"}


def rows_by_method(runs: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    rows = results.rows_of(collected_in(runs, name, *METHODS_OF[name]))
    return {method: [row for row in rows if row["method"] == method] for method in METHODS_OF[name]}


def test_tab1_holds_what_the_runs_say(runs: Path) -> None:
    by_method = rows_by_method(runs, "tab1")
    [dense], [pruned] = by_method["dense"], by_method["prunetrain"]
    run = read_run(runs / every_method()[1].path)
    assert run.summary is not None
    seconds = run.log[["train_seconds", "lasso_seconds", "reconfigure_seconds"]].to_numpy().sum()
    dense_seconds = read_run(runs / every_method()[0].path).log[["train_seconds", "lasso_seconds"]].to_numpy().sum()
    assert pruned["accuracy"] == 100 * run.summary["val_accuracy"]
    assert pruned["accuracy_delta"] == pytest.approx(pruned["accuracy"] - dense["accuracy"])
    assert pruned["time_ratio"] == pytest.approx(seconds / dense_seconds)
    assert pruned["eta"] == pytest.approx((1 - seconds / dense_seconds) / (1 - run.summary["train_flops_ratio"]))
    assert (dense["time_ratio"], dense["train_flops_ratio"], dense["accuracy_delta"]) == (1, 1, 0)
    assert np.isnan(dense["eta"])


def test_times_on_different_devices_are_not_compared(runs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "runs"
    shutil.copytree(runs, copy)
    path = copy / every_method()[0].path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device_name": "another"}))
    [pruned] = rows_by_method(copy, "tab1")["prunetrain"]
    assert np.isnan(pruned["time_ratio"])
    assert np.isnan(pruned["eta"])
    assert np.isfinite(pruned["accuracy_delta"])


def test_gating_is_below_union_and_union_is_what_the_run_ended_with(runs: Path) -> None:
    union, ends, gating = rows_by_method(runs, "fig6")["prunetrain"]
    summary = read_run(runs / every_method()[1].path).summary
    assert summary is not None
    assert union["policy"] == "union"
    assert union["inference_flops_ratio"] == pytest.approx(summary["inference_flops_ratio"], rel=1e-12)
    assert gating["inference_flops_ratio"] < union["inference_flops_ratio"]
    assert gating["train_flops_ratio_final"] < union["train_flops_ratio_final"]
    assert ends["policy"] == "gating at branch ends"
    for column in ("inference_flops_ratio", "train_flops_ratio_final"):
        assert gating[column] < ends[column] < union[column]


def test_densities_agree_with_the_channels_and_the_weights(runs: Path) -> None:
    run = read_run(runs / every_method()[1].path)
    shares = densities(run)
    last = run.channels[run.channels.reconfiguration == run.channels.reconfiguration.max()]
    last = last[last.kind == "conv"]
    assert [density.layer for density in shares] == list(last.layer)
    by_layer = {row.layer: row for row in last.itertuples()}
    weights = read_checkpoint(run.directory / "checkpoint.pt")["model"]
    for density in shares:
        row = by_layer[density.layer]
        kept = 0 if row.removed else row.in_kept * row.out_kept / (row.in_total * row.out_total)
        assert density.channels == pytest.approx(kept)
        assert density.weights <= density.channels
        if not row.removed:
            size = weights[f"{density.layer}.weight"].abs()
            alive = (size >= run.config["threshold"] * size.max()).double().mean().item()
            assert density.weights == pytest.approx(kept * alive)
    assert any(0 < density.weights < density.channels < 1 for density in shares)


def test_a_checkpoint_that_is_not_the_summarys_is_refused(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs / every_method()[1].path, folder)
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"inference_flops": 1}))
    with pytest.raises(InputError, match=r"summary\.json beside it says 1"):
        final_network(read_run(folder))


def test_ssl_costs_the_dense_training_too(runs: Path) -> None:
    by_method = rows_by_method(runs, "fig8")
    [dense], [ssl] = by_method["dense"], by_method["ssl"]
    assert ssl["train_tflops"] == pytest.approx(2 * dense["train_tflops"])
    assert ssl["train_flops_ratio"] == 2
    assert ssl["bn_gb"] == pytest.approx(2 * dense["bn_gb"])


# -- formulas, on a run with round numbers -----------------------------------------------------------------------------


def invented(
    tmp_path: Path, training: Training, flops: Sequence[float], batches: Sequence[int], **summary: Any
) -> results.Result:
    """Six epochs of 1000 images; `flops`: training FLOPs per image in each epoch, the last value after the end."""
    folder = tmp_path / training.path
    log = RunLog(folder)
    log.write_config({**asdict(TrainConfig(str(folder))), **training.options, "device_name": "GPU", "torch": "9"})
    for epoch, (f, batch) in enumerate(zip(flops, batches, strict=False), start=1):
        log.add_epoch(
            {
                "epoch": epoch,
                "val_accuracy": 0.5,
                "train_flops_per_image": f,
                "train_flops": f * batch,
                "gradient_bytes": 4 * f,
                "bn_bytes": f * batch,
                "memory_bytes": 10 * f * batch,
                "steps": 1000 // batch,
                "batch": batch,
                "train_seconds": 1,
                "lasso_seconds": 0.5,
                "reconfigure_seconds": 0.25,
            }
        )
    done = [{"epoch": e, "train_flops": after} for e, after in enumerate(flops[1:], start=1)]
    total = 1000 * sum(flops[: len(batches)])
    log.write_summary(
        {
            "val_accuracy": 0.5,
            "train_flops": total,
            "reconfigurations": done,
            "batch_sizes": sorted(set(batches)),
            **summary,
        }
    )
    log.save()
    return results.Result(training, read_run(folder), "2020-02-02")


def test_fig2_by_hand(tmp_path: Path) -> None:
    plain = ("small", "cifar10", "resnet20", 0.5)
    usual = invented(tmp_path, experiments.prunetrain(*plain, 0), [100, 80, 50, 50, 40, 40, 20], [10] * 6)
    once = invented(tmp_path, experiments.once(*plain, 3, 0), [100, 100, 100, 60, 60, 60, 60], [10] * 6)
    rows = results.rows_of(results.Collected(EXPERIMENTS["fig2"], "small", [usual, once], {}))
    panels = {panel: [(row["x"], row["y"]) for row in rows if row["panel"] == panel] for panel in "abc"}
    assert panels["a"] == [(1, 1), (2, 0.8), (3, 0.5), (4, 0.5), (5, 0.4), (6, 0.4)]
    # after 2 epochs 50 of 100 are left, after 4 epochs 40, at the end 20: of 80 pruned in all
    assert panels["b"] == [(1, 50 / 80), (2, pytest.approx(10 / 80)), (3, pytest.approx(20 / 80))]
    sums = [1 + 5 * 0.8, 2 + 4 * 0.5, 3 + 3 * 0.5, 4 + 2 * 0.4, 5 + 0.4]
    assert panels["c"][:5] == [(x, pytest.approx(total / 3.6)) for x, total in enumerate(sums, start=1)]
    assert panels["c"][5] == (3, pytest.approx(480 / 360))
    assert [row["label"] for row in rows if row["panel"] == "c"] == ["computed"] * 5 + ["run"]
    assert "+11.1% at epoch 2" in tables.markdown(
        results.Collected(EXPERIMENTS["fig2"], "small", [usual, once], {}), rows
    )


def test_fig9_and_fig11_by_hand(tmp_path: Path) -> None:
    training = experiments.adjusted("small", "cifar10", "resnet20", 0.5, 0)
    grown = invented(tmp_path, training, [100, 100, 50, 50, 25, 25, 25], [10, 10, 20, 20, 40, 40])
    rows = results.rows_of(results.Collected(EXPERIMENTS["fig9"], "small", [grown], {}))
    assert [(row["batch"], row["memory_bytes"]) for row in rows[1:4]] == [(10, 10000), (20, 10000), (20, 10000)]
    assert {row["memory_ratio"] for row in rows} == {1}
    assert {row["budget"] for row in rows} == {10000}
    rows = results.rows_of(results.Collected(EXPERIMENTS["fig11"], "small", [grown], {}))
    assert sorted({row["gpus"] for row in rows}) == [16, 32, 64, 128, 256]
    one = [row for row in rows if row["gpus"] == 128]
    assert [row["bytes_per_iteration_ratio"] for row in one] == pytest.approx([1, 1, 0.5, 0.5, 0.25, 0.25])
    assert [row["bytes_per_epoch_ratio"] for row in one] == pytest.approx([1, 1, 0.25, 0.25, 0.0625, 0.0625])
    assert {round(row["average_saving"], 12) for row in rows} == {round(1 - 2 * 1.3125 / 6, 12)}


def test_tab4_by_hand(tmp_path: Path) -> None:
    plain = ("small", "cifar10", "resnet50")
    ratios = {"train_flops_ratio": 0.6, "inference_flops_ratio": 0.25}
    whole = dict.fromkeys(ratios, 1)
    dense = invented(tmp_path, experiments.dense(*plain, 0), [100] * 7, [10] * 6, **whole)
    grown = invented(tmp_path, experiments.adjusted(*plain, 0.5, 0), [100] * 3 + [25] * 4, [10] * 3 + [20], **ratios)
    collected = results.Collected(EXPERIMENTS["tab4"], "small", [dense, grown], {})
    row = results.rows_of(collected)[1]
    assert row["time_reduction"] == pytest.approx(1 - 4 / 6)  # it logged four epochs
    assert (row["batch_first"], row["batch_last"], row["steps"]) == (10, 20, 350)
    assert (row["paper_time_reduction"], row["paper_accuracy_delta"]) == (0.43, -0.4)
    assert "| Adjusted |" in tables.markdown(collected, results.rows_of(collected))


def test_several_seeds_are_a_mean_and_a_deviation(tmp_path: Path) -> None:
    runs = []
    for seed, accuracy in enumerate((0.5, 0.6, 0.7)):
        training = experiments.prunetrain("small", "cifar10", "resnet20", 0.5, seed)
        runs.append(invented(tmp_path, training, [100] * 7, [10] * 6, val_accuracy=accuracy, inference_flops=2e6))
    whole = results.Collected(EXPERIMENTS["fig10"], "small", runs, {})
    rows = results.rows_of(whole)
    assert [row["seed"] for row in rows] == [0, 1, 2]
    text = tables.markdown(whole, rows)
    assert "60.0% ± 10.0%" in text
    assert "seeds 0, 1, 2" in text
    assert text.count("| resnet20 ") == 1


def test_the_middle_path_is_one_that_is_still_there(runs: Path) -> None:
    run = read_run(runs / every_method()[0].path)
    assert results.path_in_the_middle(run) == ["layer2.1.conv1", "layer2.1.conv2", "layer2.2.conv1"]
    run.slices["layer2.1.conv2"][-1] = np.nan
    assert results.path_in_the_middle(run)[:2] == ["layer2.0.conv1", "layer2.0.conv2"]
