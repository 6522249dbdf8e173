"""`torch.set_default_device`: what the package makes is where its tensors are, not where new tensors go by default.

"meta" stands in for "cuda": what is made there by mistake has no values, and raises or differs as soon as it meets a
tensor of the CPU.
"""

import ast
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._device import _device_constructors

import prunetrain_kernels as pk
from prunetrain_kernels import cli, cost, data, graph, models, ops, optim, prune
from prunetrain_kernels import nn as fused
from prunetrain_kernels.cost import convolution, roof
from prunetrain_kernels.graph.gating import MeasuredCost
from prunetrain_kernels.probe import named_tensors_in

T0_BACKENDS = ("kernels", "native", "reference")
ROOT = Path(__file__).parents[1]


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


def forget() -> None:
    """Empties the package's caches: a table that is known from another test is not made again."""
    for name, module in list(sys.modules.items()):
        if name.startswith("prunetrain_kernels"):
            for value in vars(module).values():
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()


def same_under(scenario: Callable[[], dict[str, Any]]) -> None:
    """Runs it with "meta" as the default device, then with the CPU: all tensors and all else must be the same."""
    forget()
    with default_device("meta"):
        there = scenario()
    forget()
    with default_device("cpu"):
        here = scenario()
    assert there.keys() == here.keys()
    for name, value in here.items():
        under_meta, expected = named_tensors_in(there[name]), named_tensors_in(value)
        assert under_meta.keys() == expected.keys(), name
        for place, tensor in expected.items():
            assert under_meta[place].device.type == "cpu", f"{name}{place}"
            torch.testing.assert_close(under_meta[place], tensor, rtol=0, atol=0, equal_nan=True, msg=f"{name}{place}")
        if not expected:
            assert there[name] == value, name


# -- networks and numbers of a user who says where they are ------------------------------------------------------------


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")


