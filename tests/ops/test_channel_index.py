"""channel_gather, channel_scatter and channel_scatter_add against float64 indexing, in every layout."""

import math
import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from fences import fenced, layout
from torch import Tensor, nn

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.nn import ChannelGather, ChannelScatter, ChannelScatterAdd
from prunetrain_kernels.ops import channel_index as module
from prunetrain_kernels.ops import native
from prunetrain_kernels.ops.channel_index import (
    ChannelIndex,
    channel_gather,
    channel_map,
    channel_scatter,
    channel_scatter_add,
)

t0 = pytest.mark.t0
T0_BACKENDS = ("reference", "kernels", "native")
LAYOUTS = ["contiguous", "channels_last", "sliced"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# batch 1, odd maps, one pixel, no pixel dimensions, more rows than one program takes
SHAPES = [(2, 5, 7), (1, 3, 3), (3, 1, 1), (11, 13, 9)]


def chosen(channels: int, live: int, device: torch.device, seed: int = 0) -> ChannelIndex:
    generator = torch.Generator().manual_seed(seed)
    return ChannelIndex(torch.randperm(channels, generator=generator)[:live], channels, device)


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)


def expected_gather(x: Tensor, index: ChannelIndex) -> Tensor:
    return torch.stack([x.double()[:, c] for c in index.index.tolist()], 1) if index.live else x.double()[:, :0]


def expected_scatter(x: Tensor, index: ChannelIndex, base: Tensor | None = None) -> Tensor:
    shape = (x.shape[0], index.channels, *x.shape[2:])
    out = torch.zeros(shape, dtype=torch.float64, device=x.device) if base is None else base.double().clone()
    for i, c in enumerate(index.index.tolist()):
        out[:, c] += x.double()[:, i]
    return out


def record_paths(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which path each call takes, so that no backend can pass by another's work."""
    seen: list[str] = []
    for where, name, path in (
        (module, "launch", "kernels"),
        (module, "channel_map_reference", "reference"),
        (native, "ops", "native"),
    ):
        true = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *a, true=true, path=path, **k: (seen.append(path), true(*a, **k))[1])
    return seen


