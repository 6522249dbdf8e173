"""A whole training step: forward, loss, backward, update with the group lasso, gradients zeroed.

Networks dense, and pruned at random to 80, 60 and 40 % of the channels of every space, unrounded and to multiples of 8;
and by the session's profile where it is of that network. Their weights are drawn anew, so that channels which rounding
kept do not stand out.

    eager            torch.optim.SGD (fused on CUDA, else foreach) and the lasso's penalty by autograd
    compile          the same, the model through torch.compile
    ours             prunetrain_kernels: nn.fuse(model), optim.SGD with the lasso inside the update
    eager, no lasso  for the dense network only: what one trains without PruneTrain

`flops_ratio` is that of the training FLOPs. `time_ratio` and `eta` compare with the dense step of the same provider.
The printed line says beside it what a pruned step takes of "eager, no lasso" on the dense network: lasso inside,
against none, which is what PruneTrain saves.

On CUDA forward and loss run under autocast in --dtype (fp32: none), without a gradient scaler; gradients are zeroed in
place, since CUDA graphs replay on fixed addresses; tensors are channels_last. On a CPU everything is fp32, and
contiguous: oneDNN 3.12 (torch 2.13) with AVX2 writes beyond its memory in the weight gradient of a strided 1x1
convolution with fewer than 8 channels_last input channels, which pruned networks have.

The floor in `roof_us` is a sum, as these are different operators one after the other: training FLOPs at the matmul
peak, plus 8 passes over the input of each batch norm (`cost.batch_norm_bytes`) and 20 bytes per parameter for the
update at the copy bandwidth; `model_bytes` are those of the last two. `v100_projection_us` is the same sum with a
V100's peaks.

Checked before timing: logits and the update of every eighth parameter in the first step of `CHECKED` images, against
float64. The lasso's coefficient is half as strong there as the loss, so that one left out is seen; time does not depend
on it. A ReLU whose input is zero to rounding may open for one provider and not for another, which moves the update of a
few images by a percent or three: `GRANTED`.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import profiles, roof, timing
from bench.harness import COMPILED, EAGER, OURS, Provider, Session, against_dense, attempt, compiled, measure, prepared
from prunetrain_kernels.cost import batch_norm_bytes, count_flops
from prunetrain_kernels.graph import ChannelGraph, trace_channels
from prunetrain_kernels.models.init import initialize
from prunetrain_kernels.nn import fuse
from prunetrain_kernels.optim import SGD
from prunetrain_kernels.regularizer import GroupLasso

NO_LASSO = "eager, no lasso"
UNFUSED = "ours, not fused"
SHARES = (0.8, 0.6, 0.4)
FEW = 2  # networks that --few keeps: ResNet-50 and ResNet-32
ROUND_TO = 8
LARGE = ("imagenet_resnet50", "vgg11")  # slow enough for --quick to leave out their rounded shapes
BYTES_PER_PARAMETER = 20  # read p, g, b; write p, b (design section 5)
LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 1e-4
TIMED_LR = 1e-5  # many steps on one batch: weights stay where they are
CHECKED = 32  # images; float64 activations of a whole batch would not fit beside the others
EVERY = 8  # parameters; conv, batch norm weight and bias come by turns, so that all kinds are among them
GRANTED = timing.Check(error=0.03, outliers=1e-3)


@dataclass(frozen=True)
class Network:
    """A network of the paper, its images and its mini-batch."""

    name: str
    image: int
    classes: int
    images: int


def networks(session: Session) -> list[Network]:
    """The paper's (section 5), with its mini-batch for CIFAR and that of four GPUs for ImageNet, on a GPU."""
    if session.quick:
        return [
            Network("imagenet_resnet50", 64, 1000, session.images(0, 4)),  # 32 pixels end as one: no statistics
            Network("resnet32", 32, 10, session.images(0, 8)),
            Network("vgg11", 32, 10, session.images(0, 4)),
        ]
    imagenet = Network("imagenet_resnet50", 224, 1000, session.images(256 if session.device.type == "cuda" else 8))
    names = ("resnet32", "resnet50", "vgg11", "vgg13")
    return [imagenet, *(Network(name, 32, 10, session.images(128)) for name in names)]


def shapes(session: Session, network: Network) -> list[tuple[profiles.Profile, int]]:
    """Profiles to prune by and what to round to; the dense one first, then the session's own."""
    uniform = [profiles.parse(f"uniform:{share}") for share in (SHARES if not session.quick else SHARES[1:2])]
    chosen = [profiles.for_network(p, network.name, network.image, network.classes) for p in uniform]
    of_session = session.profile
    if not session.quick and of_session.network == network.name and of_session.label not in {p.label for p in chosen}:
        chosen.insert(0, of_session)
    rounds = (1,) if session.quick and network.name in LARGE else (1, ROUND_TO)
    dense = profiles.dense(network.name, network.image, network.classes)
    if session.few:  # the session's profile where it is of this network, else the middle share
        return [(dense, 1), (chosen[0 if len(chosen) != len(SHARES) else 1], 1)]
    return [(dense, 1), *((profile, round_to) for profile in chosen for round_to in rounds)]


