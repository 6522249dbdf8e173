"""Fig. 11: bytes of gradients that training sends between GPUs, modelled (section 5.3)."""

from pathlib import Path
from typing import TYPE_CHECKING

from plots import common, paper

if TYPE_CHECKING:
    import pandas as pd

FILES = ("fig11.csv",)
PAPER_GPUS = 128  # of the paper's Fig. 11
PANELS = (("bytes_per_iteration_ratio", "per iteration"), ("bytes_per_epoch_ratio", "per epoch"))


def figures(folder: Path) -> list[common.Drawing]:
    numbers = (*common.RUN_NUMBERS, "epoch", "gpus", *(column for column, _ in PANELS), "average_saving")
    rows = common.read(folder / FILES[0], common.RUN_TEXTS, numbers, common.RUN_OPTIONAL)
    return [common.Drawing(f"fig11-{folder.name}", draw(rows))]


def draw(rows: "pd.DataFrame") -> "common.Drawn | None":
    """Bytes per iteration and per epoch over epochs, and the average saving by the number of GPUs; a line per run.

    rows: columns of a run, and epoch, gpus, bytes_per_iteration_ratio and bytes_per_epoch_ratio (of dense),
    average_saving (share of the dense run's bytes, the same in all rows of a run and gpus).
    """
    from matplotlib.lines import Line2D

    rows = rows.dropna(subset=["epoch", "gpus"])
    if rows.empty:
        return None
    labels = common.run_labels(rows)
    dense = set(rows.loc[rows["method"] == "dense", "run"])
    looks = common.looks(["dense" if run in dense else run for run in labels])
    gpus = PAPER_GPUS if PAPER_GPUS in set(rows["gpus"]) else rows["gpus"].max()
    figure = common.new_figure(2.6 + 0.17 * -(-len(labels) // 2))
    *over_epochs, saving = figure.subplots(1, 3)
    for ax, (column, name) in zip(over_epochs, PANELS, strict=True):
        for run in labels:
            curve = rows[(rows["run"] == run) & (rows["gpus"] == gpus)].sort_values("epoch")
            look = looks["dense" if run in dense else run]
            ax.plot(curve["epoch"], 100 * curve[column], drawstyle="steps-mid", **common.line_look(look))
        ax.set(title=f"Sent {name}", xlabel="epoch", ylabel="bytes, % of dense")
        ax.set_ylim(0, max(105, 105 * rows[column].max()))
        ax.grid(axis="y")
        common.whole_epochs(ax)
    savings = {}
    for run, label in labels.items():
        by_gpus = rows[rows["run"] == run].groupby("gpus")["average_saving"].mean()
        savings[label] = by_gpus.mean()
        if run not in dense:
            saving.plot(by_gpus.index, 100 * by_gpus, markersize=4, **looks[run])
    counts = sorted(rows["gpus"].unique())
    saving.set_xscale("log", base=2)
    saving.set_xticks(counts, [f"{count:g}" for count in counts])
    saving.minorticks_off()
    saving.set(title="Saved, whole training", xlabel="GPUs", ylabel="bytes, % of dense", ylim=(0, 100))
    saving.grid(axis="y")
    common.paper_level(saving, 100 * paper.COMMUNICATION_SAVING, "paper, section 5.3: 55 % at ratio 0.25")
    handles = [
        Line2D([], [], **common.line_look(looks["dense" if run in dense else run]), label=common.plain(label))
        for run, label in labels.items()
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, handlelength=3)
    texts = [f"{label} {common.percent(share)}" for label, share in savings.items() if share == share]
    return common.finish(
        figure,
        f"Gradient bytes that a model of hierarchical ring all-reduce sends, {common.subject(rows)}, as the paper's "
        f"Fig. 11: {gpus:g} GPUs on the left, normalised to the dense network. Modelled, not measured. A mini-batch "
        f"that grows lowers the bytes per epoch. Saved over the whole training: {'; '.join(texts)}; the paper, "
        f"ResNet-50 on ImageNet at ratio 0.25: 55 % at every number of GPUs. {common.training_note(rows)}",
    )
