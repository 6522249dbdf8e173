"""The command `python -m bench`: run from the repository's root, in an environment that has the package."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from prunetrain_kernels.errors import InputError, PruneTrainError

SUITES = {
    "kernels": "what every Triton kernel compiles to, per architecture; needs no GPU",
    "fused": "lasso and SGD, batch norm with what follows it, channel gather and scatter: ours beside PyTorch's",
}

KERNELS_CSV = Path("bench/results/offline/kernels.csv")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 if a kernel breaks a promise, 2 for input that cannot be used."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except PruneTrainError as error:
        print(f"bench: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench: interrupted; rows written so far are kept", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has gone (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measures the package's operators on this device, each beside PyTorch's own, and compiles its "
        "kernels for devices that are not here. Results are rows of CSV files under bench/results.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="name the suites", description="Names the suites.")
    listing.set_defaults(run=_list)
    _add_kernels(commands)
    _add_fused(commands)
    return parser


def _list(options: argparse.Namespace) -> int:
    for name, what in SUITES.items():
        print(f"{name:<10}{what}")
    return 0


# -- kernels -----------------------------------------------------------------------------------------------------------


def _add_kernels(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "kernels",
        help=SUITES["kernels"],
        description="Compiles every kernel for each architecture, without a GPU, and reports registers, shared memory, "
        "spills, vector loads and stores, tensor-core and atomic instructions. Exit code 1 if a kernel spills, uses "
        "atomics or fp64, misses a vector width it promised, or is compiled again because a shape changed.",
        epilog="example: python -m bench kernels --arch 90 --only 'SGD + lasso'",
    )
    parser.set_defaults(run=_kernels)
    parser.add_argument(
        "--arch", default="70,80,90", metavar="A,B", help="compute capabilities without the dot (default: 70,80,90)"
    )
    parser.add_argument("--out", type=Path, default=KERNELS_CSV, help=f"the CSV to write (default: {KERNELS_CSV})")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name holds this; all if left out")


def _kernels(options: argparse.Namespace) -> int:
    from bench import kernels

    architectures = kernels.architectures(options.arch)
    with kernels.offline(architectures[0]):  # says at once if this process cannot compile
        pass
    from bench.kernel_cases import cases, reuse

    chosen = [case for case in cases() if options.only in case.name]
    if not chosen:
        raise InputError(f"no case's name holds {options.only!r}; leave --only out to see them all")
    rows: list[kernels.Row] = []
    faults: list[str] = []
    for arch in architectures:
        report = kernels.report(chosen, arch)
        rows += report.rows
        faults += report.faults
        if not options.only:
            faults += kernels.reuse_faults(reuse(), arch)
    kernels.write_csv(options.out, rows)
    print(kernels.table(rows))
    print(f"\n{len(rows)} kernels of {len(chosen)} cases; with all columns in {options.out}")
    for fault in faults:
        print(f"FAULT: {fault}")
    if not faults and not options.only:
        print("No spills, stack, atomics or fp64; vector widths as promised; changed shapes compile nothing new.")
    return 1 if faults else 0


# -- fused -------------------------------------------------------------------------------------------------------------


def _add_fused(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "fused",
        help=SUITES["fused"],
        description="Times the fused operators on the shapes of ImageNet ResNet-50, side by side with eager PyTorch "
        "and torch.compile, checks each against float64 first, and ends with a table of targets met and missed.",
        epilog="example: python -m bench fused --device cuda --batch 256",
    )
    parser.set_defaults(run=_fused)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few repetitions, to see that it works")
    parser.add_argument(
        "--dtype", choices=("fp16", "fp32", "bf16"), default="fp16", help="of activations (default: fp16)"
    )
    parser.add_argument("--batch", type=int, help="images per step (default: 256; with --quick 2)")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="time torch.compile too (default: on cuda only)"
    )
    parser.add_argument("--only", default="", metavar="PART", help="one of optimizer, batch_norm, channels; else all")
    parser.add_argument("--out", type=Path, help="CSV to append to (default: bench/results/DEVICE/fused.csv)")


def _fused(options: argparse.Namespace) -> int:
    from bench import fused

    return fused.run(fused.Settings(**{f.name: getattr(options, f.name) for f in dataclasses.fields(fused.Settings)}))


if __name__ == "__main__":
    sys.exit(main())
