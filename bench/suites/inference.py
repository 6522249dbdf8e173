"""Tab. 2: images per second in inference, dense against pruned, in batches of 10 and 100.

The paper measured trained networks in mixed precision on a TITAN Xp (section 5.1). Here channels are drawn at random
(or a real run's, with --profile): CIFAR networks keep the share of every space that leaves the inference FLOPs which
Tab. 1 gives for CIFAR-100, ResNet-50 those for ImageNet at the three ratios. What can be compared is the speedup.

    eager            evaluation mode
    compile          the same through torch.compile
    eager, BN folded batch norms folded into the convolutions before them, as one would deploy it

On CUDA weights and images are in --dtype (fp32: as they are), channels_last; on a CPU they are contiguous, fp32 unless
--dtype bf16 says otherwise; fp16, which CPUs emulate, is refused. Calls are replays of CUDA graphs where `mode` says
so: launches then cost less than in the paper's loop.

`p50_us` is of a batch of `n` images; the floor is max(input, weight and output of each convolution once, FLOPs).
`flops_ratio` is of inference FLOPs, `time_ratio` compares with the dense network by the same provider. Of Tab. 2 as
printed, three PruneTrain cells for batches of 10 repeat the dense number beside another speedup (1442, 5534, 5197): of
those only the speedup is quoted.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bench import profiles
from bench.harness import COMPILED, EAGER, Provider, Session, against_dense, attempt, compiled, measure
from bench.profiles import Profile
from prunetrain_kernels.cost import count_flops

FOLDED = "eager, BN folded"
BATCHES = (10, 100)

# Tab. 1, inference FLOPs on CIFAR-100
CIFAR100_FLOPS = {"resnet32": 0.54, "resnet50": 0.31, "vgg11": 0.43, "vgg13": 0.48}

# Tab. 2: (dense images/s, pruned images/s or None where the cell repeats the dense number, speedup) by network or
# ImageNet ratio, then by batch; TITAN Xp, mixed precision
TAB2: Mapping[str, Mapping[int, tuple[int, int | None, float]]] = {
    "resnet32": {10: (3038, 4081, 1.34), 100: (18587, 24759, 1.33)},
    "resnet50": {10: (1442, None, 1.18), 100: (7847, 11865, 1.51)},
    "vgg11": {10: (5534, None, 1.44), 100: (15489, 23878, 1.54)},
    "vgg13": {10: (5197, None, 1.38), 100: (12845, 21075, 1.64)},
    "paper:0.25": {10: (610, 937, 1.53), 100: (772, 1194, 1.55)},
    "paper:0.2": {10: (610, 833, 1.36), 100: (772, 1047, 1.36)},
    "paper:0.1": {10: (610, 661, 1.08), 100: (772, 813, 1.05)},
}


@dataclass(frozen=True)
class Case:
    """A network and its pruned forms, each with its row of Tab. 2 if it has one."""

    network: str
    image: int
    classes: int
    pruned: tuple[tuple[Profile, str | None], ...]


def cases(session: Session) -> list[Case]:
    """ImageNet ResNet-50 by the session's profile, CIFAR networks by Tab. 1; a real run's network by that run."""
    side = 64 if session.quick else 224
    chosen = session.profile
    imagenet: tuple[tuple[Profile, str | None], ...]
    if chosen.run is None and chosen.label.startswith("paper"):
        ratios = ("0.25",) if session.quick else tuple(profiles.PAPER_INFERENCE_FLOPS)
        imagenet = tuple((profiles.parse(f"paper:{ratio}"), f"paper:{ratio}") for ratio in ratios)
    elif chosen.network == profiles.NETWORK:
        imagenet = ((chosen, None),)
    else:
        imagenet = ((profiles.parse("paper"), "paper:0.25"),)
    cases_chosen = [Case(profiles.NETWORK, side, 1000, imagenet)]
    for network, target in CIFAR100_FLOPS.items():
        label = f"Tab. 1 CIFAR-100, {target:.0%} FLOPs (synthetic)"
        cases_chosen.append(Case(network, 32, 100, ((Profile(label, network, 32, 100, target=target), network),)))
    if chosen.run is not None and chosen.network != profiles.NETWORK:
        cases_chosen = [case for case in cases_chosen if case.network != chosen.network]
        cases_chosen.insert(0, Case(chosen.network, chosen.image, chosen.classes, ((chosen, None),)))
    if session.quick:
        cases_chosen = [case for case in cases_chosen if case.network not in ("resnet50", "vgg13")]
    return cases_chosen


def run(session: Session) -> None:
    if session.device.type == "cpu" and session.dtype == torch.float16:
        session.refused.append("inference: a CPU only emulates fp16; use --dtype bf16 or fp32")
        print(f"  REFUSED {session.refused[-1]}")
        return
    batches = (session.batch,) if session.batch else BATCHES[:1] if session.quick else BATCHES
    for case in cases(session):
        if not session.wants(case.network):
            continue
        dense = Dense()
        shapes = [(profiles.dense(case.network, case.image, case.classes), None), *case.pruned]
        for profile, row in shapes:
            attempt(
                session,
                f"{case.network} {profile.label}",
                lambda c=case, p=profile, r=row, d=dense: _measure(session, c, p, r, d, batches),  # type: ignore[misc]
            )


@dataclass
class Dense:
    """The dense network's inference FLOPs per image, and its microseconds by (provider, batch)."""

    flops: float = 0
    p50: dict[tuple[str, int], float] = field(default_factory=dict)


