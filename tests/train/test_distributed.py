"""Several processes train one network: gloo, on one CPU."""

import copy
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prunetrain_kernels import MiniBatch, PruneTrain, penalty_coefficient, to_dense
from prunetrain_kernels.cli import main
from prunetrain_kernels.cost import MemoryModel, gradient_bytes
from prunetrain_kernels.data import batch, load
from prunetrain_kernels.errors import CheckpointError, InputError, PruneTrainError, RankLostError, RanksDifferError
from prunetrain_kernels.graph import ChannelGraph
from prunetrain_kernels.nn import BatchNormAct2d, SyncBatchNorm, synchronize_batch_norm
from prunetrain_kernels.prune.checkpoint import load_pruned, save_pruned
from prunetrain_kernels.train import loop, mini_batch, setup
from prunetrain_kernels.train.config import TrainConfig
from prunetrain_kernels.train.distributed import (
    Ranks,
    answering,
    count_sent_bytes,
    rebuild_buckets,
    speak_when_terminated,
)
from prunetrain_kernels.train.loop import train
from prunetrain_kernels.train.run_log import RunLog, read_run

NETS = '''
import itertools, os, signal
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(y)))


class Net(nn.Module):
    def __init__(self, num_classes=10, in_channels=3, drop=0.0):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 12, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.a, self.b, self.c = Block(12), Block(12), Block(12)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(drop)
        self.fc = nn.Linear(12, num_classes)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        return self.fc(self.drop(torch.flatten(self.pool(self.c(self.b(self.a(x)))), 1)))


def drops(num_classes=10, in_channels=3):
    return Net(num_classes, in_channels, 0.2)


class Dies(Net):
    """In the named rank, in the middle of the second epoch."""

    steps = itertools.count()

    def forward(self, x):
        steps = self.training and type(x) is torch.Tensor  # not the fake ones that costs are found with
        if steps and os.environ.get("DIES", "nobody") == os.environ.get("RANK") and next(self.steps) == 11:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)
'''
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
plain_step = loop.make_step


@pytest.fixture(scope="module", autouse=True)
def nets(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("nets")
    (folder / "nets_for_ranks.py").write_text(NETS)
    sys.path.insert(0, str(folder))
    torch.set_num_threads(1)
    yield folder
    sys.path.remove(str(folder))


def config(out: Path, **changes: Any) -> TrainConfig:
    """Four epochs of 4 steps; the last of each has 14 images, which no number of ranks here divides."""
    default = TrainConfig(
        out=str(out),
        model="nets_for_ranks:Net",
        data="synthetic:62x8x8",
        epochs=4,
        batch=16,
        lr=0.05,
        interval=1,
        device="cpu",
        threads=1,
    )
    return replace(default, **changes)


def withering_step(training: Any, progress: Any, indices: Tensor, epoch: int) -> None:
    """A step after which more and more channels are zero, and a whole block: the lasso's work in a few steps."""
    plain_step(training, progress, indices, epoch)
    prunetrain, share = training.prunetrain, min(0.7, 0.15 * (epoch + 1))
    with torch.no_grad():
        for name, layer in prunetrain.graph.layers.items():
            weight = training.model.get_submodule(name)._parameters.get("weight")
            if weight is None or weight.dim() < 2:
                continue
            if name == "c.conv2" and epoch >= 1:
                weight.zero_()
            _, ins, outs = prunetrain.dense_layers[name]
            for dim, space, size in ((0, layer.output, outs), (1, layer.input, ins)):
                if prunetrain.graph.spaces[space].frozen is None:
                    weight.index_fill_(dim, (prunetrain.kept[name][1 - dim] < share * size).nonzero().flatten(), 0)


# -- processes ---------------------------------------------------------------------------------------------------------


def _rank(function: Callable[..., Any], rank: int, world: int, folder: Path, seconds: float, arguments: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=seconds)
    )
    try:
        outcome = function(rank, *arguments)
    except Exception as error:
        error.add_note(traceback.format_exc())
        outcome = error
    torch.save(outcome, folder / f"{rank}.pt")


