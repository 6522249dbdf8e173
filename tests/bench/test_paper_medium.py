"""The medium scale: its trainings, the runs that are committed, the steps that are timed, the table and the page."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_kit import paper, rows_of

from bench.paper import command, committed, experiments, networks, results, runner, steps, tables
from bench.paper.experiments import EXPERIMENTS, Training, names_at, trainings_of
from bench.results import page
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.train.config import TrainConfig
from prunetrain_kernels.train.loop import train
from prunetrain_kernels.train.run_log import RunLog, read_run

NO_RUN = "No run at medium scale is committed yet; the command is"


def claimed(seeds: int = 1) -> dict[str, Training]:
    return {training.name: training for training in trainings_of(["claim"], "medium", seeds)}


def fabricated(folder: Path, training: Training, accuracy: float = 0.9, left: float = 1.0, **options: Any) -> Path:
    """A finished run folder as `prunetrain train` leaves it, but for the weights: it ends with `left` of the FLOPs."""
    log = RunLog(folder)
    record = {"train": {"counts": [5000] * 10}, "val": {"counts": [1000] * 10}, "class_names": []}
    log.write_config(
        {
            **asdict(TrainConfig(str(folder), data="/somewhere/cifar10")), **training.options, "cache": "/cache/x",
            "device_name": "CPU", "processor": "Some CPU", "threads_used": 1, "torch": "9", "data_record": record,
            "start_from": "/elsewhere/runs/dense" if training.start is not None else None, **options,
        }
    )  # fmt: skip
    for epoch in (1, 2, 3):
        flops = 100.0 if epoch == 1 else 100 * left
        log.add_epoch(
            {
                "epoch": epoch, "val_accuracy": accuracy, "train_flops_per_image": flops, "train_flops": 128 * flops,
                "gradient_bytes": 4 * flops, "bn_bytes": flops, "steps": 390, "batch": 128, "train_seconds": 1,
                "lasso_seconds": 0, "reconfigure_seconds": 0,
            }
        )  # fmt: skip
    layers = [f"layer2.{block}.conv{conv}" for block in (0, 1, 2) for conv in (1, 2)]
    for n, kept in enumerate((4, 3, 2)):
        log.add_channels(
            {"reconfiguration": n, "epoch": n, "layer": layer, "kind": "conv", "in_kept": kept, "in_total": 4,
             "out_kept": kept, "out_total": 4, "removed": 0}
            for layer in layers
        )  # fmt: skip
    for epoch in range(7):
        log.add_slices(epoch, {layer: np.array([1, 0.5, 1e-5, 1e-3], np.float32) for layer in layers})
    log.write_summary(
        {
            "val_accuracy": accuracy, "train_flops_ratio": (1 + 2 * left) / 3, "inference_flops_ratio": left,
            "inference_flops": 1e6 * left, "train_flops": 1e9, "bn_bytes_ratio": left, "date": None,
            "reconfigurations": [{"epoch": 1.0, "train_flops": 100 * left}], "batch_sizes": [128],
            "somewhere": "/a/machine/path",
        }
    )  # fmt: skip
    log.save()
    return folder


# -- the trainings -----------------------------------------------------------------------------------------------------


def test_the_main_table_is_of_three_networks_by_five_ways_and_two_that_were_not_focused() -> None:
    trainings = claimed()
    assert len(trainings) == 17
    target = trainings["vgg11-target-0.38-seed-0-proximal"]
    assert (target.method, target.ratio, target.target) == ("proximal-target", None, 0.38)
    assert (target.options["target_flops"], target.options["proximal"]) == (0.38, True)
    assert "target_focus" not in target.options
    without = trainings["vgg11-target-0.35-seed-0-proximal-unfocused"]
    assert (without.method, without.target, without.options["target_focus"]) == ("unfocused-target", 0.35, False)
    assert "penalty_ratio" not in target.options
    plain = trainings["resnet32-ratio-0.25-seed-0"].options
    assert (plain["epochs"], plain["interval"], plain["batch"], plain["lr"]) == (60, 3, 128, 0.1)
    assert (plain["threshold"], plain["weight_decay"]) == (1e-4, 5e-4)
    assert (plain["amp"], plain["fuse"], plain["channels_last"]) == ("bf16", True, True)
    dense = trainings["vgg11-dense-seed-0"].options
    assert (dense["epochs"], dense["dense"]) == (30, True)
    assert all("limit_train" not in t.options for t in trainings.values())


def test_further_runs_are_of_one_seed() -> None:
    everything = trainings_of(names_at("medium"), "medium", 2)
    further = {t.name for t in everything} - set(claimed(2))
    assert further == {
        "resnet20-ratio-0.25-seed-0-once-30", "resnet20-ratio-0.25-seed-0-ssl",
        "resnet20-ratio-0.25-seed-0-interval-6", "resnet20-ratio-0.25-seed-0-interval-24",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["tab1", "tab3", "tab4", "fig9", "fig12"])
def test_experiments_without_this_scale_say_so(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} has no medium scale; medium has claim, fig2, fig4"):
        paper(name, "--scale", "medium", "--tabulate")


def test_the_small_scale_follows_the_linear_rule() -> None:
    assert experiments.SMALL["lr"] == 0.1 * experiments.SMALL["batch"] / 128


# -- committed runs ----------------------------------------------------------------------------------------------------


def test_a_run_is_copied_small_and_without_paths(tmp_path: Path) -> None:
    training = claimed()["resnet20-ratio-0.25-seed-0"]
    source = fabricated(tmp_path / "elsewhere" / "mine", training, left=0.5)
    assert paper("claim", "--scale", "medium", "--out", str(tmp_path / "out"), "--adopt", str(source)) == 0
    target = tmp_path / "out/medium" / training.name
    assert {path.name for path in target.iterdir()} == {
        "config.json", "summary.json", "log.csv", "channels.csv", "slices.npz",
    }  # fmt: skip
    for path in target.glob("*.json"):
        texts = [value for value in json.loads(path.read_text()).values() if isinstance(value, str)]
        assert not [text for text in texts if text.startswith("/")], path
        assert str(tmp_path) not in path.read_text()
    config = json.loads((target / "config.json").read_text())
    assert (config["out"], config["data"], config["cache"]) == (training.name, "cifar10", None)
    assert len(config["date"]) == 10
    assert (target / "log.csv").read_bytes() == (source / "log.csv").read_bytes()
    kept, before = read_run(target), read_run(source)
    assert kept.channels["reconfiguration"].tolist() == [0] * 6 + [2] * 6
    # Fig. 4 of the copy is that of the run
    middle = results.path_in_the_middle(before)
    assert results.path_in_the_middle(kept) == middle == list(kept.slices)
    assert all(np.array_equal(kept.slices[layer], before.slices[layer]) for layer in middle)
    # once more changes nothing
    assert committed.adopt(source, training, tmp_path / "out") == []


def test_a_run_is_recognised_by_its_options(tmp_path: Path) -> None:
    known = trainings_of(names_at("medium"), "medium", 2)
    for name in ("vgg11-dense-seed-1", "resnet32-target-0.48-seed-0-proximal", "resnet20-ratio-0.25-seed-0-ssl"):
        training = next(t for t in known if t.name == name)
        assert committed.matching(fabricated(tmp_path / name[::-1], training, threads=7), known) == training
    dense = claimed()["resnet20-dense-seed-0"]
    for changes, says in (
        ({"limit_train": 1000}, "resnet20-dense-seed-0 comes nearest, but the run has --limit-train 1000, not None"),
        ({"lr": 0.2, "amp": "off"}, "--lr 0.2, not 0.1"),
    ):
        with pytest.raises(InputError, match=says):
            committed.matching(fabricated(tmp_path / "other", dense, **changes), known)
    with pytest.raises(InputError, match=r"it has no config\.json"):
        committed.matching(tmp_path / "absent", known)


def test_what_is_not_finished_or_not_all_of_the_data_is_refused(tmp_path: Path) -> None:
    dense = claimed()["resnet20-dense-seed-0"]
    few = {"train": {"counts": [10] * 10}, "val": {"counts": [1000] * 10}}
    with pytest.raises(InputError, match="trained on 100 and validated on 10,000 images"):
        committed.adopt(fabricated(tmp_path / "few", dense, data_record=few), dense, tmp_path / "out")
    (fabricated(tmp_path / "cut", dense) / "summary.json").unlink()
    with pytest.raises(InputError, match="unfinished"):
        committed.adopt(tmp_path / "cut", dense, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_committed_is_not_trained_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, runs = ["--out", str(tmp_path / "out")], ["--runs", str(tmp_path / "runs")]
    known = {t.name: t for t in trainings_of(names_at("medium"), "medium", 1)}
    dense, ssl = known["resnet20-dense-seed-0"], known["resnet20-ratio-0.25-seed-0-ssl"]
    committed.adopt(fabricated(tmp_path / "a", dense), dense, tmp_path / "out")
    words = ["--scale", "medium", "--data", "cifar10=digits", *out, *runs, "--seeds", "1", "--dry-run"]
    assert paper("claim", *words, "--only", "resnet20-dense", "--overwrite") == 0
    assert "1 trainings, 0 of them done" in capsys.readouterr().out
    assert paper("claim", *words, "--only", "resnet20-dense") == 0
    said = capsys.readouterr().out
    assert "committed already: resnet20-dense-seed-0" in said
    assert "0 trainings" in said
    # SSL needs the dense run's weights, which are not committed
    assert paper("fig8", *words, "--only", "0-ssl") == 0
    said = capsys.readouterr().out
    assert said.count("\nnew") + said.startswith("new") == 2
    assert ssl.name in said
    # a committed run with other options is another training's
    path = tmp_path / "out/medium" / dense.name / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lr": 0.5}))
    assert paper("claim", *words, "--only", "resnet20-dense") == 0
    assert "1 trainings, 0 of them done" in capsys.readouterr().out


def test_finished_runs_are_copied_by_the_command_that_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training itself is left to the small scale's test: this one finds two runs done and one that fails."""
    for name in ("resnet20-dense-seed-0", "resnet20-ratio-0.25-seed-0"):
        training = claimed()[name]
        fabricated(tmp_path / "runs" / training.path, training, data="digits", left=0.5 if "ratio" in name else 1)
    monkeypatch.setattr(runner, "run", lambda jobs, *_: [job for job in jobs if job.state != "done"])
    words = ["claim", "--scale", "medium", "--data", "cifar10=digits", "--out", str(tmp_path / "out"), "--jobs", "2"]
    words += ["--runs", str(tmp_path / "runs"), "--seeds", "1", "--only"]
    assert paper(*words, "resnet20-ratio-0.25-seed-0-proximal") == 1
    assert not list((tmp_path / "out").glob("*/resnet*"))
    assert paper(*words, "resnet20-dense") == 0
    assert paper(*words[:-1], "--only", "resnet20-ratio-0.25-seed-0") == 1  # the proximal one, again
    assert {path.name for path in (tmp_path / "out/medium").iterdir() if path.is_dir()} == {
        "resnet20-dense-seed-0",
        "resnet20-ratio-0.25-seed-0",
    }
    assert "| resnet20 | PruneTrain" in capsys.readouterr().out


