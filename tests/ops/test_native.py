"""The native library as a whole: threads, instruction sets, how it is found, forced and missed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prunetrain_kernels.ops import ChannelIndex, Groups, batch_norm_act, channel_gather, channel_scatter, native
from prunetrain_kernels.ops.group_lasso import add_group_lasso_gradient_, slice_statistics
from prunetrain_kernels.ops.sgd import Hyperparameters, LassoState, Parameters, sgd_update_

pytestmark = pytest.mark.skipif(native.problem() is not None, reason=f"no native library: {native.problem()}")

GATHERED = ChannelIndex([1, 2, 3, 7, 11], 13)


def everything() -> list[Tensor]:
    """Results of every native operator on odd shapes, large enough for several pieces of work."""
    torch.manual_seed(0)
    shapes = [(130, 70, 3, 3), (64, 129, 1, 1), (10, 300), (7,)]
    params = [torch.randn(shape) for shape in shapes]
    params[0] = params[0].contiguous(memory_format=torch.channels_last)
    weights, groups = params[:3], [Groups(), Groups(inputs=False), Groups(block=3)]
    norms, sizes = slice_statistics(weights, groups)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    penalty = add_group_lasso_gradient_(weights, groups, 0.25)
    found = [side for pair in (*norms, *sizes) for side in pair] + [penalty] + [w.grad for w in weights]
    flat = torch.cat([side for pair in norms for side in pair])
    grads, buffers = [torch.randn_like(p) for p in params], [torch.randn_like(p) for p in params]
    sgd_update_(
        Parameters(params, grads, buffers, [0] * 4, [False] * 4, [1, 1, 3, 1], [3, 2, 3, 0]),
        LassoState(flat, torch.empty_like(flat), torch.tensor(0.01), 1e-8),
        [torch.tensor(0.1)],
        [Hyperparameters(momentum=0.9, weight_decay=5e-4, nesterov=True)],
    )
    found += [*params, *buffers, flat]
    x = torch.randn(9, 13, 33, 31).contiguous(memory_format=torch.channels_last).requires_grad_()
    residual, weight, bias = torch.randn_like(x).requires_grad_(), torch.rand(13), torch.randn(13)
    weight.requires_grad_()
    bias.requires_grad_()
    y = batch_norm_act(x, None, None, weight, bias, training=True, residual=residual, relu=True)
    found += [y.detach(), *torch.autograd.grad(y, [x, residual, weight, bias], torch.randn_like(y))]
    part = channel_gather(x.detach(), GATHERED)
    return [*found, part, channel_scatter(part, GATHERED)]


def test_the_number_of_threads_changes_no_bit() -> None:
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything())
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        for a, b in zip(results[0], others, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_instruction_sets_agree(name: str, tmp_path: Path) -> None:
    code = (
        f"import sys, torch; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_native as t; "
        f"from prunetrain_kernels.ops import native; "
        f"torch.save([native.instruction_set(), t.everything()], {str(tmp_path / 'found.pt')!r})"
    )
    done = python("-c", code, PRUNETRAIN_CPU=name)
    assert done.returncode == 0, done.stderr
    chosen, found = torch.load(tmp_path / "found.pt")
    order = [set_name.lower().replace("-", "") for set_name in native.INSTRUCTION_SETS]
    widest = order.index(native.instruction_set().lower().replace("-", ""))
    assert chosen == native.INSTRUCTION_SETS[min(order.index(name), widest)]
    for a, b in zip(everything(), found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


# -- found, forced, missed ---------------------------------------------------------------------------------------------

STEP = (
    "import torch; from prunetrain_kernels.ops import channel_gather; "
    "print([channel_gather(torch.arange(6.0).view(1, 3, 2), [2, 0]).flatten().tolist() for _ in range(2)][1])"
)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
def test_a_missing_library_is_said_once_or_refused(backend: str, tmp_path: Path) -> None:
    done = python("-c", STEP, PRUNETRAIN_CPU_LIBRARY=str(tmp_path / "none.so"), PRUNETRAIN_BACKEND=backend)
    if backend == "native":
        assert done.returncode == 1
        assert "PRUNETRAIN_BACKEND=native, but there is no native library: none.so does not load" in done.stderr
        return
    assert done.stdout == "[4.0, 5.0, 0.0, 1.0]\n"
    assert done.stderr.count("without its native library") == (1 if backend == "auto" else 0)


def test_a_damaged_library_does_not_stop_the_import(tmp_path: Path) -> None:
    library = native.library()
    assert library is not None
    cut = tmp_path / "_cpu.abi3.so"
    cut.write_bytes(library.read_bytes()[: 100 * 1024])
    done = python("-c", STEP, PRUNETRAIN_CPU_LIBRARY=str(cut))
    assert done.stdout == "[4.0, 5.0, 0.0, 1.0]\n"
    assert "_cpu.abi3.so is damaged" in done.stderr


def test_says_what_is_active() -> None:
    said = python("-m", "prunetrain_kernels", PRUNETRAIN_BACKEND="auto").stdout
    assert f"native library {native.library().name}, {native.instruction_set()}" in said
    assert f"torch {torch.__version__}" in said
    assert (
        "PRUNETRAIN_BACKEND=reference turns it off"
        in python("-m", "prunetrain_kernels", PRUNETRAIN_BACKEND="reference").stdout
    )
    wrong = python("-m", "prunetrain_kernels", PRUNETRAIN_BACKEND="fast")
    assert wrong.returncode == 2
    expected = "prunetrain_kernels: PRUNETRAIN_BACKEND=fast is not a backend; set it to one of auto, native, reference."
    assert expected in wrong.stderr.splitlines()
    assert "Traceback" not in wrong.stderr
