"""Channel gather, scatter and scatter-add on the outputs of ImageNet ResNet-50's four stages.

Floors: gather reads and writes the live part; scatter reads it and writes the whole; scatter-add reads both and writes
the whole. Providers: ours, the same in CUDA C++ where that is built, and eager (index_select, index_copy into zeros,
index_add). Half of the channels are live unless --profile uniform:SHARE says otherwise.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.harness import EAGER, OURS, Provider, Session, attempt, measure
from prunetrain_kernels.ops import cuda_native
from prunetrain_kernels.ops.channel_index import ChannelIndex, channel_gather, channel_scatter, channel_scatter_add

LIVE = 0.5
NATIVE = "CUDA C++"
WIDTHS = (256, 512, 1024, 2048)
FULL_SIDE, QUICK_SIDE = 56, 8  # of the first stage's output, pixels


def run(session: Session) -> None:
    side = QUICK_SIDE if session.quick else FULL_SIDE
    for width in WIDTHS:
        attempt(
            session,
            f"{width} channels",
            lambda width=width: _measure(session, width, max(1, side * 256 // width)),  # type: ignore[misc]
        )


def _measure(session: Session, width: int, side: int) -> None:
    torch.manual_seed(0)
    share = session.profile.share or LIVE
    live = max(1, int(width * share))
    index = ChannelIndex(torch.randperm(width)[:live].sort().values, width, session.device)
    chosen = index.index.long()
    images = session.images(256)

    def activation(count: int) -> Tensor:
        x = torch.randn(images, count, side, side, device=session.device, dtype=session.dtype)
        return x.contiguous(memory_format=torch.channels_last)

    full, part = activation(width), activation(live)

    def scatter() -> Tensor:
        return torch.zeros_like(full).index_copy_(1, chosen, part)

    cases: dict[str, tuple[dict[str, Callable[[], Tensor]], Tensor, int]] = {
        "channel_gather": (
            {OURS: lambda: channel_gather(full, index), EAGER: lambda: full.index_select(1, chosen)},
            full.double()[:, chosen],
            2 * part.numel(),
        ),
        "channel_scatter": (
            {OURS: lambda: channel_scatter(part, index), EAGER: scatter},
            torch.zeros_like(full, dtype=torch.float64).index_copy_(1, chosen, part.double()),
            part.numel() + full.numel(),
        ),
        "channel_scatter_add": (
            {
                OURS: lambda: channel_scatter_add(full, part, index),
                EAGER: lambda: full.index_add(1, chosen, part),
            },
            full.double().index_add(1, chosen, part.double()),
            part.numel() + 2 * full.numel(),
        ),
    }
    if session.device.type == "cuda" and cuda_native.available():
        forward, back = (index.index, index.inverse), (index.inverse, index.index)
        cases["channel_gather"][0][NATIVE] = lambda: cuda_native.channel_map(full, *forward, None)
        cases["channel_scatter"][0][NATIVE] = lambda: cuda_native.channel_map(part, *back, None)
        cases["channel_scatter_add"][0][NATIVE] = lambda: cuda_native.channel_map(part, *back, full)
    for name, (functions, reference, elements) in cases.items():
        what = {
            "layer": f"{name} {width}x{side}x{side}", "direction": "forward", "dtype": session.dtype_name,
            "layout": "channels_last", "n": images, "h": side, "w": side, "c_full": width, "c_live": live,
            "mask_profile": f"uniform:{share:g} (synthetic)",
        }  # fmt: skip
        if not session.wants(str(what["layer"])):
            continue
        providers = {
            provider: Provider(function, lambda function=function: [function()])  # type: ignore[misc]
            for provider, function in functions.items()
        }
        measure(
            session, "gather", providers, [reference], EAGER, what=what, model_bytes=elements * session.dtype.itemsize
        )
