"""The command `python -m plots`: run from the repository's root, in an environment that has the package."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from plots import claim, common, fig2, fig4, fig6, fig7, fig8, fig9, fig10, fig11, fig12, gating, operators, step
from prunetrain_kernels.errors import InputError, PruneTrainError
from prunetrain_kernels.files import reason

FIGURES: dict[str, ModuleType] = {
    "claim": claim, "fig2": fig2, "fig4": fig4, "fig6": fig6, "fig7": fig7, "fig8": fig8, "fig9": fig9, "fig10": fig10,
    "fig11": fig11, "fig12": fig12, "gating": gating, "operators": operators, "step": step,
}  # fmt: skip


# drawn of the medium scale where it has them, and of the small one, which proves plumbing only, where not
MEDIUM_FIRST = ("fig2", "fig4", "fig6", "fig8", "fig10", "fig11")


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws figures; returns the exit code: 0, or 2 where an input cannot be used."""
    options = _parser().parse_args(arguments)
    try:
        return draw_all(options.names or list(FIGURES), options.results, options.out)
    except PruneTrainError as error:
        _complain(error)
        return 2
    except KeyboardInterrupt:
        print("plots: interrupted; figures written so far are kept", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    what = "\n".join(f"  {name:<11}{(module.__doc__ or '').splitlines()[0]}" for name, module in FIGURES.items())
    parser = argparse.ArgumentParser(
        prog="python -m plots",
        description="Draws the figures from the CSV files that python -m bench wrote: a PNG for each figure and scale "
        "of the paper's trainings, or for each figure and device.",
        epilog=f"figures:\n{what}\n\nexample: python -m plots fig7 operators",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="figures to draw (default: all)")
    parser.add_argument("--results", type=Path, default=Path("bench/results"), help="default: bench/results")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="default: docs/figures")
    return parser


def draw_all(names: Sequence[str], results: Path, out: Path) -> int:
    """Draws each named figure for every folder under `results` that has its CSV, and prints what became of it.

    A figure without a CSV is named and skipped. A CSV that cannot be used is named, and the other figures are drawn.

    Returns:
        The exit code: 0, or 2 where a CSV could not be used.

    Raises:
        InputError: no such figure, no such folder, or figures that cannot be written.
    """
    unknown = [name for name in names if name not in FIGURES]
    if unknown:
        raise InputError(f"there is no figure {', '.join(unknown)}; there are {', '.join(FIGURES)}")
    if not results.is_dir():
        raise InputError(f"there is no folder {results}; run python -m bench first, or name another with --results")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {out}: {reason(error)}") from error
    folders = sorted(path for pattern in ("*", "paper/*") for path in results.glob(pattern) if path.is_dir())
    code = 0
    with common.styled():
        for name in names:
            module = FIGURES[name]
            with_rows = [folder for folder in folders if any((folder / file).exists() for file in module.FILES)]
            if name in MEDIUM_FIRST and results / "paper" / "medium" in with_rows:
                with_rows = [folder for folder in with_rows if folder != results / "paper" / "small"]
            if not with_rows:
                print(f"{name:<11}skipped: no {' or '.join(module.FILES)} in a folder of {results}")
            for folder in with_rows:
                if not _draw_folder(name, module.figures, folder, out):
                    code = 2
    return code


def _draw_folder(name: str, figures: Callable[[Path], list[common.Drawing]], folder: Path, out: Path) -> bool:
    """Draws one folder's figures; returns False where a CSV could not be used."""
    try:
        drawings = figures(folder)
    except InputError as error:
        _complain(error)
        return False
    for drawing in drawings:
        if drawing.drawn is None:
            print(f"{name:<11}skipped: the rows in {folder} have nothing to show yet")
            continue
        path = out / f"{drawing.stem}.png"
        written = common.write_png(path, drawing.drawn[0])
        print(f"{name:<11}{path}" + ("" if written else " (unchanged)"))
    return True


def _complain(error: Exception) -> None:
    print(f"plots: error: {' '.join(str(error).splitlines())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
