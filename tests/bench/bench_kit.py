"""What the tests of `bench` share: a session, the command `paper`, a process that compiles, the rows of a CSV file."""

import argparse
import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench import profiles, roof, rows
from bench.harness import Session
from bench.paper import add_command

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).parents[2]
ROOF = roof.Roof(10.0, {"fp32": 0.05}, 1.0)


def tiny_session(folder: Path, profile: str = "paper", **changes: Any) -> Session:
    """A quick session in fp32 on the CPU that writes into `folder`; `changes` are other fields of it."""
    fields: dict[str, Any] = {
        "device": CPU, "dtype": torch.float32, "batch": None, "quick": True, "compile": False,
        "profile": profiles.parse(profile), "only": "", "folder": folder, "roof": ROOF,
        "environment": rows.environment(CPU),
    }  # fmt: skip
    return Session(**fields | changes)


def paper(*words: str) -> int:
    """`python -m bench paper WORDS`, in this process: its exit code."""
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers(required=True))
    options = parser.parse_args(["paper", *words])
    code: int = options.run(options)
    return code


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, by column."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def compiling(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process that compiles kernels, with one thread."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *arguments]
    options: dict[str, Any] = {"cwd": REPOSITORY, "capture_output": True, "text": True, "timeout": 600}
    return subprocess.run(command, env=environment, check=False, **options)