def run(session: Session) -> None:
    for network in networks(session)[: FEW if session.few else None]:
        if not session.wants(network.name):
            continue
        dense = Dense()
        for profile, round_to in shapes(session, network):
            label = profile.label + (f" rounded to {round_to}" if round_to > 1 else "")
            attempt(
                session,
                f"{network.name} {label}",
                lambda n=network, p=profile, r=round_to, label=label, d=dense: _measure(session, n, p, r, label, d),  # type: ignore[misc]
            )


@dataclass
class Dense:
    """The dense network's training FLOPs per image, and its microseconds per step by provider."""

    flops: float = 0
    p50: dict[str, float] = field(default_factory=dict)


def _measure(
    session: Session, network: Network, profile: profiles.Profile, round_to: int, label: str, dense: Dense
) -> None:
    model = profiles.prune(profile, network.image, round_to).model
    torch.manual_seed(0)
    initialize(model)
    model = model.to(memory_format=layout(session.device))  # type: ignore[call-overload]
    example = (torch.zeros(2, 3, network.image, network.image),)
    flops = count_flops(model, example).training
    is_dense = not dense.flops
    if is_dense:
        dense.flops = flops
    dtype, name = (session.dtype, session.dtype_name) if session.device.type == "cuda" else (torch.float32, "fp32")
    moved = batch_norm_bytes(model, example, network.images) * dtype.itemsize // 4
    updated = BYTES_PER_PARAMETER * sum(p.numel() for p in model.parameters())
    work = flops * network.images

    graph = trace_channels(model, (torch.zeros(2, 3, min(network.image, 64), min(network.image, 64)),))
    model.to(session.device)
    data = Data.random(network, session.device)
    reference = Reference.of(model, graph, data.first(CHECKED))
    task = Task(model, graph, data, reference, dtype)
    providers = {EAGER: task.provider(session, EAGER)}
    if session.compile:
        providers[COMPILED] = task.provider(session, COMPILED)
    providers[OURS] = task.provider(session, OURS)
    if is_dense:
        providers[NO_LASSO] = task.provider(session, NO_LASSO)
    references = {kind: reference.outputs(lasso=kind != NO_LASSO) for kind in providers}

    def compare(p50: Mapping[str, float]) -> dict[str, dict[str, Any]]:
        if is_dense:
            dense.p50.update(p50)
        columns = {}
        for kind, microseconds in p50.items():
            least = floor(session.roof, work, moved + updated, name)
            columns[kind] = {
                "roof_us": least,
                "ratio_to_roof": least / microseconds if least is not None else None,
                "v100_projection_us": floor(roof.V100, work, moved + updated, name),
                **against_dense(
                    flops / dense.flops, microseconds / dense.p50[kind] if kind in dense.p50 else None
                ),
            }  # fmt: skip
        return columns

    what = {
        "layer": network.name, "direction": "step", "dtype": name,
        "layout": str(layout(session.device)).removeprefix("torch.").removesuffix("_format"), "n": network.images,
        "h": network.image, "w": network.image, "mask_profile": label,
    }  # fmt: skip
    timings = measure(
        session, "step", providers, references, EAGER, what=what, model_bytes=moved + updated, flops=work,
        compare=compare, large=True,
        granted=GRANTED,
    )  # fmt: skip
    if timings and not is_dense:
        print(f"    {label}: {summary({kind: t.p50 for kind, t in timings.items()}, flops / dense.flops, dense)}")


def layout(device: torch.device) -> torch.memory_format:
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def floor(peaks: roof.Roof, flops: float, size: float, dtype: str) -> float | None:
    """Microseconds for the FLOPs and then for the bytes; None without a peak for the dtype."""
    parts = peaks.microseconds(0, flops, dtype), peaks.microseconds(size, 0, dtype)
    return None if parts[0] is None or parts[1] is None else parts[0] + parts[1]


def summary(p50: Mapping[str, float], flops_ratio: float, dense: Dense) -> str:
    """Time of a pruned step as a share of the same provider's dense one, and of the dense one without a lasso."""

    def compared(kind: str, baseline: str) -> str:
        if kind not in p50 or baseline not in dense.p50:
            return "not measured"
        columns = against_dense(flops_ratio, p50[kind] / dense.p50[baseline])
        eta = f" (eta {columns['eta']:.2f})" if columns["eta"] is not None else ""
        return f"{columns['time_ratio']:.0%}{eta}"

    times = ", ".join(f"{kind} {compared(kind, kind)}" for kind in p50)
    return f"FLOPs {flops_ratio:.0%} of dense; time {times}; ours of dense by {NO_LASSO}: {compared(OURS, NO_LASSO)}"