class OnRanks:
    """Runs a function in `world` processes and returns what each returned, or the exception it raised."""

    def __init__(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        self.folders = tmp_path_factory
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["prunetrain_kernels.cli", "torch._dynamo", "pandas", "pytest", __name__])

    def __call__(self, world: int, function: Callable[..., Any], *arguments: Any, seconds: float = 60) -> list[Any]:
        folder = self.folders.mktemp("ranks")
        processes = [
            self.context.Process(target=_rank, args=(function, rank, world, folder, seconds, arguments))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            assert process.exitcode == 0
        outcomes = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
        for outcome in outcomes:
            if isinstance(outcome, Exception) and not isinstance(outcome, PruneTrainError):
                raise outcome
        return outcomes


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> OnRanks:
    return OnRanks(tmp_path_factory)


def _train(rank: int, options: TrainConfig, stop_at: int | None = None, resume: bool = False) -> dict[str, Tensor]:
    """Trains up to an epoch; the network's tensors at the end, as this rank has them.

    With synchronised statistics in double precision: in single, rounding alone makes another curve within 20 steps.
    """
    loops: Any = loop
    finish, epoch_of, share_of = loop.finish, loop.train_epoch, setup.Batches.share
    held: dict[str, Any] = {}

    def hold(training: Any, progress: Any) -> None:
        held.update({name: tensor.clone() for name, tensor in training.model.state_dict().items()})
        held["momentum"] = [state["momentum_buffer"].clone() for state in training.optimizer.state.values()]
        finish(training, progress)

    def stop(training: Any, progress: Any, epoch: int) -> None:
        if epoch == stop_at:
            raise InterruptedError
        epoch_of(training, progress, epoch)

    def doubled(batches: Any, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        images, labels = share_of(batches, *arguments, **keywords)
        return images.to(torch.get_default_dtype()), labels

    loops.finish, loops.train_epoch, loops.make_step = hold, stop, withering_step
    setup.Batches.share = doubled  # type: ignore[method-assign]
    torch.set_default_dtype(torch.float64 if options.sync_batch_norm else torch.float32)
    try:
        train(options, resume=resume, progress=False)
    except InterruptedError:
        held["stopped"] = torch.ones(())
    finally:
        loops.finish, loops.train_epoch, loops.make_step = finish, epoch_of, plain_step
        setup.Batches.share = share_of  # type: ignore[method-assign]
        torch.set_default_dtype(torch.float32)
    return held


def assert_bitwise_equal(states: list[Any]) -> None:
    first, *others = states
    assert isinstance(first, dict), first
    assert first
    for other in others:
        assert first.keys() == other.keys()
        for name, tensor in first.items():
            pairs = zip(tensor, other[name], strict=True) if isinstance(tensor, list) else [(tensor, other[name])]
            assert all(torch.equal(*pair) for pair in pairs), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with the same global batch."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    _train(0, config(folder, sync_batch_norm=True))
    return folder


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_end_bitwise_equal_and_learn_what_one_process_learns(
    on_ranks: OnRanks, tmp_path: Path, alone: Path, world: int
) -> None:
    assert_bitwise_equal(on_ranks(world, _train, config(tmp_path / "run", sync_batch_norm=True)))
    one, many = read_run(alone), read_run(tmp_path / "run")
    assert one.summary is not None
    assert many.summary is not None
    sizes = [r["parameters"] for r in many.summary["reconfigurations"]]
    assert len(set(sizes)) >= 3
    assert many.summary["removed_layers"] == ["c.conv1", "c.bn1", "c.conv2"]
    assert (alone / "channels.csv").read_bytes() == (tmp_path / "run" / "channels.csv").read_bytes()
    assert many.summary["lambda"] == pytest.approx(one.summary["lambda"], rel=1e-12)
    for column in ("loss", "penalty"):
        assert list(many.log[column]) == pytest.approx(list(one.log[column]), rel=1e-9)
    for column in ("train_accuracy", "val_accuracy", "train_flops", "steps", "batch", "bn_bytes", "lr"):
        assert list(many.log[column]) == list(one.log[column]), column
    # what DDP hands over is what the cost model says
    assert list(many.log.all_reduced_bytes) == list(many.log.gradient_bytes)
    assert many.log.all_reduced_bytes.is_monotonic_decreasing
    assert many.log.all_reduced_bytes.iloc[-1] < many.log.all_reduced_bytes.iloc[0]
    assert set(one.log.all_reduced_bytes) == {0}
    assert many.summary["all_reduced_bytes"] == (many.log.all_reduced_bytes * many.log.steps).sum()
    assert many.summary["ranks"] == world


def test_with_plain_batch_norm_ranks_are_equal_and_the_curve_is_near(
    on_ranks: OnRanks, tmp_path: Path, alone: Path
) -> None:
    """Statistics of half a batch: another curve, close by; the channels that go are the same."""
    options = config(tmp_path / "run", model="nets_for_ranks:drops", grow_batch=True, batch_granularity=4)
    states = on_ranks(2, _train, options)
    assert_bitwise_equal(states)
    stopped = replace(options, out=str(tmp_path / "stopped"))
    on_ranks(2, _train, stopped, 2)
    assert_bitwise_equal(states + on_ranks(2, _train, stopped, None, True))  # dropout, too, is as it would have been
    run, one = read_run(tmp_path / "run"), read_run(alone)
    assert list(run.log.loss) == pytest.approx(list(one.log.loss), rel=0.15)
    assert run.summary is not None
    assert run.summary["batch_sizes"][0] == 16
    assert len(run.summary["batch_sizes"]) > 1
    assert all(size % 4 == 0 for size in run.summary["batch_sizes"])


@pytest.mark.parametrize(
    "changes",
    [
        {"fuse": True},
        {"policy": "gating"},
        {"policy": "auto", "policy_cost": "measure"},
        {"interval": 0.4, "proximal": True, "fine_tune_epochs": 1},
        {"amp": "bf16", "channels_last": True},
        {"target_flops": 0.6, "target_by": 1.0},
    ],
)
def test_ranks_end_bitwise_equal_with(on_ranks: OnRanks, tmp_path: Path, changes: dict[str, Any]) -> None:
    assert_bitwise_equal(on_ranks(2, _train, config(tmp_path / "run", epochs=2, **changes)))
    assert read_run(tmp_path / "run").log.params.is_monotonic_decreasing


def test_ranks_start_from_a_trained_dense_network(on_ranks: OnRanks, tmp_path: Path) -> None:
    train(config(tmp_path / "dense", dense=True, epochs=1), progress=False)
    options = config(tmp_path / "many", epochs=2, sync_batch_norm=True, start_from=str(tmp_path / "dense"))
    assert_bitwise_equal(on_ranks(2, _train, options))
    _train(0, replace(options, out=str(tmp_path / "one")))
    one, many = read_run(tmp_path / "one"), read_run(tmp_path / "many")
    assert one.summary is not None
    assert many.summary is not None
    assert many.summary["lambda"] == pytest.approx(one.summary["lambda"], rel=1e-12)
    assert list(many.log.loss) == pytest.approx(list(one.log.loss), rel=1e-9)


def test_resumed_on_other_numbers_of_ranks(on_ranks: OnRanks, tmp_path: Path, alone: Path) -> None:
    options = config(tmp_path / "run", sync_batch_norm=True)
    assert [set(state) for state in on_ranks(2, _train, options, 1)] == [{"stopped"}] * 2
    assert set(_train(0, options, 2, resume=True)) == {"stopped"}
    assert_bitwise_equal(on_ranks(4, _train, options, None, True))
    one, many = read_run(alone).log, read_run(tmp_path / "run").log
    assert list(many.epoch) == [1, 2, 3, 4]
    assert list(many.loss) == pytest.approx(list(one.loss), rel=1e-9)
    assert (alone / "channels.csv").read_bytes() == (tmp_path / "run" / "channels.csv").read_bytes()
    assert [sent > 0 for sent in many.all_reduced_bytes] == [True, False, True, True]


def test_a_grown_batch_is_cut_anew_on_another_number_of_ranks(tmp_path: Path) -> None:
    batch = MiniBatch(8, granularity=4, budget_bytes=1000, maximum=40)
    batch.ranks = 4
    batch.load_state_dict({"size": 24, "budget_bytes": 7, "maximum": 12, "ranks": 2})
    assert (batch.size, batch.budget_bytes, batch.maximum) == (12, 1000, 40)
    with pytest.raises(CheckpointError, match=r"15 images cannot be cut into 4 equal shares.*such as 3"):
        batch.load_state_dict({"size": 5, "budget_bytes": 7, "maximum": 12, "ranks": 3})
    batch.ranks = 1
    batch.load_state_dict({"size": 24, "budget_bytes": 7, "maximum": 12})  # saved before there were ranks
    assert (batch.size, batch.budget_bytes, batch.maximum) == (24, 7, 12)


# -- ranks that differ -------------------------------------------------------------------------------------------------


def _planted(rank: int, options: TrainConfig, what: str) -> dict[str, Tensor]:
    keep = ChannelGraph.keep

    def another(self: ChannelGraph, model: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        if what == "weights":
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] += 1e-7
        kept = keep(self, model, *arguments, **keywords)
        if what == "mask":
            masks = {name: replace(mask, outputs=~mask.outputs) for name, mask in kept.sparse.items()}
            return replace(kept, sparse=masks)
        channels = tuple(c if self.spaces[i].frozen else c[1:] for i, c in enumerate(kept.channels))
        return replace(kept, channels=channels) if what == "channels" else kept

    if rank == 1:
        ChannelGraph.keep = another  # type: ignore[method-assign]
    if rank == 1 and what == "options":
        options = replace(options, lr=0.06)
    return _train(rank, options)


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("mask", "the sparse slices differ between the 2 ranks: rank 1 has"),
        ("channels", "the kept channels differ between the 2 ranks: rank 1 has"),
        ("weights", "the model's weights differ between the 2 ranks: rank 1 has"),
        ("options", "the options differ between the 2 ranks: rank 1 has"),
    ],
)
def test_a_rank_that_differs_stops_all_of_them(on_ranks: OnRanks, tmp_path: Path, what: str, named: str) -> None:
    start = time.perf_counter()
    errors = on_ranks(2, _planted, config(tmp_path / "run"), what)
    assert time.perf_counter() - start < 60
    for error in errors:
        assert isinstance(error, RanksDifferError)
        assert named in str(error)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def _compare(rank: int) -> list[str]:
    ranks, said = Ranks.of(), []
    for what, value in (
        ("the things", min(rank, 2)),  # 0, 1, 2, 2: no majority, so rank 0's is taken for right
        ("the things", rank != 2),
        ("this" if rank == 3 else "that", 0),
        ("the tensors", torch.zeros(2, 3) if rank else torch.zeros(3, 2)),
    ):
        try:
            ranks.agree(what, value)
            said.append("")
        except RanksDifferError as error:
            said.append(str(error).split(";")[0])
    ranks.agree("all", b"1", torch.ones(3, dtype=torch.bfloat16), {"a": 1})
    numbers = [
        ranks.least(5 - rank),
        ranks.broadcast(("from", rank))[1],
        *ranks.sum(torch.tensor([1.5, rank])).tolist(),
    ]
    return [*said, str(numbers), str(ranks.share(10))]


