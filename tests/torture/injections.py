"""`KeyboardInterrupt` and `MemoryError` at calls and lines inside `PruneTrain.reconfigure`: all of it, or nothing.

Calls are those of all Python code that runs inside, PyTorch's and the standard library's too; lines those of the
package. The exception is raised where the trace function is called, as the handler of a signal would do it. Left out is
what PyTorch calls from C++ where no exception may pass: there it ends the process, which leaves no half state either.
"""

import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from tests.torture.report import Outcomes
from tests.torture.subjects import WAYS, Patient, difference, identities_of, patient, values_of

PACKAGE = str(Path(__file__).parents[2] / "prunetrain_kernels")
# PyTorch's fake tensors and dispatching in Python.
NO_EXCEPTIONS = tuple(
    f"/torch/{part}"
    for part in ("_subclasses/", "_dynamo/", "_compile.py", "_ops.py", "_prims", "_library/", "fx/experimental/")
)
OUTERMOST, INSIDE, ORDINARY = 1, 2, 3
KINDS: dict[Any, int] = {}  # of code that has been seen
WHOLE = ("tensors of the model", "tensors of the average", "PruneTrain", "graph", "lasso")
ERRORS: tuple[type[BaseException], ...] = (KeyboardInterrupt, MemoryError)


def traced(act: Callable[[], Any], at: int = 0, error: type[BaseException] | None = None) -> int:
    """Runs `act`; raises `error` in it at the event number `at`, counted from 1; returns the events that there were."""
    events = 0

    def happens(frame: FrameType) -> None:
        nonlocal events
        if _inside_of_dispatching(frame):
            return
        events += 1
        if events == at and error is not None:
            raise error("injected")

    def lines(frame: FrameType, kind: str, _: Any) -> Any:
        if kind == "line":
            happens(frame)
        return lines

    def calls(frame: FrameType, kind: str, _: Any) -> Any:
        happens(frame)
        return lines if frame.f_code.co_filename.startswith(PACKAGE) else None

    sys.settrace(calls)
    try:
        act()
    finally:
        sys.settrace(None)
    return events


def _inside_of_dispatching(frame: FrameType | None) -> bool:
    while frame is not None:
        kind = KINDS.get(frame.f_code)
        if kind is None:
            outermost = frame.f_code is traced.__code__
            inside = any(part in frame.f_code.co_filename for part in NO_EXCEPTIONS)
            kind = KINDS[frame.f_code] = OUTERMOST if outermost else INSIDE if inside else ORDINARY
        if kind != ORDINARY:
            return kind == INSIDE
        frame = frame.f_back
    return False


def run(count: int = 1000, seed: int = 0, ways: Sequence[str] = WAYS) -> Outcomes:
    """So many injections, spread evenly over the ways to train, at events drawn at random."""
    outcomes, chance = Outcomes("injections", ("before", "after", "went on")), random.Random(seed)
    for i, way in enumerate(ways):
        share = count * (i + 1) // len(ways) - count * i // len(ways)
        if not share:
            continue
        sound = patient(way)
        events = traced(sound.prunetrain.reconfigure)
        after = values_of(sound)
        one, before = None, {}  # type: tuple[Patient | None, dict[str, Any]]
        for number in sorted(chance.sample(range(1, events + 1), min(share, events))):
            if one is None:  # what is as it was is used again: a fault that shows later is one too
                one = patient(way)
                before, objects = values_of(one), identities_of(one)
            error = chance.choice(ERRORS)
            where, raised = _injected(one, number, error)
            now = values_of(one)
            if now == before and identities_of(one) == objects:
                outcomes.add("before")
            elif now == after:
                outcomes.add("after")
                one = None
            elif not raised and all(now[part] == after[part] for part in WHOLE):
                outcomes.add("went on")  # costs and memory may be unknown; the batch then stays
                one = None
            else:
                changed, lacking = (", ".join(difference(then, now)) for then in (before, after))
                outcomes.fault(
                    f"{way}, {error.__name__} at event {number} ({where}), {'' if raised else 'not '}raised: changed "
                    f"are {changed or 'objects'}; unlike a whole reconfiguration {lacking}"
                )
                one = None
    return outcomes


def _injected(one: Patient, number: int, error: type[BaseException]) -> tuple[str, bool]:
    """Injects an error into a reconfiguration at an event; where that was, and whether an error came out."""
    place: list[str] = []

    class Noted(error):  # type: ignore[misc,valid-type]
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            frame = sys._getframe(3)
            place.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}")

    try:
        traced(one.prunetrain.reconfigure, number, Noted)
    except BaseException:
        if not place:
            raise
        return place[0], True
    return (place or ["nowhere"])[0], False
