"""Predicted times: the formula on hand-computed cases, loops of machine code, and predictions beside measured times."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from bench_kit import compiling

from bench import compare, rows
from bench.__main__ import main
from bench.predict import command, formula, machine_code
from bench.predict.formula import Launch, Time
from bench.predict.machine_code import Code, Loop
from bench.predict.machines import MACHINES, Machine, machine, machine_of
from bench.predict.work import Work

# 1,000 MHz: a cycle is 1 ns. 10 SMs of 4 schedulers issue 40 instructions in it; 1,000 GB/s copied are 1 MB a us.
TOY = Machine(
    "Toy", 80, 1000, 10, 1000, {"fp16": 10}, l2=1 << 20, l2_bytes=10_000, latency=500, shared=100 << 10,
    sm_bytes=10_000, launch_us=1.0, copied=1.0,
)  # fmt: skip
# one warp; registers for 2,048 threads: 32 programs on an SM
STRAIGHT = Code(straight=100, loop=None, registers=32, shared=0, warps=1)


def looped(instructions: int, moved: int, flops: int = 0, **options: Any) -> Code:
    values: dict[str, Any] = {"straight": 0, "registers": 32, "shared": 0, "warps": 1, "wgmma": True, **options}
    return Code(loop=Loop(instructions, moved, 16, flops), **values)


def test_a_copy_is_bound_by_bytes() -> None:
    """32,000 programs of 32 kB, 1.024 GB: 1,024 us; everything else is far below."""
    time = formula.predict(Launch("copy", 32_000, 1.024e9, code=STRAIGHT), TOY, "fp16")
    assert (time.memory, time.bound) == (pytest.approx(1_024), "bytes")
    assert time.issue == pytest.approx(32_000 * 100 / 40 / 1000)
    assert (time.waves, time.launch, time.total) == (0, 1, pytest.approx(1_025))


def test_bytes_that_lie_in_the_cache_are_not_read_from_memory() -> None:
    whole = Launch("copy", 32_000, 1.024e9, code=STRAIGHT)
    half = Launch("copy", 32_000, 1.024e9, cached=0.512e9, code=STRAIGHT)
    assert formula.predict(half, TOY, "fp16").memory == formula.predict(whole, TOY, "fp16").memory / 2
    # all of it: what L2 delivers, 10,000 bytes a cycle, is left
    cached = formula.predict(Launch("copy", 32_000, 1.024e9, cached=1.024e9, code=STRAIGHT), TOY, "fp16")
    assert cached.memory == pytest.approx(1.024e9 / 10_000 / 1000)


def test_a_loop_of_many_instructions_is_bound_by_the_issue_rate() -> None:
    """3,200 programs read 32 bytes a thread and turn, 32 kB each: 32 turns of 1,000 instructions."""
    launch = Launch("divide", 3_200, 3_200 * 32 * 32 * 32.0, code=looped(1000, 32))
    assert formula.turns(launch) == 32
    time = formula.predict(launch, TOY, "fp16")
    assert time.issue == pytest.approx(3_200 * 32_000 / 40 / 1000)
    assert time.memory == pytest.approx(3_200 * 32_768 / 1e6)
    assert time.bound == "issue"


def test_a_product_is_bound_by_tensor_cores() -> None:
    """A turn of 32,768 FLOPs a warp and few instructions, at 10 TFLOP/s; by mma.sync where that reaches half, twice."""
    code = looped(10, 64, flops=32_768)
    launch = Launch("product", 3_200, 1e5, flops=3_200 * 100 * 32_768.0, code=code)
    assert formula.turns(launch) == 100
    time = formula.predict(launch, TOY, "fp16")
    assert time.tensor == pytest.approx(launch.flops / 1e7)
    assert (time.bound, time.total >= time.tensor + 1) == ("tensor cores", True)
    by_mma = Launch("product", 3_200, 1e5, flops=launch.flops, code=looped(10, 64, flops=32_768, wgmma=False))
    machine_with_both = Machine(**{**vars(TOY), "mma_share": 0.5})
    assert formula.predict(by_mma, machine_with_both, "fp16").tensor == pytest.approx(2 * time.tensor)


def test_programs_come_in_waves() -> None:
    """320 programs fill the 10 SMs. One more makes a wave of its own, which takes as long as a program alone."""
    code = Code(straight=4_000, loop=None, registers=32, shared=0, warps=1)
    assert formula.resident(code, TOY) == 32

    def time(programs: int) -> Time:
        return formula.predict(Launch("step", programs, 1.0, code=code), TOY, "fp16")

    issue = 320 * 4_000 / 40 / 1000  # 32 us
    assert time(320).waves == 0
    assert time(320).issue == pytest.approx(issue)
    alone = (500 + 4_000 / 4) / 1000  # waits for one load, then issues with one scheduler in four
    assert time(321).waves == pytest.approx(alone - issue / 320)
    # 11 programs: one SM has two, 2 us; spread evenly it would be 1.1
    assert time(11).total == pytest.approx(2 * 4_000 / 4 / 1000 + 1)


def test_a_loop_that_waits_for_its_loads_is_bound_by_waves() -> None:
    """One program of 64 turns of 500 cycles, as a fold of many slots is; loads two turns ahead make that a half."""
    moved = 64 * 32 * 32.0
    time = formula.predict(Launch("fold", 1, moved, code=looped(4, 32)), TOY, "fp16")
    assert time.bound == "waves"
    assert time.total - 1 == pytest.approx((65 * 500 + 64) / 1000)
    ahead = formula.predict(Launch("fold", 1, moved, code=looped(4, 32, stages=3)), TOY, "fp16")
    assert ahead.total - 1 == pytest.approx((33 * 500 + 64) / 1000)


def test_a_small_kernel_costs_its_launch() -> None:
    time = formula.predict(Launch("update", 1, 1000, code=Code(10, None, 32, 0, 1)), TOY, "fp16")
    assert (time.bound, time.total) == ("launch", pytest.approx(1.5, abs=0.01))


@pytest.mark.parametrize(
    ("options", "programs"),
    [({"warps": 8}, 8), ({"registers": 255}, 8), ({"shared": 30 << 10}, 3), ({"shared": 1 << 20}, 1)],
)
def test_programs_on_an_sm(options: dict[str, int], programs: int) -> None:
    """Bounded by warps, registers or shared memory, and never none."""
    assert formula.resident(looped(1, 1, **options), TOY) == programs


def test_the_part_after_a_barrier_costs_the_barrier() -> None:
    """In place of a launch; what all programs read beside `bytes` comes from L2, and only its loop waits for loads."""
    code = looped(4, 32)
    slots = 64 * 32 * 32.0
    launch = Launch("fold", 10, 1000.0, code=code, asked=10 * slots, shared=10 * slots, after_barrier=True)
    time = formula.predict(launch, TOY, "fp16")
    assert time.launch == TOY.barrier_us == 1.0
    assert time.total - 1 == pytest.approx((64 * 500 + 64) / 1000)
    assert time.memory == pytest.approx((1000 + 10 * slots) / 10_000 / 1000)
    assert Work("net", {}, 0.0, 0.0, [Launch("first", 10, 1000.0, code=code), launch]).launched == 1


def test_sums_add_up() -> None:
    parts = [Time(3, 1, 0, 1, 0.5), Time(1, 4, 0, 0, 0.5)]
    total = formula.sum_of(parts)
    assert total.total == pytest.approx(sum(part.total for part in parts))
    assert (total.memory, total.issue, total.launch) == (4, 5, 1)


# -- machine code ------------------------------------------------------------------------------------------------------

SASS = """
 Function _kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;       /* 0x00 */
        /*0010*/                   LDG.E R2, [R4.64] ;
        /*0020*/              @P0  LDG.E.128 R8, [R4.64] ;
        /*0030*/                   HMMA.16816.F32 R8, R4, R2, R8 ;
        /*0040*/                   STG.E.64 [R4.64], R8 ;
        /*0050*/              @!P1 BRA 0x20 ;
        /*0060*/                   LDG.E.U16 R2, [R4.64] ;
        /*0070*/              @P2  BRA 0x60 ;
        /*0080*/              @P3  BRA 0x10 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0 ;
        /*00b0*/                   NOP ;
