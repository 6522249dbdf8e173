"""The native CPU library (csrc/cpu) against what serves without it and PyTorch's own, on one thread and on all.

    update   of the parameters of ImageNet ResNet-50, ResNet-32 and VGG-11: torch.optim.SGD (foreach, fused), the same
             with the lasso's penalty by autograd; ours with the lasso inside, native and by the reference
    layers   every distinct batch norm of ResNet-32, 128 images, channels_last: eager, native
    step     of ResNet-32, 128 images: torch.optim.SGD without a lasso, and with its penalty by autograd; ours with the
             lasso, native and by the reference, with batch norms fused and not

All providers of a row's layer were timed side by side. `threads` is what PyTorch was set to.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from bench import profiles
from bench.harness import EAGER, Provider, Session, attempt, measure
from bench.suites import bn, sgd, step
from prunetrain_kernels.graph import trace_channels
from prunetrain_kernels.models import build
from prunetrain_kernels.models.init import initialize
from prunetrain_kernels.ops import native
from prunetrain_kernels.optim import SGD

NATIVE, REFERENCE, PLAIN = "native", "reference", "native, no lasso"
FOREACH, FUSED, AUTOGRAD = sgd.FOREACH, sgd.FUSED, sgd.FOREACH + " + autograd"
NETWORKS = {"imagenet_resnet50": (1000, 64), "resnet32": (10, 32), "vgg11": (10, 32)}


def run(session: Session) -> None:
    """Measures on the CPU, if the library is there; says so otherwise."""
    why = "it is for the CPU: add --device cpu" if session.device.type != "cpu" else native.problem()
    if why is not None:
        print(f"  skipped, there is no native library to measure: {why}")
        return
    most = torch.get_num_threads()
    try:
        for threads in sorted({1, most}):
            torch.set_num_threads(threads)
            print(f"  -- {threads} thread(s), {native.instruction_set()}")
            for name in NETWORKS if not session.quick else ("resnet32",):
                if session.wants(name):
                    attempt(session, name, lambda name=name, n=threads: _update(session, name, n))  # type: ignore[misc]
            _layers(session, threads)
            if session.wants("step"):
                attempt(session, "step", lambda n=threads: _step(session, n))  # type: ignore[misc]
    finally:
        torch.set_num_threads(most)


@contextmanager
def by_reference() -> Iterator[None]:
    """Inside, operators on the CPU take their plain-PyTorch references."""
    before, native.ENABLED = native.ENABLED, False
    try:
        yield
    finally:
        native.ENABLED = before


def without_native(provider: Provider) -> Provider:
    """The same by the references."""

    def inside(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with by_reference():
                return call()

        return run

    return replace(provider, run=inside(provider.run), outputs=inside(provider.outputs))


# -- update ------------------------------------------------------------------------------------------------------------


def _update(session: Session, name: str, threads: int) -> None:
    torch.manual_seed(0)
    classes, side = NETWORKS[name]
    model = build(name, classes)
    graph = trace_channels(model, (torch.zeros(1, 3, side, side),))
    gradients = [torch.randn_like(p) for p in model.parameters()]
    count = sum(p.numel() for p in model.parameters())

    def ours(*, regularized: bool) -> Provider:
        return sgd.update(model, graph, gradients, SGD, {}, regularized=regularized)

    def torchs(options: dict[str, Any], *, by_autograd: bool = False) -> Provider:
        return sgd.update(model, graph, gradients, torch.optim.SGD, options, by_autograd=by_autograd)

    providers = {
        FOREACH: torchs({"foreach": True}),
        FUSED: torchs({"fused": True}),
        PLAIN: ours(regularized=False),
        NATIVE: ours(regularized=True),
        REFERENCE: without_native(ours(regularized=True)),
        AUTOGRAD: torchs({"foreach": True}, by_autograd=True),
    }
    expected = {lasso: sgd.reference_update(model, graph, gradients, lasso=lasso) for lasso in (True, False)}
    references = {kind: expected[kind in (NATIVE, REFERENCE, AUTOGRAD)] for kind in providers}
    what = {
        "layer": f"{name} update", "dtype": "fp32", "layout": "contiguous", "n": count, "mask_profile": "dense",
        "threads": threads, "direction": "step",
    }  # fmt: skip
    timings = measure(
        session, "native", providers, references, AUTOGRAD, what=what, model_bytes=sgd.BYTES_PER_PARAMETER * count
    )
    if NATIVE in timings:
        p50 = {kind: t.p50 for kind, t in timings.items()}
        ratios = ", ".join(f"{kind} {p50[kind] / p50[NATIVE]:.2f}" for kind in p50 if kind != NATIVE)
        print(f"    of native with lasso: {ratios}")


# -- layers ------------------------------------------------------------------------------------------------------------


def _layers(session: Session, threads: int) -> None:
    functions = {EAGER: bn.eager_batch_norm, NATIVE: bn.our_batch_norm}
    for layer in bn.layers(build("resnet32", 10), 32):
        if session.wants(layer.name):
            images = session.images(128)
            attempt(
                session,
                layer.name,
                lambda layer=layer, n=images: bn.measure_layer(  # type: ignore[misc]
                    session, "native", layer, "dense", functions=functions, images=n, more={"threads": threads}
                ),
            )
            p50 = {kind: sum(session.p50.get((layer.name, kind, d), 0.0) for d in bn.DIRECTIONS) for kind in functions}
            if p50[NATIVE]:
                print(f"    {layer.name}: eager / native, both directions: {p50[EAGER] / p50[NATIVE]:.2f}")


# -- step --------------------------------------------------------------------------------------------------------------

UNFUSED = "native, not fused"


def _step(session: Session, threads: int) -> None:
    network = step.Network("resnet32", 32, 10, session.images(128, 8))
    torch.manual_seed(0)
    model = profiles.prune(profiles.dense("resnet32", 32, 10), 32, 1).model
    initialize(model)
    graph = trace_channels(model, (torch.zeros(2, 3, 32, 32),))
    data = step.Data.random(network, session.device)
    reference = step.Reference.of(model, graph, data.first(step.CHECKED))
    task = step.Task(model, graph, data, reference, torch.float32)
    providers = {
        step.NO_LASSO: task.provider(session, step.NO_LASSO),
        EAGER: task.provider(session, EAGER),
        UNFUSED: task.provider(session, step.UNFUSED),
        NATIVE: task.provider(session, step.OURS),
        REFERENCE: without_native(task.provider(session, step.OURS)),
    }
    references = {kind: reference.outputs(lasso=kind != step.NO_LASSO) for kind in providers}
    what = {
        "layer": "resnet32 step", "direction": "step", "dtype": "fp32", "layout": "contiguous", "n": network.images,
        "h": 32, "w": 32, "mask_profile": "dense", "threads": threads,
    }  # fmt: skip
    timings = measure(
        session, "native", providers, references, EAGER, what=what, large=True, granted=step.GRANTED
    )  # fmt: skip
    if step.NO_LASSO in timings:
        base = timings[step.NO_LASSO].p50
        print("    of the step without a lasso: " + ", ".join(f"{k} {t.p50 / base:.3f}" for k, t in timings.items()))