class Residual(nn.Module):
    """A stem, a block whose branch can die, and a linear layer behind a flatten."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 11, 3, padding=1, bias=False), nn.BatchNorm2d(11)
        self.conv2, self.bn2 = nn.Conv2d(11, 13, 3, padding=1, bias=False), nn.BatchNorm2d(13)
        self.conv3, self.bn3 = nn.Conv2d(13, 11, 3, padding=1, bias=False), nn.BatchNorm2d(11)
        self.conv4, self.bn4 = nn.Conv2d(11, 11, 1, bias=False), nn.BatchNorm2d(11)
        self.fc = nn.Linear(11 * 4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x))))) + x)
        x = F.relu(self.bn4(self.conv4(x)) + x)
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))
        return logits


def network(*, sparse: bool = True) -> nn.Module:
    """With `sparse`, some channels are zero everywhere, others in one layer only, and one branch is dead."""
    with torch.device("cpu"), torch.random.fork_rng():
        torch.manual_seed(0)
        model = Residual()
        if sparse:
            with torch.no_grad():
                for conv in (model.conv1, model.conv3, model.conv4):
                    conv.weight[2:4] = 0
                for conv in (model.conv2, model.conv4):
                    conv.weight[:, 2:4] = 0
                model.fc.weight.view(5, 11, 4)[:, 2:4] = 0
                model.conv2.weight[5] = 0
                model.conv3.weight[:, 5] = 0
                model.conv3.weight[7] = 0
                model.conv4.weight.zero_()
        return model


X, LABELS = numbers(4, 3, 8, 8), torch.tensor([0, 1, 2, 3], device="cpu")


def step(model: nn.Module, optimizer: torch.optim.Optimizer, extra: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    optimizer.zero_grad()
    loss = extra(F.cross_entropy(model(X), LABELS))
    loss.backward()
    optimizer.step()
    return loss.detach()


def momentum(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]


# -- what is public ----------------------------------------------------------------------------------------------------


def channel_operators() -> dict[str, Any]:
    x, base = numbers(2, 7, 5, 3).requires_grad_(), numbers(2, 9, 5, 3, seed=1)
    index = ops.ChannelIndex([0, 2, 5], 7)
    gathered = ops.channel_gather(x, [0, 2, 5])
    scattered = ops.channel_scatter(gathered, index)
    added = ops.channel_scatter_add(base, gathered, torch.tensor([1, 8, 3], device="cpu"))
    (scattered.sum() + added.square().sum()).backward()
    return {"index": (index.index, index.inverse), "outputs": (gathered, scattered, added), "gradient": x.grad}


def convolutions() -> dict[str, Any]:
    result: dict[str, Any] = {}
    for backend in (None, "naive", "expanded"):
        x, weight = numbers(2, 6, 5, 5).requires_grad_(), numbers(4, 5, 3, 3, seed=1).requires_grad_()
        maps = {"input_index": ops.ChannelIndex([0, 1, 3, 4, 5], 6), "output_index": ops.ChannelIndex([1, 2, 4, 6], 7)}
        y = ops.conv2d(x, weight, padding=1, backend=backend, **maps)
        assert isinstance(y, Tensor)
        y.square().sum().backward()
        result[str(backend)] = (y, x.grad, weight.grad)
    return result


def batch_norms() -> dict[str, Any]:
    x, weight, bias = numbers(3, 7, 5, 3).requires_grad_(), numbers(7, seed=1), numbers(7, seed=2)
    mean, var = numbers(7, seed=3), numbers(7, seed=4).square() + 0.5
    residual = numbers(3, 9, 5, 3, seed=5)
    plain = ops.batch_norm_act(x, mean, var, weight, bias, training=True, residual=residual[:, :7], relu=True)
    placed = ops.batch_norm_act(
        x, mean, var, weight, bias, residual=residual, relu=True, scatter=ops.ChannelIndex(range(1, 8), 9)
    )
    (plain.square().sum() + placed.square().sum()).backward()
    still = x.detach()
    parts = ops.batch_norm_statistics(still)
    merged = ops.merge_statistics(torch.stack([parts[0], mean]), torch.stack([parts[1], var]), [45, 3])
    y, mask = ops.batch_norm_apply(still, *parts, weight, bias, residual[:, :7].contiguous(), None, 1e-5, True, True)
    of = (numbers(3, 7, 5, 3, seed=6), still, *parts, weight, bias, mask, None)
    sums = ops.batch_norm_backward_sums(*of, 1e-5, True, True)
    back = ops.batch_norm_backward_apply(*of, *sums, 45.0, 1e-5, True, True, True)
    return {"outputs": (plain, placed, x.grad), "running": (mean, var), "parts": (parts, merged, y, sums, back)}


def lasso_operators() -> dict[str, Any]:
    weights = [numbers(7, 5, 3, 3).requires_grad_(), numbers(3, 14, seed=1).requires_grad_()]
    groups = [ops.Groups(1), ops.Groups(2, inputs=True, outputs=False)]
    value = ops.group_lasso(weights, groups)
    value.backward()
    again = ops.add_group_lasso_gradient_(weights, groups, 0.3)
    (norms, largest) = ops.slice_statistics(weights, groups)
    flat = torch.cat([side for pair in norms for side in pair])
    thresholds = [torch.tensor(0.2, device="cpu")]
    shrunk = [w.detach().clone() for w in weights]
    ops.group_soft_threshold_(shrunk, flat, thresholds, None, [0, 0], [1, 2], [3, 1])
    return {
        "penalty": (value, again, [w.grad for w in weights]),
        "slices": (norms, largest, ops.slice_norms(weights[0]), ops.slice_max_abs(weights[0])),
        "view": ops.slice_view(weights[1], 2),
        "shrunk": shrunk,
    }


def sgd_operator() -> dict[str, Any]:
    params, grads = [numbers(7, 5, 3, 3), numbers(7, seed=1)], [numbers(7, 5, 3, 3, seed=2), numbers(7, seed=3)]
    buffers = [torch.zeros_like(p) for p in params]
    norms = torch.cat(ops.slice_norms(params[0]))
    largest, rate, coefficient = torch.zeros_like(norms), numbers(1).abs()[0], numbers(1)[0]
    ops.sgd_(
        params, grads, buffers, norms, largest, [rate], coefficient, None, None, [0.9], [0.0], [1e-4], [True], [False],
        [0, 0], [True, True], [1, 1], [3, 0], 1e-8,
    )  # fmt: skip
    return {"all": (params, buffers, norms, largest)}


OPERATORS = [channel_operators, convolutions, batch_norms, lasso_operators, sgd_operator]


def optimizers() -> dict[str, Any]:
    result: dict[str, Any] = {}
    for kind in (optim.SGD, optim.ProximalSGD):
        for rate in (0.1, torch.tensor(0.1, device="cpu")):
            model = network()
            optimizer = kind(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
            trainer = pk.PruneTrain(model, optimizer, (X,), interval=100)
            losses = [step(model, optimizer, trainer.regularize) for _ in range(3)]
            result[f"{kind.__name__} {rate}"] = (losses, list(model.parameters()), momentum(optimizer))
    return result


def modules() -> dict[str, Any]:
    x, base = numbers(2, 7, 5, 5), numbers(2, 9, 5, 5, seed=1)
    gated = fused.GatedConv2d(7, 9, 3, padding=1, bias=False, output_index=[0, 3, 4, 8], device="cpu")
    behind = fused.BatchNormAct2d(9, device="cpu")
    alone = fused.BatchNormAct2d(7, momentum=None, device="cpu")
    with torch.no_grad():
        gated.weight.copy_(numbers(*gated.weight.shape, seed=2))
    whole = behind(gated(x), base)
    fused.pair(gated, behind)
    paired = behind(gated(x), base)
    fused.unpair(behind)
    together = fused.SyncBatchNorm(7, device="cpu")
    swapped = fused.synchronize_batch_norm(network())
    report = fused.fuse(network())
    assert isinstance(report, fused.FuseReport)
    return {
        "gated": (whole, paired),
        "batch norms": (alone(x, relu=True), alone(x), list(alone.buffers()), together(x), list(together.buffers())),
        "indices": (
            fused.ChannelGather([1, 5], 7)(x),
            fused.ChannelScatter([0, 1, 2, 4, 5, 7, 8], 9)(x),
            fused.ChannelScatterAdd([0, 1, 2, 4, 5, 7, 8], 9)(base, x),
        ),
        "counts": (swapped, str(report)),
    }


def fusing() -> dict[str, Any]:
    model = network(sparse=False)
    report = fused.fuse(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = [step(model, optimizer) for _ in range(2)]
    kinds = [type(m).__name__ for m in (fused.FusedBatchNorm, fused.LeftAlone)]
    return {"report": str(report), "losses": losses, "after": model(X), "state": model.state_dict(), "kinds": kinds}


def costs() -> dict[str, Any]:
    model = network()
    flops, table = cost.flop_table(model, (X,))
    assert isinstance(flops, cost.Flops)
    assert isinstance(table, cost.FlopTable)
    memory = cost.step_memory(model, (X,), optimizer=torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    assert isinstance(memory, cost.MemoryModel)
    size = cost.gradient_bytes(model)
    return {
        "flops": (flops, cost.count_flops(model, (X,)), table.flops(model)),
        "layers": cost.count_flops_by_layer(model, (X,)),
        "bytes": (memory, cost.batch_norm_bytes(model, (X,), 3), size),
        "sent": (
            cost.ring_all_reduce_bytes(size, 4),
            cost.hierarchical_all_reduce_bytes(size, 16),
            cost.hierarchical_all_reduce_seconds(size, 16, cost.Cluster()),
        ),
    }


def graphs() -> dict[str, Any]:
    """Traced, chosen, reconfigured: by union, by gating, by a threshold relative to the layer, and rounded."""
    result: dict[str, Any] = {}
    for policy, relative, round_to in (
        ("union", False, 1), ("gating", False, 1), ("union", True, 4), ("auto", False, 1),
    ):  # fmt: skip
        model = network()
        optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
        step(model, optimizer)
        model.load_state_dict(network().state_dict())
        channels = pk.trace_channels(model, (X,))
        assert isinstance(graph.prunable(channels), graph.Prunable)
        assert isinstance(channels, pk.ChannelGraph)
        keep = channels.keep(model, relative=relative, policy=policy, round_to=round_to, cost=convolution.flops)
        assert isinstance(keep, pk.Keep)
        done = pk.reconfigure(model, optimizer, keep)
        assert isinstance(done, pk.Reconfiguration)
        result[f"{policy} {round_to}"] = (keep.channels, list(keep.live.values()), model(X), momentum(optimizer))
        result[f"{policy} {round_to}: text"] = (str(channels), done.layers)
        result[f"{policy} {round_to}: dense"] = pk.to_dense(model, (X,))(X)
        result[f"{policy} {round_to}: places"] = graph.expand(keep.channels[0], 3)
    return result


def paper_models() -> dict[str, Any]:
    """Models are made where new tensors go by default, as any `nn.Module` is: the user says where."""
    images = numbers(2, 3, 32, 32)
    result: dict[str, Any] = {}
    for name in models.MODELS:
        with torch.device("cpu"), torch.random.fork_rng():
            torch.manual_seed(0)
            model = models.build(name, 10)
        if name in ("resnet20", "vgg11"):
            result[name] = (model.eval()(images), list(model.parameters()))
    return result


def data_sets(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in ("digits", "synthetic:120x3x9x9"):
        images = data.load(name, cache=folder, limit_train=60, limit_val=30, seed=1)
        assert isinstance(images, data.ImageData)
        order = data.epoch_order(len(images.train_labels), 0, 3)
        result[name] = (
            images.train_images, images.train_labels, images.val_images, images.val_labels, order,
            data.batch(images, order[:7], seed=0, epoch=3, step=0, device="cpu", train=True),
            data.batch(images, torch.arange(7, device="cpu"), seed=0, epoch=3, step=0, device="cpu", train=False),
            data.balanced_subset(images.train_labels, 20, 0),
            data.normalize_and_augment(images.train_images[:5], images, None, train=False),
        )  # fmt: skip
        record = data.record_of(images)
        assert data.difference_of_data(record, record) is None
        assert isinstance(data.digest_of_contents(images), str)
        result[f"{name}: numbers"] = (images.mean, images.std, images.classes, record)
    return result


def images_of_files(folder: Path) -> dict[str, Any]:
    from PIL import Image

    for split, i in itertools.product(("train", "val"), range(4)):
        (folder / split / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").resize((30 + i, 20)).save(folder / split / "ab"[i % 2] / f"{i}.png")
    images = data.load(str(folder), recipe=data.ResizedCrop(8, workers=2, cache_limit=0))
    assert isinstance(images.train_images, data.ImageFiles)
    rows = torch.arange(3, device="cpu")
    data.read_ahead(images, rows, seed=0, epoch=1, train=True)
    return {
        "training": data.batch(images, rows, seed=0, epoch=1, step=0, device="cpu", train=True),
        "validation": data.batch(images, rows, seed=0, epoch=1, step=0, device="cpu", train=False),
        "none": images.train_images[rows[:0]],
        "numbers": (images.mean, images.std, data.record_of(images)),
    }


def training(folder: Path, *, policy: str, fuse: bool) -> dict[str, Any]:
    """PruneTrain with a growing batch, a scheduler and an EMA; saved and loaded."""
    model = network()
    average = torch.optim.swa_utils.AveragedModel(model, device="cpu")
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    trainer = pk.PruneTrain(
        model, optimizer, (X,), interval=1, policy=policy, fuse=fuse, also=[average], scheduler=scheduler,
        batch=pk.MiniBatch(4, granularity=4, maximum=64),
    )  # fmt: skip
    losses = [step(model, optimizer, trainer.regularize)]
    model.load_state_dict(network().state_dict())
    average.update_parameters(model)
    reports = [trainer.epoch_end()]
    losses += [step(model, optimizer, trainer.regularize) for _ in range(2)]
    average.update_parameters(model)
    assert isinstance(reports[0], pk.PruneReport)

    path = folder / "checkpoint.pt"
    pk.save_pruned(path, model, optimizer, trainer, also=[average], epoch=1)
    again = network(sparse=False)
    second = torch.optim.swa_utils.AveragedModel(again, device="cpu")
    optimizer2 = optim.SGD(again.parameters(), 0.1, momentum=0.9)
    trainer2 = pk.PruneTrain(
        again,
        optimizer2,
        (X,),
        interval=1,
        policy=policy,
        fuse=fuse,
        also=[second],
        batch=pk.MiniBatch(4, granularity=4),
    )
    extra = pk.load_pruned(path, again, optimizer2, trainer2, also=[second])
    losses += [step(again, optimizer2, trainer2.regularize)]
    third = network(sparse=False)
    pk.apply_shape(third, pk.pruned_shape(again))
    assert [p.shape for p in third.parameters()] == [p.shape for p in again.parameters()]
    history = [{k: v for k, v in entry.items() if "seconds" not in k} for entry in trainer.history]
    return {
        "losses": losses,
        "parameters": (list(model.parameters()), momentum(optimizer), list(average.parameters())),
        "loaded": (list(again.parameters()), momentum(optimizer2), list(second.parameters()), again.eval()(X)),
        "numbers": (history, trainer.batch_size, trainer.coefficient, trainer.removed, extra["epoch"]),
        "slices": trainer.slice_sizes(),
        "channels": trainer.channel_table(),
        "dense": pk.to_dense(model, (X,)).eval()(X),
        "rate": optimizer.param_groups[0]["lr"],
    }


def exported(folder: Path) -> dict[str, Any]:
    """Each file is read again and run, also by `export_program` itself, which compares it with the network."""
    model = network().eval()
    for file in ("network.pt2", "network.pt", "network.onnx"):
        pk.export_program(model, (X,), folder / file)
    with torch.device("cpu"):
        program = torch.export.load(folder / "network.pt2").module()
    return {"torch.export": program(X), "TorchScript": torch.jit.load(folder / "network.pt")(X)}


def by_hand() -> dict[str, Any]:
    """The regularizer alone, and `prune` by its module's name."""
    model = network()
    channels = pk.trace_channels(model, (X,))
    lasso = pk.GroupLasso(model, (X,), graph=channels)
    penalty = lasso.penalty()
    coefficient = pk.penalty_coefficient(torch.tensor(2.3, device="cpu"), penalty, 0.25)
    lasso.add_gradient_(coefficient)
    gradients = [p.grad for p in model.parameters()]
    keep = channels.keep(model)
    with pytest.raises(ArithmeticError), prune.reconfiguring(model, None, keep):
        raise ArithmeticError  # which undoes it
    done = prune.reconfigure(model, None, keep)
    assert all(isinstance(change, prune.LayerChange) for change in done.layers)
    return {"penalty": penalty, "lambda": coefficient, "gradients": gradients, "after": model(X)}