"""


def test_the_main_loop_of_machine_code() -> None:
    """Of two loops inside a third the one with tensor cores; the third, the endless one and padding are none."""
    code = machine_code.parse(SASS, 40, shared=1024, warps=4, stages=3)
    assert code.loop == Loop(instructions=4, bytes=16 + 8, widest=16, flops=2 * 16 * 8 * 16)
    assert (code.straight, code.registers, code.stages, code.wgmma) == (5, 40, 1, False)
    ahead = machine_code.parse(SASS.replace("LDG.E.128", "LDGSTS.E.BYPASS.128"), 40, shared=0, warps=4, stages=3)
    assert (ahead.stages, ahead.loop) == (3, code.loop)


BARRIER = """
        /*0000*/                   LDG.E.128 R8, [R4.64] ;
        /*0010*/              @P0  ATOMG.E.ADD.STRONG.GPU PT, R2, [R4.64], R3 ;
        /*0020*/                   LDG.E.STRONG.GPU R2, [R4.64] ;
        /*0030*/              @P3  BRA 0x20 ;
        /*0040*/                   LDG.E.128.STRONG.GPU R8, [R4.64] ;
        /*0050*/              @P3  BRA 0x40 ;
        /*0060*/                   EXIT ;
"""


def test_a_barrier_in_machine_code() -> None:
    """The loop in which programs wait is none; one instruction is before the addition, that and the end are after."""
    code = machine_code.parse(BARRIER, 40, shared=0, warps=4, stages=1)
    assert (code.straight, code.before, code.loop) == (3, 1, Loop(instructions=2, bytes=16, widest=16))


@pytest.mark.t1
@pytest.mark.parametrize("name", ["h200", "v100"])
def test_kernels_are_compiled_and_predicted(name: str, tmp_path: Path) -> None:
    """The penalty of ResNet-32, offline: rows that are sound, marked as a model, of a time above the roof."""
    out = tmp_path / "predict.csv"
    words = ("--device", name, "--suite", "lasso", "--only", "ResNet-32", "--out", str(out))
    run = compiling("-m", "bench", "predict", *words)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "PREDICTED by a model, not measured" in run.stdout
    with out.open(newline="") as file:
        lines = {row["direction"]: row for row in csv.DictReader(file)}
    assert list(lines) == ["value", "value+gradient"]
    count = int(lines["value"]["n"])
    for row, size, launches in zip(lines.values(), (4, 16), (2, 3), strict=True):
        assert not rows.faults(row)
        assert (row["mode"], row["device"]) == ("model", f"NVIDIA {name.upper()} (predicted)")
        assert float(row["roof_us"]) < float(row["p50_us"]) < 50 * float(row["roof_us"])
        assert (int(row["launches"]), int(row["model_bytes"])) == (launches, size * count)


# -- command, compare --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(MACHINES))
def test_data_sheets(name: str) -> None:
    """The tensor-core rate is SMs x clock x FLOPs a cycle and SM: 1,024 on Volta, 2,048 on Ampere, 4,096 on Hopper."""
    of = machine(name.upper())
    flops = {70: 1024, 80: 2048, 90: 4096}[of.arch]
    assert of.tflop_s["fp16"] == pytest.approx(of.sms * of.mhz * flops / 1e6, rel=0.005)
    assert machine_of(f"NVIDIA {name.upper()} SXM") == machine_of(f"nvidia-{name}") == of
    assert machine_of("AMD EPYC") is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["predict", "--device", "h100x"], "nothing is known of a GPU called 'h100x'; choose among h200, a100, v100"),
        (["predict", "--record", "--only", "BN"], "leave --only out"),
        (["predict", "--suite", "memory"], "there is no suite 'memory' to predict; choose among bn"),
        (["compare", "only-one.csv"], "two files"),
        (["compare", "--tolerance", "0"], "--tolerance must be a positive share"),
        (["compare", "--results", "nowhere"], "no predictions"),
    ],
)
def test_unusable_input(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert not said.out


def _row(layer: str, p50: float, device: str, **more: Any) -> dict[str, Any]:
    return {
        "suite": "bn", "layer": layer, "count": 1, "provider": "ours", "part": "all", "direction": "forward",
        "dtype": "fp16", "layout": "channels_last", "n": 256, "mask_profile": "dense", "size": "full",
        "mode": "graph, cold L2", "p20_us": p50, "p50_us": p50, "p80_us": p50, "date": "2026-12-01", "device": device,
        "torch": "2.11.0", **more,
    }  # fmt: skip


def test_predictions_beside_measurements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Made-up rows: within 20 %, slower, faster, of another GPU, of tiny shapes, never measured, measured twice."""
    predicted = [_row(name, 100.0, "NVIDIA H200 (predicted)", mode="model") for name in ("a", "b", "c", "d", "e", "f")]
    rows.append(tmp_path / "offline/predict-h200.csv", predicted)
    assert main(["compare", "--results", str(tmp_path)]) == 0
    assert "6 predictions by model; none of these has been measured" in capsys.readouterr().out
    h200 = "NVIDIA H200"
    rows.append(tmp_path / "nvidia-h200/bn.csv", [
        _row("a", 300.0, h200), _row("a", 119.0, h200), _row("b", 150.0, h200, h=7), _row("b", 130.0, h200),
        _row("c", 70.0, h200), _row("d", 500.0, h200, size="quick"), _row("f", 500.0, h200, mode="model"),
    ])  # fmt: skip
    rows.append(tmp_path / "nvidia-a100-sxm4-80gb/bn.csv", [_row("e", 500.0, "NVIDIA A100-SXM4-80GB")])
    assert main(["compare", "--results", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "6 predictions by model, 3 of them measured, 2 off by more than 20%" in said
    named = [line for line in said.splitlines() if line.startswith("OFF")]
    assert ["bn: c forward" in named[0], "bn: b forward" in named[1], len(named)] == [True, True, 2]
    assert "1.30 x the predicted time" in named[1]
    assert main(["compare", "--results", str(tmp_path), "--tolerance", "0.5"]) == 0
    pairs, _ = compare.foretold(tmp_path)
    assert {pair.name.split()[1]: round(pair.off, 2) for pair in pairs} == {"c": -0.3, "b": 0.3, "a": 0.19}


def test_a_suite_that_is_recorded_replaces_its_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of other suites stay as they are, and where they are."""
    monkeypatch.setattr(command, "RECORD", tmp_path)
    device = "NVIDIA H200 (predicted)"
    every = [_row("a", 1.0, device), _row("b", 2.0, device), _row("c", 3.0, device, suite="sgd")]
    rows.append(tmp_path / "predict-h200.csv", [dict(each, mode="model") for each in every])
    command._replace(MACHINES["h200"], [_row("d", 4.0, device, mode="model")], "bn")
    with (tmp_path / "predict-h200.csv").open(newline="") as file:
        assert [(row["suite"], row["layer"], float(row["p50_us"])) for row in csv.DictReader(file)] == [
            ("bn", "d", 4.0), ("sgd", "c", 3.0)
        ]  # fmt: skip
    command._replace(MACHINES["h200"], [_row("e", 5.0, device, mode="model")], None)
    with (tmp_path / "predict-h200.csv").open(newline="") as file:
        assert [row["layer"] for row in csv.DictReader(file)] == ["e"]
    assert not list(tmp_path.glob("*.new"))


def test_the_committed_predictions_are_marked() -> None:
    """Whoever reads a row sees that nobody measured it."""
    paths = sorted(Path("bench/results/offline").glob("predict-*.csv"))
    assert [path.stem for path in paths] == ["predict-a100", "predict-h200", "predict-v100"]
    for path in paths:
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file))
        assert {line["mode"] for line in lines} == {"model"}
        assert all(line["device"].endswith("(predicted)") for line in lines)
        keys = [json.dumps([line[column] for column in rows.WHAT]) for line in lines]
        assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("name", list(MACHINES))
def test_the_lasso_inside_sgd_costs_little(name: str) -> None:
    """By the committed predictions at most 5 % of ResNet-50's and VGG-13's update, the fold of its slots included."""
    with Path(f"bench/results/offline/predict-{name}.csv").open(newline="") as file:
        updates = [row for row in csv.DictReader(file) if row["suite"] == "sgd" and int(row["n"]) > 1_000_000]
    for count in {row["n"] for row in updates}:
        times = {row["direction"]: float(row["p50_us"]) for row in updates if row["n"] == count}
        assert times["SGD"] < times["SGD+lasso"] <= 1.05 * times["SGD"]