def test_options_are_fixed_and_flags_are_the_mediums(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="options are fixed"):
        paper("claim", "--scale", "medium", "--data", "cifar10=digits", "--train-options=--epochs 1")
    with pytest.raises(InputError, match="only --scale medium has"):
        paper("tab1", "--scale", "small", "--adopt", str(tmp_path))
    with pytest.raises(InputError, match="--adopt trains nothing"):
        paper("claim", "--scale", "medium", "--adopt", str(tmp_path), "--dry-run")


# -- the table ---------------------------------------------------------------------------------------------------------


def times(name: str, seconds: Sequence[float], flops: float) -> list[dict[str, Any]]:
    return [
        {"run": f"medium/cifar10/{name}", "provider": provider, "p20_s": s, "p50_s": s, "p80_s": s, "samples": 7,
         "images": 128, "train_flops_per_image": 1000 if provider == "dense" else 1000 * flops, "amp": "bf16",
         "layout": "channels_last", "threads": 1, "load": 0.1, "device": "Some CPU", "date": "2026-12-01T00:00:00Z",
         "torch": "9"}
        for provider, s in zip(steps.PROVIDERS, seconds, strict=True)
    ]  # fmt: skip


def table_of(text: str) -> list[dict[str, str]]:
    lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines() if "|" in line]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_the_table_of_some_runs_by_hand(tmp_path: Path) -> None:
    out, known = tmp_path / "out", claimed(2)
    for name, accuracy, left in (
        ("resnet32-dense-seed-0", 0.90, 1), ("resnet32-dense-seed-1", 0.92, 1),
        ("resnet32-ratio-0.25-seed-0", 0.89, 0.7), ("resnet32-ratio-0.25-seed-1", 0.89, 0.5),
        ("resnet32-target-0.48-seed-0-proximal", 0.88, 0.5), ("resnet20-target-0.48-seed-1", 0.86, 0.5),
    ):  # fmt: skip
        committed.adopt(fabricated(tmp_path / name, known[name], accuracy, left), known[name], out)
    old = times("resnet32-ratio-0.25-seed-0", (9, 9, 9), 0.9)
    steps.append(out / "medium/steps.csv", [*old, *times("resnet32-ratio-0.25-seed-0", (0.4, 0.3, 0.32), 0.6)])
    assert paper("claim", "--scale", "medium", "--out", str(out), "--tabulate") == 0
    text = (out / "medium/claim.md").read_text()
    rows = {(row["Network"], row["Method"]): row for row in table_of(text)}
    assert len(rows) == 5
    dense, pruned = rows["resnet32", "dense"], rows["resnet32", "PruneTrain"]
    assert (dense["Seeds"], dense["Val. acc."], dense["of dense, points"], dense["eta"]) == (
        "2",
        "91.0% ± 1.4%",
        "",
        "",
    )
    assert (pruned["Seeds"], pruned["Ratio"], pruned["of dense, points"]) == ("2", "0.25", "-2.00 ± 1.41")
    assert pruned["Inf. FLOPs"] == "60.0% ± 14.1%"
    assert [pruned[c] for c in ("s/step, dense", "last shape", "with our lasso")] == ["0.400", "0.300", "0.320"]
    assert (pruned["its FLOPs"], pruned["its time"], pruned["eta"]) == ("60.0%", "80.0%", "0.50")
    assert pruned["Train. FLOPs"].startswith("73.3%")
    steered = rows["resnet32", "proximal, to a target"]
    assert (steered["Seeds"], steered["Ratio"], steered["eta"]) == ("1", "to 48%", "–")
    alone = rows["resnet20", "PruneTrain, to a target"]
    assert (alone["Seeds"], alone["of dense, points"]) == ("1", "–")  # its dense run is not there
    quoted = rows["resnet32", "*paper*"]
    assert (quoted["Val. acc."], quoted["Train. FLOPs"], quoted["eta"]) == ("91.8%", "47.0%", "0.36")
    assert "Missing: 26 of 32 trainings" in text
    assert "Steps were timed on Some CPU, 1 thread" in text
    table = rows_of(out / "medium/claim.csv")
    assert [row["eta"] for row in table if row["run"] == "cifar10/resnet32-ratio-0.25-seed-0"] == ["0.5"]
    assert [row["target"] for row in table if row["method"] == "target"] == ["0.48"]


