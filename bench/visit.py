"""The bookkeeping of a visit to a GPU (gpu.sh): steps with time limits, one archive, and a second call that goes on.

    python bench/visit.py begin                         opens or takes up the visit in $VISIT
    python bench/visit.py step NAME SECONDS COMMAND...  runs a step, unless it has come to its end before
    python bench/visit.py step --for "a b" NAME SECONDS COMMAND... {}   a process each for a and b, side by side
    python bench/visit.py passed NAME ITEM              exit code 1 if that process of that step is known to have failed
    python bench/visit.py end [NAME...]                 prints the summary; exit code 1 unless all but those are done

The folder $VISIT holds `logs/` (everything a step printed), `rows/` (CSV files of the suites), `steps/` (a JSON file
and notes for each step) and `visit.txt`, the summary. After each step, and every `RENEWED` seconds within one, all of
it is packed into $OUT/visit.tgz, which is replaced in one move: whatever ends the visit, the last archive is whole. The
summary lies beside it. Nothing here imports PyTorch, so that a broken one cannot take the bookkeeping along.

In the environment: VISIT, OUT, VISIT_ENDS (seconds since 1970, after which nothing may run), STEPS (only these steps,
run even if they have ended), SCALE (multiplies all limits).
"""

import argparse
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

DONE, FAILED, DIED, CUT, SKIPPED = "done", "failed", "died", "timed out", "skipped"
ENDED = (DONE, FAILED)  # not run again by a second call; after a repair name the step: STEPS=bn
RENEWED = 30.0  # seconds
PACKING = 5.0  # seconds kept at the visit's end for the last archive
GRACE = 4.0  # seconds of a step's limit between the request to stop and the end by force
LEAST = 10.0  # a step is not begun with less time left than this, or than its whole limit
LARGEST = 15 * 2**20  # bytes of the archive
TRIES = 4  # starts of a process that dies: a step that notes what it has finished goes on behind it
DEAD = 70  # `sticky.DEAD`, written out because nothing is imported here


@dataclass
class Step:
    """What is known of a step.

    Attributes:
        result: one of DONE, FAILED, DIED, CUT, SKIPPED.
        seconds: that it took; `limit` seconds it was given.
        codes: exit code of each of its processes; negative is a signal.
        why: in words, where the result needs any.
        order: when it was begun, seconds since 1970.
    """

    name: str
    result: str
    seconds: float = 0.0
    limit: float = 0.0
    codes: dict[str, int] = field(default_factory=dict)
    why: str = ""
    order: float = 0.0

    @property
    def line(self) -> str:
        bad = ", ".join(f"{item or 'exit code'} {code}" for item, code in self.codes.items() if code)
        text = f"{self.name:<14} {self.result:<10} {self.seconds:>6.1f} s of {self.limit:>5.1f}"
        return f"{text}  {'; '.join(filter(None, (self.why, bad)))}".rstrip()


