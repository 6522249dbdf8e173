"""PruneTrain in a stranger's loop on several ranks: DDP's buckets and hooks, the batch, checkpoints."""

import copy
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rank_processes import TORCHRUN, OnRanks, assert_bitwise_equal, nets, on_ranks  # noqa: F401  (fixtures among them)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prunetrain_kernels import MiniBatch, PruneTrain, penalty_coefficient
from prunetrain_kernels.cost import MemoryModel, gradient_bytes
from prunetrain_kernels.errors import InputError, RanksDifferError
from prunetrain_kernels.prune.checkpoint import load_pruned, save_pruned
from prunetrain_kernels.train import loop, mini_batch
from prunetrain_kernels.train.distributed import (
    count_sent_bytes,
    rebuild_buckets,
)


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
    alone = copy.deepcopy(ddp.module)
    images, labels = _images(rank, step)
    F.cross_entropy(alone(images), labels).backward()
    ddp.zero_grad(set_to_none=True)
    F.cross_entropy(ddp(images), labels).backward()
    same = True
    for parameter, averaged in zip(alone.parameters(), ddp.parameters(), strict=True):
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        assert averaged.grad is not None
        same &= torch.allclose(averaged.grad, parameter.grad / world, rtol=1e-4, atol=1e-6)
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
    outcome: dict[str, Any] = {"averaged": [], "sent": [], "gradients": [], "calls": [], "world": 2}
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
        outcome["averaged"].append(_averaged(ddp, rank, 99, 2))
        outcome["sent"].append(sent.total)
        outcome["gradients"].append(gradient_bytes(ddp))
        outcome["calls"].append(len(hook_calls))
    assert all(any(p is q for q in before) for p in ddp.parameters())
    outcome["state"] = dict(ddp.module.named_parameters())
    outcome["coefficient"] = prunetrain.coefficient
    assert prunetrain.coefficient == pytest.approx(expected, rel=1e-5)
    outcome["options"] = {
        "static_graph": ddp.static_graph,
        "gradient_as_bucket_view": ddp.gradient_as_bucket_view,
        "find_unused_parameters": ddp.find_unused_parameters,
        "bucket_cap_mb": ddp.bucket_bytes_cap / 2**20,
    }
    return outcome


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
    outcomes = on_ranks(2, _stranger, options)
    assert_bitwise_equal([one["state"] for one in outcomes if isinstance(one, dict) or pytest.fail(str(one))])
    for one in outcomes:
        assert one["averaged"] == [True] * 4
        assert one["sent"] == one["gradients"]
        assert one["calls"] == [1] * 4
        assert len(set(one["gradients"])) == 3 + (one["gradients"][3] != one["gradients"][2])
        assert {name: one["options"][name] for name in options} == pytest.approx(options, rel=1e-3)
        assert one["coefficient"] == outcomes[0]["coefficient"]


def test_the_trainer_in_the_documentation_runs(tmp_path: Path) -> None:
    root = Path(loop.__file__).parents[2]
    text = (root / "docs" / "distributed.md").read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "trainer.py").write_text(text.replace("for epoch in range(4)", "for epoch in range(2)"))
    done = subprocess.run(
        [*TORCHRUN, "trainer.py"], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("epoch 2: training FLOPs")
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
    sizes = []
    for as_view, copies in ((False, 0), (True, 0), (False, 2)):
        ddp = DistributedDataParallel(_net(), gradient_as_bucket_view=as_view)
        sizing = MiniBatch(8)
        also = [copy.deepcopy(ddp.module) for _ in range(copies)]
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
        PruneTrain(ddp, optimizer, (_images(0, 0)[0],), batch=sizing, also=also)
        assert sizing.memory is not None
        sizes.append(sizing.memory.fixed)
    return [*sizes, gradient_bytes(ddp.module), sum(t.nbytes for t in ddp.module.state_dict().values())]


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
