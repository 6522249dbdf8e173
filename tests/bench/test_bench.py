"""The command `python -m bench`, the rows it writes, and that a wrong provider is refused."""

import csv
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench import fused, rows, timing
from bench.__main__ import main
from bench.kernels import architectures
from prunetrain_kernels.errors import InputError

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_list_names_the_suites(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == {"kernels", "fused"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["kernels", "--arch", "60"], "--arch 60 is no architecture"),
        (["kernels", "--arch", "ninety"], "--arch takes numbers"),
        (["kernels"], "TRITON_INTERPRET=1"),  # as it is set in this process
        (["fused", "--device", "cpu", "--batch", "0"], "--batch must be at least 1"),
        (["fused", "--device", "cpu", "--only", "conv"], "--only takes one of optimizer"),
        (["fused", "--device", "cpu", "--out", "/dev/null/fused.csv"], "cannot write /dev/null/fused.csv"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_missing_gpu_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fused", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_architectures_are_listed_once() -> None:
    assert architectures("80,70,80") == [80, 70]


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a dry run of bench/gpu.sh, which runs the whole of `python -m bench fused --quick`."""
    out = tmp_path_factory.mktemp("visit")
    environment = os.environ | {"DEVICE": "cpu", "QUICK": "1", "OUT": str(out), "PYTHON": sys.executable}
    run = subprocess.run(
        ["bash", "bench/gpu.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (out / "said").write_text(run.stdout)
    return out


def test_gpu_script_goes_through_its_steps_without_a_gpu(visit: Path) -> None:
    said = (visit / "said").read_text()
    for step in ("DONE t2", "DONE optimizers", "DONE fused", "SKIPPED memcheck", "all steps done"):
        assert step in said
        assert step in (visit / "gpu.log").read_text()
    assert "skipped" in (visit / "t2.log").read_text()
    assert "shows what only a GPU can" in (visit / "t2.log").read_text()
    fused_log = (visit / "fused.log").read_text()
    assert "Targets are for GPUs" in fused_log
    assert "REFUSED" not in fused_log


def test_fused_writes_rows(visit: Path) -> None:
    with (visit / "fused.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert tuple(found[0]) == rows.COLUMNS
    directions = {(row["layer"], row["provider"], row["direction"]) for row in found}
    assert ("all parameters", "ours", "SGD+lasso") in directions
    assert {("all layers", p, d) for p in ("ours", "eager") for d in ("forward", "backward")} <= directions
    assert len({row["layer"] for row in found if row["layer"].startswith("BN")}) == 16
    assert len({row["layer"] for row in found if row["layer"].startswith("channel_")}) == 12
    for row in found:
        assert row["suite"] == "fused"
        assert row["torch"] == torch.__version__
        assert float(row["p50_us"]) > 0
        assert int(row["model_bytes"]) > 0
        assert float(row["ratio_to_roof"]) > 0
        if row["layer"] != "all layers":
            assert float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
            assert 0 <= float(row["error"]) < (0.01 if row["provider"] == "ours" else 0.1)
    total = sum(float(r["p50_us"]) * int(r["count"]) for r in found if is_layer(r, "ours", "forward"))
    assert total == pytest.approx(
        next(float(r["p50_us"]) for r in found if r["layer"] == "all layers" and is_of(r, "ours", "forward")), rel=1e-3
    )


def is_of(row: dict[str, str], provider: str, direction: str) -> bool:
    return row["provider"] == provider and row["direction"] == direction


def is_layer(row: dict[str, str], provider: str, direction: str) -> bool:
    return row["layer"].startswith("BN") and is_of(row, provider, direction)


def test_all_of_resnet50s_batch_norms_are_measured() -> None:
    found = fused.layers()
    assert sum(layer.count for layer in found) == 53
    assert sum(layer.count for layer in found if layer.follows == "BN+add+ReLU") == 16
    assert sum(layer.count for layer in found if layer.follows == "BN") == 4
    elements = sum(layer.count * layer.channels * layer.side**2 for layer in found)
    assert elements == 11_113_984  # per image: what the network's convolutions put out
    # design section 7: 12.0 ms at 4.3 TB/s for batch 256 in fp16
    size = sum(
        layer.count * fused.batch_norm_bytes(256 * layer.channels * layer.side**2, 2, layer.follows, direction)
        for layer in found
        for direction in ("forward", "backward")
    )
    assert size / 4.3e12 == pytest.approx(12.0e-3, rel=0.05)


def session(tmp_path: Path) -> fused.Session:
    return fused.Session(CPU, torch.float16, 2, True, False, tmp_path / "fused.csv", 1.0, rows.environment(CPU))


def test_a_provider_with_a_wrong_result_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(x, mean, var, weight, bias, residual, relu):  # type: ignore[no-untyped-def]
        y = fused.eager_batch_norm(x, mean, var, weight, bias, residual, relu)
        return y + F.pad(torch.ones(1, 1, 1, 1), (0, 0, 0, 0, 0, y.shape[1] - 1)).to(y)  # one channel is off

    monkeypatch.setattr(fused, "our_batch_norm", wrong)
    run = session(tmp_path)
    fused.batch_norm(run)
    assert "BN+add+ReLU 256x8x8 forward by ours: wrong result" in run.refused
    found = list(csv.DictReader(run.out.open(newline="")))
    assert not any(is_of(row, "ours", "forward") for row in found)  # neither layers nor their sum
    assert any(row["layer"] == "all layers" and is_of(row, "eager", "forward") for row in found)
    assert "ours has no sum" in capsys.readouterr().out
    assert "REFUSED BN+add+ReLU" in fused.verdict(run)


def test_a_piece_that_fails_is_reported_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(fused, "channel_gather", failing)
    run = session(tmp_path)
    fused.attempt(run, "channels", lambda: fused.channels(run))
    assert run.refused == [f"{w} channels: RuntimeError no such kernel" for w in (256, 512, 1024, 2048)]


def test_verdict_says_met_and_missed(tmp_path: Path) -> None:
    run = session(tmp_path)
    run.p50 = {
        ("all parameters", "ours", "SGD"): 100.0,
        ("all parameters", "ours", "SGD+lasso"): 104.0,
        ("floor", "model", "SGD"): 80.0,
        ("all parameters", "torch fused", "SGD"): 90.0,
        ("all layers", "ours", "forward"): 1000.0,
        ("all layers", "ours", "backward"): 1000.0,
        ("all layers", "eager", "forward"): 1500.0,
        ("all layers", "eager", "backward"): 1500.0,
        ("bytes", "model", "both"): 1.9e6,  # 0.95 of a copy at 1 GB/s
    }
    assert [" ".join(str(target).split("= ")[-1].split()[1:]) for target in fused.targets(run)] == [
        "met",
        "missed by 4.0%",
        "missed by 5.8%",
        "missed by 10.1%",
        "met",
        "met",
        "not measured",
    ]


def test_rows_are_appended_and_foreign_files_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows.append(path, [{"suite": "x", "p50_us": 1.23456789}])
    rows.append(path, [{"suite": "y"}])
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["suite"] for row in found] == ["x", "y"]
    assert found[0]["p50_us"] == "1.23457"
    with pytest.raises(InputError, match="no column speed"):
        rows.append(path, [{"speed": 1}])
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="other columns"):
        rows.append(path, [{"suite": "z"}])
    assert path.read_text() == "a,b\n1,2\n"


def test_checks_see_rounding_outliers_and_nan() -> None:
    exact = torch.linspace(-1, 1, 4098, dtype=torch.float64)
    rounded = timing.check([exact.half()], [exact])
    assert 0 < rounded.error < 1e-3
    assert rounded.outliers == 0
    off = exact.float()
    off[17] += 1
    assert timing.check([off], [exact]).outliers == pytest.approx(1 / 4098)
    assert not timing.check([off], [exact]).passes(rounded, torch.float16)
    off[17] = float("nan")
    assert not timing.check([off], [exact]).passes(rounded, torch.float16)
    assert rounded.passes(rounded, torch.float16)


def test_slower_is_slower() -> None:
    calls = {"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.004)}
    found = timing.side_by_side(calls, CPU, milliseconds=8, rounds=3)
    assert found["long"].p50 > 2 * found["short"].p50
    assert found["long"].p50 > 4000
    assert found["long"].mode == timing.CPU
    assert found["long"].samples == 3


def test_settings_are_the_commands_options() -> None:
    """The command hands its options over by name."""
    from bench.__main__ import _parser

    options = _parser().parse_args(["fused"])
    assert {f.name for f in dataclasses.fields(fused.Settings)} <= set(vars(options))