def test_what_is_said_of_ranks_that_differ(on_ranks: OnRanks) -> None:
    for rank, said in enumerate(on_ranks(4, _compare)):
        assert said[0].startswith("the things differ between the 4 ranks: ranks 1, 2, 3 have not")
        assert said[1].startswith("the things differ between the 4 ranks: rank 2 has not")
        assert said[2].startswith(f"ranks are at different points: rank {rank} compares")
        assert "rank 3 has" in said[2]
        assert said[3].startswith("the tensors differ between the 4 ranks: rank 0 has not")
        assert said[4] == "[2, 0, 6.0, 6.0]"
        assert said[5] == str([slice(0, 2), slice(2, 5), slice(5, 7), slice(7, 10)][rank])


def test_options_that_ranks_cannot_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="synchronised"):
        train(config(tmp_path / "run", fuse=True, sync_batch_norm=True), progress=False)
    with pytest.raises(InputError, match="--rank-timeout must be a positive number"):
        train(config(tmp_path / "run", rank_timeout=0), progress=False)
    with pytest.raises(InputError, match="BatchNormAct2d has no form"):
        synchronize_batch_norm(nn.Sequential(BatchNormAct2d(3)))
    monkeypatch.setattr(Ranks, "of_environment", lambda **_: Ranks(0, 3))
    with pytest.raises(InputError, match=r"--batch 16.*multiple of 3, and at least 6"):
        train(config(tmp_path / "run"), progress=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="use --device cuda"):
        train(config(tmp_path / "run", device="cuda:1"), progress=False)


