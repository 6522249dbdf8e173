"""Kernels with and without faults, to see that the offline report finds what it looks for. Prints JSON.

Runs in a process without the interpreter: `python tests/bench/toys.py ARCH`.
"""

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from bench import offline
from prunetrain_kernels.ops.launch import launch, tl, triton


@triton.jit(do_not_specialize=["n8"])
def sound(x, y, n8, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + o, mask=o < n8 * 8, other=0.0).to(tl.float32)
    tl.store(y + o, (v * 2).to(y.dtype.element_ty), mask=o < n8 * 8)


@triton.jit(do_not_specialize=["n"])
def scalar(x, y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o, mask=o < n, other=0.0), mask=o < n)


@triton.jit
def specialised(x, y, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o, mask=o < n, other=0.0), mask=o < n)


@triton.jit
def atomic(x, y, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.atomic_add(y + o % 8, tl.load(x + o).to(tl.float32))


@triton.jit
def double(x, y, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(y + o, (tl.load(x + o).to(tl.float64) * 1.1).to(tl.float32))


@triton.jit
def spilling(x, y, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    v = tl.load(x + o)
    tl.store(y + o, v / tl.sum(v))  # every value stays until the sum is there


@triton.jit
def product(x, y, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    a = tl.load(x + o[:, None] * BLOCK + o[None, :])
    tl.store(y + o[:, None] * BLOCK + o[None, :], tl.dot(a, a))


@triton.jit
def broken(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), tl.arange(0, 2 * BLOCK))


def main(arch: int) -> None:
    half, single = torch.zeros(4096, dtype=torch.float16), torch.zeros(4096)
    aligned, odd = half[:1024], half[1:1025]
    promise = offline.Promise(load=16, store=16)

    def case(name: str, kernel: object, *arguments: object, dtype: torch.dtype = torch.float16, **constants: object):
        promises = {kernel.__name__: promise} if kernel in (sound, scalar) else {}
        return offline.Case(name, dtype, lambda: launch(kernel, (1,), *arguments, **constants), promises)

    cases = [
        case("sound", sound, aligned, aligned, 128, BLOCK=1024),
        case("again", sound, aligned, aligned, 37, BLOCK=1024),
        case("scalar", scalar, aligned, odd, 1024, BLOCK=1024),
        case("atomic", atomic, single, single, dtype=torch.float32, BLOCK=1024),
        case("double", double, single, single, dtype=torch.float32, BLOCK=1024),
        case("spilling", spilling, single, single, dtype=torch.float32, BLOCK=4096, num_warps=1, maxnreg=32),
        case("product", product, half, single, BLOCK=64),
        case("broken", broken, half, BLOCK=64),
        case("bfloat", sound, aligned.bfloat16(), aligned.bfloat16(), 128, dtype=torch.bfloat16, BLOCK=1024),
        offline.Case("nothing", torch.float32, lambda: None),
        offline.Case("elsewhere", torch.float16, cases_run(aligned), {"other_kernel": promise}),
    ]
    result = offline.report(cases, arch)
    lengths = (sound, scalar, specialised)
    reuse = [
        offline.Reuse(
            kernel.__name__,
            lambda kernel=kernel: launch(kernel, (1,), single, single, 64, BLOCK=64),
            tuple(lambda kernel=kernel, n=n: launch(kernel, (1,), single, single, n, BLOCK=64) for n in (61, 37, 1)),
        )
        for kernel in lengths
    ]
    rows = {row.kernel + "/" + row.case: dataclasses.asdict(row) for row in result.rows}
    print(json.dumps({"rows": rows, "faults": result.faults, "reuse": offline.reuse_faults(reuse, arch)}))


def cases_run(x: torch.Tensor):
    return lambda: launch(sound, (1,), x, x, 128, BLOCK=1024)


if __name__ == "__main__":
    main(int(sys.argv[1]))
