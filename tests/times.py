"""How long tests take, and which of them `make test` leaves to `make test-all`.

    make test-all             adds each test's seconds to build/test-times.txt: of CPU, those of its processes included
    python -m tests.times     writes tests/long.txt anew from that file

Of the cases of a test function the cheapest stays in `make test` unless that takes more than `CHEAPEST`, and the others
if they take less than `LONG`; so nearly every function runs there, and a tenth of the time. What is never left out, and
why, stands in `ALWAYS`.
"""

import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TIMES = ROOT / "build/test-times.txt"
LIST = ROOT / "tests/long.txt"
LONG, CHEAPEST = 0.28, 2.5  # seconds of CPU
ALWAYS = {
    "tests/bench/test_bench.py::test_the_visit_is_rehearsed_step_by_step_without_a_gpu",  # nothing else tries gpu.sh
    "tests/bench/test_kernels_offline.py::test_a_share_of_the_kernels[70-0/22]",  # T1: spills, vector widths
    "tests/bench/test_kernels_offline.py::test_a_share_of_the_kernels[80-14/22]",
    "tests/bench/test_kernels_offline.py::test_a_share_of_the_kernels[90-6/11]",
    "tests/test_house.py::test_files_classes_and_functions_are_short",
    "tests/test_examples.py::test_the_pruning_trainer_runs_and_its_file_comes_back",  # README's trainer, whole
    "tests/torture/test_kills_and_soak.py::test_a_few_kills_lose_nothing",  # a sample of each part of `make torture`
    "tests/torture/test_kills_and_soak.py::test_a_few_reconfigurations_hold_nothing",
    "tests/torture/test_torture.py::test_a_sample[contents]",
    "tests/torture/test_torture.py::test_a_sample[flips]",
    "tests/torture/test_torture.py::test_a_sample[injections]",
    "tests/train/test_loop_files.py::test_two_processes_train",  # DDP from the command line
    "tests/train/test_target.py::test_lands_on_the_target_and_learns_on[ProximalSGD-0.5]",  # what users ask for first
    "tests/train/test_loops.py::test_runs_resume_bitwise[everything]",
    "tests/train/test_stopping.py::test_signals",
    "tests/zoo/test_properties.py::test_any_network_shrinks_and_trains_on",
}
HEADER = """\
# Tests that `make test` leaves to `make test-all`, chosen by measured time: `python -m tests.times` writes this file.
# Seconds of CPU, and the test. To run one of them here and now, name it: pytest 'FILE::TEST'.
"""


def read_list() -> dict[str, float]:
    """The long tests and their seconds."""
    lines = LIST.read_text(encoding="utf-8").splitlines()
    pairs = (line.split(maxsplit=1) for line in lines if line and not line.startswith("#"))
    return {name: float(seconds) for seconds, name in pairs}


def chosen(seconds: dict[str, float]) -> dict[str, float]:
    """Those of the tests that are long."""
    functions: dict[str, list[str]] = defaultdict(list)
    for name in sorted(seconds, key=lambda name: (seconds[name], name)):
        functions[name.partition("[")[0]].append(name)
    stay = {cases[0] for cases in functions.values() if seconds[cases[0]] < CHEAPEST} | ALWAYS
    return {name: taken for name, taken in seconds.items() if taken >= LONG and name not in stay}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """As a plugin (`-p tests.times`): adds a line for each test to `TIMES`."""
    before = os.times()
    yield
    taken = sum(os.times()[:4]) - sum(before[:4])
    TIMES.parent.mkdir(exist_ok=True)
    with TIMES.open("a", encoding="utf-8") as file:  # one write of one line: workers' lines do not mix
        file.write(f"{taken:.2f} {item.nodeid}\n")


def main() -> int:
    if not TIMES.exists():
        print(f"tests.times: there is no {TIMES.relative_to(ROOT)}; make test-all writes it.", file=sys.stderr)
        return 2
    lines = TIMES.read_text(encoding="utf-8").splitlines()
    seconds = {name: float(taken) for taken, name in (line.split(maxsplit=1) for line in lines)}
    long = chosen(seconds)
    rows = [f"{taken:.1f} {name}\n" for name, taken in sorted(long.items())]
    LIST.write_text(HEADER + "".join(rows), encoding="utf-8")
    print(f"{len(long)} of {len(seconds)} tests are long: {sum(long.values()):.0f} of {sum(seconds.values()):.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