# -- a rank that is gone -----------------------------------------------------------------------------------------------


def _silent(rank: int) -> float:
    start = time.perf_counter()
    if rank == 1:
        time.sleep(6)
    try:
        Ranks.of().agree("anything", 1)
    except RankLostError as error:
        return time.perf_counter() - start if rank == 1 or "does not answer" in str(error) else -1.0
    return -1.0


def test_a_rank_that_does_not_answer_is_given_up_in_time(on_ranks: OnRanks) -> None:
    waited = on_ranks(2, _silent, seconds=3)
    assert isinstance(waited[0], float), waited[0]
    assert 0 < waited[0] < 6


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(CheckpointError, match="gloo"), answering():
        raise CheckpointError("cannot write /data/gloo")
    with pytest.raises(RuntimeError, match="shapes"), answering():
        raise RuntimeError("shapes cannot be multiplied")


def test_a_rank_killed_in_an_epoch_ends_the_job_which_resumes(tmp_path: Path, nets: Path) -> None:
    out = tmp_path / "run"
    options = [
        "train",
        "--model",
        "nets_for_ranks:Dies",
        "--data",
        "synthetic:128x8x8",
        "--epochs",
        "3",
        "--batch",
        "16",
    ]
    options += ["--interval", "1", "--device", "cpu", "--out", str(out)]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(nets), str(Path(loop.__file__).parents[2])]),
        "OMP_NUM_THREADS": "1", "DIES": "1",
    }  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(
        [*TORCHRUN, "-m", "prunetrain_kernels.cli", *options],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert time.perf_counter() - start < 60
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("prunetrain: rank 0: ")]
    assert len(said) == 1
    assert "--resume" in said[0]
    assert "another" in said[0]
    assert "Traceback" not in done.stderr.split("prunetrain: rank 0: ")[0], "of our own process"
    assert list(read_run(out).log.epoch) == [1]
    assert read_run(out).summary is None
    assert main([*options, "--resume", "--quiet"]) == 0
    assert list(read_run(out).log.epoch) == [1, 2, 3]