@dataclass(frozen=True)
class Visit:
    """The folder of a visit, where its archive goes, and when it ends."""

    folder: Path
    out: Path
    ends: float
    only: tuple[str, ...] = ()
    scale: float = 1.0

    @staticmethod
    def of(environment: Mapping[str, str]) -> "Visit":
        """The visit that the environment describes."""
        return Visit(
            Path(environment["VISIT"]),
            Path(environment["OUT"]),
            float(environment["VISIT_ENDS"]),
            tuple(environment.get("STEPS", "").split()),
            float(environment.get("SCALE", "1")),
        )

    @property
    def left(self) -> float:
        """Seconds that steps may still take."""
        return self.ends - PACKING - time.time()

    # -- what is known -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Makes the folders; an archive in $OUT is taken up where the folder of the visit is not there."""
        archive = self.out / "visit.tgz"
        self.out.mkdir(parents=True, exist_ok=True)
        if not self.folder.exists() and archive.exists():
            self.folder.mkdir(parents=True)
            with tarfile.open(archive) as tar:
                for member in tar.getmembers():
                    member.name = member.name.partition("/")[2] or "."
                    tar.extract(member, self.folder, filter="data")
        for name in ("logs", "rows", "steps"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for remnant in self.out.glob(".visit-*.part"):
            remnant.unlink()

    def steps(self) -> list[Step]:
        """All steps of which something is known, in the order in which they were begun."""
        files = (self.folder / "steps").glob("*.json")
        known = [Step(**json.loads(file.read_text(encoding="utf-8"))) for file in files]
        return sorted(known, key=lambda step: step.order)

    def note(self, step: Step) -> None:
        """Keeps what is known of a step, and renews summary and archive."""
        file = self.folder / "steps" / f"{step.name}.json"
        aside = file.with_suffix(".part")
        aside.write_text(json.dumps(asdict(step)), encoding="utf-8")
        aside.replace(file)
        self.pack()

    # -- the archive ---------------------------------------------------------------------------------------------------

    def pack(self) -> None:
        """Renews $VISIT/visit.txt and $OUT/visit.tgz, whole at every moment; a full disk, say, ends no step."""
        try:
            with self._alone():
                self._pack()
        except OSError as error:
            print(f"visit: the archive could not be renewed: {error}", flush=True)

    def _pack(self) -> None:
        summary = "".join(f"{step.line}\n" for step in self.steps())
        (self.folder / "visit.txt").write_text(summary, encoding="utf-8")
        self._put("visit.txt", summary.encode())
        packed = b""
        for longest in (2**21, 2**18, 2**15):  # of a log
            packed = archive_of(self.folder, longest)
            if len(packed) <= LARGEST:
                break
        self._put("visit.tgz", packed)

    def _put(self, name: str, content: bytes) -> None:
        aside = self.out / f".visit-{os.getpid()}.part"
        aside.write_bytes(content)
        aside.replace(self.out / name)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time: an archive that was begun earlier must not replace a later one."""
        with (self.folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # -- a step --------------------------------------------------------------------------------------------------------

    def step(self, name: str, limit: float, items: Sequence[str], command: Sequence[str]) -> Step:
        """Runs a step within its limit and within the visit; what there is to know of it is kept."""
        if self.only and name not in self.only:
            return Step(name, SKIPPED, why="not asked for")
        before = next((step for step in self.steps() if step.name == name), None)
        if before is not None and before.result in ENDED and name not in self.only:
            print(f"visit: {name} has ended before: {before.result}", flush=True)
            return before
        limit, begun = limit * self.scale, time.time()
        seconds = min(limit, self.left)
        if seconds < min(limit, LEAST):
            step = Step(name, SKIPPED, limit=limit, why="no time left", order=begun)
            if before is not None:  # what it came to in an earlier call remains what is known
                print(f"visit: {step.line}", flush=True)
                return step
        else:
            notes = self.folder / "steps" / name
            if name in self.only:
                shutil.rmtree(notes, ignore_errors=True)
            notes.mkdir(exist_ok=True)
            print(f"visit: {name}, at most {seconds:.0f} s", flush=True)
            step = self._run(Step(name, DONE, limit=seconds, order=begun), items, command)
        self.note(step)
        print(f"visit: {step.line}", flush=True)
        return step

    def _run(self, step: Step, items: Sequence[str], command: Sequence[str]) -> Step:
        """Starts the step's processes and waits for them, to the limit and no longer."""
        start, renewed = time.monotonic(), time.monotonic()
        jobs = [Job.start(self.folder / "logs", step.name, item, command) for item in items or ("",)]
        asked = False
        try:
            while sum(job.runs(again=not asked) for job in jobs):
                now = time.monotonic() - start
                if not asked and now > step.limit - min(GRACE, step.limit / 2):
                    asked, step.result = True, CUT
                    for job in jobs:
                        job.send(signal.SIGINT)  # so that Python says how far it came
                if now > step.limit:
                    break
                if time.monotonic() - renewed > RENEWED:
                    self.pack()
                    renewed = time.monotonic()
                time.sleep(0.05)
        finally:  # also when this process is told to end
            for job in jobs:
                job.send(signal.SIGKILL)  # workers that its process has left behind, too
        step.seconds = round(time.monotonic() - start, 1)
        step.codes = {job.item: job.process.wait() for job in jobs}
        codes = set(step.codes.values())
        if step.result != CUT and codes != {0}:
            step.result = DIED if any(code == DEAD or code < 0 for code in codes) else FAILED
        for job in jobs:
            if step.codes[job.item]:
                print(job.tail(), flush=True)
        return step


@dataclass
class Job:
    """One process of a step, a group of its own with all that it starts, and its log."""

    item: str
    command: list[str]
    log: Path
    process: "subprocess.Popen[bytes]"
    tries: int = 1

    @staticmethod
    def start(logs: Path, step: str, item: str, command: Sequence[str]) -> "Job":
        words = [word.replace("{}", item) for word in command]
        name = f"{step}-{item}" if item else step
        log = logs / f"{''.join(c if c.isalnum() or c in '._-' else '_' for c in name)}.log"
        return Job(item, words, log, _started(words, log))

    def runs(self, *, again: bool) -> bool:
        """Whether it is running; one that died is started again, a few times, if `again`."""
        code = self.process.poll()
        if code is None:
            return True
        if not again or self.tries >= TRIES or (code != DEAD and code >= 0):
            return False
        self.tries += 1
        self.process = _started(self.command, self.log)
        return True

    def send(self, number: int) -> None:
        """Sends a signal to the process and to all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def tail(self, lines: int = 15) -> str:
        """The end of the log."""
        text = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
        return "\n".join(f"  | {line}" for line in text)


def _started(command: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def archive_of(folder: Path, longest: int) -> bytes:
    """All files of the folder as a tar.gz; of a log longer than `longest` bytes its beginning and its end."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as tar:
        for path in sorted(folder.rglob("*")):
            if not path.is_file() or path.suffix == ".part" or path.name == ".lock":
                continue
            try:
                content = path.read_bytes()
            except FileNotFoundError:  # a suite writes rows aside first
                continue
            if path.suffix == ".log" and len(content) > longest:
                half = longest // 2
                content = content[:half] + b"\n[... cut ...]\n" + content[-half:]
            member = tarfile.TarInfo(f"visit/{path.relative_to(folder).as_posix()}")
            member.size, member.mtime = len(content), int(time.time())
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="visit.py", description="See bench/visit.py.")
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("begin")
    commands.add_parser("end").add_argument("but", nargs="*", metavar="NAME")
    passed = commands.add_parser("passed")
    passed.add_argument("name")
    passed.add_argument("item")
    step = commands.add_parser("step")
    step.add_argument("name")
    step.add_argument("seconds", type=float)
    step.add_argument("--for", dest="items", default="", metavar="ITEMS")
    step.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND")
    options = parser.parse_args(arguments)
    visit = Visit.of(os.environ)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.command == "begin":
        visit.begin()
    elif options.command == "step":
        result = visit.step(options.name, options.seconds, options.items.split(), options.words).result
        return 0 if result in (DONE, SKIPPED) else 1
    elif options.command == "passed":
        codes = next((step.codes for step in visit.steps() if step.name == options.name), {})
        return 1 if codes.get(options.item) else 0
    else:
        visit.pack()
        print((visit.folder / "visit.txt").read_text(encoding="utf-8"), end="")
        return 0 if all(step.result == DONE or step.name in options.but for step in visit.steps()) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
