"""The bookkeeping of a visit to a GPU: limits, the archive, what a second call does; and a share of the tests."""

import dataclasses
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from bench_kit import CPU, rows_of, tiny_session

from bench import harness, launches, shards, smoke, sticky, visit
from bench.suites import blocks
from bench.visit import CUT, DIED, DONE, FAILED, SKIPPED, Visit

ROOT = Path(__file__).parents[2]
SLOW = 60.0  # seconds, for steps that are not to be cut


@pytest.fixture
def opened(tmp_path: Path) -> Visit:
    one = Visit(tmp_path / "visit", tmp_path / "out", time.time() + 600)
    one.begin()
    return one


def archived(one: Visit) -> list[str]:
    with tarfile.open(one.out / "visit.tgz") as archive:
        return archive.getnames()


def test_a_step_costs_itself_only(opened: Visit) -> None:
    """One that fails, one that is killed, one that hangs and does not listen: the next one runs."""
    assert opened.step("fails", SLOW, [], ["bash", "-c", "echo said; exit 3"]).result == FAILED
    died = opened.step("dies", SLOW, [], ["bash", "-c", "kill -9 $$"])
    assert died.result == DIED
    assert (opened.folder / "logs/dies.log").read_text().count("$ bash") == visit.TRIES
    start = time.monotonic()
    assert opened.step("hangs", 1.0, [], ["bash", "-c", "trap '' INT; while true; do sleep 0.2; done"]).result == CUT
    assert time.monotonic() - start < SLOW / 2
    assert opened.step("runs", SLOW, [], ["echo", "here"]).result == DONE
    assert [line.split()[:2] for line in (opened.out / "visit.txt").read_text().splitlines()] == [
        ["fails", "failed"], ["dies", "died"], ["hangs", "timed"], ["runs", "done"],
    ]  # fmt: skip
    assert {f"visit/logs/{name}.log" for name in ("fails", "dies", "hangs", "runs")} <= set(archived(opened))
    assert sorted(path.name for path in opened.out.iterdir()) == ["visit.tgz", "visit.txt"]


def test_a_second_call_goes_on_from_the_folder_or_the_archive(opened: Visit, tmp_path: Path) -> None:
    count = ["bash", "-c", f"echo once >> {tmp_path}/counted; exit 1"]
    opened.step("counts", SLOW, [], count)
    late = Visit(opened.folder, opened.out, time.time())
    assert late.step("late", SLOW, [], ["true"]).result == SKIPPED
    assert late.step("counts", SLOW, [], count).result == FAILED
    again = Visit(tmp_path / "elsewhere", opened.out, time.time() + 600)
    again.begin()
    assert again.step("counts", SLOW, [], count).result == FAILED
    assert again.step("late", SLOW, [], ["true"]).result == DONE
    assert (tmp_path / "counted").read_text() == "once\n"
    named = Visit(again.folder, again.out, time.time() + 600, only=("counts",))
    named.step("counts", SLOW, [], count)
    assert named.step("late", SLOW, [], ["true"]).result == SKIPPED
    assert (tmp_path / "counted").read_text() == "once\n" * 2
    assert {step.name: step.result for step in named.steps()} == {"counts": FAILED, "late": DONE}


def test_a_step_takes_no_more_than_is_left(opened: Visit) -> None:
    one = Visit(opened.folder, opened.out, time.time() + visit.PACKING + 20)
    assert 10 < one.step("runs", 1000, [], ["true"]).limit <= 20
    assert one.step("for each", SLOW, ["a", "b"], ["bash", "-c", "[ {} = a ]"]).codes == {"a": 0, "b": 1}


def test_long_logs_are_cut_in_the_middle_and_rows_are_not(opened: Visit, tmp_path: Path) -> None:
    (opened.folder / "logs/long.log").write_bytes(b"first" + b"." * 10_000 + b"last")
    (opened.folder / "rows/long.csv").write_bytes(b"," * 10_000)
    (tmp_path / "some.tgz").write_bytes(visit.archive_of(opened.folder, 1000))
    with tarfile.open(tmp_path / "some.tgz") as archive:
        content = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    log = content["visit/logs/long.log"]
    assert len(log) < 1100
    assert log.startswith(b"first")
    assert log.endswith(b"last")
    assert len(content["visit/rows/long.csv"]) == 10_000


def test_the_steps_of_gpu_sh_fit_into_its_time() -> None:
    run = subprocess.run(["bash", "bench/gpu.sh", "--plan"], cwd=ROOT, capture_output=True, text=True, check=True)
    limits = {name: int(seconds) for name, seconds in (line.split() for line in run.stdout.splitlines())}
    beside = {"compile", "cuda-cpp"}
    assert sum(seconds for name, seconds in limits.items() if name not in beside) <= 420 - visit.PACKING - 10
    assert limits["smoke"] <= 45
    order = [name for name in limits if name not in beside]
    assert order[:5] == ["smoke", "roof", "sgd-lasso-bn", "step", "t2"]


