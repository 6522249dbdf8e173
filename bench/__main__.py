"""The command `python -m bench`: run from the repository's root, in an environment that has the package."""

import argparse
import dataclasses
import importlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.suites import SUITES
from prunetrain_kernels.errors import InputError, PruneTrainError

COSTS_CSV = Path("bench/results/offline/gating.csv")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 if something was refused or slower, 2 for unusable input."""
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
        description="Measures on this device what the paper measured: suites of operators and networks, each beside "
        "PyTorch's own and against the device's roof; whole trainings for the paper's tables and figures. Results are "
        "rows of CSV files under bench/results, drawn by `python -m plots`. bench/README.md tells more.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="name the suites", description="Names the suites.")
    listing.set_defaults(run=_list)
    _add_run(commands)
    _add_compare(commands)
    _add_roof(commands)
    _add_kernels(commands)
    _add_costs(commands)
    _add_predict(commands)
    from bench import architectures, paper, results

    architectures.add_command(commands)
    paper.add_command(commands)
    results.add_command(commands)
    return parser


def _list(options: argparse.Namespace) -> int:
    for name, what in SUITES.items():
        print(f"{name:<12}{what}")
    return 0


# -- suites ------------------------------------------------------------------------------------------------------------


def _add_run(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "run",
        help="measure some suites",
        description="Measures suites on this device, providers side by side, each checked against float64 before it is "
        "timed, and appends rows to FOLDER/SUITE.csv as it goes. Quick rows go to runs/bench unless --out says else.",
        epilog="example: python -m bench run fig7 bn --device cuda --batch 256 --profile uniform:0.5",
    )
    parser.set_defaults(run=_run, suites=[])
    parser.add_argument("suites", nargs="+", metavar="SUITE", help=f"{', '.join(SUITES)}")
    _add_settings(parser)
    parser = commands.add_parser(
        "all", help="measure all suites", description="Measures all suites, one after another."
    )
    parser.set_defaults(run=_run, suites=list(SUITES))
    _add_settings(parser)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    _add_device(parser)
    parser.add_argument(
        "--dtype", choices=("fp16", "fp32", "bf16"), help="of activations (default: fp16; fp32 on a CPU)"
    )
    parser.add_argument("--batch", type=int, help="images per step (default: the suite's own)")
    parser.add_argument(
        "--profile",
        default="paper",
        help="which channels are live: paper (or paper:0.2, paper:0.1: synthetic, with the inference FLOPs of the "
        "paper's ResNet-50 at that ratio), uniform:SHARE (synthetic), or the channels.csv of a run (default: paper)",
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="time torch.compile too (default: on cuda only)"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only layers whose name holds this")
    parser.add_argument(
        "--few",
        action="store_true",
        help="fig7, gating: of layers of one dense shape only the first; step: ResNet-50 and -32, dense and one pruned",
    )
    parser.add_argument(
        "--counters", action=argparse.BooleanOptionalAction, default=True, help="bn: count bytes by hardware, with ncu"
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few repetitions, to see that it works")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where the CSV files are (default: bench/results/DEVICE; with --quick: runs/bench)",
    )


def _run(options: argparse.Namespace) -> int:
    from bench import harness, roof, targets

    unknown = [name for name in options.suites if name not in SUITES]
    if unknown:
        raise InputError(f"there is no suite {unknown[0]}; choose among {', '.join(SUITES)}")
    names = [field.name for field in dataclasses.fields(harness.Settings)]
    session = harness.open_session(harness.Settings(**{name: getattr(options, name) for name in names}))
    print(f"{session.environment['device']}, {session.dtype_name}; roof: {roof.in_words(session.roof)}")
    print(f"results: {session.folder}")
    try:
        for name in options.suites:
            start = time.perf_counter()
            print(f"\n{name}: {SUITES[name]}", flush=True)
            suite = importlib.import_module(f"bench.suites.{name}")
            harness.attempt(session, name, lambda suite=suite: suite.run(session))  # type: ignore[misc]
            print(f"  {name} took {time.perf_counter() - start:.0f} s", flush=True)
    finally:  # a run that is cut short still says how far it came
        print(f"\n{session.written} rows in {session.folder}\n{targets.verdict(session)}".rstrip())
    return 1 if session.refused else 0


# -- roof --------------------------------------------------------------------------------------------------------------


def _add_roof(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "roof",
        help="measure what this device can do",
        description="Measures the device's copy bandwidth, its rate of matrix products per dtype, and what it costs to "
        "start an operator, and prints them. With --record or --out it appends them to FOLDER/roof.csv too.",
    )
    parser.set_defaults(run=_roof)
    _add_device(parser)
    _add_record(parser, "append to FOLDER/roof.csv")


def _add_record(parser: argparse.ArgumentParser, what: str) -> None:
    """A command that only looks leaves the committed results alone unless it is asked to record."""
    parser.add_argument("--record", action="store_true", help=f"{what} (default: print, and write nothing)")


def _roof(options: argparse.Namespace) -> int:
    from bench import harness, roof, rows

    if options.record or options.out:
        settings = harness.Settings(device=options.device, quick=options.quick, out=options.out, profile="dense")
        session = harness.open_session(settings)
        session.write("roof", roof.as_rows(session.roof))
        device, peaks = session.device, session.roof
        print(f"recorded in {session.folder / 'roof.csv'}")
    else:
        device = harness.find_device(options.device)
        peaks = roof.measure(device, quick=options.quick)
    print(f"{rows.device_name(device)}: {roof.in_words(peaks)}")
    print(f"V100 by its data sheet, for projections: {roof.in_words(roof.V100)}")
    return 0


# -- compare -----------------------------------------------------------------------------------------------------------


def _add_compare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "compare",
        help="two results files against each other, or predictions against measurements",
        description="Compares the newest rows of two results files, and lists what became slower or faster. Exit code "
        "1 if anything became slower by more than the tolerance. Without files: sets the recorded predictions (`bench "
        "predict`) beside what was measured on these GPUs, and names what is off by more than the tolerance; exit code "
        "1 if anything is.",
    )
    parser.set_defaults(run=_compare)
    parser.add_argument("before", type=Path, metavar="A.csv", nargs="?")
    parser.add_argument("after", type=Path, metavar="B.csv", nargs="?")
    parser.add_argument(
        "--tolerance", type=float, help="a share of the median (default: 0.1), or of the predicted time (default: 0.2)"
    )
    parser.add_argument(
        "--results", type=Path, metavar="FOLDER", help="of predictions and measurements (default: bench/results)"
    )


def _compare(options: argparse.Namespace) -> int:
    from bench import compare

    if options.before is None:
        tolerance = compare.PREDICTED if options.tolerance is None else options.tolerance
        return compare.report_predictions(options.results or compare.RESULTS, tolerance)
    if options.after is None or options.results is not None:
        raise InputError("compare takes two files and no --results, or no file: then it compares with predictions")
    tolerance = compare.TOLERANCE if options.tolerance is None else options.tolerance
    return compare.report(options.before, options.after, tolerance)


# -- kernels -----------------------------------------------------------------------------------------------------------


def _add_kernels(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "kernels",
        help="the suite kernels, for chosen architectures",
        description="Compiles every kernel for each architecture, without a GPU, and reports registers, shared memory, "
        "spills, vector loads and stores, tensor-core and atomic instructions. Prints the table; writes it only if "
        "--record or --out says so. Exit code 1 if a kernel spills, uses atomics or fp64, misses a vector width it "
        "promised, or is compiled again because a shape changed.",
        epilog="example: python -m bench kernels --arch 90 --only 'SGD + lasso'",
    )
    parser.set_defaults(run=_kernels)
    parser.add_argument(
        "--arch", default="70,80,90", metavar="A,B", help="compute capabilities without the dot (default: 70,80,90)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all columns to this CSV")
    _add_record(parser, "write all columns to bench/results/offline/kernels.csv")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name holds this; all if left out")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="every N-th of these cases, from the I-th (0) on")


def _add_costs(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "costs",
        help="bytes and FLOPs of channel union and every form of channel gating, by count",
        description="Counts, for the first and last convolution of each residual block with what follows it, the bytes "
        "and FLOPs of a training step under channel union and in every form of channel gating, with a projection to a "
        "V100. Nothing is run or timed, and nothing written unless --record or --out says so.",
        epilog="example: python -m bench costs --batch 256 --profile paper:0.2",
    )
    parser.set_defaults(run=_costs)
    parser.add_argument("--batch", type=int, default=32, help="images per step (default: 32)")
    parser.add_argument("--dtype", choices=("fp16", "fp32"), default="fp16", help="of activations (default: fp16)")
    parser.add_argument("--profile", default="paper", help="which channels are live, as for run (default: paper)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the rows of all layers to this CSV")
    _add_record(parser, f"append the rows of all layers to {COSTS_CSV}")


def _costs(options: argparse.Namespace) -> int:
    from bench import profiles, rows
    from bench.suites import gating

    if options.batch < 1:
        raise InputError(f"--batch must be at least 1, not {options.batch}")
    lines = gating.count(profiles.parse(options.profile), options.batch, options.dtype)
    print(gating.sums(lines))
    out = options.out or (COSTS_CSV if options.record else None)
    if out is not None:
        rows.append(out, lines)
        print(f"{len(lines)} rows in {out}")
    return 0


def _kernels(options: argparse.Namespace) -> int:
    from bench.suites import kernels

    chosen = kernels.architectures(options.arch)
    share = kernels.share(options.share)
    if options.record and (options.only or share != (0, 1) or chosen != list(kernels.ARCHITECTURES)):
        raise InputError(
            f"--record replaces {kernels.RECORD} by the whole table; leave --only, --share and --arch out, or name "
            "another file with --out"
        )
    out = options.out or (kernels.RECORD if options.record else None)
    return kernels.command(chosen, out, options.only, share=share)


# -- predict -----------------------------------------------------------------------------------------------------------


def _add_predict(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "predict",
        help="predicted times of the kernels on GPUs that are not here",
        description="Predicts, for each kernel on the shapes of ResNet-50 (batch 256), ResNet-32 and VGG-13 (batch "
        "128), its time from its machine code, its grid, its bytes and the GPU's data sheet: max(bytes / bandwidth, "
        "instructions / issue rate, tensor-core FLOPs / rate) + waves + launch. Needs no GPU and measures nothing. "
        "Prints a table per device; writes rows, marked `model`, only if --record or --out says so.",
        epilog="example: python -m bench predict --device h200 --only 'BN+ReLU'",
    )
    parser.set_defaults(run=_predict)
    parser.add_argument("--device", metavar="NAME", help="h200, a100 or v100 (default: one after the other)")
    parser.add_argument("--suite", metavar="SUITE", help="only bn, sgd, lasso, gather, conv or fig7")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only the network, or the layers, whose name holds this"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the rows to this CSV")
    _add_record(parser, "replace bench/results/offline/predict-DEVICE.csv, or its rows of --suite")


def _predict(options: argparse.Namespace) -> int:
    from bench.predict import command

    return command.run(options.device, command.Part(options.suite, options.only), options.out, record=options.record)


if __name__ == "__main__":
    sys.exit(main())
