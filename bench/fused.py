"""The fused operators on ImageNet ResNet-50's shapes, beside eager PyTorch and torch.compile; and the targets.

Three parts, in order of value:

    optimizer    one update of all parameters: our SGD, our SGD with the lasso inside, torch's SGD, torch's SGD with the
                 lasso's penalty by autograd. Floor: 20 bytes per fp32 parameter (design section 5).
    batch_norm   BN, BN + ReLU and BN + add + ReLU, forward and backward, for every distinct layer. Floor: the two-pass
                 count; a row `all layers` sums them, each as often as the network has it.
    channels     channel_gather, channel_scatter and channel_scatter_add against index_select, index_copy and index_add,
                 half of the channels live.

Every provider is compared with float64 before it is timed; one that fails is named and not written. `ratio_to_roof` is
model bytes / time / the bandwidth of a copy measured in the same run.
"""

import copy
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import roof, rows, timing
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.graph import trace_channels
from prunetrain_kernels.models.resnet import imagenet_resnet50, resnet20
from prunetrain_kernels.ops import launch
from prunetrain_kernels.ops.batch_norm_act import batch_norm_act
from prunetrain_kernels.ops.channel_index import ChannelIndex, channel_gather, channel_scatter, channel_scatter_add
from prunetrain_kernels.optim import SGD
from prunetrain_kernels.regularizer import GroupLasso

DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}
PARTS = ("optimizer", "batch_norm", "channels")
OURS, EAGER, COMPILED = "ours", "eager", "compile"


@dataclass(frozen=True)
class Settings:
    """Options of `python -m bench fused`; None takes the device's default."""

    device: str | None = None
    quick: bool = False
    dtype: str = "fp16"
    batch: int | None = None
    compile: bool | None = None
    only: str = ""
    out: Path | None = None


