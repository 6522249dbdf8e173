"""One reconfiguration of a network in training: momentum in the optimizer, 40 % of every space's channels dead.

    ours                 choosing the channels, then prunetrain_kernels.prune.reconfigure: in place, and with the output
                         measured before and after
    ours, whole          all that PruneTrain.reconfigure does: also the new graph, its FLOPs and its lasso
    rebuild              the authors' way: a new network of the new widths, the surviving weights, batch norm statistics
                         and momentum copied tensor by tensor, a new optimizer. Channels are chosen as by ours. Their
                         code writes the network into a source file first and imports it, which is left out here
    torch-pruning        Torch-Pruning, where it is installed: builds its dependency graph, prunes the same channels.
                         It does not know the optimizer, so momentum is lost and a new one begins

Each call works on a fresh copy, made outside of the time, and is timed on its own (`mode` is "single-calls"), until the
device is done. The floor: every weight read once to find the dead channels, surviving weights and momentum read and
written. Checked in float64 on the CPU: outputs equal to those of the network with its dead channels at zero, momentum
(but Torch-Pruning's) to the surviving part of what it was.
"""

import copy
import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench import profiles, timing
from bench.harness import OURS, Session, against_roof, as_time, attempt, timed
from bench.profiles import Profile
from prunetrain_kernels.graph import ChannelGraph, trace_channels
from prunetrain_kernels.graph.keep import Keep
from prunetrain_kernels.graph.spaces import expand
from prunetrain_kernels.inputs import mapped
from prunetrain_kernels.models import build
from prunetrain_kernels.models.init import initialize
from prunetrain_kernels.prune import reconfigure
from prunetrain_kernels.train.prunetrain import PruneTrain

WHOLE, REBUILT, TORCH_PRUNING = "ours, whole", "rebuild", "torch-pruning"
SHARE = 0.6
THRESHOLD = 1e-4
LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 1e-4
CALLS, QUICK_CALLS = 10, 3


@dataclass(frozen=True)
class Network:
    name: str
    image: int
    classes: int


def networks(session: Session) -> list[Network]:
    if session.quick:
        return [Network("resnet20", 32, 10), Network("vgg11", 32, 10)]
    return [Network("imagenet_resnet50", 224, 1000), Network("resnet50", 32, 10), Network("vgg11", 32, 10)]


def run(session: Session) -> None:
    for network in networks(session):
        if session.wants(network.name):
            attempt(session, network.name, lambda n=network: _measure(session, n))  # type: ignore[misc]


# -- a network to reconfigure ------------------------------------------------------------------------------------------


@dataclass
class Training:
    """A network in the middle of its training, and what was found out about it before."""

    network: Network
    model: nn.Module
    optimizer: torch.optim.Optimizer
    graph: ChannelGraph

    def copied(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> "Training":
        """The same on copies of all tensors, on a device, in a dtype."""
        model = copy.deepcopy(self.model).to(device, dtype)
        optimizer = _sgd(model)
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        for before, now in pairs:
            buffer = self.optimizer.state[before]["momentum_buffer"]
            optimizer.state[now]["momentum_buffer"] = buffer.to(device, dtype, copy=True)
        graph = self.graph
        if device is not None or dtype is not None:
            example = mapped(graph.example_inputs, lambda x: x.to(device, dtype))
            graph = trace_channels(model, example)
        return Training(self.network, model, optimizer, graph)

    def momentum(self) -> dict[str, Tensor]:
        return {
            name: self.optimizer.state[p]["momentum_buffer"]
            for name, p in self.model.named_parameters()
            if "momentum_buffer" in self.optimizer.state.get(p, {})
        }


def training(network: Network, profile: Profile) -> Training:
    """A network with what its profile does not keep at zero, statistics and momentum at random; fp32, on the CPU."""
    torch.manual_seed(0)
    model = build(network.name, network.classes)
    graph = trace_channels(model, (torch.randn(2, 3, network.image, network.image),))
    kept = profiles.masks(profile, model, graph).kept
    optimizer = _sgd(model)
    with torch.no_grad():
        for layer in graph.layers.values():
            weight = model.get_submodule(layer.name).weight
            assert isinstance(weight, Tensor)
            weight[~kept[layer.output]] = 0
            weight[:, ~kept[layer.input].repeat_interleave(layer.block)] = 0
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
                module.bias.normal_(std=0.1)
        for p in model.parameters():
            optimizer.state[p]["momentum_buffer"] = torch.randn_like(p)
    return Training(network, model, optimizer, graph)


def _sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY)


# -- reconfigured by each provider -------------------------------------------------------------------------------------

