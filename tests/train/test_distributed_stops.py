"""Several ranks: they stop at one step, learn why another one failed, and refuse each other's pixels."""

import dataclasses
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_processes
import torch
import torch.nn.functional as F
from rank_processes import (  # noqa: F401  (fixtures among them)
    OnRanks,
    assert_bitwise_equal,
    config,
    nets,
    on_ranks,
    train_on_rank,
    withering_step,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from prunetrain_kernels import PruneTrain
from prunetrain_kernels.errors import InputError, PruneTrainError, RankLostError, RanksDifferError, TrainingStopped
from prunetrain_kernels.train import loop, reconfiguration, setup
from prunetrain_kernels.train.config import TrainConfig
from prunetrain_kernels.train.loop import train
from prunetrain_kernels.train.run_log import read_run
from prunetrain_kernels.train.stopping import StopRequest


def _stopped(rank: int, options: TrainConfig) -> Any:
    """Rank 1 alone is asked to stop, in the second step of the first epoch."""
    stop = StopRequest()
    rank_processes.plain_step = loop.make_step

    def step(training: Any, progress: Any, indices: Any, epoch: int) -> None:
        withering_step(training, progress, indices, epoch)
        if rank == 1 and epoch == 0 and progress.sums.steps == 1:  # counted after the step
            stop.number = signal.SIGTERM

    loop.StopRequest = lambda: stop  # type: ignore[assignment,misc]
    rank_processes.withering_step = step
    return train_on_rank(rank, options)


def test_three_ranks_stop_at_one_step_and_four_go_on(
    on_ranks: OnRanks,
    tmp_path: Path,
) -> None:
    """24 images a step, and 14 in an epoch's last, which neither number of ranks divides."""
    options = config(tmp_path / "run", batch=24, epochs=2, sync_batch_norm=True)
    for stopped in on_ranks(3, _stopped, options):
        assert isinstance(stopped, TrainingStopped)
        assert stopped.number == signal.SIGTERM
        assert "after step 2 of epoch 1" in str(stopped)
    assert_bitwise_equal(on_ranks(4, train_on_rank, options, None, True))
    train_on_rank(0, dataclasses.replace(options, out=str(tmp_path / "one")))
    one, many = (read_run(tmp_path / name).log for name in ("one", "run"))
    assert list(many.epoch) == [1, 2]
    assert list(many.steps) == list(one.steps)
    assert list(many.loss) == pytest.approx(list(one.loss), rel=1e-9)
    assert list(many.train_accuracy) == list(one.train_accuracy)
    assert (tmp_path / "one" / "channels.csv").read_bytes() == (tmp_path / "run" / "channels.csv").read_bytes()


def _told(rank: int, options: TrainConfig) -> list[str]:
    """What a rank says where rank 1 runs out of memory: while it measures a pruned network, and in a step."""

    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    ddp = DistributedDataParallel(Net())
    images = torch.ones(2, 3, 8, 8)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    prunetrain = PruneTrain(ddp, optimizer, (images,), interval=1)
    prunetrain.regularize(F.cross_entropy(ddp(images), torch.tensor([0, 1]))).backward()
    with torch.no_grad():
        ddp.module[0].weight[0] = 0
        ddp.module[0].bias[0] = 0
        ddp.module[2].weight[:, 0] = 0
    look = reconfiguration.look_again

    def measured(*arguments: Any) -> Any:
        if rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return look(*arguments)

    reconfiguration.look_again = measured
    said: list[str] = []
    try:
        prunetrain.reconfigure()
    except (torch.OutOfMemoryError, PruneTrainError) as error:
        said.append(f"{type(error).__name__}: {error}")
    reconfiguration.look_again = look
    said.append(str(ddp.module[0].out_channels))

    step = loop.make_step

    def full(training: Any, progress: Any, indices: Any, epoch: int) -> None:
        if rank == 1 and epoch == 1:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        step(training, progress, indices, epoch)

    loop.make_step = full
    try:
        train(options, progress=False)
    except (InputError, RankLostError) as error:
        said.append(f"{type(error).__name__}: {error}")
    return said


def test_a_rank_out_of_memory_is_what_all_of_them_tell(
    on_ranks: OnRanks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = config(tmp_path / "run", schedule="cosine")
    others, itself = on_ranks(2, _told, options)
    assert others[0] == (
        "RanksDifferError: rank 1 failed, so nothing was changed on any rank: OutOfMemoryError: CUDA out of memory "
        "(injected)."
    )
    assert itself[0] == "OutOfMemoryError: CUDA out of memory (injected)"
    assert others[1] == itself[1] == "8"
    why = (
        "a step of 16 images on 2 ranks does not fit the memory of rank 1; go on from the last checkpoint with --resume"
    )
    assert itself[2] == f"InputError: {why} and a smaller --batch."
    assert others[2].startswith(f"RankLostError: rank 1 failed: {why}")

    rates: list[float] = []
    begin_epoch = loop.begin_epoch

    def begun(training: Any, progress: Any) -> None:
        begin_epoch(training, progress)
        rates.append(training.optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(loop, "begin_epoch", begun)
    train(dataclasses.replace(options, batch=8), resume=True, progress=False)
    log = read_run(tmp_path / "run").log
    assert list(log.batch) == [16, 8, 8, 8]
    cosine = [0.05 * (1 + np.cos(np.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert rates == pytest.approx([rate / 2 for rate in cosine[1:]])
    assert list(log.lr) == pytest.approx([cosine[0], *rates])


def _other_pixels(rank: int, options: TrainConfig, tree: Path) -> list[str]:
    """What a rank says of another's data: one pixel of one image, or the corner of one that stays a file."""
    load = setup.load_data

    def changed(*arguments: Any) -> Any:
        data = load(*arguments)
        if rank == 1:
            data.train_images[5, 0, 0, 0] ^= 1
        return data

    said = []
    of_files = dataclasses.replace(options, data=str(tree / str(rank)), augment="resized-crop", crop=4, cache_limit=0)
    setup.NOT_COMPARED = (*setup.NOT_COMPARED, "data")
    for each, loaded in ((options, changed), (of_files, load)):
        setup.load_data = loaded
        try:
            train(each, progress=False)
        except RanksDifferError as error:
            said.append(str(error).split(":")[0])
    return said


def test_the_same_labels_with_other_pixels_are_refused(on_ranks: OnRanks, tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image", reason="pip install pillow")
    for rank in range(2):
        for i in range(8):
            pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            if rank == 1 and i == 3:
                pixels[0, 0] ^= 1  # outside the middle, which is all that validation sees
            for split in ("train", "val"):
                file = tmp_path / "tree" / str(rank) / split / "ab"[i % 2] / f"{i}.bmp"
                file.parent.mkdir(parents=True, exist_ok=True)
                pillow.fromarray(pixels).save(file)
    for said in on_ranks(2, _other_pixels, config(tmp_path / "run"), tmp_path / "tree"):
        assert said == ["the data differ between the 2 ranks", "the image files differ between the 2 ranks"]
