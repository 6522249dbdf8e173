"""Fig. 9: bytes of one training step, dense and pruned, and the batch that pruning makes room for.

By `cost.step_memory`: fixed + per_image * batch, from parameters, gradients, momentum, buffers, inputs and what
autograd saves; not in it are workspaces and gradients of activations, so that more seems to fit than does. Rows of
provider "model" hold these, and on CUDA rows of "measured" the allocator's peak in a real forward and backward pass
beside it. fp32 throughout. Bytes are in the column `peak_memory`, `n` is the batch; nothing is timed.

    step            bytes at the paper's batch: 64 per GPU for ImageNet, 128 for CIFAR
    fits dense      the largest multiple of 32 that needs no more than the dense network at that batch, and its bytes
    fits 11 GB      the largest that fits the paper's 1080 Ti (11 GiB)

The paper grows ImageNet's batch from 64 to 96 and 128, CIFAR-100's ResNet-50 from 128 to 320 in the end (captions of
Fig. 9), as a trained network shrinks; here channels are drawn at random to 80, 60 and 40 % of every space.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bench import profiles
from bench.harness import Session, attempt
from prunetrain_kernels.cost import MemoryModel, count_flops, measure_step_memory_cuda, step_memory

SHARES = (0.8, 0.6, 0.4)
GRANULARITY = 32
CARD = 11 * 2**30  # bytes of an NVIDIA 1080 Ti (section 5.3)
MODEL, MEASURED = "model", "measured"
STEP, FITS_DENSE, FITS_CARD = "step", "fits dense", "fits 11 GB"


@dataclass(frozen=True)
class Network:
    """A network, its images and the mini-batch that the paper begins with."""

    name: str
    image: int
    classes: int
    images: int


def networks(session: Session) -> list[Network]:
    imagenet = Network("imagenet_resnet50", 224, 1000, session.images(64, 64))
    names = ("resnet50", "resnet32", "vgg11", "vgg13")
    networks_chosen = [imagenet, *(Network(name, 32, 100, session.images(128, 128)) for name in names)]
    return networks_chosen[:2] if session.quick else networks_chosen


def run(session: Session) -> None:
    for network in networks(session):
        if not session.wants(network.name):
            continue
        shapes = [profiles.dense(network.name, network.image, network.classes)]
        for share in SHARES if not session.quick else SHARES[1:2]:
            uniform = profiles.parse(f"uniform:{share}")
            shapes.append(profiles.for_network(uniform, network.name, network.image, network.classes))
        if (
            not session.quick
            and session.profile.network == network.name
            and session.profile.label not in {p.label for p in shapes}
        ):
            shapes.append(session.profile)
        dense = Dense()
        for profile in shapes:
            attempt(
                session,
                f"{network.name} {profile.label}",
                lambda n=network, p=profile, d=dense: _measure(session, n, p, d),  # type: ignore[misc]
            )


@dataclass
class Dense:
    """The dense network's training FLOPs per image, and the bytes that it needs at the first batch."""

    flops: float = 0
    needs: int = 0


def _measure(session: Session, network: Network, profile: profiles.Profile, dense: Dense) -> None:
    model = profiles.prune(profile, network.image).model
    example = (torch.zeros(2, 3, network.image, network.image),)
    flops = count_flops(model, example).training
    memory = step_memory(model, example)
    is_dense = not dense.flops
    if is_dense:
        dense.flops, dense.needs = flops, memory.bytes(network.images)
    what = {
        "layer": network.name, "dtype": "fp32", "layout": "contiguous", "h": network.image, "w": network.image,
        "mask_profile": profile.label, "mode": "model", "flops_ratio": flops / dense.flops,
    }  # fmt: skip
    lines: list[dict[str, Any]] = [
        {**what, "provider": MODEL, "direction": STEP, "n": network.images, "peak_memory": memory.bytes(network.images)}
    ]
    text = f"{gib(memory.bytes(network.images))} at {network.images}"
    for direction, budget in ((FITS_DENSE, dense.needs), (FITS_CARD, CARD)):
        batch = largest_batch(memory, budget)
        if batch:
            needs = memory.bytes(batch)
            lines.append({**what, "provider": MODEL, "direction": direction, "n": batch, "peak_memory": needs})
        text += f"; {direction}: {batch or 'not even ' + str(GRANULARITY)}"
    session.write("memory", lines)
    print(f"  {network.name:<20} {profile.label:<26} {text}", flush=True)
    if session.device.type == "cuda":
        needs = measured(model, network, session.device)
        row = {**what, "provider": MEASURED, "direction": STEP, "n": network.images, "peak_memory": needs}
        session.write("memory", [row])
        print(f"  {'':<20} {'':<26} {gib(needs)} measured", flush=True)


def measured(model: nn.Module, network: Network, device: torch.device) -> int:
    """Bytes at the allocator's peak in a step on the GPU, momentum added."""
    model.to(device)
    example = torch.zeros(2, 3, network.image, network.image, device=device)

    def loss(logits: Any) -> torch.Tensor:
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=device))

    batches = (max(2, network.images // 2), max(3, network.images))
    return measure_step_memory_cuda(model, (example,), loss, batches=batches).bytes(network.images)


def largest_batch(memory: MemoryModel, budget: int) -> int:
    """The largest multiple of GRANULARITY whose step fits a budget in bytes; 0 if none does."""
    return max(0, int((budget - memory.fixed) // memory.per_image // GRANULARITY * GRANULARITY))


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
