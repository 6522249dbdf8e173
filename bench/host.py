"""What operators cost on the host, in Python: `python -m bench.host`. Needs no GPU.

Launches do nothing, so what is timed is all that stands around them: checks, allocations, autograd, the arguments of
kernels. Triton's own part of a launch, some microseconds each, is not in it; the number of launches is printed beside.
PyTorch's operators on tensors of a few elements stand for what a host has to do at least; its SGD does compute, on a
CPU. CPU time of this process: the median over rounds, and the least, which a busy machine disturbs less.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import launches
from prunetrain_kernels.models import build
from prunetrain_kernels.ops import batch_norm_cooperative as cooperative
from prunetrain_kernels.ops import launch
from prunetrain_kernels.ops.batch_norm_act import batch_norm_act
from prunetrain_kernels.optim import SGD
from prunetrain_kernels.regularizer import GroupLasso

CALLS, ROUNDS = 400, 9


@contextmanager
def kernels_that_do_nothing() -> Iterator[dict[str, int]]:
    """Inside, operators on CPU tensors take the path of a GPU's, and their launches are only counted."""
    before, launch.INTERPRET = launch.INTERPRET, True
    wait, cooperative.programs_wait = cooperative.programs_wait, lambda: True
    try:
        with launches.counted(stand_in=True) as counts:
            yield counts
    finally:
        launch.INTERPRET, cooperative.programs_wait = before, wait


def microseconds(
    calls: dict[str, Callable[[], object]], rounds: int = ROUNDS, count: int = CALLS
) -> dict[str, tuple[float, float]]:
    """CPU time of one call of each, `count` of each in a round: the median over rounds, and the least."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):  # the first warms up
        for name, call in calls.items():
            start = time.process_time()
            for _ in range(count):
                call()
            samples[name].append((time.process_time() - start) / count * 1e6)
    return {name: (statistics.median(values[1:]), min(values[1:])) for name, values in samples.items()}


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

    def in_three() -> Tensor:
        before, cooperative.ENABLED = cooperative.ENABLED, False
        try:
            return ours()
        finally:
            cooperative.ENABLED = before

    return {
        "batch norm + ReLU forward, PyTorch": torchs,
        "batch norm + ReLU forward, ours": ours,
        "batch norm + ReLU forward and backward, PyTorch": lambda: torchs().backward(dy),
        "batch norm + ReLU forward and backward, ours": lambda: ours().backward(dy),
        "batch norm + ReLU forward, ours, no small one": in_three,
    }


def update_calls() -> dict[str, Callable[[], object]]:
    """A step of ResNet-32's parameters, 101 of them: PyTorch's SGD and ours, without the lasso and with it."""
    model = build("resnet32", 10)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
    plain, with_lasso = SGD(parameters, **options), SGD(parameters, **options)
    with_lasso.regularize_with(GroupLasso(model, (torch.zeros(1, 3, 32, 32),)), 1e-4)
    return {
        "SGD, 101 parameters, PyTorch (foreach)": torch.optim.SGD(parameters, foreach=True, **options).step,
        "SGD, 101 parameters, ours": plain.step,
        "SGD with the lasso, 101 parameters, ours": with_lasso.step,
    }


def main(arguments: list[str] | None = None) -> int:
    """Prints a line for each call; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--rounds",
        type=int,
        default=ROUNDS,
        help=f"of {CALLS} calls each, {CALLS // 10} of updates (default: {ROUNDS})",
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be 1 or more, not {options.rounds}")
    torch.set_num_threads(1)
    with kernels_that_do_nothing() as counts:
        print(f"{'us on the host':50} median   least  launches left out")
        for calls, count in ((batch_norm_calls(), CALLS), (update_calls(), CALLS // 10)):
            numbers = {}
            for name, call in calls.items():
                call()  # a first step begins buffers
                counts.clear()
                call()
                numbers[name] = sum(counts.values())
            for name, (median, least) in microseconds(calls, options.rounds, count).items():
                print(f"{name:50} {median:6.1f}  {least:6.1f}  {numbers[name]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
