"""Commands of `python -m bench` that only look write into no committed file; docs/results.md begins with a summary."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from bench_kit import CPU, rows_of, tiny_session

from bench import rows
from bench.__main__ import main
from bench.suites import kernels

ROOT = Path(__file__).parents[2]


def contents(*folders: str) -> dict[Path, tuple[int, int]]:
    """Size and time of every file in some folders of the repository."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["list"], "fig7"),
        (["roof", "--device", "cpu", "--quick"], "TFLOP/s multiplied"),
        (["costs", "--batch", "4", "--profile", "uniform:0.5"], "gating (expanded)"),
        (["results", "--check"], "docs/results.md is"),
        (["architectures", "unet"], "torch.fx"),
        (["compare", "bench/results/amd-epyc/sgd.csv", "bench/results/amd-epyc/sgd.csv"], "0 slower"),
        (["paper", "tab1", "--scale", "small", "--data", "cifar10=digits", "--dry-run"], "trainings"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_that_only_looks_writes_no_committed_file(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments[0] == "architectures" and not (find_spec("torchvision") and find_spec("timm")):
        pytest.skip("torchvision and timm are not installed: make test does it")
    monkeypatch.chdir(ROOT)
    before = contents("bench/results", "docs")
    assert main(arguments) in (0, 1)
    assert said in capsys.readouterr().out
    assert contents("bench/results", "docs") == before


def test_looking_writes_nowhere_and_recording_where_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # whose bench/results stands for the committed one
    costs = ["costs", "--profile", "uniform:0.5"]
    assert main(["roof", "--device", "cpu", "--quick"]) == main(costs) == 0
    assert list(tmp_path.iterdir()) == []
    assert main(["roof", "--device", "cpu", "--quick", "--out", "there"]) == 0
    assert {row["layer"] for row in rows_of(tmp_path / "there/roof.csv")} == {"copy", "matmul"}
    assert main(["roof", "--device", "cpu", "--quick", "--record"]) == 0  # tiny sizes are no results
    assert [path.name for path in (tmp_path / "runs/bench").iterdir()] == ["roof.csv"]
    assert main([*costs, "--record"]) == 0
    assert len(rows_of(tmp_path / "bench/results/offline/gating.csv")) == 32 * 5


@pytest.mark.parametrize(
    ("folder", "quick", "only", "written"),
    [
        ("bench/results/DEVICE", False, "", "bench/results/offline/kernels.csv"),
        ("bench/results/DEVICE", False, "SGD", None),  # a part would replace the whole table
        ("visit", False, "", "visit/kernels.csv"),
        ("visit", False, "SGD", "visit/kernels.csv"),
        ("runs/bench", True, "", "runs/bench/kernels-quick.csv"),
    ],
)
def test_where_the_suite_kernels_writes(
    folder: str, quick: bool, only: str, written: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path | None] = []
    monkeypatch.setattr(kernels, "command", lambda chosen, out, only: asked.append(out) or 0)
    where = rows.results_folder(CPU) if folder.endswith("DEVICE") else Path(folder)
    kernels.run(tiny_session(where, "dense", quick=quick, only=only))
    assert asked == [written and Path(written)]


@pytest.mark.parametrize("part", [["--only", "SGD"], ["--arch", "80"]])
def test_a_part_of_the_kernels_is_not_recorded(part: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", *part, "--record"]) == 2
    assert "by the whole table" in capsys.readouterr().err


def timed(layer: str, provider: str, microseconds: float, **columns: object) -> dict[str, object]:
    return {
        "suite": "native", "layer": layer, "count": 1, "provider": provider, "part": "all", "direction": "step",
        "dtype": "fp32", "size": "full", "mode": "cpu-loop", "p20_us": microseconds, "p50_us": microseconds,
        "p80_us": microseconds, "mask_profile": "dense", "n": 8, **rows.environment(CPU), **columns,
    }  # fmt: skip


def test_the_page_begins_with_a_summary_and_folds_long_tables(tmp_path: Path) -> None:
    results, page = tmp_path / "results", tmp_path / "docs/results.md"
    pieces = [timed(f"piece {i}", *way) for i in range(3) for way in (("native", 10.0), ("eager", 10.0 * (i + 1)))]
    rows.append(results / "a-cpu/native.csv", pieces)
    networks = [("dense", 1.0, 1.0), ("half", 0.5, 0.75), ("rounded", 0.6, 0.6)]
    steps = [
        timed("net", "ours", 100 * time, suite="step", mask_profile=name, flops_ratio=work, time_ratio=time,
              **({} if work == 1 else {"eta": (1 - time) / (1 - work)}))
        for name, work, time in networks
    ]  # fmt: skip
    rows.append(results / "a-cpu/step.csv", steps)
    rows.append(results / "a-cpu/gather.csv", [timed(f"width {i}", "ours", 5.0, suite="gather") for i in range(40)])
    arguments = ["results", "--results", str(results), "--out", str(page)]
    assert main(arguments) == 0
    assert main([*arguments, "--check"]) == 0
    text = page.read_text()
    before, rest = text.split("## Summary\n")
    assert "## " not in before
    summary, tables = rest.split("\n## ", 1)
    assert f"* **native** on {rows.device_name(CPU)}: the CPU library is 2.0 times as fast" in summary
    assert "(1.0 to 3.0; median of 3 pieces of work)" in summary
    assert "(eta, medians of 2 rows): ours 0.75." in summary
    assert "gather" not in summary
    assert tables.count("<details>") == tables.count("</details>") == 1
    assert "<summary>40 rows</summary>\n\n| layer |" in tables  # Markdown inside HTML begins after an empty line
    rows.append(results / "a-cpu/step.csv", steps)
    assert main([*arguments, "--check"]) == 0  # nothing new: the newest row of each thing counts
    rows.append(results / "a-cpu/native.csv", [timed("piece 4", "native", 1.0)])
    assert main([*arguments, "--check"]) == 1