@t0
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 8, 37, 64, 65])
def test_against_indexing(
    channels: int, where: str, dtype: torch.dtype, device: torch.device, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "kernels" and device.type == "cpu" and dtype != torch.float32 and channels not in (8, 37):
        pytest.skip("the interpreter is slow, and what places are read does not depend on the dtype")
    seen = record_paths(monkeypatch)
    n, h, w = SHAPES[channels % 3]
    live = max(1, channels // 2)
    index = chosen(channels, live, device)
    x = layout(fenced(random(n, channels, h, w, dtype=dtype, device=device)), where)
    small = layout(fenced(random(n, live, h, w, dtype=dtype, device=device, seed=2)), where)
    gathered, scattered = channel_gather(x, index), channel_scatter(small, index)
    assert torch.equal(gathered.double(), expected_gather(x, index))  # moved, so to the last bit
    assert torch.equal(scattered.double(), expected_scatter(small, index))
    assert gathered.dtype == scattered.dtype == dtype
    if where == "channels_last" and live > 1:  # one channel is stored both ways
        assert gathered.is_contiguous(memory_format=torch.channels_last)
        assert scattered.is_contiguous(memory_format=torch.channels_last)
    else:
        assert gathered.is_contiguous()
        assert scattered.is_contiguous()
    assert seen == [path] * 2
    if dtype == torch.bfloat16 and device.type == "cpu" and path == "kernels":
        return  # the interpreter's stores truncate bf16 sums
    added = channel_scatter_add(x, small, index)
    assert seen == [path] * 3
    # one sum each, rounded once: what PyTorch's own addition gives
    assert torch.equal(added, expected_scatter(small, index, x).to(dtype))
    assert added.data_ptr() != x.data_ptr()


@t0
@pytest.mark.parametrize("live", ["one", "all", "none"])
@pytest.mark.parametrize("where", ["contiguous", "channels_last"])
def test_extremes(where: str, live: str, device: torch.device) -> None:
    index = chosen(9, {"one": 1, "all": 9, "none": 0}[live], device)
    x = layout(random(2, 9, 3, 5, dtype=torch.float32, device=device), where)
    small = layout(random(2, index.live, 3, 5, dtype=torch.float32, device=device), where)
    assert torch.equal(channel_gather(x, index).double(), expected_gather(x, index))
    assert torch.equal(channel_scatter(small, index).double(), expected_scatter(small, index))
    assert torch.equal(channel_scatter_add(x, small, index), expected_scatter(small, index, x).to(x.dtype))
    if live == "all":
        assert torch.equal(channel_scatter(channel_gather(x, index), index), x)


@t0
def test_many_rows_and_the_cut_last_row(device: torch.device) -> None:
    """More rows than one program's tiles hold, and a last row that ends early."""
    x = layout(random(11, 3, 13, 9, dtype=torch.float32, device=device), "channels_last")
    index = chosen(3, 2, device)
    m = module.matrix(11 * 13 * 9 * 2, 2, 1)
    assert m.numel % m.columns  # or the case is not met
    assert torch.equal(channel_gather(x, index).double(), expected_gather(x, index))
    tall = random(16 * 3 * module.TILE_ROWS * module.TILES + 5, 8, dtype=torch.float32, device=device)
    index = chosen(8, 8, device)
    assert module.matrix(tall.numel(), 8, 1).rows == 3 * module.TILE_ROWS * module.TILES + 1  # four programs
    assert torch.equal(channel_gather(tall, index).double(), expected_gather(tall, index))
    rows = module.TILE_ROWS * module.TILES + 3
    wide = random(rows, 200, 1, 9, dtype=torch.float32, device=device)  # NCHW: one row an image, 18 tiles of columns
    index = chosen(200, 31, device)
    assert torch.equal(
        channel_scatter(channel_gather(wide, index), index).double(),
        expected_scatter(expected_gather(wide, index), index),
    )


@t0
@pytest.mark.parametrize("shape", [(4, 6), (2, 6, 5), (1, 6, 2, 3, 2), (3, 6, 1, 1), (0, 6, 2, 2)], ids=str)
def test_other_ranks(shape: tuple[int, ...], device: torch.device) -> None:
    x = random(*shape, dtype=torch.float32, device=device)
    index = chosen(6, 4, device)
    small = channel_gather(x, index)
    assert torch.equal(small.double(), expected_gather(x, index))
    assert torch.equal(channel_scatter(small, index).double(), expected_scatter(small, index))
    assert torch.equal(channel_scatter_add(x, small, index), expected_scatter(small, index, x).to(x.dtype))
    if x.dim() == 5:
        last = x.contiguous(memory_format=torch.channels_last_3d)
        assert torch.equal(channel_gather(last, index), small)
        assert channel_gather(last, index).is_contiguous(memory_format=torch.channels_last_3d)


@t0
@pytest.mark.parametrize("channels", [1, 8])
@pytest.mark.parametrize("base_where", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("x_where", ["contiguous", "channels_last"])
def test_tensors_that_are_stored_both_ways(x_where: str, base_where: str, channels: int, device: torch.device) -> None:
    """One live channel: x is contiguous and channels_last at once, and base need not be."""
    index = chosen(channels, 1, device)
    base = layout(random(3, channels, 4, 5, dtype=torch.float32, device=device), base_where)
    x = layout(random(3, 1, 4, 5, dtype=torch.float32, device=device, seed=3), x_where)
    assert torch.equal(channel_scatter_add(base, x, index), expected_scatter(x, index, base).float())
    assert torch.equal(channel_gather(base, index).double(), expected_gather(base, index))
    assert torch.equal(channel_scatter(x, index).double(), expected_scatter(x, index))
    pixel = layout(random(3, channels, 1, 1, dtype=torch.float32, device=device), x_where)
    assert torch.equal(channel_gather(pixel, index).double(), expected_gather(pixel, index))


@t0
@pytest.mark.parametrize("which", ["(N, C) transposed", "(N, C) with gaps", "(N, C, 1) with gaps"])
def test_what_is_not_one_run_of_numbers(which: str, device: torch.device) -> None:
    full = {
        "(N, C) transposed": random(8, 6, dtype=torch.float32, device=device).t(),
        "(N, C) with gaps": random(6, 16, dtype=torch.float32, device=device)[:, ::2],
        "(N, C, 1) with gaps": random(6, 8, 2, dtype=torch.float32, device=device)[:, :, :1],
    }[which]
    index = chosen(8, 3, device)
    part = full[:, index.index.tolist()]
    part = torch.stack([part, part], -1)[..., 0]
    assert not part.is_contiguous()
    assert torch.equal(channel_gather(full, index), part)
    assert torch.equal(channel_scatter(part, index), expected_scatter(part, index))
    assert torch.equal(channel_scatter_add(full, part, index), expected_scatter(part, index, full))


@t0
@pytest.mark.parametrize("offset", [1, 3])
def test_misaligned(offset: int, device: torch.device) -> None:
    x = fenced(random(2, 37, 3, 3, dtype=torch.float16, device=device), offset)
    index = chosen(37, 20, device)
    small = fenced(channel_gather(x, index), offset)
    assert torch.equal(small.double(), expected_gather(x, index))
    assert torch.equal(channel_scatter_add(x, small, index), expected_scatter(small, index, x).half())


@t0
def test_nan_and_infinity_go_through(device: torch.device) -> None:
    x = torch.tensor([[math.nan, math.inf, -math.inf, -0.0]], device=device)
    index = ChannelIndex([3, 0, 1, 2], 4, device)
    gathered = channel_gather(x, index)
    assert gathered[0, 1].isnan()
    assert gathered[0, [2, 3]].tolist() == [math.inf, -math.inf]
    assert math.copysign(1, gathered[0, 0].item()) == -1
    assert channel_scatter_add(x, gathered, index)[0, 0].isnan()


OPERATIONS: dict[str, Callable[[Tensor, Tensor, ChannelIndex], Tensor]] = {
    "gather": lambda base, x, index: channel_gather(base, index),
    "scatter": lambda base, x, index: channel_scatter(x, index),
    "scatter_add": channel_scatter_add,
}


@t0
@pytest.mark.parametrize("where", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_gradcheck(name: str, where: str, device: torch.device) -> None:
    if device.type == "cuda":
        device = torch.device("cpu")  # fp64 has kernels in the interpreter only
    index = chosen(5, 3, device)
    base = layout(random(1, 5, 1, 2, dtype=torch.float64, device=device), where).requires_grad_()
    x = layout(random(1, 3, 1, 2, dtype=torch.float64, device=device, seed=2), where).requires_grad_()
    needed = {"gather": (base,), "scatter": (x,), "scatter_add": (base, x)}[name]
    assert torch.autograd.gradcheck(lambda *_: OPERATIONS[name](base, x, index), needed, fast_mode=False)


@t0
@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_in_the_other_layout(name: str, device: torch.device) -> None:
    """What flows back may be channels_last where the forward was contiguous, or expanded from one number."""
    index = chosen(5, 3, device)
    base, x = (random(2, c, 2, 3, dtype=torch.float32, device=device).requires_grad_() for c in (5, 3))
    out = OPERATIONS[name](base, x, index)
    upstream = random(*out.shape, dtype=torch.float32, device=device, seed=4)
    needed = [t for t, used in ((base, name != "scatter"), (x, name != "gather")) if used]
    expected = torch.autograd.grad(out, needed, upstream)
    out = OPERATIONS[name](base, x, index)
    actual = torch.autograd.grad(out, needed, upstream.contiguous(memory_format=torch.channels_last))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    ones = torch.autograd.grad(OPERATIONS[name](base, x, index).sum(), needed)
    assert all(set(g.unique().tolist()) <= {0.0, 1.0} for g in ones)
    assert sum(int(g.sum()) for g in ones) == {"gather": 36, "scatter": 36, "scatter_add": 96}[name]


@t0
@pytest.mark.kernels_only  # the operator is opaque to those who trace it: one path shows them all
@pytest.mark.parametrize("where", LAYOUTS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_opcheck(name: str, where: str, device: torch.device) -> None:
    index = chosen(5, 3, device)
    base = layout(random(2, 5, 2, 3, dtype=torch.float32, device=device), where).requires_grad_()
    x = layout(random(2, 3, 2, 3, dtype=torch.float32, device=device), where).requires_grad_()
    arguments = {
        "gather": (base, index.index, index.inverse, None),
        "scatter": (x, index.inverse, index.index, None),
        "scatter_add": (x, index.inverse, index.index, base),
    }[name]
    torch.library.opcheck(channel_map, arguments)


@t0
def test_second_derivative(device: torch.device) -> None:
    """The derivative is the same operator, so it has one too."""
    index = chosen(5, 3, device)
    base, x = (random(2, c, 2, 3, dtype=torch.float32, device=device).requires_grad_() for c in (5, 3))
    (dx,) = torch.autograd.grad((channel_scatter_add(base, x, index) ** 3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.sum(), x)
    assert torch.allclose(second, 6 * (channel_gather(base, index) + x))


class Gated(nn.Module):
    """A layer on some of a space's channels."""

    def __init__(self, index: ChannelIndex) -> None:
        super().__init__()
        self.gather, self.add, self.scatter = ChannelGather(index), ChannelScatterAdd(index), ChannelScatter(index)

    def forward(self, x: Tensor) -> Tensor:
        live = torch.sin(self.gather(x))
        return self.add(x, live) * self.scatter(live)


@t0
@pytest.mark.kernels_only  # the operator is opaque to those who trace it: one path shows them all
def test_compiles_whole(device: torch.device) -> None:
    index = chosen(7, 4, device)
    model = Gated(index)
    x = random(2, 7, 3, 3, dtype=torch.float32, device=device).requires_grad_()
    expected = model(x)
    (expected_dx,) = torch.autograd.grad(expected.square().sum(), x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = compiled(x)
    assert torch.equal(actual, expected)
    assert torch.equal(torch.autograd.grad(actual.square().sum(), x)[0], expected_dx)
    functional = torch.compile(
        lambda x: channel_scatter(channel_gather(x, index), index), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(functional(x), channel_scatter(channel_gather(x, index), index))


@t0
@pytest.mark.kernels_only  # the operator is opaque to those who trace it: one path shows them all
def test_compiles_with_inductor(device: torch.device) -> None:
    index = chosen(7, 4, device)
    x = random(2, 7, 3, 3, dtype=torch.float32, device=device)
    compiled = torch.compile(lambda x: channel_scatter_add(x, channel_gather(x, index), index), fullgraph=True)
    assert torch.equal(compiled(x), channel_scatter_add(x, channel_gather(x, index), index))


@t0
@pytest.mark.kernels_only  # the operator is opaque to those who trace it: one path shows them all
def test_exports(device: torch.device) -> None:
    model = Gated(chosen(7, 4, device))
    x = random(2, 7, 3, 3, dtype=torch.float32, device=device)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}})
    larger = random(5, 7, 3, 3, dtype=torch.float32, device=device)
    assert torch.equal(program.module()(larger), model(larger))


# -- without the interpreter: the plain reference, and what is refused -------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.int64], ids=str)
@pytest.mark.parametrize("where", LAYOUTS)
def test_reference(where: str, dtype: torch.dtype) -> None:
    device = torch.device("cpu")
    index = chosen(6, 4, device)
    x = layout(
        random(2, 6, 3, 3, dtype=torch.float32, device=device).mul(9),
        where if dtype.is_floating_point else "contiguous",
    ).to(dtype)
    small = channel_gather(x, index)
    assert torch.equal(small.double(), expected_gather(x, index))
    assert torch.equal(channel_scatter(small, index).double(), expected_scatter(small, index))
    assert torch.equal(channel_scatter_add(x, small, index), expected_scatter(small, index, x).to(dtype))
    empty = ChannelIndex([], 6)
    assert channel_gather(x, empty).shape == (2, 0, 3, 3)
    assert channel_scatter(x[:, :0], empty).eq(0).all()
    assert torch.equal(channel_scatter_add(x, x[:, :0], empty), x)


def test_opcheck_of_the_reference() -> None:
    index = chosen(5, 3, torch.device("cpu"))
    x = random(2, 3, 2, 3, dtype=torch.float32, device=torch.device("cpu"))
    for last in (False, True):
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        torch.library.opcheck(channel_map, (x.requires_grad_(), index.inverse, index.index, None))
    base = random(2, 5, 2, 3, dtype=torch.float64, device=x.device).requires_grad_()
    assert torch.autograd.gradcheck(lambda b: channel_scatter_add(b, channel_gather(b, index), index), base)


def test_plain_numbers_are_accepted_and_checked() -> None:
    x = torch.randn(2, 6, 3, 3)
    for numbers in (
        [4, 0, 2],
        (4, 0, 2),
        np.array([4, 0, 2]),
        torch.tensor([4, 0, 2]),
        torch.tensor([4, 0, 2], dtype=torch.int32),
    ):
        assert torch.equal(channel_gather(x, numbers), x[:, [4, 0, 2]])
        assert channel_scatter(x[:, :3], numbers, channels=6)[:, [1, 3, 5]].eq(0).all()
        assert torch.equal(channel_scatter_add(x, x[:, :3], numbers)[:, 4], x[:, 4] + x[:, 0])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ChannelIndex([0, 6], 6), "channel 6 is out of range"),
        (lambda: ChannelIndex([0, -1], 6), "channel -1 is out of range"),
        (lambda: ChannelIndex([2, 1, 2], 6), "channel 2 is listed twice"),
        (lambda: ChannelIndex([], 0), "at least one channel"),
        (lambda: ChannelIndex([0.5], 6), "must hold integers"),  # type: ignore[list-item]
        (lambda: ChannelIndex([True, False], 6), "must hold integers"),
        (lambda: ChannelIndex(torch.tensor([True, False]), 6), "1-D tensor of integers"),
        (lambda: ChannelIndex(torch.tensor([[1]]), 6), "1-D tensor of integers"),
        (lambda: channel_gather(torch.zeros(2, 5, 3), ChannelIndex([0], 6)), "x has 5 channels"),
        (lambda: channel_gather(torch.zeros(2, 6, 3), [0, 0]), "listed twice"),
        (lambda: channel_gather(torch.zeros(6), [0]), "1 dimensions"),
        (lambda: channel_gather(torch.zeros(1, 6, 1, 1, 1, 1), [0]), "6 dimensions"),
        (lambda: channel_gather(torch.zeros(2, 6, device="meta"), ChannelIndex([0], 6)), "use index.to"),
        (lambda: channel_scatter(torch.zeros(2, 2), ChannelIndex([0], 6)), "lists 1"),
        (lambda: channel_scatter(torch.zeros(2, 1), [0]), "pass channels="),
        (lambda: channel_scatter(torch.zeros(2, 1), ChannelIndex([0], 6), channels=7), "into 6 channels"),
        (lambda: channel_scatter_add(torch.zeros(2, 6), torch.zeros(2, 1).half(), [0]), "float16"),
        (lambda: channel_scatter_add(torch.zeros(3, 6), torch.zeros(2, 1), [0]), "more than their channels"),
        (lambda: channel_scatter_add(torch.zeros(2, 6), torch.zeros(2, 2), [0]), "lists 1"),
        (lambda: channel_scatter_add(torch.zeros(2, 6), torch.zeros(2, 1, device="meta"), [0]), "move one"),
        (lambda: ChannelGather([0]), "pass channels="),
        (lambda: ChannelGather(ChannelIndex([0], 6), channels=5), "into 6 channels"),
    ],
)
def test_refuses(call: Callable[[], object], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        call()
    assert isinstance(caught.value, ValueError)


def test_an_index_is_frozen_and_moves() -> None:
    index = ChannelIndex([3, 1], 5)
    with pytest.raises(AttributeError):
        index.live = 3  # type: ignore[misc]
    assert index.inverse.tolist() == [-1, 1, -1, 0, -1]
    assert index.index.dtype == index.inverse.dtype == torch.int32
    assert index.to("cpu") is index
    moved = index.to("meta")
    assert moved.index.device.type == moved.inverse.device.type == "meta"
    assert (moved.live, moved.channels) == (2, 5)
    assert "2 of 5" in repr(index)


def test_modules_keep_the_index_in_their_state() -> None:
    gather, other = ChannelGather([3, 1], 5), ChannelGather([0, 2], 5)
    assert list(gather.state_dict()) == ["index"]
    other.load_state_dict(gather.state_dict())
    x = torch.randn(2, 5, 3)
    assert torch.equal(other(x), gather(x))
    assert other.inverse.tolist() == gather.inverse.tolist()
    assert gather.half().index.dtype == torch.int32
    assert gather.to("meta").inverse.device.type == "meta"
    with pytest.raises(RuntimeError, match="listed twice"):
        other.load_state_dict({"index": torch.tensor([1, 1])})
    assert torch.equal(other(x), x[:, [3, 1]])  # as it was
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict({"index": torch.tensor([1])})
    scatter = ChannelScatter([3, 1], 5)
    assert torch.equal(ChannelScatterAdd([3, 1], 5)(x, x[:, :2]), x + scatter(x[:, :2]))


# -- compiled offline --------------------------------------------------------------------------------------------------

OFFLINE = """
import re, sys, tempfile, subprocess, torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from prunetrain_kernels.ops import launch, channel_index as ci

class Offline:
    def __init__(self, cc): self.cc = cc
    def get_current_target(self): return GPUTarget("cuda", self.cc, 32)
    def get_current_device(self): return self.cc
    def get_current_stream(self, device): return 0
    def get_active_torch_device(self): return torch.device("cpu")

for cc in (70, 80, 90):
    driver.set_active(Offline(cc))
    for dtype in (torch.float16, torch.float32):
        first = None
        for channels in (64, 61, 37):
            for form in (torch.contiguous_format, torch.channels_last):
                x = torch.zeros(4, channels, 7, 9, dtype=dtype).contiguous(memory_format=form)
                index = ci.ChannelIndex(range(0, channels, 2), channels)
                with launch.compiling_only() as kernels:
                    small = ci.channel_gather(x, index)
                    ci.channel_scatter(small, index)
                    ci.channel_scatter_add(x, small, index)
                count = len(ci._channel_map_kernel.device_caches[cc][0])
                first = first or count
                assert count == first, (cc, dtype, channels, form)  # no channel count and no layout compiles anew
        for kernel, loads in ((kernels[1], False), (kernels[2], True)):
            ptx = kernel.asm["ptx"]
            assert not re.search(r"\\b(atom|red)[.]", ptx)
            assert re.search(r"st[.]global[.\\w]*[.]v4", ptx), ptx
            assert not loads or re.search(r"ld[.]global[.\\w]*[.]v4", ptx)
            with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
                file.write(ptx)
                file.flush()
                arch = re.search(r"[.]target (sm_\\w+)", ptx).group(1)
                said = subprocess.run([get_ptxas(cc).path, "-v", f"--gpu-name={arch}", file.name, "-o", "/dev/null"],
                                      capture_output=True, text=True, check=True).stderr
            assert "0 bytes spill stores, 0 bytes spill loads" in said, said
print("compiled")
"""


@pytest.mark.t1
def test_compiled_offline() -> None:
    pytest.importorskip("triton", reason="triton exists for Linux only")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "compiled" in done.stdout
