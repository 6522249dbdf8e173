"""Fig. 11: what data-parallel training sends at every step, for 16 to 256 GPUs. A model; nothing is timed.

Bytes that each GPU sends to all-reduce the gradients: around one ring (`cost.ring_all_reduce_bytes`) and in two levels
(`cost.hierarchical_all_reduce_bytes`). The seconds in `v100_projection_us` follow from the latencies and bandwidths of
`cost.Cluster`, whose values and sources stand there. Dense against the three paper profiles, or, with --profile RUN,
epoch by epoch from the gradient bytes and steps that the run logged, so that a grown mini-batch counts too. `n` is the
number of GPUs, `flops_ratio` is empty, `time_ratio` is of the projected seconds.
"""

from pathlib import Path
from typing import Any

from bench import profiles
from bench.harness import Session
from prunetrain_kernels.cost import (
    Cluster,
    gradient_bytes,
    hierarchical_all_reduce_bytes,
    hierarchical_all_reduce_seconds,
    ring_all_reduce_bytes,
)
from prunetrain_kernels.errors import InputError

GPUS = (16, 32, 64, 128, 256)
RING, HIERARCHICAL = "ring", "hierarchical"
PAPER = "the paper saves 55 % on average at ratio 0.25, at every number of GPUs (section 5.3)"


def run(session: Session) -> None:
    cluster = Cluster()
    print(f"  {cluster}")
    lines: list[dict[str, Any]] = []
    if session.profile.folder is not None:
        lines = _of_run(session, session.profile.folder, cluster)
    else:
        chosen = [profiles.parse(f"paper:{ratio}") for ratio in profiles.PAPER_INFERENCE_FLOPS]
        if session.profile.label not in [profile.label for profile in chosen]:
            chosen.append(session.profile)
        dense = 0
        for profile in chosen:
            pruned = profiles.prune(profile)
            if not dense:
                dense = gradient_bytes(pruned.dense)
                lines += _rows(profile.network, "step", "dense", dense, dense, cluster)
            size = gradient_bytes(pruned.model)
            lines += _rows(profile.network, "step", profile.label, size, dense, cluster)
            print(f"  {profile.label:<34} {size / 1e6:.1f} of {dense / 1e6:.1f} MB of gradients: "
                  f"{1 - size / dense:.0%} saved at the end")  # fmt: skip
    print(f"  {PAPER}")
    session.write("comm", lines)


def _rows(
    layer: str,
    direction: str,
    label: str,
    size: int,
    dense: int,
    cluster: Cluster,
    steps: int = 1,
    dense_steps: int = 1,
) -> list[dict[str, Any]]:
    lines = []
    for gpus in GPUS:
        seconds = steps * hierarchical_all_reduce_seconds(size, gpus, cluster)
        before = dense_steps * hierarchical_all_reduce_seconds(dense, gpus, cluster)
        by = {
            RING: ring_all_reduce_bytes(size, gpus),
            HIERARCHICAL: hierarchical_all_reduce_bytes(size, gpus, cluster.gpus_per_node),
        }
        for provider, sent in by.items():
            projected = {"v100_projection_us": 1e6 * seconds, "time_ratio": seconds / before}
            lines.append(
                {
                    "layer": layer, "provider": provider, "direction": direction, "dtype": "fp32", "n": gpus,
                    "mask_profile": label, "mode": "model", "model_bytes": int(steps * sent),
                    **(projected if provider == HIERARCHICAL else {}),
                }
            )  # fmt: skip
    return lines


def _of_run(session: Session, folder: Path, cluster: Cluster) -> list[dict[str, Any]]:
    from prunetrain_kernels.train.run_log import read_run

    log = read_run(folder).log
    if not len(log):
        raise InputError(f"{folder} has no finished epoch yet; train on, or use --profile paper")
    sizes = [(int(size), int(steps)) for size, steps in zip(log["gradient_bytes"], log["steps"], strict=True)]
    dense, dense_steps = sizes[0]
    lines = []
    for epoch, (size, steps) in enumerate(sizes, start=1):
        name = f"epoch {epoch}"
        lines += _rows(name, "epoch", session.profile.label, size, dense, cluster, steps, dense_steps)
    sent, whole = sum(size * steps for size, steps in sizes), dense * dense_steps * len(sizes)
    print(f"  {session.profile.label}: {1 - sent / whole:.0%} of the gradient bytes of the dense network saved in all")
    return lines
