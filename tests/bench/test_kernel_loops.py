"""Tier T1: what the loops of kernels execute, from the machine code for sm_90: how much, and no division of integers.

The limits are some 10 % above what Triton 3.7.1 makes; another version may make somewhat more.
"""

import json

import pytest
from bench_kit import compiling

pytestmark = pytest.mark.t1

# the calls of bench/suites/kernel_cases.py by their names, and the instructions of a warp in one turn of the main loop
LIMITS = {
    "conv2d fp16, input index": {
        "_forward_kernel": 200, "_input_gradient_kernel": 130, "_weight_gradient_kernel": 210,
    },
    "conv2d fp16, few channels": {"_weight_gradient_kernel": 190},
    "slice_statistics fp32": {"_fold_kernel": 145},
}  # fmt: skip

SCRIPT = """
import json, sys
from bench import offline
from bench.predict import machine_code
from bench.suites.kernel_cases import cases_of
found = {}
for case in [case for family in ("lasso", "conv") for case in cases_of(family) if case.name in sys.argv[1:]]:
    with offline.offline(90), offline.launch.compiling_only() as compiled:
        case.run()
    for kernel in compiled:
        loop = machine_code.read(kernel, 90).loop
        found.setdefault(case.name, {})[kernel.metadata.name] = loop and (loop.instructions, loop.divisions)
print(json.dumps(found))
"""


def test_loops_are_short_and_do_not_divide() -> None:
    """The convolution by index, its weight gradient where channels are few, the fold of the lasso's slots."""
    run = compiling("-c", SCRIPT, *LIMITS)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    for case, limits in LIMITS.items():
        for kernel, limit in limits.items():
            instructions, divisions = found[case][kernel]
            assert 0 < instructions <= limit, (case, kernel, instructions)
            assert divisions == 0, (case, kernel)
