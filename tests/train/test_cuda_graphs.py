"""A captured step does what the step does. Without a GPU: recorded and replayed as a CUDA graph would be.

`FakeGraph` stands in for `torch.cuda.CUDAGraph` on the CPU. Capturing notes every operation with the tensors that it
reads and writes, refuses what would wait for the device or bring values from the host, and leaves all tensors as they
were; replaying runs the noted operations on the very same memory, without any of the Python around them, and without
PyTorch noticing that tensors change.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from strangers import Net, example, images, net, wither
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from whole_runs import config, tiny_module  # noqa: F401  (a fixture)

from prunetrain_kernels.cli import main
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.optim import SGD, ProximalSGD
from prunetrain_kernels.regularizer import GroupLasso
from prunetrain_kernels.train.loop import train
from prunetrain_kernels.train.prunetrain import PruneTrain
from prunetrain_kernels.train.run_log import read_run
from prunetrain_kernels.train.step import WARM_UP, Average, CapturedStep, Step

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::lift_fresh"}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class FakeGraph(TorchDispatchMode):
    """See above."""

    made: ClassVar[list["FakeGraph"]] = []

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.own: set[int] = set()  # memory that belongs to the graph
        self.replays = 0
        FakeGraph.made.append(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing ({name})\nmore about it")
        read = tensors_in((args, kwargs or {}))
        for tensor in read:
            if storage(tensor) not in self.own and storage(tensor) not in self.before:
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.before[storage(tensor)] = (whole, whole.clone())
        outputs = func(*args, **(kwargs or {}))
        known = {storage(tensor) for tensor in read}
        fresh = [t if storage(t) not in known else torch.empty(0) for t in tensors_in(outputs)]
        self.own |= {storage(t) for t in fresh if t.numel()}
        self.operations.append((func, args, kwargs or {}, fresh))
        return outputs

    def end(self) -> None:
        for whole, content in self.before.values():
            whole.copy_(content)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, fresh in self.operations:
            unseen = tree_map(lambda leaf: leaf.data if isinstance(leaf, Tensor) else leaf, (args, kwargs))
            for memory, result in zip(fresh, tensors_in(func(*unseen[0], **unseen[1])), strict=True):
                if memory.numel():
                    memory.data.copy_(result)


@contextmanager
def capturing(graph: FakeGraph, **_: Any) -> Iterator[None]:
    with graph:
        yield
    graph.end()


class Stream:
    def __init__(self, device: Any = None) -> None:
        self.waited = 0

    def wait_stream(self, other: Any) -> None:
        self.waited += 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    FakeGraph.made = []
    for name, stand_in in (
        ("Stream", Stream),
        ("current_stream", Stream),
        ("stream", lambda stream: nullcontext()),
        ("CUDAGraph", FakeGraph),
        ("graph", capturing),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return FakeGraph.made


def started(captured: bool, optimizer_class: type[SGD] = SGD, scales: bool = False, **options: Any) -> Any:
    model = net()
    average = Average(model, 0.9) if options.pop("average", False) else None
    optimizer = optimizer_class(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    prunetrain = PruneTrain(
        model,
        optimizer,
        example(),
        interval=1,
        fuse=options.pop("fuse", False),
        also=[] if average is None else [average.network],
    )
    coefficients = options.pop("coefficients", None)
    if coefficients:
        lasso = GroupLasso(model, (), graph=prunetrain.graph, coefficients=coefficients)
        prunetrain.present = replace(prunetrain.present, lasso=lasso)
    scaler = torch.amp.GradScaler("cpu", enabled=scales, init_scale=64.0, growth_interval=5)
    # the device is what a user with a GPU would have; all tensors are on the CPU
    step: Any = Step(model, optimizer, scaler, prunetrain, torch.device("cuda"), average=average, **options)
    return CapturedStep(step) if captured else step


def networks(step: Any) -> list[nn.Module]:
    inner = step.step if isinstance(step, CapturedStep) else step
    return [inner.prunetrain.model, *([] if inner.average is None else [inner.average.network])]


def assert_same_state(one: Any, other: Any, **tolerance: float) -> None:
    for a, b in zip(networks(one), networks(other), strict=True):
        for name, tensor in a.state_dict().items():
            torch.testing.assert_close(b.state_dict()[name], tensor, **({"rtol": 0, "atol": 0} | tolerance), msg=name)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip": 0.3},
    "two-parts": {"parts": 2},
    "average": {"average": True},
    "fused": {"fuse": True},
    "scaled": {"scales": True},
    "proximal": {"optimizer_class": ProximalSGD},
    "multipliers": {"coefficients": {"a": 3.0, "a.conv2": 0.0, "fc": 0.3}},
    "multipliers-proximal": {"coefficients": {"a": 3.0, "a.conv2": 0.0, "fc": 0.3}, "optimizer_class": ProximalSGD},
    "everything": {"clip": 0.5, "parts": 2, "average": True, "fuse": True, "scales": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_replays_are_steps_through_reconfigurations(name: str, fake: list[FakeGraph]) -> None:
    """Parameters, statistics, average, losses and hits, after every step: rates that decay, a smaller last batch, two
    reconfigurations, and fine-tuning without the lasso."""
    one, other = started(True, **OPTIONS[name]), started(False, **OPTIONS[name])
    prunetrains = [one.step.prunetrain, other.prunetrain]
    for epoch in range(4):
        for prunetrain in prunetrains:
            prunetrain.regularizing = epoch < 3
        for number, count in enumerate([12] * (WARM_UP + 3) + [6]):
            x, y = images(10 * epoch + number, count)
            before = len(fake), sum(graph.replays for graph in fake)
            (loss, hits), (loss2, hits2) = one(x, y, count), other(x, y, count)
            torch.testing.assert_close(loss, loss2, rtol=1e-12, atol=0)
            assert int(hits) == int(hits2)
            assert_same_state(one, other, rtol=1e-10, atol=1e-13)
            replays = sum(graph.replays for graph in fake) - before[1]
            assert replays == (count == 12 and number >= WARM_UP)
            assert len(fake) - before[0] == (number == WARM_UP)
            penalties = [float(p.optimizer.penalty()) for p in prunetrains if p.active]
            assert not penalties or penalties[0] == pytest.approx(penalties[1], rel=1e-11)
        for step in (one.step, other):
            for group in step.optimizer.param_groups:
                group["lr"] *= 0.5  # in place, where it is a tensor
        if epoch < 2:
            for prunetrain in prunetrains:
                wither(prunetrain.model, 2, 1)
                report = prunetrain.epoch_end()
                assert report.reconfiguration.changed
            one.reset()
        else:
            one.reset()
    assert networks(one)[0].stem.out_channels == 4  # type: ignore[union-attr]


@pytest.mark.parametrize("cls", [SGD, ProximalSGD])
def test_a_replay_may_be_a_skipped_step(cls: type[SGD]) -> None:
    """Norms of layers with multipliers are not taken over from a step that wrote none; the device decides that."""
    graph = FakeGraph()
    models = net(dtype=torch.float32), net(dtype=torch.float32)
    optimizers = [cls(model.parameters(), lr=0.05, momentum=0.9) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        lasso = GroupLasso(model, example(torch.float32), coefficients={"a": 3.0, "a.conv2": 0.0, "fc": 0.3})
        optimizer.regularize_with(lasso, 0.01)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    for number, skipped in enumerate((False, False, True, False, True, True, False)):
        for model, optimizer in zip(models, optimizers, strict=True):
            generator = torch.Generator().manual_seed(number)
            for p in model.parameters():
                p.grad = p.grad if p.grad is not None else torch.empty_like(p)
                p.grad.copy_(torch.randn(p.shape, generator=generator))
            optimizer.found_inf.fill_(float(skipped))
            if optimizer is optimizers[1] or number == 0:
                optimizer.step()
                continue
            if number == 1:
                with capturing(graph):
                    optimizer.step()
            graph.replay()
            optimizer.replayed()
        a, b = ([p.detach() for p in model.parameters()] for model in models)
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
        penalties = [float(optimizer.penalty()) for optimizer in optimizers]
        assert penalties[0] == pytest.approx(penalties[1], rel=1e-6)
        assert penalties[0] == pytest.approx(float(optimizers[0].lasso.penalty().detach()), rel=1e-6)


def test_skipped_steps_do_not_count_as_warm_up(fake: list[FakeGraph]) -> None:
    """A scaler that begins too high skips the first steps, and whether it does is only asked before a buffer exists."""
    one = started(True, scales=True)
    optimizer, left = one.step.optimizer, WARM_UP + 2
    parameter = next(p for group in optimizer.param_groups for p in group["params"])
    parameter.register_hook(lambda g: g * float("inf") if left > 0 else g)
    before = len(fake)
    for _ in range(WARM_UP + 2):
        one(*images(0), 12)
        left -= 1
        assert len(fake) == before
        assert optimizer.lacks_buffers()
    one(*images(0), 12)  # the first that is not skipped makes the buffers
    assert not optimizer.lacks_buffers()
    assert len(fake) == before
    one(*images(0), 12)
    assert len(fake) == before + 1
    assert fake[-1].replays == 1


def test_new_settings_are_captured_anew_and_learning_rates_are_not(fake: list[FakeGraph]) -> None:
    one = started(True)
    x, y = images(0)
    for _ in range(WARM_UP + 1):
        one(x, y, 12)
    assert len(fake) == 1
    group = one.step.optimizer.param_groups[0]
    group["lr"].fill_(0.001)
    one(x, y, 12)
    assert (len(fake), fake[0].replays) == (1, 2)
    group["momentum"] = 0.5
    for _ in range(WARM_UP + 2):
        one(x, y, 12)
    assert (len(fake), fake[1].replays) == (2, 2)
    one.step.prunetrain.regularizing = False
    for _ in range(WARM_UP + 1):
        one(x, y, 12)
    assert (len(fake), fake[2].replays) == (3, 1)


def test_inputs_and_gradients_stay_in_place(fake: list[FakeGraph]) -> None:
    one = started(True)
    places = set()
    for number in range(WARM_UP + 4):
        one(*images(number), 12)
        model = one.step.prunetrain.model
        if number >= WARM_UP:
            places.add((storage(one.images), storage(one.labels), *(storage(p.grad) for p in model.parameters())))
    assert len(places) == 1
    assert one.stream.waited == WARM_UP
    one.reset()
    assert all(p.grad is None for p in one.step.prunetrain.model.parameters())


def test_a_changing_last_batch_does_not_push_the_graph_out(fake: list[FakeGraph]) -> None:
    one = started(True)
    for _ in range(3 * WARM_UP):
        for count in (12, 12, 12, 12, 6):
            one(*images(0, count), count)
    assert len(fake) == 1
    for _ in range(WARM_UP + 1):  # but a size that stays does
        one(*images(0, 6), 6)
    assert len(fake) == 2


class Asks(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x * 2 if bool((x.detach() > 1e9).any()) else x


def test_a_network_that_asks_the_device_for_a_value_is_refused(fake: list[FakeGraph]) -> None:
    """CUDA itself says so; and this shows that a wait inside a step would be seen above."""
    one = started(True)
    one.step.network = Asks().double()
    for _ in range(WARM_UP):
        one(*images(0), 12)
    with pytest.raises(
        InputError, match=r"cannot be captured as a CUDA graph \(operation not permitted when stream is"
    ):
        one(*images(0), 12)


def test_what_cannot_be_captured_is_refused(fake: list[FakeGraph]) -> None:
    step = started(False)
    with pytest.raises(InputError, match="on a GPU only, not on the cpu"):
        CapturedStep(replace(step, device=torch.device("cpu")))
    with pytest.raises(InputError, match="several processes"):
        CapturedStep(replace(step, ranks=2))
    with pytest.raises(InputError, match=r"use prunetrain_kernels\.optim\.SGD"):
        CapturedStep(replace(step, optimizer=torch.optim.SGD(step.network.parameters(), lr=0.1)))


def test_a_run_on_a_cpu_is_refused_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--cuda-graphs", "--device", "cpu", "--data", "synthetic:40x8x8", "--out", str(tmp_path / "run")]
    assert main(["train", *options, "--epochs", "1"]) == 2
    assert "--cuda-graphs needs a GPU, and this run is on the cpu; leave it out." in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()


def test_the_fake_graph_replays_what_it_recorded_and_nothing_else(fake: list[FakeGraph]) -> None:
    """The instrument itself: capturing changes nothing, a value from the host is frozen, memory is followed."""
    x, total = torch.ones(3), torch.zeros(3)
    version = total._version
    factor = 2.0
    graph = FakeGraph()
    with capturing(graph):
        total.add_(x * factor)
    assert total.tolist() == [0, 0, 0]
    factor = 5.0
    x.fill_(3)
    graph.replay()
    graph.replay()
    assert total.tolist() == [12, 12, 12]
    assert total._version == version + 1  # by capturing; a replay is not noticed
    with pytest.raises(RuntimeError, match="capturing"), capturing(FakeGraph()):
        float(x.sum())
    assert copy.copy(factor) == 5.0


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize(
    "changes", [{}, {"amp": "fp16", "clip_grad": 1.0}, {"accumulate": 2, "ema": 0.9}, {"proximal": True}]
)
def test_a_captured_run_is_a_run(tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses with and without graphs, through reconfigurations; and graphs were replayed."""
    replays = []
    original = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: (replays.append(1), original(self))[1])
    runs = []
    for name, graphs in (("captured", True), ("plain", False)):
        # enough steps for a shape to be captured; a threshold under which channels go soon
        options = config(tmp_path / name, data="synthetic:400x8x8", epochs=3, fine_tune_epochs=1, interval=1, fuse=True)
        options = replace(options, device="cuda", threshold=0.12, zeroing_tolerance=float("inf"), model="resnet20")
        options = replace(options, cuda_graphs=graphs, **changes)
        train(replace(options, grow_batch=False, batch_limit=None, image_size=None), progress=False)
        runs.append(read_run(tmp_path / name))
        assert bool(replays) == graphs or name == "plain"
    assert len(replays) > 20
    assert list(runs[0].log.loss) == pytest.approx(list(runs[1].log.loss), rel=2e-2)
    assert list(runs[0].log.params) == list(runs[1].log.params)
    assert runs[0].log.params.iloc[-1] < runs[0].log.params.iloc[0] or changes