@dataclass
class Session:
    """A run: where it measures, what it found; `p50` holds microseconds by (layer, provider, direction)."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    quick: bool
    compile: bool
    out: Path
    peak: float
    environment: dict[str, Any]
    p50: dict[tuple[str, str, str], float] = field(default_factory=dict)
    modes: set[str] = field(default_factory=set)
    refused: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)


def run(settings: Settings) -> int:
    """Measures, appends rows as it goes, prints the verdict; the exit code is 0, or 1 if a provider was refused.

    Raises:
        InputError: no such device, batch, dtype or part.
    """
    session = _session(settings)
    print(
        f"{session.environment['device']}, torch {torch.__version__}, copies at {session.peak:.0f} GB/s; {session.out}"
    )
    parts = {"optimizer": optimizer, "batch_norm": batch_norm, "channels": channels}
    try:
        for name, part in parts.items():
            if settings.only in ("", name):
                print(f"\n{name}")
                attempt(session, name, lambda part=part: part(session))  # type: ignore[misc]
    finally:  # a run that is cut short still says how far it came
        print("\n" + verdict(session))
    return 1 if session.refused else 0


def _session(settings: Settings) -> Session:
    device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device that this PyTorch can use; leave --device out or name cpu")
    if launch.INTERPRET:
        raise InputError(
            "TRITON_INTERPRET=1 has kernels interpreted, thousands of times slower; unset it and run again"
        )
    if settings.batch is not None and settings.batch < 1:
        raise InputError(f"--batch must be at least 1, not {settings.batch}")
    if settings.only not in ("", *PARTS):
        raise InputError(f"--only takes one of {', '.join(PARTS)}, not {settings.only!r}")
    dtype = DTYPES[settings.dtype]
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        raise InputError("this GPU has no bf16; use --dtype fp16")
    out = settings.out or rows.results_folder(device) / "fused.csv"
    rows.append(out, [])  # says now, not after minutes, that it cannot be written
    peak = roof.copy_bandwidth(device, 16 * 2**20 if settings.quick and device.type == "cpu" else None)
    return Session(
        device=device,
        dtype=dtype,
        batch=settings.batch or (2 if settings.quick else 256),
        quick=settings.quick,
        compile=device.type == "cuda" if settings.compile is None else settings.compile,
        out=out,
        peak=peak,
        environment=rows.environment(device),
    )


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Provider:
    """One way to compute something: `run` is timed, `outputs` gives what is compared with float64, before."""

    run: Callable[[], object]
    outputs: Callable[[], Sequence[Tensor]]


def measure(
    session: Session,
    providers: Mapping[str, Provider],
    references: Sequence[Tensor],
    baseline: str,
    what: Mapping[str, Any],
    model_bytes: float,
) -> None:
    """Checks every provider against float64 references, times those that pass side by side, and appends their rows.

    Args:
        baseline: the provider whose own error, doubled, is the tolerance: PyTorch's.
        what: columns of `rows.WHAT` that the rows share; layer and direction among them.
    """
    checks = {name: timing.check(provider.outputs(), references) for name, provider in providers.items()}
    passed = {}
    for name, provider in providers.items():
        if checks[name].passes(checks[baseline], DTYPES[what["dtype"]]):
            passed[name] = provider
            continue
        session.refused.append(f"{what['layer']} {what['direction']} by {name}: wrong result")
        print(f"  REFUSED {session.refused[-1]}: {checks[name]}, {baseline}: {checks[baseline]}")
    if not passed:
        return
    milliseconds, rounds = (2.0, 2) if session.quick else (15.0, 3)
    runs = {name: provider.run for name, provider in passed.items()}
    timings = timing.side_by_side(runs, session.device, milliseconds, rounds)
    found = []
    for name, t in timings.items():
        session.p50[what["layer"], name, what["direction"]] = t.p50
        session.modes.add(t.mode)
        found.append(
            {
                "suite": "fused", "provider": name, **what, "mode": t.mode, "samples": t.samples, "p20_us": t.p20,
                "p50_us": t.p50, "p80_us": t.p80, "launches": timing.launches(passed[name].run, session.device),
                "model_bytes": int(model_bytes), "peak_gb_s": session.peak,
                "ratio_to_roof": _gb_s(model_bytes, t.p50) / session.peak, "error": checks[name].error,
                **session.environment,
            }
        )  # fmt: skip
    rows.append(session.out, found)
    shown = "  ".join(f"{row['provider']} {row['p50_us']:.1f} us ({row['ratio_to_roof']:.0%})" for row in found)
    print(f"  {what['layer']:<34} {what['direction']:<9} {shown}", flush=True)


def attempt(session: Session, what: str, run: Callable[[], None]) -> None:
    """Runs one piece; what goes wrong in it is reported, at the end too, and the other pieces go on."""
    try:
        run()
    except InputError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        session.refused.append(f"{what}: {type(error).__name__} {lines[0]}")
        print(f"  FAILED {session.refused[-1]}", flush=True)
        traceback.print_exc(limit=-4)


def _gb_s(size: float, microseconds: float) -> float:
    return size / (microseconds * 1e-6) / 1e9


@contextmanager
def _prepared(device: torch.device) -> Iterator[None]:
    """Autograd runs a backward on the stream of its forward, which must be the one that is captured later."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(timing.side_stream()):
        yield
    torch.cuda.synchronize()


# -- optimizer ---------------------------------------------------------------------------------------------------------

MOMENTUM, WEIGHT_DECAY, COEFFICIENT, LR = 0.9, 1e-4, 1e-4, 1e-3
STEPS_CHECKED = 3
BYTES_PER_PARAMETER = 20  # read p, g, b; write p, b: what SGD must move, and the lasso inside it does not add to