@pytest.mark.parametrize("name", names_at("medium"))
def test_every_figure_is_of_what_is_there(tmp_path: Path, name: str) -> None:
    """With all runs, with one, and with none."""
    out, known = tmp_path / "out", trainings_of([name], "medium", 1)
    assert paper(name, "--scale", "medium", "--seeds", "1", "--out", str(out), "--tabulate") == 0
    assert not out.exists()
    last = known[-1] if name != "fig2" else known[0]  # Fig. 2's last shows nothing without the first
    for several in ([last], known):
        for training in several:
            left = 1 if training.method == "dense" else 0.5
            source = fabricated(tmp_path / training.name, training, left=left)
            counts = {"dense": 1, "union": 0.5, networks.BRANCH_ENDS: 0.45, networks.EVERYWHERE: 0.4}
            committed.adopt(source, training, out)
            (out / "medium" / training.name / networks.COUNTS).write_text(
                json.dumps({policy: {"inference": c, "training": 3 * c} for policy, c in counts.items()})
            )
        assert paper(name, "--scale", "medium", "--seeds", "1", "--out", str(out), "--tabulate") == 0
        table = rows_of(out / "medium" / f"{name}.csv")
        assert {row["run"].split("/")[1] for row in table} == {training.name for training in several}
    text = (out / "medium" / f"{name}.md").read_text()
    assert "nan" not in text
    assert "Medium scale: all of CIFAR-10" in text
    assert "Missing" not in text
    if name == "fig6":
        assert "| 50.0% " in text
        assert "| 45.0% (5.0) " in text
        assert "| 40.0% (10.0) " in text
    for method in {training.method for training in known} - {"once"}:
        assert f"| {tables.METHOD_NAMES[method]} " in text or name == "fig4" or name == "fig11"


