"""Made-up CSV files of every kind that the figures are drawn from, and what the tests read off a figure."""

import csv
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from bench.rows import COLUMNS
from plots import operators

REPOSITORY = Path(__file__).parents[2]
DEVICE = "nvidia-h100"


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def trained(
    network: str = "resnet32",
    method: str = "prunetrain",
    ratio: float | str = 0.25,
    dataset: str = "cifar10",
    seed: int = 0,
    scale: str = "small",
    suffix: str = "",
) -> dict[str, Any]:
    """The columns that every row of a paper run begins with."""
    run = f"{dataset}/{network}-{method}-{ratio}-seed-{seed}{suffix}"
    return {
        "experiment": "x", "scale": scale, "run": run, "network": network, "dataset": dataset, "method": method,
        "ratio": ratio, "seed": seed, "epochs": 12, "device": "Some CPU", "date": "2026-11-24T10:00:00Z",
        "torch": "2.13",
    }  # fmt: skip


def measured(suite: str, **values: Any) -> dict[str, Any]:
    """A row of a suite, with all of its columns."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {
        "suite": suite, "count": 1, "part": "all", "direction": "forward", "dtype": "fp16", "n": 32, "size": "full",
        "mode": "graph-replay", "mask_profile": "paper:0.25 (synthetic)", "date": "2026-11-24T10:00:00Z",
        "device": "NVIDIA H100",
    }  # fmt: skip
    return row | values


# -- made-up data ------------------------------------------------------------------------------------------------------


def fig2_rows(scale: str = "small") -> list[dict[str, Any]]:
    rows = []
    for ratio in (0.1, 0.2):
        base = trained(ratio=ratio, scale=scale)
        rows += [{**base, "panel": "a", "x": e, "y": 1 - ratio * e / 12, "label": ""} for e in range(1, 13)]
        rows += [
            {**base, "panel": "b", "x": p, "y": y, "label": f"epochs {4 * p - 3}-{4 * p}"}
            for p, y in ((1, 0.7), (2, 0.2), (3, 0.1))
        ]
        rows += [{**base, "panel": "c", "x": e, "y": 1.3 + abs(e - 5) / 20, "label": "computed"} for e in range(1, 13)]
    rows.append({**trained(method="once", ratio=0.2, scale=scale), "panel": "c", "x": 3, "y": 1.37, "label": "run"})
    return rows


def fig4_rows(scale: str = "small") -> list[dict[str, Any]]:
    rows = []
    for layer, epoch, channel in itertools.product(("a.conv1", "a.conv2", "a.conv3"), range(1, 7), range(4)):
        size: float | str = 0.1 / epoch
        if channel == 0 and epoch > 2:
            size = ""  # pruned
        elif channel == 1 and epoch == 4:
            size = 1e-6  # white once, and back
        rows.append({**trained(scale=scale), "layer": layer, "epoch": epoch, "channel": channel, "max_abs": size})
    return rows


def fig6_rows(scale: str = "small") -> list[dict[str, Any]]:
    return [
        {**trained(network, ratio=ratio, scale=scale), "policy": policy,
         "inference_flops_ratio": 1 - 2 * ratio - extra, "train_flops_ratio_final": 1 - 2 * ratio - extra}
        for network in ("resnet32", "resnet50") for ratio in (0.1, 0.2, 0.3)
        for policy, extra in (("union", 0.0), ("gating at branch ends", 0.03), ("gating", 0.05))
    ]  # fmt: skip


def fig8_rows(scale: str = "small") -> list[dict[str, Any]]:
    def row(method: str, ratio: float | str, flops: float, accuracy: float) -> dict[str, Any]:
        return {
            **trained(method=method, ratio=ratio, scale=scale), "accuracy": accuracy, "inference_mflops": 140 * flops,
            "train_tflops": 90 * flops, "train_flops_ratio": flops, "bn_gb": 40 * flops, "bn_bytes_ratio": flops,
        }  # fmt: skip

    pruned = [row("prunetrain", r, 1 - 2 * r, 93 - 5 * r) for r in (0.05, 0.1, 0.2)]
    ssl = [row("ssl", r, 1 - 1.8 * r, 92 - 5 * r) for r in (0.05, 0.1)]
    return [row("dense", "", 1.0, 93.0), *pruned, *ssl]


def fig9_rows(scale: str = "small") -> list[dict[str, Any]]:
    rows = []
    for method, sizes in (("prunetrain", (128, 128, 128)), ("adjusted", (128, 160, 192))):
        base = trained("resnet50", method, dataset="cifar100", scale=scale)
        for epoch, size in enumerate(sizes, 1):
            memory = 4e9 * size / 128 * (1 - 0.2 * epoch)
            budget = 4e9 if method == "adjusted" else ""
            rows.append({**base, "epoch": 10 * epoch, "memory_bytes": memory, "memory_ratio": memory / 4e9,
                         "batch": size, "budget": budget})  # fmt: skip
    return rows


def fig10_rows(scale: str = "small") -> list[dict[str, Any]]:
    rows = [{**trained(method="dense", ratio="", scale=scale), "interval": "", "accuracy": 93.0,
             "inference_mflops": 140, "inference_flops_ratio": 1}]  # fmt: skip
    for interval, ratio in itertools.product((1, 2, 4), (0.1, 0.2)):
        base = trained(ratio=ratio, scale=scale, suffix=f"-interval-{interval}")
        flops = 1 - 2 * ratio + 0.01 * interval
        rows.append({**base, "interval": interval, "accuracy": 93 - ratio, "inference_mflops": 140 * flops,
                     "inference_flops_ratio": flops})  # fmt: skip
    return rows


def fig11_rows(scale: str = "small") -> list[dict[str, Any]]:
    return [
        {**trained(ratio=ratio, scale=scale), "epoch": epoch, "gpus": gpus,
         "bytes_per_iteration_ratio": 1 - ratio * epoch / 3, "bytes_per_epoch_ratio": 1 - ratio * epoch / 2,
         "average_saving": 2 * ratio}
        for ratio in (0.1, 0.25) for gpus in (16, 64, 128, 256) for epoch in range(1, 4)
    ]  # fmt: skip


def fig12_rows(scale: str = "small") -> list[dict[str, Any]]:
    return [
        {**trained(network, scale=scale), "index": i, "layer": f"conv{i}", "channel_density": 0.0 if i == 3 else 0.6,
         "weight_density": 0.0 if i == 3 else 0.3}
        for network in ("resnet32", "vgg11") for i in range(1, 9)
    ]  # fmt: skip


BLOCKS = [f"layer{s}.{b}.conv3" for s, blocks in enumerate((3, 4, 6, 3), 1) for b in range(blocks)]


def fig7_rows(**values: Any) -> list[dict[str, Any]]:
    rows = []
    for layer, direction in itertools.product(BLOCKS, ("forward", "backward")):
        for provider, part, time in (
            ("dense", "conv", 100), ("union", "conv", 50), ("gating (index_copy)", "conv", 45),
            ("gating (index_copy)", "reshape", 60), ("gating (index_copy)", "all", 110), ("gating (fused)", "conv", 45),
            ("gating (fused)", "reshape", 20), ("gating (fused)", "all", 65),
        ):  # fmt: skip
            profile = {"mask_profile": "dense"} if provider == "dense" else {}
            row = measured("fig7", layer=layer, direction=direction, provider=provider, part=part, p50_us=time,
                           roof_us=time / 2)  # fmt: skip
            rows.append(row | profile | values)
    return rows


def gating_rows(**values: Any) -> list[dict[str, Any]]:
    times = {
        "dense": 100,
        "union": 50,
        "gating (naive)": 120,
        "gating (expanded)": 45,
        "gating (triton)": 40,
        "auto": 41,
    }
    layers = [block.replace("conv3", conv) for block in BLOCKS for conv in ("conv1", "conv3")]
    return [
        measured("gating", layer=layer, direction="step", provider=provider, p50_us=time)
        | ({"mask_profile": "dense"} if provider == "dense" else {}) | values
        for layer in layers for provider, time in times.items()
    ]  # fmt: skip


def operator_rows(suite: str) -> list[dict[str, Any]]:
    return [
        measured(suite, layer=f"layer{i}", provider=provider, direction=direction, p20_us=0.9 * time, p50_us=time,
                 p80_us=1.2 * time, roof_us=10.0 * 3**i)
        for i in range(3) for provider, slower in (("eager", 4.0), ("ours", 1.2))
        for direction in ("forward", "backward") for time in [slower * 10.0 * 3**i]
    ]  # fmt: skip


def step_rows() -> list[dict[str, Any]]:
    rows = []
    for network, provider in itertools.product(("imagenet_resnet50", "resnet32", "vgg11"), ("eager", "ours")):
        for flops in (1.0, 0.8, 0.6, 0.4):
            eta = 0.4 if provider == "eager" else 0.8
            label = "dense" if flops == 1 else f"uniform:{flops} (synthetic)"
            rows.append(measured("step", layer=network, provider=provider, direction="step", flops_ratio=flops,
                                 time_ratio=1 - eta * (1 - flops), eta="" if flops == 1 else eta,
                                 p50_us=1100 * (1 - eta * (1 - flops)),
                                 mask_profile=label))  # fmt: skip
        rows.append(measured("step", layer=network, provider="eager, no lasso", direction="step", flops_ratio=1,
                             time_ratio=1, p50_us=1000, mask_profile="dense"))  # fmt: skip
    return rows


def memory_rows() -> list[dict[str, Any]]:
    rows = []
    for network, flops in itertools.product(("imagenet_resnet50", "vgg11"), (1.0, 0.6, 0.4)):
        base = measured("memory", layer=network, flops_ratio=flops, n=128, peak_memory=8e9 * flops, mode="model")
        base["mask_profile"] = "dense" if flops == 1 else f"uniform:{flops} (synthetic)"
        rows += [{**base, "provider": provider, "direction": "step"} for provider in ("model", "measured")]
        rows.append({**base, "provider": "model", "direction": "fits dense", "n": 128 / flops // 32 * 32})
        rows.append({**base, "provider": "model", "direction": "fits 11 GB", "n": 160 / flops // 32 * 32})
    return rows


PAPER_ROWS = {
    "fig2": fig2_rows, "fig4": fig4_rows, "fig6": fig6_rows, "fig8": fig8_rows, "fig9": fig9_rows, "fig10": fig10_rows,
    "fig11": fig11_rows, "fig12": fig12_rows,
}  # fmt: skip


FULL = ("fig8", "fig9")  # those that show the paper's values only at its own scale


def write_all(root: Path) -> Path:
    """Every kind of CSV that there can be."""
    for name, rows in PAPER_ROWS.items():
        for scale in ("small", "full") if name in FULL else ("small",):
            write(root / "paper" / scale / f"{name}.csv", rows(scale))
    write(root / DEVICE / "fig7.csv", fig7_rows())
    write(root / DEVICE / "gating.csv", gating_rows())
    for suite in operators.SUITES:
        write(root / DEVICE / f"{suite}.csv", operator_rows(suite))
    write(root / DEVICE / "step.csv", step_rows())
    write(root / DEVICE / "memory.csv", memory_rows())
    return root


# -- figures -----------------------------------------------------------------------------------------------------------

ALL_STEMS = {
    *(f"{name}-small" for name in PAPER_ROWS), *(f"{name}-full" for name in FULL),
    f"fig7-{DEVICE}-fp16-n32", f"gating-{DEVICE}-fp16-n32", f"fig9-{DEVICE}", f"operators-{DEVICE}", f"step-{DEVICE}",
}  # fmt: skip


def drawn(module: Any, folder: Path) -> tuple[Any, str]:
    """A module's figure, laid out, and its caption."""
    result = module.figures(folder)[0].drawn
    assert result is not None
    figure, caption = result
    figure.draw_without_rendering()
    return figure, caption


def of_paper(tmp_path: Path, module: Any, rows: Sequence[Mapping[str, Any]], scale: str = "small") -> tuple[Any, str]:
    name = module.FILES[0]
    write(tmp_path / "paper" / scale / name, rows)
    return drawn(module, tmp_path / "paper" / scale)


def of_suite(tmp_path: Path, module: Any, name: str, rows: Sequence[Mapping[str, Any]]) -> tuple[Any, str]:
    write(tmp_path / DEVICE / f"{name}.csv", rows)
    return drawn(module, tmp_path / DEVICE)


def texts_of(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def heights(ax: Any) -> list[float]:
    return [patch.get_height() for container in ax.containers for patch in container if hasattr(patch, "get_height")]