def test_the_script_hands_every_step_its_device_and_its_limit(tmp_path: Path) -> None:
    """Where Python is replaced by a script that keeps the books and names all else that it would run."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\nif [ "$1" = bench/visit.py ]; then exec {sys.executable} "$@"; fi\n'
        'if [ "$1" = - ]; then echo 90 >&2; exit 0; fi\n'
        'echo "RUN $* on $PRUNETRAIN_TEST_DEVICE interpreted: $TRITON_INTERPRET"\n'
        'if [ -n "$BROKEN" ]; then echo "cooperative: $PRUNETRAIN_COOPERATIVE"; fi\n'
        'if [[ -n "$BROKEN" && "$*" = *"run cooperative"* ]]; then exit 1; fi\n'
        'if [[ "$*" = *"run step"* ]]; then exit 70; fi\n'
    )
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "VISIT": str(tmp_path / "visit"), "OUT": str(tmp_path / "out")}
    environment |= {"TRITON_INTERPRET": "1", "STEPS": ""}

    def call(**more: str) -> tuple[int, dict[str, str]]:
        run = subprocess.run(
            ["bash", "bench/gpu.sh"], cwd=ROOT, env=environment | more, stdout=subprocess.DEVNULL, check=False
        )
        lines = (tmp_path / "out/visit.txt").read_text().splitlines()
        return run.returncode, {words[0]: words[1] for words in map(str.split, lines)}

    code, results = call(SECONDS_IN_ALL="9000")
    assert code == 1
    assert results.pop("step") == "died"
    results.pop("cuda-cpp", None)  # where nvcc is
    assert len(results) == 9
    assert set(results.values()) == {"done"}
    logs = tmp_path / "visit/logs"
    assert sorted(path.name for path in logs.glob("smoke*")) == sorted(f"smoke-{f}.log" for f in smoke.FAMILIES)
    assert len(list(logs.glob("t2-*.log"))) == 8
    for log in logs.glob("[cft]*.log"):
        assert "--device cuda" in log.read_text() or "on cuda interpreted: \n" in log.read_text()
    before = (logs / "sgd-lasso-bn.log").read_text()
    code, results = call(SECONDS_IN_ALL="3")  # a second call, too late for anything
    assert code == 1
    assert results["step"] == "died"
    assert results["t2"] == "done"
    assert (logs / "sgd-lasso-bn.log").read_text() == before
    _, results = call(SECONDS_IN_ALL="9000", STEPS="smoke roof", BROKEN="1")
    assert results["smoke"] == "failed"
    assert "cooperative: \n" in (logs / "smoke-cooperative.log").read_text()
    assert "cooperative: 0\n" in (logs / "roof.log").read_text(), "what did not pass is not used by later steps"


# -- processes that lose the GPU ---------------------------------------------------------------------------------------


def test_a_suite_that_loses_the_gpu_ends_its_process_and_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    session = tiny_session(tmp_path)

    def lost() -> None:
        session.write("bn", [{"layer": "measured before"}])
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    harness.attempt(session, "a layer", lost)  # the GPU still answers: the others go on
    monkeypatch.setattr(sticky, "answers", lambda: False)
    with pytest.raises(SystemExit) as ended:
        harness.attempt(session, "a layer", lost)
    assert ended.value.code == sticky.DEAD == visit.DEAD
    assert len(rows_of(tmp_path / "bn.csv")) == 2
    said = capsys.readouterr()
    assert "answers no longer" in said.out
    assert "in lost" in said.err  # the whole traceback


def test_shares_of_the_tests_are_all_of_them_and_a_second_call_runs_the_rest(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import os, pytest\n"
        "@pytest.mark.parametrize('i', range(5))\n"
        "def test_one(i): assert i != 3\n"
        "def test_death(): os._exit(70)\n"
        "def test_last(): pass\n"
    )

    def call(shard: str) -> int:
        command = [sys.executable, "-m", "pytest", "-p", "bench.shards", "-p", "no:cacheprovider", "-q", "test_some.py"]
        command += ["--shard", shard, "--finished", f"{shard[0]}.txt"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        return subprocess.run(command, cwd=tmp_path, env=environment, check=False, stdout=subprocess.DEVNULL).returncode

    assert call("0/2") == 0  # 0, 2, 4, last
    assert call("1/2") == 1 + 69  # 1, 3, death
    assert call("1/2") == 70
    assert call("1/2") == 1
    verdicts = {}
    for index in "01":
        verdicts |= shards.ended((tmp_path / f"{index}.txt").read_text().splitlines())
    assert len(verdicts) == 7
    assert {name.partition("::")[2] for name, verdict in verdicts.items() if verdict == "failed"} == {
        "test_one[3]", "test_death",
    }  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "in workers"])
def test_tests_for_a_gpu_do_not_pass_without_one(workers: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers]
    command += ["tests/ops/test_channel_index.py", "-k", "refuses or frozen"]
    environment = os.environ | {"PRUNETRAIN_TEST_DEVICE": "cuda", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stdout
    assert "no CUDA device to use" in run.stdout
    assert " passed" not in run.stdout


# -- what is run -------------------------------------------------------------------------------------------------------


def test_smoke_launches_every_kernel_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    code = smoke.run(list(smoke.FAMILIES), CPU)
    said = capsys.readouterr().out
    assert code == 0, said
    assert f"{len(launches.all_kernels())} kernels\n" in said
    assert len(launches.all_kernels()) >= 15


def test_smoke_goes_on_behind_a_case_that_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise RuntimeError("broken")

    whole = smoke.of_family("index")
    broken = [dataclasses.replace(whole[0], run=fail), *whole[1:]]
    monkeypatch.setattr(smoke, "of_family", lambda family: broken)
    assert smoke.run(["index"], CPU) == 1
    said = capsys.readouterr()
    assert "in fail" in said.err
    assert f"{whole[-1].name}: " in said.out


def test_few_layers_are_those_of_distinct_shapes(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    every = blocks.layers(session.profile, 224)
    assert len(blocks.distinct(every)) == 12
    assert len(blocks.distinct([layer for layer in every if layer.residual])) == 4
    assert session.device == CPU