def _waits(ready: Path, said: Path) -> None:
    with open(said, "w") as file:
        os.dup2(file.fileno(), 2)
    speak_when_terminated("stopped; go on with --resume")
    ready.touch()
    torch.mm(*torch.ones(2, 7000, 7000))  # no Python code, so no Python handler, runs until it is done
    os._exit(0)


def test_a_process_that_is_terminated_inside_a_long_call_says_so(tmp_path: Path, on_ranks: OnRanks) -> None:
    ready, said = tmp_path / "ready", tmp_path / "said"
    process = on_ranks.context.Process(target=_waits, args=(ready, said))
    process.start()
    while not ready.exists():
        time.sleep(0.05)
    process.terminate()
    process.join(30)
    assert process.exitcode == 128 + signal.SIGTERM
    assert said.read_text() == "stopped; go on with --resume\n"


# -- in a stranger's loop ----------------------------------------------------------------------------------------------


def _net() -> nn.Module:
    import nets_for_ranks

    torch.manual_seed(0)
    net: nn.Module = nets_for_ranks.Net()
    return net


def _images(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator)


def _zero_channels(model: Any, count: int) -> None:
    """The first channels inside each block."""
    with torch.no_grad():
        for block in (model.a, model.b, model.c):
            block.conv1.weight[:count] = 0
            block.conv2.weight[:, :count] = 0


def _averaged(ddp: DistributedDataParallel, rank: int, step: int, world: int) -> bool:
    """Whether DDP's gradients are the mean of what each rank's own copy computes."""
    own = copy.deepcopy(ddp.module)
    images, labels = _images(rank, step)
    F.cross_entropy(own(images), labels).backward()
    ddp.zero_grad(set_to_none=True)
    F.cross_entropy(ddp(images), labels).backward()
    same = True
    for mine, averaged in zip(own.parameters(), ddp.parameters(), strict=True):
        assert mine.grad is not None
        dist.all_reduce(mine.grad)
        assert averaged.grad is not None
        same &= torch.allclose(averaged.grad, mine.grad / world, rtol=1e-4, atol=1e-6)
    return same


