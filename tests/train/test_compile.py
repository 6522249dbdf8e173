"""A compiled network through reconfigurations: compiled anew for each shape, never silently uncompiled, and counted."""

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from strangers import Net, example, images, net, sgd, step, wither
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from whole_runs import checkpoint_of, config, tiny_module, withering  # noqa: F401  (fixtures)

from prunetrain_kernels.compiled import Compilations, eagerly, forget_compiled
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.nn import GatedConv2d
from prunetrain_kernels.optim import SGD
from prunetrain_kernels.prune.checkpoint import load_pruned, save_pruned
from prunetrain_kernels.train.loop import train
from prunetrain_kernels.train.prunetrain import PruneTrain
from prunetrain_kernels.train.run_log import read_run


class Counting:
    """A backend that runs the graphs as they are, and counts graphs and their calls."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self.backend = backend
        self.graphs = self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        compiled = torch._dynamo.lookup_backend(self.backend)(graph, inputs)

        def run(*arguments: Any) -> Any:
            self.calls += 1
            return compiled(*arguments)

        return run


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


HOW = ["torch.compile(model)", "model.compile()", "a handle beside the model", "before its optimizer"]


def compiled(how: str, backend: Any, **options: Any) -> tuple[Net, nn.Module, Any, PruneTrain]:
    """The network, what is called in a step, and its optimizer and PruneTrain."""
    model = net(width=14)
    handle: Any = model
    if how in ("torch.compile(model)", "before its optimizer"):
        handle = torch.compile(model, backend=backend)
    elif how == "model.compile()":
        model.compile(backend=backend)
    held = handle if how == "before its optimizer" else model
    optimizer = options.pop("optimizer", torch.optim.SGD)(held.parameters(), lr=0.02, momentum=0.9)
    prunetrain = PruneTrain(handle, optimizer, example(), interval=1, **options)
    if how == "a handle beside the model":
        handle = torch.compile(model, backend=backend)
    return model, handle, optimizer, prunetrain


@pytest.mark.parametrize("how", HOW)
def test_reconfigurations_are_compiled_and_learn_what_an_uncompiled_twin_does(how: str) -> None:
    """Twelve shapes, which is more than the compiler takes of one function; two for the other ways to the same end."""
    backend, epochs = Counting(), 12 if how == "torch.compile(model)" else 2
    model, handle, optimizer, prunetrain = compiled(how, backend)
    _, twin, twin_optimizer, twin_prunetrain = compiled("not", None)
    steps = 0
    for epoch in range(epochs):
        for _ in range(2):
            losses = [
                step(handle, optimizer, prunetrain, steps),
                step(twin, twin_optimizer, twin_prunetrain, steps),
            ]
            steps += 1
            assert losses[0] == pytest.approx(losses[1], rel=1e-10)
            assert (backend.graphs, backend.calls) == (epoch + 1, steps)
        for each in (model, twin):
            wither(each, 1, 1)  # type: ignore[arg-type]
        report = prunetrain.epoch_end()
        twin_prunetrain.epoch_end()
        assert report is not None
        assert report.reconfiguration.changed
        assert report.compilations == 1
        assert report.compile_seconds > 0
        assert "1 graph compiled in" in str(report)
    assert prunetrain.compilations.given_up == 0
    assert [entry["compilations"] for entry in prunetrain.history] == [1] * epochs
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11, msg=name)


def test_a_dead_branch_gating_fused_operators_and_a_lasso_inside_the_update() -> None:
    """All that changes a model's modules, in one graph without breaks."""
    for options in ({"fuse": True, "optimizer": SGD}, {"policy": "gating", "fuse": True}):
        if "policy" in options and torch.__version__.startswith("2.11"):
            continue  # which cannot follow a gated convolution's question about autocast
        backend = Counting()
        model, _, optimizer, prunetrain = compiled("not", None, **options)
        model.compile(backend=backend, fullgraph=True)
        twin = copy.deepcopy(model)  # a copy is not compiled
        steps = 0
        for epoch in range(3):
            for _ in range(2):
                step(model, optimizer, prunetrain, steps)
                steps += 1
            assert (backend.graphs, backend.calls) == (epoch + 1, steps)
            wither(model, 1, 1)
            with torch.no_grad():
                if epoch == 1:
                    model.a.conv2.weight.zero_()
                model.b.conv1.weight[0] = 0
                model.b.conv2.weight[:, :2] = 0
            report = prunetrain.epoch_end()
            assert report is not None
            assert report.reconfiguration.max_abs_dy < 1e-10
        assert "a.conv1" in prunetrain.removed
        assert any(isinstance(m, GatedConv2d) for m in model.modules()) == ("policy" in options)
        x = images(0)[0]
        expected = Net.forward(twin, x)
        assert expected.shape == (12, 5)
        out = model(x)
        with eagerly(model):
            torch.testing.assert_close(model(x), out, rtol=1e-10, atol=1e-12)


