"""A plugin for pytest (`-p bench.shards`) by which several processes share the tests, and a second call goes on.

Process `i` of `n` runs every n-th test (`--shard i/n`), in the order of the command line: what matters most comes
first in all of them. `--finished FILE` notes each test as it begins and ends. Tests that have ended are left out when
the same command is run again, and so is one on which a process has died twice; the exit code is 1 if any test noted
there has failed. On a GPU that answers no longer after a failed test, every later test would fail too: the process ends
at once with code `DEAD`, to be started again for the rest.
"""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from bench.sticky import DEAD, answers

BEGUN, ENDS = "begun", ("passed", "failed", "skipped")
ATTEMPTS = 2  # on a test that ends the process


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1", metavar="I/N", help="run every N-th test, from the I-th on")
    parser.addoption("--finished", type=Path, metavar="FILE", help="note finished tests here, and leave them out")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Shard(config), "prunetrain-shard")


def ended(lines: Iterable[str]) -> dict[str, str]:
    """The verdict of every test that need not be run again: its last, or "failed" if processes died on it."""
    verdicts: dict[str, str] = {}
    begun: Counter[str] = Counter()
    for line in lines:
        verdict, _, test = line.rstrip("\n").partition(" ")
        if verdict in ENDS:
            verdicts[test] = verdict
        elif verdict == BEGUN:
            begun[test] += 1
    for test, times in begun.items():
        if times >= ATTEMPTS:
            verdicts.setdefault(test, "failed")
    return verdicts


class Shard:
    """The hooks of one process; its tests and its notes."""

    def __init__(self, config: pytest.Config) -> None:
        index, _, count = config.getoption("--shard").partition("/")
        self.index, self.count = int(index), int(count)
        self.notes: Path | None = config.getoption("--finished")
        self.verdict = "passed"

    def _verdicts(self) -> dict[str, str]:
        if self.notes is None or not self.notes.exists():
            return {}
        return ended(self.notes.read_text(encoding="utf-8").splitlines())

    def _note(self, verdict: str, test: str) -> None:
        if self.notes is not None:
            with self.notes.open("a", encoding="utf-8") as file:
                file.write(f"{verdict} {test}\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        known = self._verdicts()
        in_shard = [item for i, item in enumerate(items) if i % self.count == self.index]
        left = [item for item in in_shard if item.nodeid not in known]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(left)])
        items[:] = left

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.verdict = "passed"
        self._note(BEGUN, nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.verdict = "failed"
        elif report.skipped and self.verdict == "passed":
            self.verdict = "skipped"

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._note(self.verdict, nodeid)
        if self.verdict == "failed" and not answers():
            print(f"\nthe GPU answers no longer after {nodeid}; this process ends", flush=True)
            os._exit(DEAD)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if "failed" in self._verdicts().values():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        elif exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:  # all have ended before, or there are fewer than shards
            session.exitstatus = pytest.ExitCode.OK