def test_fig6_leaves_out_a_run_without_weights(tmp_path: Path) -> None:
    training = claimed()["resnet20-ratio-0.25-seed-0"]
    run = read_run(fabricated(tmp_path / "run", training))
    assert networks.gating_counts(run) is None
    collected = results.Collected(EXPERIMENTS["fig6"], "medium", [results.Result(training, run, "2026-12-01")], {})
    assert results.rows_of(collected) == []
    (run.directory / networks.COUNTS).write_text("{}")
    with pytest.raises(InputError, match=r"gating\.json is damaged"):
        networks.gating_counts(run)


# -- timed steps -------------------------------------------------------------------------------------------------------


def test_a_busy_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (2.5, 0, 0))
    with pytest.raises(InputError, match=r"the machine is busy: 2\.50 processes"):
        steps.load_of_an_idle_machine()
    assert steps.load_of_an_idle_machine(even_if_busy=True) == 2.5
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0, 0))
    assert steps.load_of_an_idle_machine() == 0.1


def test_a_damaged_file_of_steps_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    assert steps.read(path) == {}
    steps.append(path, times("a", (1, 1, 1), 0.5)[:2])
    with pytest.raises(InputError, match="is damaged"):
        steps.read(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run in short, half of whose largest slice is below the threshold: pruned in seconds."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    config = TrainConfig(
        str(folder), data="synthetic:48x32x32", epochs=3, interval=1, batch=16, threshold=0.6, relative=True, lr=0.05,
        fuse=True, channels_last=True, amp="bf16", zeroing_tolerance=1e6, device="cpu", threads=1,
    )  # fmt: skip
    train(config, progress=False)
    return folder