def command_line(folder: Path) -> dict[str, Any]:
    run = folder / "run"
    model = ["--model", f"{__name__}:Residual"]  # the package's own networks are in `paper_models`
    options = [*model, "--data", "synthetic:64x3x16x16", "--batch", "32", "--epochs", "1", "--interval", "1", "--fuse"]
    options += ["--threads", str(torch.get_num_threads()), "--ema", "0.9", "--grow-batch", "--out", str(run)]
    assert cli.main(["train", *options]) == 0  # two steps and a reconfiguration
    saved = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    assert cli.main(["train", *options, "--resume", "--quiet"]) == 0
    assert cli.main(["info", *model, "--input", "3x16x16"]) == 0
    assert cli.main(["export", str(run), "--out", str(folder / "network.pt")]) == 0
    again = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    return {"saved": saved["model"], "resumed": again["model"]}


# -- tests -------------------------------------------------------------------------------------------------------------


@pytest.mark.t0
@pytest.mark.parametrize("scenario", OPERATORS)
def test_operators(scenario: Callable[[], dict[str, Any]], path: str) -> None:
    same_under(scenario)


@pytest.mark.parametrize("scenario", [optimizers, modules, fusing, costs, graphs, paper_models, by_hand])
def test_functions(scenario: Callable[[], dict[str, Any]]) -> None:
    same_under(scenario)


