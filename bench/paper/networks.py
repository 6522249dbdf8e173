"""What a run's last checkpoint says of the network: FLOPs under channel gating, density of channels and weights."""

import copy
import dataclasses
import json
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunetrain_kernels.cost import Flops, count_flops
from prunetrain_kernels.cost.convolution import Form
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.files import reason
from prunetrain_kernels.graph import trace_channels
from prunetrain_kernels.graph.gating import UNION, Choice
from prunetrain_kernels.graph.keep import Keep
from prunetrain_kernels.models import build
from prunetrain_kernels.nn import GatedConv2d
from prunetrain_kernels.prune.checkpoint import load_pruned, read_checkpoint
from prunetrain_kernels.prune.reconfigure import reconfigure
from prunetrain_kernels.train.run_log import Run

CIFAR_SIDE = 32


@dataclass(frozen=True)
class Density:
    """The part of one convolution that is left, as shares of the dense one.

    `channels`: input times output channels that remain; `weights`: those that remain and are not near zero.
    """

    layer: str
    channels: float
    weights: float


def final_network(run: Run) -> tuple[nn.Module, nn.Module, tuple[Tensor, ...]]:
    """The network as it was built, the one in the run's checkpoint, and an example image for both.

    Raises:
        InputError: the checkpoint is missing or damaged, or does not fit the run's options.
    """
    path = run.directory / "checkpoint.pt"
    tensors = read_checkpoint(path)["model"]
    first = next(tensor for tensor in tensors.values() if tensor.ndim == 4)
    last = [tensor for tensor in tensors.values() if tensor.ndim == 2][-1]  # its outputs are never pruned
    shape = first.shape[1], *_image_size(run.config)
    dense, final = (build(run.config["model"], last.shape[0], in_channels=shape[0]) for _ in range(2))
    load_pruned(path, final)
    example = (torch.zeros(1, *shape),)
    recorded = (run.summary or {}).get("inference_flops")
    counted = count_flops(final, example).inference
    if recorded is not None and recorded != counted:
        raise InputError(
            f"{path} is of a network with {counted} FLOPs per inference, and summary.json beside it says {recorded}; "
            "train it anew with --overwrite."
        )
    return dense, final, example


def _image_size(config: dict[str, Any]) -> tuple[int, int]:
    side = config.get("crop") or config.get("image_size")
    if side:
        return side, side
    synthetic = re.fullmatch(r"synthetic:\d+(?:x\d+)?x(\d+)x(\d+)", str(config.get("data")))
    return (int(synthetic[1]), int(synthetic[2])) if synthetic else (CIFAR_SIDE, CIFAR_SIDE)


# Where convolutions are gated. The paper gates the ends of residual branches (section 4.2, Fig. 5b and c: the first
# convolution of a path selects its inputs, the last one scatters its outputs); ours gates every convolution.
BRANCH_ENDS, EVERYWHERE = "branch ends", "everywhere"
COUNTS = "gating.json"  # beside a run whose weights are not there: what `gating_counts` said of them


def gating_flops(
    model: nn.Module,
    example_inputs: tuple[Tensor, ...],
    threshold: float,
    *,
    relative: bool = False,
    where: str = EVERYWHERE,
) -> Flops:
    """FLOPs per image of the network that channel gating makes of `model` (design section 4, paper Fig. 6).

    A copy is reconfigured under the policy "gating": of each convolution only the channels whose slices are not sparse
    are computed, those that the spaces keep remain. The linear layer behind a network is not gated. Selecting and
    placing channels costs no FLOPs.

    Args:
        model: a network that `trace_channels` can follow, in its shape after the last reconfiguration.
        example_inputs: the model's positional arguments.
        threshold, relative: what sparse is, as for `ChannelGraph.keep`.
        where: "branch ends": only on the sides of convolutions where residual branches begin and end, as in the paper;
            "everywhere": also between the convolutions of a branch, and of the first convolution.

    Raises:
        TraceError: the model cannot be traced.
    """
    gated = copy.deepcopy(model)
    graph = trace_channels(gated, example_inputs)
    keep = graph.keep(gated, threshold, relative=relative, policy="gating")
    if where == BRANCH_ENDS:
        keep = at_branch_ends(keep)
    reconfigure(gated, None, keep, zeroing_tolerance=math.inf)  # FLOPs are all that is asked of it
    for module in gated.modules():
        if isinstance(module, GatedConv2d):
            module.backend = "naive"  # computes nothing but live channels
    return count_flops(gated, example_inputs)


def at_branch_ends(keep: Keep) -> Keep:
    """The same choice with gates only where residual branches begin and end: on the channels that several layers
    produce, but for the convolution in front of all branches, which stands on none."""
    graph = keep.graph
    live, choices = dict(keep.live), dict(keep.choices)
    for name, choice in keep.choices.items():
        layer = graph.layers[name]
        spaces = layer.input, layer.output
        in_front = graph.spaces[layer.input].is_input
        ends = [len(graph.spaces[space].producers) > 1 and not in_front for space in spaces]
        live[name] = (
            keep.live[name][0] if ends[0] else keep.channels[layer.input],
            keep.live[name][1] if ends[1] else keep.channels[layer.output],
        )
        form = Form(choice.form.gates_input and ends[0], choice.form.gates_output and ends[1], choice.form.backend)
        choices[name] = Choice(form if form.gated else UNION, {}, choice.reason)
    return dataclasses.replace(keep, live=live, choices=choices)


def gating_counts(run: Run) -> dict[str, dict[str, float]] | None:
    """{policy: {"inference", "training": FLOPs per image}} of the policies "dense", "union", "branch ends" and
    "everywhere", from the run's checkpoint, or from `COUNTS` where that was left behind; None without either.

    Raises:
        InputError: either is damaged, or not the run's.
    """
    path = run.directory / COUNTS
    if not (run.directory / "checkpoint.pt").exists():
        if not path.exists():
            return None
        try:
            content: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))
            return {
                policy: {what: float(content[policy][what]) for what in ("inference", "training")}
                for policy in ("dense", "union", BRANCH_ENDS, EVERYWHERE)
            }
        except OSError as error:
            raise InputError(f"cannot read {path}: {reason(error)}.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged; restore it, or adopt the run again.") from error
    dense, final, example = final_network(run)
    threshold, relative = run.config["threshold"], run.config.get("relative", False)
    counted = {
        "dense": count_flops(dense, example),
        "union": count_flops(final, example),
        **{
            where: gating_flops(final, example, threshold, relative=relative, where=where)
            for where in (BRANCH_ENDS, EVERYWHERE)
        },
    }
    return {policy: {"inference": f.inference, "training": f.training} for policy, f in counted.items()}


def densities(run: Run) -> list[Density]:
    """The density of every convolution of the dense network, in its order (paper Fig. 12); 0 for removed ones.

    A weight is near zero when it is below the run's threshold in absolute value (with --relative: times the layer's
    largest weight). Both shares are of the dense layer, so `weights` is at most `channels`, and their quotient is the
    share of weights inside the remaining channels that matters.
    """
    dense, final, _ = final_network(run)
    threshold, relative = run.config["threshold"], run.config.get("relative", False)
    remaining = dict(final.named_modules())
    shares = []
    for name, module in dense.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        weight = getattr(remaining.get(name), "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 4:
            shares.append(Density(name, 0.0, 0.0))
            continue
        size = weight.detach().abs()
        limit = threshold * float(size.max()) if relative else threshold
        total = module.weight.numel()
        shares.append(Density(name, weight.numel() / total, int((size >= limit).sum()) / total))
    return shares