def plain_penalty(weights: Sequence[Tensor], groups: Sequence[Any], eps: float) -> Tensor:
    """R(W) as one writes it in plain PyTorch: some small operators per layer, by autograd."""
    total: Tensor | float = 0.0
    for weight, group in zip(weights, groups, strict=True):
        square = weight.view(weight.shape[0], weight.shape[1] // group.block, -1).square().sum(2)
        for used, dim in ((group.inputs, 0), (group.outputs, 1)):
            if used:
                total = total + (square.sum(dim) + eps).sqrt().sum()
    assert isinstance(total, Tensor)
    return total


def optimizer(session: Session) -> None:
    """One update of all parameters by each optimizer; weights are fp32, whatever --dtype says of activations."""
    torch.manual_seed(0)
    model, side = (resnet20(10), 32) if session.quick else (imagenet_resnet50(1000), 64)
    graph = trace_channels(model, (torch.zeros(1, 3, side, side),))
    model.to(session.device)
    gradients = [torch.randn_like(p) for p in model.parameters()]
    count = sum(p.numel() for p in model.parameters())
    what = {"layer": "all parameters", "count": 1, "dtype": "fp32", "layout": "contiguous", "n": count}
    session.p50["floor", "model", "SGD"] = BYTES_PER_PARAMETER * count / session.peak / 1e3
    plain: dict[str, Provider] = {}
    inside: dict[str, Provider] = {}
    fused = {"torch fused": {"fused": True}} if session.device.type == "cuda" else {}
    for name, options in {"torch foreach": {"foreach": True}, **fused}.items():
        plain[name] = _update(model, graph, gradients, torch.optim.SGD, options)
        inside[name + " + autograd"] = _update(model, graph, gradients, torch.optim.SGD, options, by_autograd=True)
    plain[OURS] = _update(model, graph, gradients, SGD, {})
    inside[OURS] = _update(model, graph, gradients, SGD, {}, regularized=True)
    for providers, direction in ((plain, "SGD"), (inside, "SGD+lasso")):
        reference = _reference_update(model, graph, gradients, lasso=direction != "SGD")
        baseline = next(name for name in providers if name.startswith("torch foreach"))
        measure(session, providers, reference, baseline, {**what, "direction": direction}, BYTES_PER_PARAMETER * count)


def _update(
    model: nn.Module,
    graph: Any,
    gradients: Sequence[Tensor],
    optimizer_class: type[torch.optim.SGD],
    options: dict[str, Any],
    *,
    regularized: bool = False,
    by_autograd: bool = False,
) -> Provider:
    """A provider on a copy of the model, whose gradients are there already."""
    model = copy.deepcopy(model)
    parameters = list(model.parameters())
    optimizer = optimizer_class(parameters, LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, **options)
    lasso = GroupLasso(model, (), graph=graph)
    if regularized:
        assert isinstance(optimizer, SGD)
        optimizer.regularize_with(lasso, COEFFICIENT)

    def run() -> None:
        if by_autograd:
            (COEFFICIENT * plain_penalty(*lasso.weights(), lasso.eps)).backward()
        optimizer.step()

    def outputs() -> list[Tensor]:
        start = [p.detach().clone() for p in parameters]
        with _prepared(parameters[0].device):
            for _ in range(STEPS_CHECKED):
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if parameter.grad is None:
                        parameter.grad = torch.empty_like(parameter)
                    parameter.grad.copy_(gradient)
                run()
        return [p.detach() - s for p, s in zip(parameters, start, strict=True)]

    return Provider(run, outputs)


def _reference_update(model: nn.Module, graph: Any, gradients: Sequence[Tensor], *, lasso: bool) -> list[Tensor]:
    """What the parameters move in STEPS_CHECKED steps, in float64, from the formulas alone."""
    model = copy.deepcopy(model).double()
    regularizer = GroupLasso(model, (), graph=graph)
    parameters = list(model.parameters())
    start = [p.detach().clone() for p in parameters]
    buffers = [torch.zeros_like(p) for p in parameters]
    for step in range(STEPS_CHECKED):
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient.double()
        if lasso:
            (COEFFICIENT * plain_penalty(*regularizer.weights(), regularizer.eps)).backward()
        with torch.no_grad():
            for p, b in zip(parameters, buffers, strict=True):
                assert p.grad is not None
                g = p.grad + WEIGHT_DECAY * p
                b.copy_(MOMENTUM * b + g if step else g)
                p.sub_(LR * b)
    return [p.detach() - s for p, s in zip(parameters, start, strict=True)]


# -- batch norm --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A batch norm of the network: its activation for one image, what follows it, and how many there are of it."""

    channels: int
    side: int
    follows: str  # "BN", "BN+ReLU" or "BN+add+ReLU"
    count: int

    @property
    def name(self) -> str:
        return f"{self.follows} {self.channels}x{self.side}x{self.side}"


def layers(image: int = 224) -> list[Layer]:
    """ResNet-50's distinct batch norms, the largest share of the bytes first."""
    found: Counter[tuple[int, int, str]] = Counter()

    def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        last = name.rsplit(".", 1)[-1]
        follows = {"bn1": "BN+ReLU", "bn2": "BN+ReLU", "bn3": "BN+add+ReLU"}.get(last, "BN")
        return lambda module, inputs, output: found.update([(output.shape[1], output.shape[2], follows)])

    with torch.device("meta"):
        model = imagenet_resnet50(1000)
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(note(name))
        model(torch.zeros(2, 3, image, image))
    some = [Layer(channels, side, follows, count) for (channels, side, follows), count in found.items()]
    return sorted(some, key=lambda layer: -layer.count * layer.channels * layer.side**2)


def batch_norm_bytes(elements: int, size: int, follows: str, direction: str) -> float:
    """Two passes (design section 5): 3E + 5E; with add and ReLU 4E + 6E, and a bit per element once and twice."""
    if follows == "BN+add+ReLU":
        return elements * (4 * size + 1 / 8 if direction == "forward" else 6 * size + 2 / 8)
    return elements * size * (3 if direction == "forward" else 5)


def eager_batch_norm(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    """As models/resnet.py writes it."""
    y = F.batch_norm(x, mean, var, weight, bias, True)
    if residual is not None:
        y = residual + y
    return F.relu(y) if relu else y


def our_batch_norm(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    return batch_norm_act(x, mean, var, weight, bias, training=True, residual=residual, relu=relu)


def batch_norm(session: Session) -> None:
    """Every distinct layer, then the sum over the network."""
    chosen = layers(32 if session.quick else 224)
    session.modes.clear()
    names = [EAGER, OURS] + [COMPILED] * session.compile
    sums: dict[tuple[str, str], float] = dict.fromkeys(((n, d) for n in names for d in ("forward", "backward")), 0.0)
    model_bytes = dict.fromkeys(("forward", "backward"), 0.0)
    whole = set(names)
    for layer in chosen:
        attempt(session, layer.name, lambda layer=layer: _measure_layer(session, layer, names))  # type: ignore[misc]
        for direction in model_bytes:
            elements = session.batch * layer.channels * layer.side**2
            size = batch_norm_bytes(elements, session.dtype.itemsize, layer.follows, direction)
            model_bytes[direction] += layer.count * size
            for name in names:
                time_of = session.p50.get((layer.name, name, direction))
                if time_of is None:
                    whole.discard(name)  # a sum over some of the layers would mislead
                else:
                    sums[name, direction] += layer.count * time_of
    for name in names:
        if name not in whole:
            print(f"  {name} has no sum: not all of its layers were measured")
            continue
        for direction, size in model_bytes.items():
            p50 = sums[name, direction]
            session.p50["all layers", name, direction] = p50
            row = {
                "suite": "fused", "layer": "all layers", "count": sum(layer.count for layer in chosen),
                "provider": name, "direction": direction, "dtype": session.name, "layout": "channels_last",
                "n": session.batch, "mode": "sum of " + "+".join(sorted(session.modes)), "p50_us": p50,
                "model_bytes": int(size), "peak_gb_s": session.peak,
                "ratio_to_roof": _gb_s(size, p50) / session.peak, **session.environment,
            }  # fmt: skip
            rows.append(session.out, [row])
            print(f"  {'all layers':<34} {direction:<9} {name} {p50 / 1e3:.3f} ms ({row['ratio_to_roof']:.0%})")
    session.p50["bytes", "model", "both"] = sum(model_bytes.values())


def _measure_layer(session: Session, layer: Layer, names: Sequence[str]) -> None:
    torch.manual_seed(0)
    device, shape = session.device, (session.batch, layer.channels, layer.side, layer.side)

    def activation() -> Tensor:
        return torch.randn(shape, device=device, dtype=session.dtype).contiguous(memory_format=torch.channels_last)

    relu, adds = layer.follows.endswith("ReLU"), "add" in layer.follows
    x, dy = activation() * 2 + 1, activation()
    residual = activation().requires_grad_() if adds else None
    x.requires_grad_()
    weight = torch.rand(layer.channels, device=device).add_(0.5).requires_grad_()
    bias = torch.randn(layer.channels, device=device).requires_grad_()
    inputs = [x, weight, bias] + ([residual] if residual is not None else [])
    what = {
        "layer": layer.name, "count": layer.count, "dtype": session.name, "layout": "channels_last", "n": session.batch,
        "h": layer.side, "w": layer.side, "c_full": layer.channels, "c_live": layer.channels, "mask_profile": "dense",
    }  # fmt: skip
    functions = {EAGER: eager_batch_norm, OURS: our_batch_norm, COMPILED: _compiled(session)}
    forward: dict[str, Provider] = {}
    backward: dict[str, Provider] = {}
    for name in names:
        mean, var = torch.zeros(layer.channels, device=device), torch.ones(layer.channels, device=device)
        arguments = (x, mean, var, weight, bias, residual, relu)
        forward[name], backward[name] = _both_directions(functions[name], arguments, inputs, dy, device)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    zeros = torch.zeros(layer.channels, device=device, dtype=torch.float64)
    y = eager_batch_norm(wide[0], zeros, zeros + 1, wide[1], wide[2], wide[3] if adds else None, relu)
    references = torch.autograd.grad(y, wide, dy.double())
    for providers, expected, direction in ((forward, [y.detach()], "forward"), (backward, references, "backward")):
        size = batch_norm_bytes(x.numel(), session.dtype.itemsize, layer.follows, direction)
        measure(session, providers, expected, EAGER, {**what, "direction": direction}, size)


def _both_directions(
    function: Callable[..., Tensor],
    arguments: tuple[Any, ...],
    inputs: Sequence[Tensor],
    dy: Tensor,
    device: torch.device,
) -> tuple[Provider, Provider]:
    """Providers of a function's forward, which records for autograd, and of its backward."""
    kept: list[Tensor] = []

    def output() -> Tensor:
        if not kept:
            with _prepared(device):
                kept.append(function(*arguments))
        return kept[0]

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(kept[0], inputs, dy, retain_graph=True)

    def gradients() -> tuple[Tensor, ...]:
        output()
        with _prepared(device):
            return backward()

    return Provider(lambda: function(*arguments), lambda: [output().detach()]), Provider(backward, gradients)


def _compiled(session: Session) -> Callable[..., Tensor]:
    """Eager PyTorch's expression through torch.compile, which specialises to this layer's shapes."""
    if not session.compile:
        return eager_batch_norm
    import torch._dynamo
    import torch._functorch.config

    torch._dynamo.reset()  # layers have the same code: without it torch.compile gives up after a few shapes
    torch._functorch.config.donated_buffer = False  # the backward is timed again and again
    result: Callable[..., Tensor] = torch.compile(eager_batch_norm, dynamic=False)
    return result


# -- channels ----------------------------------------------------------------------------------------------------------

LIVE = 0.5


def channels(session: Session) -> None:
    """The outputs of ResNet-50's four stages, a random half of their channels live."""
    side = 8 if session.quick else 56
    for width in (256, 512, 1024, 2048):
        attempt(
            session,
            f"{width} channels",
            lambda width=width: _measure_channels(session, width, max(1, side * 256 // width)),  # type: ignore[misc]
        )


def _measure_channels(session: Session, width: int, side: int) -> None:
    torch.manual_seed(0)
    live = int(width * LIVE)
    index = ChannelIndex(torch.randperm(width)[:live].sort().values, width, session.device)
    chosen = index.index.long()

    def activation(count: int) -> Tensor:
        x = torch.randn(session.batch, count, side, side, device=session.device, dtype=session.dtype)
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
    for name, (functions, reference, elements) in cases.items():
        what = {
            "layer": f"{name} {width}x{side}x{side}", "count": 1, "direction": "forward", "dtype": session.name,
            "layout": "channels_last", "n": session.batch, "h": side, "w": side, "c_full": width, "c_live": live,
            "mask_profile": f"uniform:{LIVE} (synthetic)",
        }  # fmt: skip
        providers = {
            provider: Provider(function, lambda function=function: [function()])  # type: ignore[misc]
            for provider, function in functions.items()
        }
        measure(session, providers, [reference], EAGER, what, elements * session.dtype.itemsize)


# -- verdict -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A figure and its bound: at most `bound` if `at_most`, else at least."""

    name: str
    value: float | None
    bound: float
    at_most: bool

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        if self.value is None:
            return f"{self.name:<58} {'-':>7}  {sign} {self.bound:<5} not measured"
        met = self.value <= self.bound if self.at_most else self.value >= self.bound
        result = "met" if met else f"missed by {abs(self.value / self.bound - 1):.1%}"
        return f"{self.name:<58} {self.value:>7.3f}  {sign} {self.bound:<5} {result}"


def targets(session: Session) -> list[Target]:
    """The issue's targets with what this run measured."""

    def ratio(above: float | None, below: float | None) -> float | None:
        return above / below if above is not None and below else None

    def both(provider: str) -> float | None:
        forward, backward = (session.p50.get(("all layers", provider, d)) for d in ("forward", "backward"))
        return forward + backward if forward is not None and backward is not None else None

    p50 = session.p50.get
    sgd, lasso = p50(("all parameters", OURS, "SGD")), p50(("all parameters", OURS, "SGD+lasso"))
    torch_fused = p50(("all parameters", "torch fused", "SGD"))
    floor = session.p50.get(("floor", "model", "SGD"))
    ours = both(OURS)
    moved = p50(("bytes", "model", "both"))
    achieved = _gb_s(moved, ours) / session.peak if moved and ours else None
    return [
        Target("SGD + lasso / our SGD alone, time", ratio(lasso, sgd), 1.05, True),
        Target("SGD + lasso / bandwidth floor (20 bytes a parameter), time", ratio(lasso, floor), 1.25, True),
        Target("our SGD / torch's fused SGD, time", ratio(sgd, torch_fused), 1.05, True),
        Target("SGD + lasso / torch's fused SGD alone, time", ratio(lasso, torch_fused), 1.05, True),
        Target("BN (+ add) (+ ReLU) all layers / copy bandwidth", achieved, 0.90, False),
        Target("BN (+ add) (+ ReLU) all layers, eager / ours, time", ratio(both(EAGER), ours), 1.3, False),
        Target("BN (+ add) (+ ReLU) all layers, compile / ours, time", ratio(both(COMPILED), ours), 1.0, False),
    ]


def verdict(session: Session) -> str:
    """The targets as a table, and what was refused."""
    lines = [f"{'target':<58} {'value':>7}  bound    verdict", *map(str, targets(session))]
    if session.device.type == "cpu":
        lines.append("Targets are for GPUs. On a CPU these figures show that the script works, and compare references.")
    if session.quick:
        lines.append("--quick: tiny shapes, which say nothing about speed.")
    lines += [f"REFUSED {what}" for what in session.refused]
    return "\n".join(lines)
