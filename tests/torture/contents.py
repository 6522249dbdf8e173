"""Well-formed files with wrong contents: the command line ends with code 2 and one sentence, or goes on; `load_pruned`
refuses in one sentence and leaves every bit as it was, or what it has loaded trains on.
"""

import contextlib
import copy
import io
import math
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunetrain_kernels import CheckpointError, InputError
from prunetrain_kernels.cli import main
from tests.torture.flips import is_sentence, load, saved
from tests.torture.report import Outcomes
from tests.torture.subjects import built, identities_of, values_of

NETWORK = """
from tests.torture.subjects import Subject


def subject(num_classes=10, in_channels=3):
    return Subject(8, num_classes, in_channels)
"""
RUN = ("train", "--model", "tortured_network:subject", "--data", "synthetic:48x6x6", "--epochs", "2", "--batch", "16",
       "--interval", "1", "--threads", "1", "--device", "cpu")  # fmt: skip
ABSENT = object()

Path_ = tuple[Any, ...]


def places(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """The way to every value in a structure, without those inside long lists but their first."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list | tuple):
        for i in range(min(2, len(value))):
            yield from places(value[i], (*path, i))


def wrong_values(value: Any, chance: random.Random) -> list[Any]:
    """Values that may stand in another one's place, nearly right ones too."""
    deep: Any = []
    for _ in range(chance.choice((5, 200))):
        deep = [deep]
    wrong: list[Any] = [ABSENT, None, "x", -1, 0, 2**70, math.nan, math.inf, True, [], {}, deep, {"a": {"b": [1]}},
                        torch.ones(2, 3), torch.full((), math.nan)]  # fmt: skip
    if isinstance(value, Tensor):
        wrong += [value[..., :-1] if value.dim() else value, torch.cat([value, value]) if value.dim() else value]
        wrong += [value.unsqueeze(0), value.to(torch.int64), value.double(), value.flatten(), value.tolist()]
        wrong += [
            value.clone().fill_(math.nan) if value.is_floating_point() else value - 1000,
            value[:0] if value.dim() else value,
        ]
        wrong += [torch.empty_like(value, device="meta")]
    if isinstance(value, int) and not isinstance(value, bool):
        wrong += [value + 1, value - 1, 10**9, float(value), str(value)]
    if isinstance(value, float):
        wrong += [-value, str(value), int(value) if math.isfinite(value) else 0]
    if isinstance(value, str):
        wrong += [value + "x", "", value.encode(), value * 1000]
    if isinstance(value, list | tuple):
        wrong += [[*value, *value], list(reversed(value)), value[:-1], [None] * len(value)]
    if isinstance(value, dict) and value:
        keys = list(value)
        wrong += [{f"{k}x": v for k, v in value.items()}, {**value, "other": 1}, dict.fromkeys(keys, None)]
        wrong += [{k: value[k] for k in keys[1:]}, {**value, keys[0]: value[keys[-1]]}, {**value, 7: 7}]
    return wrong


def mutated(payload: Any, chance: random.Random) -> tuple[Any, str]:
    """A copy with one value replaced, and which."""
    result = copy.deepcopy(payload)
    every = list(places(result))
    # as often a place near the top as one deep inside, of which there are many more
    depth = chance.choice(sorted({len(path) for path in every}))
    path = chance.choice([path for path in every if len(path) == depth])
    holder = result
    for key in path[:-1]:
        holder = holder[key]
    value = chance.choice(wrong_values(holder[path[-1]], chance))
    if isinstance(holder, tuple):
        return mutated(payload, chance)
    if value is ABSENT:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    text = "deleted" if value is ABSENT else repr(value).replace("\n", " ")[:60]
    return result, f"{'/'.join(map(str, path))} = {text}"


def run(count: int = 500, seed: int = 0) -> Outcomes:
    """Half of the files for `load_pruned`, half for the command line."""
    kinds = ("refused", "loaded, and trains on", "exit 2", "exit 0")
    outcomes, chance = Outcomes("wrong contents", kinds), random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        _through_python(count - count // 2, Path(folder), chance, outcomes)
        _through_command_line(count // 2, Path(folder), chance, outcomes)
    return outcomes


def _through_python(count: int, folder: Path, chance: random.Random, outcomes: Outcomes) -> None:
    path = folder / "run.pt"
    saved(path)
    payload = torch.load(path, weights_only=True)
    fresh = built(seed=5)
    before, objects = values_of(fresh), identities_of(fresh)
    for _ in range(count):
        wrong, what = mutated(payload, chance)
        torch.save(wrong, path)
        try:
            load(path, fresh)
        except (CheckpointError, InputError) as error:
            if not is_sentence(error):
                outcomes.fault(f"load_pruned, {what}: refused with {error}")
            elif values_of(fresh) != before or identities_of(fresh) != objects:
                outcomes.fault(f"load_pruned, {what}: refused, and changed")
                fresh = built(seed=5)
                objects = identities_of(fresh)
            else:
                outcomes.add("refused")
            continue
        except Exception as error:
            outcomes.fault(f"load_pruned, {what}: {type(error).__name__} {error}")
        else:
            try:
                fresh.step()
                outcomes.add("loaded, and trains on")
            except Exception as error:
                outcomes.fault(f"load_pruned, {what}: loaded, then {type(error).__name__} {error}")
        fresh = built(seed=5)
        objects = identities_of(fresh)


def _through_command_line(count: int, folder: Path, chance: random.Random, outcomes: Outcomes) -> None:
    (folder / "tortured_network.py").write_text(NETWORK)
    sys.path.insert(0, str(folder))
    try:
        wholes = [folder / "pruned", folder / "dense"]
        for whole, options in zip(wholes, ((), ("--dense",)), strict=True):
            code, said = _called(*RUN, *options, "--out", str(whole))
            assert code == 0, said
            (whole / "checkpoint.previous.pt").unlink()
        payloads = [torch.load(whole / "checkpoint.pt", weights_only=True) for whole in wholes]
        out, other = folder / "run", folder / "other"
        for _ in range(count):
            shutil.rmtree(out, ignore_errors=True)
            starts = chance.random() < 0.2
            shutil.copytree(wholes[starts], out)
            wrong, what = mutated(payloads[starts], chance)
            torch.save(wrong, out / "checkpoint.pt")
            resume = ("--resume", "--out", str(out))
            start = ("--start-from", str(out), "--out", str(other), "--overwrite", "--interval", "9")
            _judge(what, (*RUN, *(start if starts else resume)), outcomes)
    finally:
        sys.path.remove(str(folder))


def _judge(what: str, command: tuple[str, ...], outcomes: Outcomes) -> None:
    name = "--resume" if "--resume" in command else "--start-from"
    try:
        code, said = _called(*command)
    except BaseException as error:
        outcomes.fault(f"{name}, {what}: {type(error).__name__} {error}")
        return
    lines = [line for line in said.splitlines() if line.strip()]
    if code == 0:
        outcomes.add("exit 0")
    elif code == 2 and lines and "Traceback" not in said and lines[-1].startswith("prunetrain: "):
        outcomes.add("exit 2")
    else:
        outcomes.fault(f"{name}, {what}: exit {code}, {said[-300:]}")


def _called(*arguments: str) -> tuple[int, str]:
    """The exit code of the command line, and what it wrote to stderr."""
    said = io.StringIO()
    call: Callable[[list[str]], int] = main
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            return call(list(arguments)), said.getvalue()
        except SystemExit as error:
            return int(error.code or 0), said.getvalue()
