"""The first lines of docs/results.md: one sentence for each suite that has rows, computed from them."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench import rows

if TYPE_CHECKING:
    import pandas as pd


def lines(devices: "Sequence[tuple[str, Mapping[str, pd.DataFrame]]]", results: Path) -> list[str]:
    """Markdown bullets; quick rows, which say nothing about speed, have none, and small trainings beside larger ones.

    Args:
        devices: the name of each and its tables by suite, each thing in them once.
        results: the folder that holds paper/ and offline/.
    """
    bullets = [
        f"* **{suite}** on {device}: {sentence}"
        for device, tables in devices
        for suite, summarise in SENTENCES.items()
        if suite in tables and set(tables[suite]["size"]) != {"quick"} and (sentence := summarise(tables[suite]))
    ]
    trainings = [f"* **trainings**, {scale} scale: {text}"
                 for scale, name in (("full", "tab1"), ("medium", "claim"), ("small", "tab1"))
                 if (text := _trainings(results / "paper" / scale / f"{name}.csv"))]  # fmt: skip
    bullets += [bullet for bullet in trainings if "small scale" not in bullet] or trainings  # small: plumbing only
    bullets += [f"* **gating, by count**: {text}" for text in (_costs(results / "offline/gating.csv"),) if text]
    bullets += [f"* **kernels**: {text}" for text in (_kernels(results / "offline/kernels.csv"),) if text]
    return bullets


def _times(table: "pd.DataFrame", *key: str) -> dict[tuple[object, ...], dict[str, float]]:
    """Medians in microseconds of the timed rows: by the columns `key`, then by provider (and part, if not "all")."""
    times: dict[tuple[object, ...], dict[str, float]] = {}
    for row in table[table["p50_us"].notna()].to_dict("records"):
        name = row["provider"] if row["part"] == "all" else f"{row['provider']} {row['part']}"
        times.setdefault(tuple(row[column] for column in key), {})[name] = row["p50_us"]
    return times


def _median(values: list[float]) -> float:
    ordered = sorted(value for value in values if math.isfinite(value))
    if not ordered:
        return math.nan
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _blocks(table: "pd.DataFrame") -> str:
    groups = [group for group in _times(table, "layer", "n", "dtype", "direction").values() if "union conv" in group]
    ratios = [
        _median([group[name] / group["union conv"] for group in groups if name in group])
        for name in ("gating (index_copy)", "gating (fused)")
    ]
    if not all(math.isfinite(ratio) for ratio in ratios):
        return ""
    return (
        f"gating takes {ratios[0]:.1f} times union's time with index_copy and {ratios[1]:.1f} times with the fused "
        f"scatter (medians of {len(groups)} blocks and directions)."
    )


def _gating(table: "pd.DataFrame") -> str:
    whole = table[table["part"] == "all"]
    forms = ("union", "gating (selected)", "gating (expanded)", "gating (triton)")
    ratios = [
        group["auto"] / min(group[form] for form in forms if form in group)
        for group in _times(whole, "layer", "n", "dtype", "mask_profile").values()
        if "auto" in group and any(form in group for form in forms)
    ]
    if not ratios:
        return ""
    return (
        f"what `auto` chooses takes {_median(ratios):.2f} times as long as the best form (median of {len(ratios)} "
        f"layers; worst {max(ratios):.2f})."
    )


def _batch_norm(table: "pd.DataFrame") -> str:
    from bench.suites.bn import ALL, PAPER_SAVINGS

    model = table[table["provider"] == "model"].set_index("mask_profile")["model_bytes"]
    saved = [
        f"{1 - model.loc[[name]].iloc[-1] / model.loc[['dense']].iloc[-1]:.0%} (paper {paper:.0%})"
        for ratio, paper in PAPER_SAVINGS.items()
        if (name := f"paper:{ratio} (synthetic)") in model.index and "dense" in model.index
    ]
    dense = table[(table["layer"] == ALL) & (table["mask_profile"] == "dense")]
    ratios = [
        group["ours"] / group["eager"]
        for group in _times(dense, "direction", "n").values()
        if {"ours", "eager"} <= {*group}
    ]
    texts = [f"pruning at the paper's ratios saves {', '.join(saved)} of its bytes, by model"] if saved else []
    texts += [f"ours takes {_median(ratios):.2f} times eager's time over all layers"] if ratios else []
    return f"{'; '.join(texts)}." if texts else ""


def _sgd(table: "pd.DataFrame") -> str:
    times = _times(table, "direction")
    lasso = times.get(("SGD+lasso",), {})
    others = {name: time for name, time in lasso.items() if name != "ours"}
    if "ours" not in lasso or not others:
        return ""
    best = min(others, key=lambda name: others[name])
    return f"an update with the lasso inside takes {lasso['ours'] / others[best]:.2f} times as long as by {best}."


def _step(table: "pd.DataFrame") -> str:
    pruned = table[(table["flops_ratio"] < 1) & table["eta"].notna()]
    etas = [
        f"{provider} {_median(list(group['eta'])):.2f}" for provider, group in pruned.groupby("provider", sort=False)
    ]
    if not etas:
        return ""
    return f"of the FLOPs saved, this share of time is saved (eta, medians of {len(pruned)} rows): {', '.join(etas)}."


def _memory(table: "pd.DataFrame") -> str:
    steps = table[(table["direction"] == "step") & table["peak_memory"].notna()]
    dense = steps[steps["mask_profile"] == "dense"].set_index(["layer", "provider"])["peak_memory"]
    shares = {}
    for row in steps.to_dict("records"):
        key = row["layer"], row["provider"]
        if row["mask_profile"] != "dense" and key in dense.index:
            shares[f"{row['layer']}, {row['mask_profile']}"] = row["peak_memory"] / dense.loc[[key]].iloc[-1]
    if not shares:
        return ""
    least, most = (choose(shares, key=lambda name: shares[name]) for choose in (min, max))
    return (
        f"a training step of the pruned network has {shares[least]:.0%} ({least}) to {shares[most]:.0%} ({most}) of "
        "dense's bytes."
    )


def _native(table: "pd.DataFrame") -> str:
    others = ("torch foreach + autograd", "eager")
    ratios = [
        min(group[other] for other in others if other in group) / group["native"]
        for group in _times(table, "layer", "n", "direction", "threads").values()
        if "native" in group and any(other in group for other in others)
    ]
    if not ratios:
        return ""
    return (
        f"the CPU library is {_median(ratios):.1f} times as fast as PyTorch's operators ({min(ratios):.1f} to "
        f"{max(ratios):.1f}; median of {len(ratios)} pieces of work)."
    )


SENTENCES: dict[str, Callable[["pd.DataFrame"], str]] = {
    "fig7": _blocks, "gating": _gating, "bn": _batch_norm, "sgd": _sgd, "step": _step, "memory": _memory,
    "native": _native,
}  # fmt: skip


def _trainings(path: Path) -> str:
    """The table of the paper's main result, Tab. 1, and at medium scale `claim`: every run, by method."""
    if not path.exists():
        return ""
    import pandas as pd

    table = pd.read_csv(path)
    names = {"prunetrain": "PruneTrain", "target": "PruneTrain to a target", "proximal": "proximal",
             "proximal-target": "proximal to a target"}  # fmt: skip
    pruned = table[table["method"].isin(list(names))].dropna(subset=["inference_flops_ratio", "accuracy_delta"])
    texts = []
    for method, runs in pruned.groupby("method", sort=False):
        flops, points = (
            " to ".join(dict.fromkeys(format(value, form) for value in (runs[column].min(), runs[column].max())))
            for column, form in (("inference_flops_ratio", ".0%"), ("accuracy_delta", "+.1f"))
        )
        texts.append(
            f"{names[str(method)]} keeps {flops} of the inference FLOPs, at {points} points of accuracy against dense"
        )
    plumbing = "; plumbing only: after a few short epochs all networks are half trained"
    return f"{'; '.join(texts)}{plumbing * ('small' in set(table['scale']))}." if texts else ""


def _costs(path: Path) -> str:
    if not path.exists():
        return ""
    table = rows.newest(rows.read(path))
    sums = table.groupby(["n", "dtype", "provider"], sort=False)["model_bytes"].sum()
    shares = {
        provider: _median([sums[n, dtype, provider] / sums[n, dtype, "union"] for n, dtype, name in sums.index
                           if name == provider and (n, dtype, "union") in sums.index])
        for provider in dict.fromkeys(table["provider"]) if provider != "union"
    }  # fmt: skip
    return f"bytes of a step, of union's: {', '.join(f'{name} {share:.0%}' for name, share in shares.items())}."


def _kernels(path: Path) -> str:
    if not path.exists():
        return ""
    import pandas as pd

    table = pd.read_csv(path)
    spilled = int(table["spill_stores"].sum() + table["spill_loads"].sum())
    architectures, atomics = table["arch"].nunique(), table["atomics"].sum()
    return f"{len(table)} for {architectures} architectures, {spilled} bytes spilled, {atomics} atomic instructions."
