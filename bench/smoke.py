"""The first minute on a GPU: every kernel of the package once, before anything is measured; and all compiled ahead.

    python -m bench.smoke run lasso --device cuda     the kernels of one family, or of several: lasso,bn
    python -m bench.smoke run bn --device cpu         a rehearsal: the calls are made, no kernel is compiled or run
    python -m bench.smoke compile 3/16 --arch 90      the fourth sixteenth of all cases, into Triton's cache; no GPU

A family is a process of its own: a kernel that writes where it may not ends that process (exit code 70) and no other.
The calls are those of `kernel_cases.py`, one or two for each kernel, on zeros: that they come back is what is shown
here; values are the tests' part. Exit code 1 if a call failed or launched nothing, and, where all families run in one
process, if a kernel of the package was not launched.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from bench import launches, offline, sticky
from bench.suites.kernel_cases import cases, cases_of
from prunetrain_kernels.ops import launch

REHEARSED = 90  # the architecture that a CPU stands in for
# By family, cases that between them launch all of its kernels.
FAMILIES: dict[str, tuple[str, ...]] = {
    "lasso": ("slice_statistics fp16", "group_lasso, backward fp16", "add_group_lasso_gradient_ fp16"),
    "sgd": ("SGD fp16", "SGD + lasso fp16", "SGD + lasso, GradScaler fp32", "ProximalSGD fp16"),
    "bn": ("BN + add + ReLU fp16 NHWC", "BN + ReLU fp16 NCHW", "BN + ReLU fp16, eval"),
    # by itself: programs that wait for each other could wait for ever
    "cooperative": ("cooperative BN + add + ReLU fp16 NHWC, 128 x 16, 32 x 32",
                    "cooperative BN + ReLU fp16 NHWC, 8 x 37"),
    "gated": ("gated BN + ReLU fp16 NHWC, map", "gated BN + ReLU fp16 NHWC, map, statistics given",
              "BN + scatter + add + ReLU fp16 NHWC"),
    "index": ("channel_gather fp16 NHWC", "channel_scatter fp16 NCHW", "channel_scatter_add fp16 NHWC"),
    "conv": ("conv2d fp16", "conv2d fp16, 1x1, moments", "conv2d fp16, output index", "conv2d fp16, odd runs"),
}  # fmt: skip


def of_family(family: str) -> list[offline.Case]:
    """The cases of a family, in its order; their tensors are on the default device.

    Raises:
        KeyError: there is no such family, or a case has another name by now.
    """
    names = FAMILIES[family]
    by_name = {
        case.name: case
        for case in cases_of("bn" if family in ("gated", "cooperative") else family)
        if case.name in names
    }
    return [by_name[name] for name in names]


def run(families: Sequence[str], device: torch.device) -> int:
    """Runs the families' cases on the device, and prints kernels and milliseconds; on a CPU nothing is computed."""
    failed = []
    rehearsed = device.type == "cpu"
    with ExitStack() as around:
        around.enter_context(torch.device(device))
        if rehearsed:  # then operators take the way of their kernels, as they would on a GPU
            around.enter_context(offline.offline(REHEARSED))
        counts = around.enter_context(launches.counted(stand_in=rehearsed))
        for case in (case for family in families for case in of_family(family)):
            start, before = time.perf_counter(), counts.copy()
            try:
                case.run()
                if device.type == "cuda":
                    torch.cuda.synchronize()
            except Exception:
                failed.append(case.name)
                print(f"FAILED {case.name}", flush=True)
                traceback.print_exc()
                if not sticky.answers():
                    print(f"the GPU answers no longer after {case.name}; this process ends", flush=True)
                    sys.stderr.flush()
                    os._exit(sticky.DEAD)
                continue
            launched = ", ".join(sorted(counts - before))
            if not launched:
                failed.append(case.name)
            milliseconds = 1e3 * (time.perf_counter() - start)
            print(f"{case.name}: {milliseconds:.0f} ms; {launched or 'FAILED: no kernel was launched'}", flush=True)
    if set(families) == set(FAMILIES):
        missing = sorted(launches.all_kernels() - set(counts))
        failed += missing
        print(f"{len(set(counts))} kernels" + (f", FAILED: never launched: {', '.join(missing)}" if missing else ""))
    return 1 if failed else 0


def compile_share(index: int, count: int, arch: int, only: str) -> int:
    """Compiles every `count`-th case whose name holds `only` for sm_`arch`, into Triton's cache."""
    chosen = [case for case in cases() if only in case.name and case.runs_on(arch)][index::count]
    failed = 0
    for case in chosen:
        try:
            with offline.offline(arch), launch.compiling_only():
                case.run()
        except Exception:
            failed += 1
            print(f"FAILED {case.name}", flush=True)
            traceback.print_exc()
    print(f"{len(chosen)} cases for sm_{arch}, {failed} failed")
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one of the two commands; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.smoke", description="See bench/smoke.py.")
    commands = parser.add_subparsers(required=True, dest="command")
    running = commands.add_parser("run")
    running.add_argument("families", help=f"some of {', '.join(FAMILIES)}, with commas between")
    running.add_argument("--device", choices=("cpu", "cuda"), required=True)
    compiling = commands.add_parser("compile")
    compiling.add_argument("share", metavar="I/N")
    compiling.add_argument("--arch", type=int, required=True)
    compiling.add_argument("--only", default="", metavar="TEXT")
    options = parser.parse_args(arguments)
    if options.command == "run":
        return run(options.families.split(","), torch.device(options.device))
    index, _, count = options.share.partition("/")
    return compile_share(int(index), int(count), options.arch, options.only)


if __name__ == "__main__":
    sys.exit(main())
