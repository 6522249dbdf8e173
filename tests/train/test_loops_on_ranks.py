"""Accumulation, clipping, the average and a schedule on two ranks: the same as one process in as many parts."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import OnRanks, assert_bitwise_equal, config, nets, on_ranks, train_on_rank  # noqa: F401  (fixtures)
from strangers import example, net, sgd, step, wither
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from prunetrain_kernels.errors import InputError, RanksDifferError
from prunetrain_kernels.train import setup
from prunetrain_kernels.train.config import TrainConfig
from prunetrain_kernels.train.distributed import Ranks
from prunetrain_kernels.train.prunetrain import PruneTrain
from prunetrain_kernels.train.run_log import read_run

OPTIONS: dict[str, Any] = {
    "data": "synthetic:64x8x8",
    "clip_grad": 0.7,
    "ema": 0.8,
    "schedule": "cosine",
    "warmup": 1,
    "no_decay_norms": True,
}


def _in_double_precision(rank: int, options: TrainConfig) -> dict[str, Tensor]:
    set_default = torch.set_default_dtype
    set_default(torch.float64)
    torch.set_default_dtype = lambda dtype: None  # `train_on_rank` would set it back
    try:
        return train_on_rank(rank, options)
    finally:
        torch.set_default_dtype = set_default
        set_default(torch.float32)


def test_two_ranks_in_two_parts_are_one_process_in_four(on_ranks: OnRanks, tmp_path: Path) -> None:
    many = config(tmp_path / "many", accumulate=2, **OPTIONS)
    assert_bitwise_equal(on_ranks(2, _in_double_precision, many))
    _in_double_precision(0, config(tmp_path / "one", accumulate=4, **OPTIONS))
    runs = [read_run(tmp_path / name) for name in ("many", "one")]
    for column in ("loss", "penalty"):
        assert list(runs[0].log[column]) == pytest.approx(list(runs[1].log[column]), rel=1e-8)
    for column in ("train_accuracy", "lr", "batch", "params", "memory_bytes", "steps"):
        assert list(runs[0].log[column]) == list(runs[1].log[column]), column
    assert len(set(runs[0].log.params)) >= 3
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("many", "one")]
    for name, average in states[0]["also"][0]["network"].items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):  # of rank 0's parts alone
            torch.testing.assert_close(average, states[1]["also"][0]["network"][name], rtol=1e-7, atol=1e-10, msg=name)


def _with_averages(rank: int, differ: bool) -> Any:
    """A stranger's DDP with an average that another rank's may differ from; its shapes after a reconfiguration."""
    model = net()
    average = copy.deepcopy(model)
    if differ and rank == 1:
        average.fc.bias.data[0] += 1
    average.bn.running_mean.fill_(rank)  # buffers may: rank 0's hold
    ddp = DistributedDataParallel(model)
    prunetrain = PruneTrain(ddp, sgd(ddp), example(), interval=1, also=[average])
    step(ddp, prunetrain.optimizer, prunetrain, rank)
    wither(model, 2, 1)
    prunetrain.epoch_end()
    return [tuple(p.shape) for p in average.parameters()], average.bn.running_mean.tolist()


def test_averages_follow_on_all_ranks_and_must_not_differ(on_ranks: OnRanks) -> None:
    first, second = on_ranks(2, _with_averages, False)
    assert first == second
    assert first[0][0] == (6, 3, 3, 3)
    assert set(first[1]) == {0.0}
    for outcome in on_ranks(2, _with_averages, True):
        assert isinstance(outcome, RanksDifferError)
        assert "the weights of the copies of the model differ between the 2 ranks" in str(outcome)


def test_what_ranks_cannot_do() -> None:
    ranks = Ranks(world=2)
    with pytest.raises(InputError, match="a multiple of 6, and at least 12"):
        setup.check_ranks(TrainConfig("x", batch=16, accumulate=3), ranks)
    with pytest.raises(InputError, match="--cuda-graphs captures the step of one process only"):
        setup.check_ranks(TrainConfig("x", batch=16, cuda_graphs=True), ranks)