def _stranger(rank: int, options: dict[str, Any]) -> dict[str, Any]:
    ddp = DistributedDataParallel(_net(), **options)
    before, hook_calls = list(ddp.parameters()), []
    ddp.register_forward_hook(lambda *_: hook_calls.append(1))
    sent = count_sent_bytes(ddp)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    prunetrain = PruneTrain(ddp, optimizer, (_images(0, 0)[0],), penalty_ratio=0.3, interval=1)
    assert prunetrain.model is ddp.module
    with torch.no_grad():  # lambda is that of the mean loss, over both ranks
        losses = [F.cross_entropy(copy.deepcopy(ddp.module)(_images(r, 0)[0]), _images(r, 0)[1]) for r in range(2)]
        expected = penalty_coefficient(sum(losses) / 2, prunetrain.lasso.penalty(), 0.3)
    assert losses[0] != losses[1]
    found: dict[str, Any] = {"averaged": [], "sent": [], "gradients": [], "calls": [], "world": 2}
    for epoch in range(4):
        for step in range(2):
            images, labels = _images(rank, 10 * epoch + step)
            loss = prunetrain.regularize(F.cross_entropy(ddp(images), labels))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        _zero_channels(prunetrain.model, epoch + 1 if epoch < 3 else 0)
        report = prunetrain.epoch_end()
        assert report is not None
        assert report.reconfiguration.changed == (epoch < 3)
        sent.total = 0
        hook_calls.clear()
        found["averaged"].append(_averaged(ddp, rank, 99, 2))
        found["sent"].append(sent.total)
        found["gradients"].append(gradient_bytes(ddp))
        found["calls"].append(len(hook_calls))
    assert all(any(p is q for q in before) for p in ddp.parameters())
    found["state"] = dict(ddp.module.named_parameters())
    found["coefficient"] = prunetrain.coefficient
    assert prunetrain.coefficient == pytest.approx(expected, rel=1e-5)
    found["options"] = {
        "static_graph": ddp.static_graph,
        "gradient_as_bucket_view": ddp.gradient_as_bucket_view,
        "find_unused_parameters": ddp.find_unused_parameters,
        "bucket_cap_mb": ddp.bucket_bytes_cap / 2**20,
    }
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.01, "find_unused_parameters": True},
        {"static_graph": True},
    ],
)
def test_a_strangers_ddp_goes_on_after_reconfigurations(on_ranks: OnRanks, options: dict[str, Any]) -> None:
    """Every gradient is averaged, once, over buckets of the new shape, by the same object with the same hooks."""
    found = on_ranks(2, _stranger, options)
    assert_bitwise_equal([one["state"] for one in found if isinstance(one, dict) or pytest.fail(str(one))])
    for one in found:
        assert one["averaged"] == [True] * 4
        assert one["sent"] == one["gradients"]
        assert one["calls"] == [1] * 4
        assert len(set(one["gradients"])) == 3 + (one["gradients"][3] != one["gradients"][2])
        assert {name: one["options"][name] for name in options} == pytest.approx(options, rel=1e-3)
        assert one["coefficient"] == found[0]["coefficient"]