def test_steps_are_of_the_trained_shape(trained: Path) -> None:
    run = read_run(trained)
    assert run.summary is not None
    assert run.summary["inference_flops_ratio"] < 1
    lines = steps.measure("mine", run, "cpu", 0.2, rounds=1)
    by_provider = {line["provider"]: line for line in lines}
    assert list(by_provider) == list(steps.PROVIDERS)
    last = run.log["train_flops_per_image"].tolist()
    done = run.summary["reconfigurations"][-1]["train_flops"]
    assert by_provider["dense"]["train_flops_per_image"] == last[0]
    assert by_provider["ours"]["train_flops_per_image"] == by_provider["pruned"]["train_flops_per_image"] == done
    assert all(line["amp"] == "bf16" and line["load"] == 0.2 and line["p50_s"] > 0 for line in lines)


def test_channels_that_are_not_the_summarys_are_refused(trained: Path, tmp_path: Path) -> None:
    for path in trained.glob("*.[cj]s*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    summary = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"inference_flops_ratio": 0.123}))
    with pytest.raises(InputError, match=r"summary\.json beside it\s+says 0\.123"):
        steps.measure("mine", read_run(tmp_path), "cpu", 0.0, rounds=1)


def test_a_real_run_is_adopted_with_its_gating(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committed, "IMAGES", {"train": 48, "val": 10})
    training = Training("medium", "cifar10", "resnet20", "prunetrain", 0.25, 0)
    committed.adopt(trained, training, tmp_path)
    copy, run = read_run(tmp_path / "medium" / training.name), read_run(trained)
    counts = networks.gating_counts(copy)
    assert counts is not None
    assert counts == networks.gating_counts(run)  # without weights what the weights said
    assert run.summary is not None
    assert counts["union"]["inference"] == run.summary["inference_flops"]
    values = [counts[policy]["inference"] for policy in ("everywhere", "branch ends", "union", "dense")]
    assert values == sorted(values)
    assert values[0] < values[1] < values[3]


def test_the_command_times_what_is_committed(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = claimed()["resnet20-ratio-0.25-seed-0"]
    committed.adopt(fabricated(tmp_path / "run", training), training, tmp_path / "out")
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0, 0))
    monkeypatch.setattr(steps, "measure", lambda path, *_: times(path.rpartition("/")[2], (0.4, 0.3, 0.3), 0.5))
    assert paper("claim", "--scale", "medium", "--out", str(tmp_path / "out"), "--time-steps") == 0
    assert steps.read(tmp_path / "out/medium/steps.csv")[training.path].eta == pytest.approx(0.5)
    assert "| 0.400 " in capsys.readouterr().out
    with pytest.raises(InputError, match="there is nothing to time"):
        paper("claim", "--scale", "medium", "--out", str(tmp_path / "none"), "--time-steps")
    assert callable(command.add_command)


# -- docs/results.md ---------------------------------------------------------------------------------------------------


def test_the_page_opens_with_the_table_or_says_how_to_make_it(tmp_path: Path) -> None:
    out = tmp_path / "results/paper"
    out.mkdir(parents=True)
    text = page(tmp_path / "results", tmp_path)
    assert text.index(NO_RUN) < text.index("Roof")
    assert "python -m bench paper claim --scale medium --data cifar10=PATH --jobs 2" in text
    for name, left in (("resnet20-dense-seed-0", 1), ("resnet20-target-0.48-seed-0", 0.5)):
        committed.adopt(fabricated(tmp_path / name, claimed()[name], left=left), claimed()[name], out)
    assert paper("claim", "--scale", "medium", "--out", str(out), "--tabulate") == 0
    text = page(tmp_path / "results", tmp_path)
    assert NO_RUN not in text
    assert text.index("| resnet20 | PruneTrain, to a target |") < text.index("Roof")
    assert text.count("| resnet20 | dense") == 1