# -- one step, by each provider ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """A mini-batch: images (N, 3, H, W) and their classes (N,)."""

    images: Tensor
    classes: Tensor

    @staticmethod
    def random(network: Network, device: torch.device) -> "Data":
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(network.images, 3, network.image, network.image, generator=generator)
        classes = torch.randint(network.classes, (network.images,), generator=generator)
        return Data(images.to(device, memory_format=layout(device)), classes.to(device))

    def first(self, count: int) -> "Data":
        return Data(self.images[:count], self.classes[:count])


@dataclass(frozen=True)
class Reference:
    """The first step in float64, from the formulas: p moves by -lr (dL/dp + weight decay p + lambda dR/dp).

    Attributes:
        data: of the step.
        logits: (N, classes).
        moves: of each checked parameter -update / lr, with the lasso and without.
        coefficient: lambda.
    """

    data: Data
    logits: Tensor
    moves: Mapping[bool, Mapping[str, Tensor]]
    coefficient: float

    @staticmethod
    def of(model: nn.Module, graph: ChannelGraph, data: Data) -> "Reference":
        """The reference of a step of `model` on `data`."""
        wide = copy.deepcopy(model).double().train()
        logits = wide(data.images.double())
        F.cross_entropy(logits, data.classes).backward()  # type: ignore[no-untyped-call]
        parameters = dict(wide.named_parameters())
        plain = {n: p.grad + WEIGHT_DECAY * p.detach() for n, p in parameters.items() if p.grad is not None}
        lasso = GroupLasso(wide, (), graph=graph)
        pull = torch.autograd.grad(_penalty(lasso), list(parameters.values()), allow_unused=True)
        pulls = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), pull, strict=True)}
        names = [*list(parameters)[::EVERY], list(parameters)[-1]]
        both = [torch.cat([g[n].flatten() for n in names]).square().mean().sqrt() for g in (plain, pulls)]
        coefficient = 0.5 * float(both[0]) / max(float(both[1]), 1e-30)
        moves = {
            lasso: {n: plain[n] + (coefficient * pulls[n] if lasso else 0) for n in names} for lasso in (True, False)
        }
        return Reference(data, logits.detach(), moves, coefficient)

    def outputs(self, *, lasso: bool) -> list[Tensor]:
        return [self.logits, self.in_units(self.moves[lasso], lasso=lasso)]

    def in_units(self, moves: Mapping[str, Tensor], *, lasso: bool) -> Tensor:
        """All checked parameters in one, each in units of its own RMS, so that they weigh the same."""
        scales = {n: max(float(move.square().mean().sqrt()), 1e-30) for n, move in self.moves[lasso].items()}
        return torch.cat([moves[n].double().flatten() / scale for n, scale in scales.items()])


@dataclass(frozen=True)
class Task:
    """The training step that every provider computes, each on a copy of the model."""

    model: nn.Module
    graph: ChannelGraph
    data: Data
    reference: Reference
    dtype: torch.dtype

    def provider(self, session: Session, kind: str) -> Provider:
        """The step by one of EAGER, COMPILED, OURS, UNFUSED, NO_LASSO."""
        model = copy.deepcopy(self.model).train()
        parameters = dict(model.named_parameters())
        lasso = GroupLasso(model, (), graph=self.graph)
        coefficient = self.reference.coefficient
        if kind in (OURS, UNFUSED):
            if kind == OURS:
                fuse(model)
            ours = SGD(parameters.values(), LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
            ours.regularize_with(lasso, coefficient)
            optimizer: torch.optim.Optimizer = ours
        else:
            options = {"fused": True} if session.device.type == "cuda" else {"foreach": True}
            optimizer = torch.optim.SGD(parameters.values(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY, **options)
        forward = compiled(session, model) if kind == COMPILED else model
        by_autograd = kind in (EAGER, COMPILED)

        def step(data: Data) -> Tensor:
            with torch.autocast(session.device.type, self.dtype, enabled=self.dtype != torch.float32):
                logits: Tensor = forward(data.images)
                loss = F.cross_entropy(logits, data.classes)
            if by_autograd:
                loss = loss + coefficient * _penalty(lasso)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=session.device.type != "cuda")
            return logits.detach()

        def outputs() -> Sequence[Tensor]:
            start = {name: p.detach().clone() for name, p in parameters.items()}
            with prepared(session.device):
                logits = step(self.reference.data).float()
            moves = {name: (start[name] - p.detach()) / LR for name, p in parameters.items()}
            for group in optimizer.param_groups:
                group["lr"] = TIMED_LR
            return [logits, self.reference.in_units(moves, lasso=kind != NO_LASSO)]

        return Provider(lambda: step(self.data), outputs)


def _penalty(lasso: GroupLasso) -> Tensor:
    from bench.suites.sgd import plain_penalty

    return plain_penalty(*lasso.weights(), lasso.eps)