def test_the_trainer_in_the_documentation_runs(tmp_path: Path) -> None:
    root = Path(loop.__file__).parents[2]
    text = (root / "docs" / "distributed.md").read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "trainer.py").write_text(text.replace("for epoch in range(4)", "for epoch in range(2)"))
    done = subprocess.run(
        [*TORCHRUN, "trainer.py"], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("epoch 2: epoch 2: training FLOPs")
    assert (tmp_path / "ranks.pt").exists()


def _without_rebuilding(rank: int) -> bool:
    import prunetrain_kernels.train.reconfiguration as module

    module.rebuild_buckets = lambda ddp: None  # type: ignore[assignment]
    ddp = DistributedDataParallel(_net())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    prunetrain = PruneTrain(ddp, optimizer, (_images(0, 0)[0],), interval=1)
    prunetrain.regularize(F.cross_entropy(ddp(_images(rank, 0)[0]), _images(rank, 0)[1])).backward()
    _zero_channels(ddp.module, 3)
    prunetrain.epoch_end()
    try:
        return _averaged(ddp, rank, 1, 2)
    except RuntimeError:
        return False


def test_the_test_above_sees_buckets_that_were_not_rebuilt(on_ranks: OnRanks) -> None:
    assert on_ranks(2, _without_rebuilding) == [False, False]


def _built_in_hook(rank: int) -> tuple[Any, Any]:
    ddp = DistributedDataParallel(_net())
    ddp._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    rebuild_buckets(ddp)
    half = DistributedDataParallel(_net())
    half.mixed_precision = object()  # type: ignore[assignment]
    try:
        PruneTrain(half, torch.optim.SGD(half.parameters(), lr=0.1), (_images(0, 0)[0],))
    except InputError as error:
        return ddp.logger._get_ddp_logging_data().strs_map["comm_hook"], str(error)  # type: ignore[union-attr]
    return None, None


def test_a_built_in_hook_stays_and_mixed_precision_inside_ddp_is_refused(on_ranks: OnRanks) -> None:
    for hook, said in on_ranks(2, _built_in_hook):
        assert hook == "BuiltinCommHookType.FP16_COMPRESS"
        assert "mixed_precision cannot be pruned" in said


def _smallest(rank: int) -> tuple[Any, Any]:
    """Rank 1 has half the memory."""
    ddp = DistributedDataParallel(_net(), gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    per_image = [100, 200][rank]
    mini_batch.step_memory = lambda *_, **__: MemoryModel(0, per_image)  # type: ignore[assignment]
    sizing = MiniBatch(8, granularity=4, budget_bytes=4900)
    prunetrain = PruneTrain(ddp, optimizer, (_images(0, 0)[0],), interval=1, batch=sizing)
    prunetrain.regularize(F.cross_entropy(ddp(_images(rank, 0)[0]), _images(rank, 0)[1])).backward()
    _zero_channels(ddp.module, 3)
    report = prunetrain.epoch_end()
    sizing.size += 4 * rank  # as after a step that ran out of memory on one rank alone
    try:
        prunetrain.reconfigure()
    except RanksDifferError as error:
        return prunetrain.batch_size - 4 * rank, str(error) + str(report)  # type: ignore[operator]
    return None, None


def test_the_batch_grows_to_what_the_smallest_rank_holds(on_ranks: OnRanks) -> None:
    for size, said in on_ranks(2, _smallest):
        assert size == 24  # of 4900 bytes, 49 images fit rank 0 and 24 rank 1
        assert "the epochs counted and the mini-batch differ" in said
        assert "batch 8 -> 24 on each of 2 ranks" in said


def _beside(rank: int) -> list[int]:
    """Bytes that are not the network's own: with DDP's buckets, with gradients in the buckets, with a copy too."""
    mini_batch.step_memory = lambda *_, **__: MemoryModel(0, 1)  # type: ignore[assignment]
    found = []
    for as_view, copies in ((False, 0), (True, 0), (False, 2)):
        ddp = DistributedDataParallel(_net(), gradient_as_bucket_view=as_view)
        sizing = MiniBatch(8)
        also = [copy.deepcopy(ddp.module) for _ in range(copies)]
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
        PruneTrain(ddp, optimizer, (_images(0, 0)[0],), batch=sizing, also=also)
        assert sizing.memory is not None
        found.append(sizing.memory.fixed)
    return [*found, gradient_bytes(ddp.module), sum(t.nbytes for t in ddp.module.state_dict().values())]


def test_the_budget_counts_buckets_and_copies(on_ranks: OnRanks) -> None:
    for buckets, none, all_of_it, gradients, copy_of_it in on_ranks(2, _beside):
        assert none == 0
        assert buckets == gradients > 0
        assert all_of_it == gradients + 2 * copy_of_it


def _does_not_fit(rank: int) -> tuple[int, float]:
    """On rank 1 more than 30 images run out of memory, whatever the model of it says."""
    ddp = DistributedDataParallel(_net(), gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)

    def memory(model: nn.Module, example: Any, optimizer: Any, batches: tuple[int, int], **_: Any) -> MemoryModel:
        if rank == 1 and max(batches) > 30:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return MemoryModel(0, 100)

    mini_batch.step_memory = memory  # type: ignore[assignment]
    sizing = MiniBatch(8, granularity=8, budget_bytes=4900)
    prunetrain = PruneTrain(ddp, optimizer, (_images(0, 0)[0],), interval=1, batch=sizing)
    _zero_channels(ddp.module, 3)
    prunetrain.reconfigure()
    return sizing.size, optimizer.param_groups[0]["lr"]


def test_a_grown_batch_that_one_rank_cannot_hold_falls_back_on_all(on_ranks: OnRanks) -> None:
    assert on_ranks(2, _does_not_fit) == [(24, pytest.approx(0.15))] * 2


def _other_arguments(rank: int) -> None:
    ddp = DistributedDataParallel(_net())
    PruneTrain(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1), (_images(0, 0)[0],), threshold=1e-4 * (1 + rank))


def test_other_arguments_on_one_rank_are_refused(on_ranks: OnRanks) -> None:
    for error in on_ranks(2, _other_arguments):
        assert isinstance(error, RanksDifferError)
        assert "PruneTrain's arguments" in str(error)


def _checkpointed(rank: int, folder: Path) -> tuple[bool, list[int]]:
    """Saved by a rank, loaded by all into fresh DDPs."""
    nets = []
    for _ in range(2):
        ddp = DistributedDataParallel(_net())
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
        nets.append((ddp, optimizer, PruneTrain(ddp, optimizer, (_images(0, 0)[0],), interval=1)))
    (ddp, optimizer, prunetrain), (fresh, fresh_optimizer, fresh_prunetrain) = nets
    prunetrain.regularize(F.cross_entropy(ddp(_images(rank, 0)[0]), _images(rank, 0)[1])).backward()
    optimizer.step()
    _zero_channels(ddp.module, 3)
    prunetrain.epoch_end()
    if rank == 0:
        save_pruned(folder / "saved.pt", ddp.module, optimizer, prunetrain)
    prunetrain.ranks.wait()
    load_pruned(folder / "saved.pt", fresh.module, fresh_optimizer, fresh_prunetrain)
    return _averaged(fresh, rank, 5, 2), [gradient_bytes(ddp), gradient_bytes(fresh)]


def test_a_checkpoint_into_a_strangers_ddp(on_ranks: OnRanks, tmp_path: Path) -> None:
    for averaged, (before, after) in on_ranks(2, _checkpointed, tmp_path):
        assert averaged
        assert before == after


# -- batch norm over ranks ---------------------------------------------------------------------------------------------

CUTS = (5, 2)  # images of each rank


def _norm(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (7, 5) if kind == "1d" else (7, 5, 4, 3)
    norm: nn.Module = nn.BatchNorm1d(5) if kind == "1d" else nn.BatchNorm2d(5, momentum=None, affine=kind == "2d")
    norm.double()
    for tensor in norm.parameters():
        tensor.data = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 7 for _ in range(2))
    return norm, x, dy


def _run(norm: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    for _ in range(2):
        y = norm(x)
    y.backward(dy)
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in norm.parameters()), *norm.buffers()]  # type: ignore[list-item]