def test_batch_sizes_that_change_make_one_graph_more() -> None:
    """The second size of a dimension makes the compiler leave that open, until the next reconfiguration."""
    backend = Counting()
    model, handle, optimizer, prunetrain = compiled("torch.compile(model)", backend)
    for epoch in range(2):
        for number, count in enumerate((12, 12, 5, 12, 7)):
            step(handle, optimizer, prunetrain, number, count)
        assert backend.graphs == 2 * (epoch + 1)
        wither(model, 1, 1)
        report = prunetrain.epoch_end()
        assert report is not None
        assert report.compilations == 2


def test_by_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.exc as exceptions

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    backend = Counting("inductor")
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)]
    model = nn.Sequential(*layers).double()
    twin = copy.deepcopy(model)
    handle = torch.compile(model, backend=backend)
    ours, of_twin = (PruneTrain(each, sgd(each), example(), interval=1) for each in (handle, twin))
    for epoch in range(2):
        try:
            with torch._inductor.config.patch(compile_threads=1):
                loss = step(handle, ours.optimizer, ours, epoch)
        except exceptions.InductorError as error:
            pytest.skip(f"no C++ compiler: {error}")
        assert loss == pytest.approx(step(twin, of_twin.optimizer, of_twin, epoch), rel=1e-10)
        assert backend.calls == backend.graphs == epoch + 1
        for each, prunetrain in ((model, ours), (twin, of_twin)):
            with torch.no_grad():
                each[0].weight[:2] = 0
                each[5].weight[:, :2] = 0
            assert prunetrain.epoch_end() is not None
    assert model[0].out_channels == 2


# -- the compiler gives up ---------------------------------------------------------------------------------------------


def forgets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("prunetrain_kernels.prune.reconfigure", "prunetrain_kernels.train.prunetrain"):
        monkeypatch.setattr(sys.modules[name], "forget_compiled", lambda: None)


