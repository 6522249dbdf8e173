"""Attempts to break what must not break, with figures: `python -m tests.torture [PART ...] [--count N] [--seed N]`."""

import argparse
import importlib
import importlib.util
import sys
import time
import warnings

import torch

# The parts, and how often each is done by default; a part is a module here with `run(count, seed)`.
PARTS = {"flips": 200, "contents": 500, "injections": 1000, "kills": 200, "soak": 300}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    there = [part for part in PARTS if importlib.util.find_spec(f"tests.torture.{part}")]
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(there)}; by default all")
    parser.add_argument("--count", type=int, help="how often each is done")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in there]
    if unknown:
        parser.error(f"there is no part '{unknown[0]}'; the parts are {', '.join(there)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    faults = 0
    for part in options.parts or there:
        start = time.perf_counter()
        outcomes = importlib.import_module(f"tests.torture.{part}").run(options.count or PARTS[part], options.seed)
        print(f"{outcomes}\n  {time.perf_counter() - start:.0f} s", flush=True)
        faults += len(outcomes.faults)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