def _synchronised(rank: int, kind: str) -> list[Tensor]:
    norm, x, dy = _norm(kind)
    assert synchronize_batch_norm(norm) == 1
    assert isinstance(norm, SyncBatchNorm)
    assert synchronize_batch_norm(nn.Sequential(norm)) == 1
    assert type(to_dense(nn.Sequential(norm))[0]) is (nn.BatchNorm1d if kind == "1d" else nn.BatchNorm2d)
    mine = slice(0, CUTS[0]) if rank == 0 else slice(CUTS[0], sum(CUTS))
    return _run(norm, x[mine], dy[mine])


@pytest.mark.parametrize("kind", ["1d", "2d", "2d without weights"])
def test_synchronised_batch_norm_is_batch_norm_of_the_whole_batch(on_ranks: OnRanks, kind: str) -> None:
    whole = _run(*_norm(kind))
    ranks = on_ranks(2, _synchronised, kind)
    parameters = 0 if "without" in kind else 2
    for i, expected in enumerate(whole):
        parts = [rank[i] for rank in ranks]
        if i < 2:
            torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-10, atol=1e-10)
        elif i < 2 + parameters:
            torch.testing.assert_close(sum(parts), expected, rtol=1e-10, atol=1e-10)  # DDP's mean makes them one
        else:
            assert torch.equal(*parts)
            torch.testing.assert_close(parts[0], expected, rtol=1e-10, atol=1e-10)


# -- data and log ------------------------------------------------------------------------------------------------------


def test_shares_of_a_batch_are_the_batch(tmp_path: Path) -> None:
    data = replace(load("synthetic:40x8x8", cache=tmp_path), padding=2, flip=True)
    indices = torch.randperm(40)[:15]
    for train_images, count in itertools.product((True, False), (1, 2, 4)):
        where = {"seed": 1, "epoch": 2, "step": 3, "device": "cpu", "train": train_images}
        images, labels = batch(data, indices % len(data.val_labels), **where)
        shares = [
            batch(data, indices % len(data.val_labels), share=Ranks(rank, count).share(15), **where)
            for rank in range(count)
        ]
        assert torch.equal(torch.cat([share[0] for share in shares]), images)
        assert torch.equal(torch.cat([share[1] for share in shares]), labels)


def test_runs_from_before_bytes_were_counted_stay_readable(alone: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text("{}")
    log = pd.read_csv(alone / "log.csv").drop(columns="all_reduced_bytes")
    log.to_csv(old / "log.csv", index=False)
    run = read_run(old)
    assert list(run.log.columns) == list(read_run(alone).log.columns)
    assert list(run.log.all_reduced_bytes) == [0] * len(log)

    state = torch.load(alone / "checkpoint.pt", weights_only=True)["extra"]["log"]
    for row in state["epochs"]:
        del row["all_reduced_bytes"]
    record = RunLog(old)
    record.load_state_dict(state)
    record.save()
    assert list(read_run(old).log.all_reduced_bytes) == [0] * len(log)
    assert json.loads((alone / "config.json").read_text())["ranks"] == 1
