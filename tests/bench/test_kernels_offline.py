"""Tier T1: every kernel compiles for V100, A100 and H100, and its code is as promised.

Kernels are compiled in processes of their own, because this one interprets them. One process per architecture.
"""

import csv
import json
from pathlib import Path

import pytest
from bench_kit import compiling

pytestmark = pytest.mark.t1

ARCHITECTURES = (70, 80, 90)
OPERATORS = {"group_lasso", "sgd", "group_soft_threshold", "batch_norm_passes", "channel_index", "conv2d"}
OPERATORS |= {"channel_statistics", "slots"}  # what two of them share
OPERATORS |= {"batch_norm_cooperative"}  # another way to launch one of them


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_of_every_operator(arch: int, tmp_path: Path) -> None:
    """No spills, no stack, no atomics, no fp64; vector widths; and changed shapes compile nothing new."""
    out = tmp_path / "kernels.csv"
    run = compiling("-m", "bench", "kernels", "--arch", str(arch), "--out", str(out))
    faults = [line for line in run.stdout.splitlines() if line.startswith("FAULT")]
    assert not faults, "\n".join(faults)
    assert run.returncode == 0, run.stderr
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["kernel"].split(".")[0] for row in rows} == OPERATORS
    assert {row["arch"] for row in rows} == {str(arch)}
    assert {row["dtype"] for row in rows} == {"float32", "float16"} | ({"bfloat16"} if arch >= 80 else set())
    for row in rows:
        for what in ("spill_stores", "spill_loads", "stack", "fp64"):
            assert row[what] == "0", (row["kernel"], row["case"], what)
        barriers = int(row["kernel"].startswith("batch_norm_cooperative."))  # an addition each, and nothing else
        assert int(row["atomics"]) == barriers, (row["kernel"], row["case"])
        assert 0 < int(row["registers"]) <= 255
        assert int(row["cubin_bytes"]) > 0
    # the passes over activations and weights, as the report promises them from sm_80 on
    for kernel in ("batch_norm_passes._apply_kernel", "batch_norm_passes._gradient_kernel", "sgd._sgd_kernel"):
        aligned = [row for row in rows if row["kernel"] == kernel and "misaligned" not in row["case"]]
        assert aligned
        # through a map, or a run that is no multiple of 8, single elements are moved
        placed = ("scatter", ", map", ", run")
        wide = [row for row in aligned if arch >= 80 and row["dtype"] == "float32"]
        wide = [row for row in wide if not any(word in row["case"] for word in placed)]
        assert wide or arch < 80
        assert all(int(row["load_v4"]) > 0 and int(row["store_v4"]) > 0 for row in wide)


@pytest.mark.parametrize(("arch", "share"), [(70, "0/22"), (80, "14/22"), (90, "6/11")])
def test_a_share_of_the_kernels(arch: int, share: str) -> None:
    """For `make test`: other calls of the operators for each architecture; what they promise is looked at as above."""
    run = compiling("-m", "bench", "kernels", "--arch", str(arch), "--share", share)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "FAULT" not in run.stdout
    operators = {line.split(".")[0] for line in run.stdout.splitlines() if "." in line.split(" ")[0]}
    assert operators <= OPERATORS
    assert len(operators) >= len(OPERATORS) - 3


@pytest.fixture(scope="module")
def toys() -> dict[str, object]:
    """The report over kernels that have the faults it looks for, and over sound ones."""
    run = compiling(str(Path(__file__).with_name("toys.py")), "80")
    assert run.returncode == 0, run.stderr
    report: dict[str, object] = json.loads(run.stdout)
    return report


def test_the_report_finds_what_it_looks_for(toys: dict[str, object]) -> None:
    faults = "\n".join(toys["faults"])
    for said in (
        "toys.scalar (scalar, sm_80) promised loads of 16 bytes, its widest is 2",
        "toys.scalar (scalar, sm_80) promised stores of 16 bytes, its widest is 2",
        "toys.atomic (atomic, sm_80) has 8 atomic instructions",
        "toys.double (double, sm_80) has",
        "toys.spilling (spilling, sm_80) spills",
        "broken fails for sm_80: CompilationError",
        "nothing launched no kernel",
        "elsewhere promises something of other_kernel",
    ):
        assert said in faults
    assert len(toys["faults"]) == 8  # and nothing else: sound kernels have none


def test_the_report_counts_instructions(toys: dict[str, object]) -> None:
    rows = {row["kernel"].split(".")[1] + " " + row["case"]: row for row in toys["rows"].values()}
    assert "sound again" not in rows  # another length makes no other kernel
    sound = rows["sound sound"]
    assert (sound["load_v4"], sound["load_scalar"], sound["widest_load"]) == (1, 0, 16)
    assert (sound["store_v4"], sound["store_scalar"], sound["widest_store"]) == (1, 0, 16)
    assert rows["sound bfloat"]["dtype"] == "bfloat16"
    assert rows["product product"]["mma"] > 0
    assert rows["product product"]["shared"] > 0
    assert rows["spilling spilling"]["spill_stores"] > 0
    assert rows["spilling spilling"]["stack"] > 0
    assert "x:*fp16/16 y:*fp16 n:i32 BLOCK=1024" in rows["scalar scalar"]["specialisation"]


def test_the_report_notices_a_length_that_is_compiled_in(toys: dict[str, object]) -> None:
    assert toys["reuse"] == ["specialised compiled 2 kernels more for sm_80"]