def test_measurements() -> None:
    """What is measured differs from run to run."""
    with default_device("meta"):
        assert roof.measure_roof(torch.device("cpu"), quick=True).gb_s > 0
        layer = convolution.Convolution(2, (6, 6), (6, 6), (3, 3), (1, 1), (1, 1), (1, 1), 8, 5, 8, 5)
        measured = MeasuredCost(torch.device("cpu"), torch.float32, False)
        for form in (
            convolution.Form(),
            convolution.Form(True, True, "expanded"),
            convolution.Form(True, True, "naive"),
        ):
            assert measured(layer, form) > 0


def test_data_sets(tmp_path_factory: pytest.TempPathFactory) -> None:
    same_under(lambda: data_sets(tmp_path_factory.mktemp("cache")))


def test_images_of_files(tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("PIL")
    same_under(lambda: images_of_files(tmp_path_factory.mktemp("images")))


@pytest.mark.parametrize(("policy", "fuse"), [("union", False), ("union", True), ("gating", False), ("gating", True)])
def test_training(tmp_path_factory: pytest.TempPathFactory, policy: str, fuse: bool) -> None:
    same_under(lambda: training(tmp_path_factory.mktemp("run"), policy=policy, fuse=fuse))


def test_export(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One run, not two as of the others: the network itself, on the CPU, says what the files have to compute."""
    pytest.importorskip("onnxscript")
    expected = network().eval()(X)
    forget()
    with default_device("meta"):
        outputs = exported(tmp_path_factory.mktemp("export"))
    for output in outputs.values():
        assert output.device.type == "cpu"
        torch.testing.assert_close(output, expected)


def test_command_line(tmp_path_factory: pytest.TempPathFactory) -> None:
    same_under(lambda: command_line(tmp_path_factory.mktemp("command")))


PUBLIC = (pk, ops, fused, optim, cost, graph, models, data, prune)
# What is not called here: exceptions, what needs a GPU, and what others return.
NOT_RUN = {
    "measure_step_memory_cuda", "imagenet_resnet50", "resnet20", "resnet32", "resnet50", "resnet56", "vgg7", "vgg11",
    "vgg13", "resnet50_cifar", "NAMES", "OLD_NAMES",
    # numbers and words, no tensors
    "UNKNOWN", "Unknown", "autocast_around", "batches_near", "is_unknown", "known_or_none", "or_unknown", "reasons",
    "share", "share_text",
    "DeadBranch", "Flow", "Follower", "Layer", "Merge", "Space", "SparseSlices", "register_rule",
}  # fmt: skip


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_all_that_is_public_is_run_here(module: ModuleType) -> None:
    tree = ast.parse(Path(__file__).read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    errors = {name for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert set(module.__all__) - used - errors - NOT_RUN == set()


# -- the source --------------------------------------------------------------------------------------------------------

# PyTorch's own list of what the default device decides, and the generator, which goes with `randperm` and its like.
FACTORIES = {function.__name__ for function in _device_constructors()} | {"Generator"}
# Calls that say where by other means: file, line of code.
DEVICE_IN_OPTIONS = {("graph/gating.py", "**options")}


def calls_without_a_device() -> Iterator[str]:
    for file in sorted((ROOT / "prunetrain_kernels").rglob("*.py")):
        name = str(file.relative_to(ROOT / "prunetrain_kernels"))
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            of, made = ast.unparse(node.func.value), node.func.attr
            said = {keyword.arg for keyword in node.keywords}
            options = any((name, f"**{ast.unparse(k.value)}") in DEVICE_IN_OPTIONS for k in node.keywords if not k.arg)
            if (
                of in ("torch", "torch.fft", "torch.nested")
                and made in FACTORIES
                and "device" not in said
                and not options
            ):
                yield f"{name}:{node.lineno}: {ast.unparse(node)}"


def test_every_factory_call_names_its_device() -> None:
    assert list(calls_without_a_device()) == []


def test_factories_are_called_as_torch_s() -> None:
    """Which the test above relies on: nobody imports `zeros` by itself."""
    imported = [
        f"{file.name}: {alias.name}"
        for file in (ROOT / "prunetrain_kernels").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "torch"
        for alias in node.names
        if alias.name in FACTORIES
    ]
    assert imported == []