Reconfigure = Callable[[Training], Training]  # the timed function; it may change its argument in place and return it


def by_ours(job: Training) -> Training:
    reconfigure(job.model, job.optimizer, job.graph.keep(job.model, THRESHOLD))
    return job


def by_prunetrain(prunetrain: PruneTrain, job: Training) -> Training:
    prunetrain.reconfigure()
    return job


def by_rebuilding(job: Training) -> Training:
    """A new network of the widths that are left, with copies of the surviving tensors, and a new optimizer."""
    keep = job.graph.keep(job.model, THRESHOLD)
    assert not keep.removed  # no branch of these networks is dead
    with torch.device("meta"):  # the old widths are not to be paid for
        model = build(job.network.name, job.network.classes)
    device = next(job.model.parameters()).device
    where: dict[str, tuple[Tensor, Tensor | None]] = {}  # by module: kept outputs (or channels), kept inputs
    with device:
        for layer in keep.graph.layers.values():
            outputs, inputs = keep.channels[layer.output], expand(keep.channels[layer.input], layer.block)
            old = job.model.get_submodule(layer.name)
            model.set_submodule(layer.name, _resized(old, len(inputs), len(outputs)))
            where[layer.name] = (outputs.to(device), inputs.to(device))
        for follower in keep.graph.followers.values():
            channels = expand(keep.channels[follower.space], follower.block)
            model.set_submodule(follower.name, nn.BatchNorm2d(len(channels)))
            where[follower.name] = (channels.to(device), None)
    initialize(model)  # as every network here begins
    model.to(next(job.model.parameters()).dtype)
    optimizer = _sgd(model)
    for name, (kept_out, kept_in) in where.items():
        for key, tensor in _tensors(model.get_submodule(name)):
            before = getattr(job.model.get_submodule(name), key)
            tensor.data.copy_(_surviving(before, kept_out, kept_in))
            if isinstance(tensor, nn.Parameter):
                momentum = job.optimizer.state[before]["momentum_buffer"]
                optimizer.state[tensor]["momentum_buffer"] = _surviving(momentum, kept_out, kept_in).clone()
    model.train(job.model.training)
    return Training(job.network, model, optimizer, job.graph)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _resized(layer: nn.Module, inputs: int, outputs: int) -> nn.Module:
    """A new layer of other channels, otherwise like this one."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(inputs, outputs, bias=layer.bias is not None)
    assert isinstance(layer, nn.Conv2d)
    window: dict[str, Any] = {"kernel_size": layer.kernel_size, "stride": layer.stride, "padding": layer.padding}
    return nn.Conv2d(inputs, outputs, **window, bias=layer.bias is not None)


def _surviving(tensor: Tensor, outputs: Tensor, inputs: Tensor | None) -> Tensor:
    if tensor.dim() == 0:  # a counter
        return tensor
    kept = tensor.detach().index_select(0, outputs)
    return kept.index_select(1, inputs) if inputs is not None and tensor.dim() > 1 else kept


def by_torch_pruning(tp: Any, job: Training) -> Training:
    keep = job.graph.keep(job.model, THRESHOLD)
    dependencies = tp.DependencyGraph().build_dependency(job.model, job.graph.example_inputs)
    for space, kept in zip(keep.graph.spaces, keep.channels, strict=True):
        if len(kept) == space.size or not space.producers:
            continue
        dead = torch.ones(space.size, dtype=torch.bool).index_fill_(0, kept, value=False).nonzero()[:, 0].tolist()
        layer = job.model.get_submodule(space.producers[0])
        prune = tp.prune_conv_out_channels if isinstance(layer, nn.Conv2d) else tp.prune_linear_out_channels
        dependencies.get_pruning_group(layer, prune, idxs=dead).prune()
    return Training(job.network, job.model, _sgd(job.model), job.graph)


def torch_pruning() -> Any:
    """Torch-Pruning, or None where it is not installed."""
    try:
        return importlib.import_module("torch_pruning")
    except ImportError:
        return None


def prepared_by(kind: str, job: Training, tp: Any) -> Reconfigure:
    """The function of a provider that is timed; what it needs once per training is made here, outside of the time."""
    if kind == WHOLE:
        prunetrain = PruneTrain(
            job.model, job.optimizer, job.graph.example_inputs, penalty_ratio=0, threshold=THRESHOLD
        )
        return partial(by_prunetrain, prunetrain)
    ways: dict[str, Reconfigure] = {
        OURS: by_ours,
        REBUILT: by_rebuilding,
        TORCH_PRUNING: partial(by_torch_pruning, tp),
    }
    return ways[kind]


# -- measuring ---------------------------------------------------------------------------------------------------------


def _measure(session: Session, network: Network) -> None:
    uniform = profiles.parse(f"uniform:{SHARE}")
    profile = profiles.for_network(uniform, network.name, network.image, network.classes)
    original = training(network, profile)
    tp = torch_pruning()
    kinds = [OURS, WHOLE, REBUILT, *([TORCH_PRUNING] if tp is not None else [])]
    if tp is None:
        print(f"  {TORCH_PRUNING} is not installed, so not compared (pip install torch-pruning)")

    wide = original.copied(dtype=torch.float64)
    keep = wide.graph.keep(wide.model, THRESHOLD)
    x = torch.randn(2, 3, network.image, network.image, dtype=torch.float64)
    expected = _outputs(wide.model, x)
    errors: dict[str, float] = {}
    for kind in kinds:
        job = wide.copied(dtype=torch.float64)
        done = prepared_by(kind, job, tp)(job)
        error = compare(done, wide, keep, x, expected, momentum=kind != TORCH_PRUNING)
        if error is None or not error.passes(timing.Check(0.0, 0.0), torch.float64):
            session.refused.append(f"{network.name} reconfigure by {kind}: wrong result")
            print(f"  REFUSED {session.refused[-1]}: {error or 'other shapes'}")
            continue
        errors[kind] = error.error
    if not errors:
        return

    before = sum(p.numel() for p in original.model.parameters())
    after = _parameters_after(original)
    on_device = original.copied(device=session.device)
    calls = QUICK_CALLS if session.quick else CALLS
    samples: dict[str, list[float]] = {kind: [] for kind in errors}
    for attempt_number in range(calls + 1):  # the first is not counted
        for kind, taken in samples.items():
            job = on_device.copied()
            call = prepared_by(kind, job, tp)
            _wait(session.device)
            start = time.perf_counter()
            call(job)
            _wait(session.device)
            if attempt_number:
                taken.append((time.perf_counter() - start) * 1e6)
    timings = {kind: timing.summary(timing.CALLS, taken) for kind, taken in samples.items()}
    session.modes.add(timing.CALLS)
    lines = []
    for kind, t in timings.items():
        session.p50[network.name, kind, "reconfigure"] = t.p50
        lines.append(
            {
                "layer": network.name, "provider": kind, "direction": "reconfigure", "dtype": "fp32",
                "layout": "contiguous", "n": 2, "h": network.image, "w": network.image, "mask_profile": profile.label,
                **timed(t), **against_roof(session, t.p50, 4 * before + 16 * after, 0, "fp32"), "error": errors[kind],
            }
        )  # fmt: skip
    session.write("reconfigure", lines)
    texts = [f"{kind} {as_time(t.p50)}{' (momentum lost)' * (kind == TORCH_PRUNING)}" for kind, t in timings.items()]
    print(f"  {network.name}, {before:,} -> {after:,} parameters: {'  '.join(texts)}", flush=True)


def compare(
    done: Training, wide: Training, keep: Keep, x: Tensor, expected: Tensor, *, momentum: bool
) -> timing.Check | None:
    """Outputs, and momentum if it is to survive, against the network before; None if there are other parameters."""
    results, references = [_outputs(done.model, x)], [expected]
    if momentum:
        survivors = expected_momentum(wide, keep)
        now = done.momentum()
        if {n: t.shape for n, t in now.items()} != {n: t.shape for n, t in survivors.items()}:
            return None
        results += [now[name] for name in survivors]
        references += list(survivors.values())
    return timing.check(results, references)


def expected_momentum(wide: Training, keep: Keep) -> Mapping[str, Tensor]:
    """The momentum of each parameter's kept channels: by indexing, in no provider's way."""
    places: dict[str, Sequence[Tensor]] = {}
    for layer in keep.graph.layers.values():
        places[layer.name] = (keep.channels[layer.output], expand(keep.channels[layer.input], layer.block))
    for follower in keep.graph.followers.values():
        places[follower.name] = (expand(keep.channels[follower.space], follower.block),)
    momenta = {}
    for name, buffer in wide.momentum().items():
        indices = places[name.rpartition(".")[0]][: buffer.dim()]
        momenta[name] = buffer[torch.meshgrid(*indices, indexing="ij")] if len(indices) > 1 else buffer[indices[0]]
    return momenta


def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    was = model.training
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(x)
    model.train(was)
    return logits


def _parameters_after(original: Training) -> int:
    return sum(p.numel() for p in by_ours(original.copied()).model.parameters())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