def _measure(
    session: Session, case: Case, profile: Profile, row: str | None, dense: Dense, batches: tuple[int, ...]
) -> None:
    on_gpu = session.device.type == "cuda"
    dtype, name = session.dtype, session.dtype_name
    layout = torch.channels_last if on_gpu else torch.contiguous_format
    plain = profiles.prune(profile, case.image).model
    sizes = profiles.conv_shapes(plain, case.image)
    flops = count_flops(plain, (torch.zeros(2, 3, case.image, case.image),)).inference
    is_dense = not dense.flops
    if is_dense:
        dense.flops = flops
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(max(*batches, 16), 3, case.image, case.image, generator=generator)
    images = images.to(session.device, memory_format=layout)
    plain = plain.to(session.device, memory_format=layout)  # type: ignore[call-overload]
    settle(plain, images[:16])
    wide = copy.deepcopy(plain).double()
    models = {EAGER: plain.to(dtype), FOLDED: folded(wide).to(dtype)}
    for batch in batches:
        x = images[:batch].to(dtype)
        providers = {kind: _provider(model, x) for kind, model in models.items()}
        if session.compile:
            providers[COMPILED] = _provider(compiled(session, models[EAGER]), x)
        with torch.no_grad():
            reference = wide(images[:batch].double())

        def compare(p50: Mapping[str, float], batch: int = batch) -> dict[str, dict[str, Any]]:
            if is_dense:
                dense.p50.update({(kind, batch): time for kind, time in p50.items()})
            before = {kind: dense.p50.get((kind, batch)) for kind in p50}
            return {
                kind: against_dense(flops / dense.flops, time / old if (old := before[kind]) is not None else None)
                for kind, time in p50.items()
            }

        timings = measure(
            session, "inference", providers, [reference], EAGER,
            what={
                "layer": case.network, "direction": f"inference of {batch}", "dtype": name, "n": batch,
                "layout": "channels_last" if on_gpu else "contiguous", "h": case.image, "w": case.image,
                "mask_profile": profile.label,
            },
            model_bytes=dtype.itemsize * sum(shape.elements(batch) for shape in sizes),
            flops=flops * batch,
            compare=compare,
        )  # fmt: skip
        _print({kind: t.p50 for kind, t in timings.items()}, batch, dense, None if is_dense else flops, row)


def _provider(model: Any, x: Tensor) -> Provider:
    @torch.no_grad()
    def run() -> Tensor:
        logits: Tensor = model(x)
        return logits

    return Provider(run, lambda: [run().float()])


def _print(p50: Mapping[str, float], batch: int, dense: Dense, flops: float | None, row: str | None) -> None:
    for kind, time in p50.items():
        text = f"    {kind}: {batch / time * 1e6:.4g} images/s"
        if flops is not None and (kind, batch) in dense.p50:
            text += f", {dense.p50[kind, batch] / time:.2f}x dense with {flops / dense.flops:.0%} of the FLOPs"
        print(text)
    if row is not None and batch in TAB2[row] and p50:
        before, after, speedup = TAB2[row][batch]
        shown = f"{before} -> {after} images/s" if after is not None else f"{before} images/s dense"
        print(f"    paper, Tab. 2, TITAN Xp: {shown}, {speedup:.2f}x")


def settle(model: nn.Module, images: Tensor) -> None:
    """Running statistics from these images, then evaluation mode: an untrained network would overflow fp16 without."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 1.0
    model.train()
    with torch.no_grad():
        model(images)
    model.eval()
    for m, momentum in zip(norms, before, strict=True):
        m.momentum = momentum


class _Tracer(fx.Tracer):
    """Leaves closed what stands in place of a removed branch, too."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not list(m.children())


def folded(model: nn.Module) -> nn.Module:
    """A copy of a model in evaluation mode, its batch norms inside the convolutions that they follow."""
    model = copy.deepcopy(model).eval()
    program = fx.GraphModule(model, _Tracer().trace(model))
    modules = dict(program.named_modules())
    for node in list(program.graph.nodes):
        if node.op != "call_module" or type(modules[node.target]) is not nn.BatchNorm2d:
            continue
        source = node.args[0]
        if source.op != "call_module" or type(modules[source.target]) is not nn.Conv2d or len(source.users) > 1:
            continue
        fused = fuse_conv_bn_eval(modules[source.target], modules[node.target])
        program.set_submodule(source.target, fused)
        node.replace_all_uses_with(source)
        program.graph.erase_node(node)
    program.delete_all_unused_submodules()
    program.recompile()
    return program
