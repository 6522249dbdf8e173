"""What operators cost on the host, in Python: `python -m bench.host`. Needs no GPU.

Launches do nothing, so what is timed is all that stands around them: checks, allocations, autograd, the arguments of
kernels. Triton's own part of a launch, some microseconds each, is not in it; the number of launches is printed beside.
PyTorch's operators on tensors of a few elements stand for what a host has to do at least. Medians of CPU time.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import launches
from prunetrain_kernels.ops import launch
from prunetrain_kernels.ops.batch_norm_act import batch_norm_act

CALLS, ROUNDS = 400, 9


@contextmanager
def kernels_that_do_nothing() -> Iterator[dict[str, int]]:
    """Inside, operators on CPU tensors take the path of a GPU's, and their launches are only counted."""
    before, launch.INTERPRET = launch.INTERPRET, True
    try:
        with launches.counted(stand_in=True) as counts:
            yield counts
    finally:
        launch.INTERPRET = before


def microseconds(calls: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """CPU time of one call of each, interleaved: the median over rounds."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):  # the first warms up
        for name, call in calls.items():
            start = time.process_time()
            for _ in range(CALLS):
                call()
            samples[name].append((time.process_time() - start) / CALLS * 1e6)
    return {name: statistics.median(values[1:]) for name, values in samples.items()}


def batch_norm_calls() -> dict[str, Callable[[], object]]:
    """Batch norm with a ReLU in training, forward and with its backward pass: ours and PyTorch's."""
    x = torch.randn(2, 64, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    norm = torch.nn.BatchNorm2d(64)
    dy = torch.ones_like(x)

    def ours() -> Tensor:
        return batch_norm_act(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=True, relu=True
        )  # fmt: skip

    def torchs() -> Tensor:
        return F.relu(norm(x))

    return {
        "batch norm + ReLU forward, PyTorch": torchs,
        "batch norm + ReLU forward, ours": ours,
        "batch norm + ReLU forward and backward, PyTorch": lambda: torchs().backward(dy),
        "batch norm + ReLU forward and backward, ours": lambda: ours().backward(dy),
    }


def main(arguments: list[str] | None = None) -> int:
    """Prints a line for each call; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of {CALLS} calls each (default: {ROUNDS})")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be 1 or more, not {options.rounds}")
    torch.set_num_threads(1)
    with kernels_that_do_nothing() as counts:
        calls = batch_norm_calls()
        numbers = {}
        for name, call in calls.items():
            counts.clear()
            call()
            numbers[name] = sum(counts.values())
        for name, time_of_call in microseconds(calls, options.rounds).items():
            print(f"{name:50} {time_of_call:7.1f} us on the host, {numbers[name]} launches left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