def test_without_forgetting_shapes_beyond_the_limit_run_uncompiled_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the test of ten reconfigurations would see, and what a user is told."""
    if torch.__version__.startswith("2.11"):
        pytest.skip("this PyTorch does not even notice the new shapes")
    forgets_nothing(monkeypatch)
    backend = Counting()
    model, handle, optimizer, prunetrain = compiled("torch.compile(model)", backend)
    said: list[str] = []
    for epoch in range(5):
        with torch._dynamo.config.patch(recompile_limit=3):  # instead of 8, to save time
            step(handle, optimizer, prunetrain, epoch)
        wither(model, 1, 1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            prunetrain.epoch_end()
        said += [f"{epoch}: {w.message}" for w in caught if "given up" in str(w.message)]
    assert backend.calls == 3
    assert len(said) == 1
    assert said[0].startswith("3: torch.compile has given up 1 functions, which run uncompiled until the next")


def test_a_backend_that_fails_under_suppressed_errors_is_said() -> None:
    def fails(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no such instruction")

    with torch._dynamo.config.patch(suppress_errors=True):
        model, handle, optimizer, prunetrain = compiled("torch.compile(model)", fails)
        step(handle, optimizer, prunetrain, 0)
        with pytest.warns(UserWarning, match="torch.compile has given up"):
            prunetrain.advance(0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            prunetrain.advance(0.1)  # said once
    assert next(model.parameters()).isfinite().all()


# -- what may be compiled, and where -----------------------------------------------------------------------------------


def test_a_part_compiled_in_place_and_one_that_is_wrapped() -> None:
    backend = Counting()
    model = net()
    model.a.compile(backend=backend)
    optimizer = sgd(model)
    prunetrain = PruneTrain(model, optimizer, example(), interval=1)
    assert "a.conv1" in prunetrain.graph.layers
    for epoch in range(2):
        step(model, optimizer, prunetrain, epoch)
        assert (backend.graphs, backend.calls) == (epoch + 1, epoch + 1)
        wither(model, 2, 2)
        assert prunetrain.epoch_end() is not None
    model = net()
    model.a = torch.compile(model.a, backend=backend)  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"'a' is what torch.compile\(part\) returned.*part.compile\(\)"):
        PruneTrain(model, sgd(model), example())


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("order", ["DDP(compiled)", "DDP(compiled in place)", "compiled(DDP)"])
def test_with_ddp(one_rank: None, order: str) -> None:
    backend = Counting()
    model = net()
    if order == "DDP(compiled)":
        handle: Any = DistributedDataParallel(torch.compile(model, backend=backend))
    elif order == "DDP(compiled in place)":
        model.compile(backend=backend)
        handle = DistributedDataParallel(model)
    else:
        handle = torch.compile(DistributedDataParallel(model), backend=backend)
    optimizer = sgd(handle)
    prunetrain = PruneTrain(handle, optimizer, example(), interval=1)
    assert prunetrain.model is model
    assert prunetrain.ddp is not None
    twin = net()
    twin_optimizer = sgd(twin)
    twin_prunetrain = PruneTrain(twin, twin_optimizer, example(), interval=1)
    for epoch in range(3):
        before = backend.graphs, backend.calls
        losses = [
            step(handle, optimizer, prunetrain, epoch),
            step(twin, twin_optimizer, twin_prunetrain, epoch),
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)
        assert backend.graphs > before[0]
        assert backend.calls > before[1]
        for each in (model, twin):
            wither(each, 2, 1)
        for each in (prunetrain, twin_prunetrain):
            assert each.epoch_end() is not None


def test_saved_and_loaded_into_a_compiled_model_that_has_run(tmp_path: Path) -> None:
    backend = Counting()
    model, handle, optimizer, prunetrain = compiled("torch.compile(model)", backend)
    step(handle, optimizer, prunetrain, 0)
    wither(model, 3, 3)
    prunetrain.epoch_end()
    save_pruned(tmp_path / "c.pt", handle, optimizer, prunetrain)
    _, other_handle, other_optimizer, other_prunetrain = compiled("torch.compile(model)", backend)
    step(other_handle, other_optimizer, other_prunetrain, 5)
    load_pruned(tmp_path / "c.pt", other_handle, other_optimizer, other_prunetrain)
    for number in range(2):
        losses = [
            step(handle, optimizer, prunetrain, number),
            step(other_handle, other_optimizer, other_prunetrain, number),
        ]
        assert losses[0] == losses[1]
    assert "stem.weight" in torch.load(tmp_path / "c.pt", weights_only=True)["model"]


# -- counting ----------------------------------------------------------------------------------------------------------


def test_counts_go_on_when_the_compiler_or_someone_else_sets_them_back() -> None:
    counted = Compilations()
    taken = []
    for number in range(3):
        function = torch.compile(lambda x, n=number: x * n, backend="aot_eager")
        function(torch.ones(2))
        if number == 1:
            forget_compiled()
        if number == 2:
            torch._dynamo.utils.counters.clear()
            function(torch.ones(2, 2))
        taken.append(counted.take())
    assert [graphs for graphs, _ in taken] == [1, 1, 1]
    assert all(seconds > 0 for _, seconds in taken)
    assert counted.take() == (0, 0.0)


def test_listeners_go_on_listening() -> None:
    from torch._dynamo.callback import callback_handler

    heard: list[str] = []

    def listen(_: Any) -> None:
        heard.append("compiled")

    callback_handler.register_start_callback(listen)
    try:
        forget_compiled()
        torch.compile(lambda x: x + 1, backend="aot_eager")(torch.ones(2))
        assert heard
    finally:
        callback_handler.remove_start_callback(listen)


def test_eagerly_is_undone_by_an_error_too() -> None:
    backend = Counting()
    model = net()
    model.compile(backend=backend)
    x = images(0)[0]
    with eagerly(model):
        model(x)
    with pytest.raises(RuntimeError), eagerly(model):
        model(x[0, 0])
    assert backend.calls == 0
    model(x)
    assert backend.calls == 1


# -- prunetrain train --compile ----------------------------------------------------------------------------------------


def test_a_compiled_run_is_the_uncompiled_run_and_its_log_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_compile = nn.Module.compile
    backend = Counting()
    monkeypatch.setattr(nn.Module, "compile", lambda self: plain_compile(self, backend=backend))
    options = config(tmp_path / "compiled", epochs=2, fine_tune_epochs=0, interval=1, compile=True, ema=0.5)
    options = replace(options, batch=20, grow_batch=False, batch_limit=None, limit_train=40)
    train(options, progress=False)
    train(replace(options, out=str(tmp_path / "plain"), compile=False), progress=False)
    runs = [read_run(tmp_path / name) for name in ("compiled", "plain")]
    assert list(runs[0].log.loss) == pytest.approx(list(runs[1].log.loss), rel=1e-3)
    assert list(runs[1].log.compilations) == [0, 0]
    log = runs[0].log
    # the network in training mode, and in validation; in the second epoch both in another shape
    assert list(log.compilations) == [2, 2]
    assert (log.compile_seconds > 0).all()
    assert runs[0].summary is not None
    assert runs[0].summary["compilations"] == backend.graphs == 4
    assert runs[0].summary["compile_seconds"] == pytest.approx(log.compile_seconds.sum())
    assert checkpoint_of(tmp_path / "compiled")["model"].keys() == checkpoint_of(tmp_path / "plain")["model"].keys()


def test_a_network_that_cannot_be_compiled_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no working C++ compiler")

    plain_compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: plain_compile(self, backend=fails))
    with pytest.raises(
        InputError,
        match=r"torch.compile cannot compile this network here: no working C\+\+ compiler; leave --compile out",
    ):
        train(config(tmp_path / "run", epochs=1, interval=1, fine_tune_epochs=0, compile=True), progress=False)
