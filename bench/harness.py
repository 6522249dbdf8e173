"""How every suite measures: providers side by side, each checked against float64 first, rows written as they come."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import profiles, roof, rows, sticky, timing
from bench.roof import DTYPES
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.ops import launch

OURS, EAGER, COMPILED = "ours", "eager", "compile"
QUICK_FOLDER = Path("runs/bench")  # not committed


@dataclass(frozen=True)
class Settings:
    """Options of `python -m bench run`; None takes the device's or the suite's default."""

    device: str | None = None
    quick: bool = False
    dtype: str | None = None
    batch: int | None = None
    compile: bool | None = None
    profile: str = "paper"
    only: str = ""
    few: bool = False
    counters: bool = True
    out: Path | None = None


@dataclass(kw_only=True)
class Session:
    """A run of some suites: the device and settings that it measures with, and its results.

    Attributes:
        dtype: of activations; `dtype_name` is its short name.
        batch: images per step, or None: each suite has its own default, see `images`.
        quick: tiny shapes and few repetitions.
        compile: time torch.compile too.
        profile: which channels are live.
        only: measure only layers whose name holds this.
        few: of blocks whose dense layers have one shape, measure the first; of networks, the dense and one pruned.
        counters: count bytes by hardware counters too.
        folder: where the CSV files are.
        p50: microseconds by (layer, provider, direction), and what a suite wants to remember for the verdict.
        refused: providers with a wrong result and pieces that failed.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int | None
    quick: bool
    compile: bool
    profile: profiles.Profile
    only: str
    folder: Path
    roof: roof.Roof
    environment: dict[str, Any]
    few: bool = False
    counters: bool = True
    p50: dict[tuple[str, str, str], float] = field(default_factory=dict)
    modes: set[str] = field(default_factory=set)
    refused: list[str] = field(default_factory=list)
    written: int = 0

    @property
    def dtype_name(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    def images(self, full: int, quick: int = 2) -> int:
        """Images per step: --batch, or the suite's own number."""
        return self.batch or (quick if self.quick else full)

    def wants(self, name: str) -> bool:
        return self.only in name

    def write(self, suite: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Appends rows to the suite's file, with what all rows of this session share."""
        common = {
            "suite": suite, "count": 1, "part": "all", "size": "quick" if self.quick else "full",
            "peak_gb_s": self.roof.gb_s, "launch_us": self.roof.launch_us, **self.environment,
        }  # fmt: skip
        rows.append(self.folder / f"{suite}.csv", [{**common, **row} for row in lines])
        self.written += len(lines)


def find_device(name: str | None) -> torch.device:
    """The device of that name; with None a GPU if there is one.

    Raises:
        InputError: there is no such device, or kernels are interpreted in this process.
    """
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device that this PyTorch can use; leave --device out or name cpu")
    if launch.INTERPRET:
        raise InputError(
            "TRITON_INTERPRET=1 has kernels interpreted, thousands of times slower; unset it and run again"
        )
    return device


def open_session(settings: Settings) -> Session:
    """Finds the device, makes the folder of the results and measures the device's roof.

    Quick sizes show that a suite works; without --out their rows go to QUICK_FOLDER and not to the committed results.

    Raises:
        InputError: no such device, dtype, batch or profile, or a folder that cannot be written.
    """
    device = find_device(settings.device)
    if settings.batch is not None and settings.batch < 1:
        raise InputError(f"--batch must be at least 1, not {settings.batch}")
    # half precision is what a GPU trains in, and what a CPU without instructions for it emulates
    dtype = DTYPES[settings.dtype or ("fp16" if device.type == "cuda" else "fp32")]
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        raise InputError("this GPU has no bf16; use --dtype fp16")
    profile = profiles.parse(settings.profile)
    folder = settings.out or (QUICK_FOLDER if settings.quick else rows.results_folder(device))
    _must_be_writable(folder)
    return Session(
        device=device,
        dtype=dtype,
        batch=settings.batch,
        quick=settings.quick,
        compile=device.type == "cuda" if settings.compile is None else settings.compile,
        profile=profile,
        only=settings.only,
        few=settings.few,
        counters=settings.counters,
        folder=folder,
        roof=roof.measure(device, quick=settings.quick),
        environment=rows.environment(device),
    )


def _must_be_writable(folder: Path) -> None:
    """Says now, not after minutes, that no rows can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rows.append(folder / ".writable.csv", [])
        (folder / ".writable.csv").unlink()
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Provider:
    """One way to compute something.

    Attributes:
        run: what is timed.
        outputs: what is compared with the references, before.
        what: columns of `rows.WHAT` in which this provider differs from those it stands beside.
        model_bytes, flops: where they differ from the others'.
    """

    run: Callable[[], object]
    outputs: Callable[[], Sequence[Tensor]]
    what: Mapping[str, Any] = field(default_factory=dict)
    model_bytes: float | None = None
    flops: float | None = None


def measure(
    session: Session,
    suite: str,
    providers: Mapping[str, Provider],
    references: Sequence[Tensor] | Mapping[str, Sequence[Tensor]],
    baseline: str,
    *,
    what: Mapping[str, Any],
    model_bytes: float = 0,
    flops: float = 0,
    columns: Mapping[str, Mapping[str, Any]] | None = None,
    compare: Callable[[Mapping[str, float]], Mapping[str, Mapping[str, Any]]] | None = None,
    large: bool = False,
    shown: Sequence[str] | None = None,
    granted: timing.Check | None = None,
) -> dict[str, timing.Timing]:
    """Checks every provider against float64 references, times those that pass side by side, and appends their rows.

    Args:
        references: the same for all providers, or by provider.
        baseline: the provider whose own error, doubled, is the tolerance: PyTorch's.
        what: columns of `rows.WHAT` that the rows share; layer and direction among them.
        model_bytes, flops: of one call.
        columns: further columns, by provider.
        compare: from the medians (microseconds, by provider) to further columns, by provider.
        shown: providers to name on the terminal; all if left out.
        large: calls take long and allocate much, as a training step does; see `timing.side_by_side`.
        granted: errors that the baseline may be taken to have, where its own are a matter of chance.

    Returns:
        The timings of the providers that passed.
    """
    by_provider = references if isinstance(references, Mapping) else dict.fromkeys(providers, references)
    checks = {name: timing.check(provider.outputs(), by_provider[name]) for name, provider in providers.items()}
    passed = {name: providers[name] for name in _passing(session, checks, baseline, what, granted)}
    if not passed:
        return {}
    milliseconds, rounds = 300.0 if large else 15.0, 3
    if session.quick:
        milliseconds, rounds = (2.0, 1 if large else 2)
    runs = {name: provider.run for name, provider in passed.items()}
    timings = timing.side_by_side(runs, session.device, milliseconds, rounds, one_pool=large)
    more = {name: {"error": checks[name].error, **(columns or {}).get(name, {})} for name in timings}
    if compare is not None:
        for name, further in compare({name: t.p50 for name, t in timings.items()}).items():
            more[name] = {**more.get(name, {}), **further}
    lines = {}
    for name, t in timings.items():
        provider = passed[name]
        size = model_bytes if provider.model_bytes is None else provider.model_bytes
        work = flops if provider.flops is None else provider.flops
        roofs = against_roof(session, t.p50, size, work, str(what["dtype"]))
        lines[name] = _row(session, name, provider, t, what) | roofs | more[name]
    session.write(suite, list(lines.values()))
    texts = [f"{name} {as_time(line['p50_us'])}{of_roof(line)}" for name, line in lines.items()
             if shown is None or name in shown]  # fmt: skip
    print(f"  {what['layer']:<34} {what['direction']:<9} {'  '.join(texts)}", flush=True)
    return timings


def _passing(
    session: Session,
    checks: Mapping[str, timing.Check],
    baseline: str,
    what: Mapping[str, Any],
    granted: timing.Check | None,
) -> list[str]:
    """Names of the providers whose error is allowed; the others are reported, now and at the session's end."""
    allowed = checks[baseline]
    if granted is not None:
        allowed = timing.Check(max(allowed.error, granted.error), max(allowed.outliers, granted.outliers))
    passing = []
    for name, check in checks.items():
        if check.passes(allowed, DTYPES[str(what["dtype"])]):
            passing.append(name)
            continue
        session.refused.append(f"{what['layer']} {what['direction']} by {name}: wrong result")
        print(f"  REFUSED {session.refused[-1]}: {check}, {baseline}: {checks[baseline]}")
    return passing


def _row(session: Session, name: str, provider: Provider, t: timing.Timing, what: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a provider: its time, launches and memory; the session keeps the median for the verdict."""
    part = provider.what.get("part", "all")
    layer = str(what["layer"]) if part == "all" else f"{what['layer']} {part}"
    session.p50[layer, name, str(what["direction"])] = t.p50
    session.modes.add(t.mode)
    return {
        "provider": name, **what, **provider.what, **timed(t),
        "launches": timing.launches(provider.run, session.device),
        "peak_memory": timing.peak_memory(provider.run, session.device),
    }  # fmt: skip


def timed(t: timing.Timing) -> dict[str, Any]:
    """The columns of a timing."""
    return {"mode": t.mode, "samples": t.samples, "p20_us": t.p20, "p50_us": t.p50, "p80_us": t.p80}


def against_roof(session: Session, p50: float | None, size: float, flops: float, dtype: str) -> dict[str, Any]:
    """The columns that compare with this device's roof, and the projection to a V100."""
    least = session.roof.microseconds(size, flops, dtype)
    return {
        "model_bytes": int(size) or None,
        "flops": int(flops) or None,
        "peak_tflop_s": session.roof.tflop_s.get(dtype),
        "roof_us": least,
        "ratio_to_roof": least / p50 if least is not None and p50 else None,
        "v100_projection_us": roof.V100.microseconds(size, flops, dtype),
    }


def against_dense(flops_ratio: float, time_ratio: float | None) -> dict[str, Any]:
    """The columns that compare with the dense network by the same provider (design section 7)."""
    saves = flops_ratio < 1 and time_ratio is not None
    return {
        "flops_ratio": flops_ratio,
        "time_ratio": time_ratio,
        "eta": (1 - time_ratio) / (1 - flops_ratio) if saves and time_ratio is not None else None,
    }


def as_time(microseconds: float) -> str:
    """Microseconds below a millisecond, milliseconds below a second."""
    if microseconds < 1e3:
        return f"{microseconds:.1f} us"
    return f"{microseconds / 1e3:.2f} ms" if microseconds < 1e6 else f"{microseconds / 1e6:.2f} s"


def of_roof(row: Mapping[str, Any]) -> str:
    return f" ({row['ratio_to_roof']:.0%})" if row.get("ratio_to_roof") else ""


def attempt(session: Session, what: str, run: Callable[[], object]) -> None:
    """Runs one piece; what goes wrong in it is reported, at the end too, and the other pieces go on.

    Where the GPU no longer answers nothing can go on, and nothing may be asked of it again: the process ends at once,
    with exit code `sticky.DEAD`. Rows are written as they are measured, so that none is lost.
    """
    try:
        run()
    except InputError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        session.refused.append(f"{what}: {type(error).__name__} {lines[0]}")
        print(f"  FAILED {session.refused[-1]}", flush=True)
        traceback.print_exc()
        if not sticky.answers():
            for text in (*session.refused, "the GPU answers no longer; this process ends"):
                print(f"bench: {text}")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(sticky.DEAD)
        if session.device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def prepared(device: torch.device) -> Iterator[None]:
    """Autograd runs a backward on the stream of its forward, which must be the one that is captured later."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(timing.side_stream()):
        yield
    torch.cuda.synchronize()


def both_directions(
    function: Callable[..., Tensor],
    arguments: tuple[Any, ...],
    inputs: Sequence[Tensor],
    dy: Tensor,
    device: torch.device,
) -> tuple[Provider, Provider]:
    """Providers of a function's forward, which records for autograd, and of its backward to `inputs`."""
    kept: list[Tensor] = []

    def output() -> Tensor:
        if not kept:
            with prepared(device):
                kept.append(function(*arguments))
        return kept[0]

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(kept[0], inputs, dy, retain_graph=True)

    def gradients() -> tuple[Tensor, ...]:
        output()
        with prepared(device):
            return backward()

    return Provider(lambda: function(*arguments), lambda: [output().detach()]), Provider(backward, gradients)


def compiled(session: Session, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function through torch.compile, specialised to the shapes that it is called with next."""
    if not session.compile:
        return function
    import torch._dynamo
    import torch._functorch.config

    torch._dynamo.reset()  # layers have the same code: without it torch.compile gives up after a few shapes
    torch._functorch.config.donated_buffer = False  # the backward is timed again and again
    return torch.compile(function, dynamic=False)
