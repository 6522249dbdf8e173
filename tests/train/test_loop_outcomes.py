"""What whole runs write, and what goes wrong in them: refused, diverged, out of memory, a full disk."""

import itertools
import json
import math
import multiprocessing
import resource
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from whole_runs import (  # noqa: F401  (fixtures among them)
    SHORT,
    assert_same_run,
    checkpoint_of,
    config,
    resnet,
    start,
    tiny_module,
    undisturbed,
    withering,
    withering_step,
)

from prunetrain_kernels.cost import batch_norm_bytes, count_flops, gradient_bytes
from prunetrain_kernels.errors import CheckpointError, DivergedError, InputError
from prunetrain_kernels.models import build
from prunetrain_kernels.prune.checkpoint import load_pruned
from prunetrain_kernels.train import layout, loop
from prunetrain_kernels.train.config import TrainConfig
from prunetrain_kernels.train.loop import train
from prunetrain_kernels.train.run_log import LOG_COLUMNS, read_run

# -- what a run writes -------------------------------------------------------------------------------------------------


def test_the_summary_agrees_with_the_log_and_with_the_shrunk_network(undisturbed: Path) -> None:
    run = read_run(undisturbed)
    summary, log = run.summary, run.log
    assert summary is not None
    needed = """val_accuracy train_flops_ratio inference_flops_ratio params_ratio bn_bytes_ratio comm_bytes_ratio
        wall_seconds lasso_seconds reconfigure_seconds lambda batch_sizes removed_layers reconfigurations"""
    assert set(needed.split()) <= summary.keys()
    assert all({"epoch", "seconds", "max_abs_dy", "train_flops"} <= r.keys() for r in summary["reconfigurations"])
    assert tuple(log.columns) == LOG_COLUMNS
    assert list(log.epoch) == list(range(1, 7))

    torch.manual_seed(0)
    dense = build("tiny_net_for_tests:tiny", 10, 3)
    example = (torch.zeros(2, 3, 8, 8),)
    flops, parameters = count_flops(dense, example), sum(p.numel() for p in dense.parameters())
    images = 60 * len(log)  # a batch of one image would be left out, and there is none here
    steps = log.steps
    assert summary["images"] == images
    assert (log.train_flops * steps).sum() == pytest.approx(summary["train_flops_ratio"] * flops.training * images)
    bn = batch_norm_bytes(dense, example)
    assert (log.bn_bytes * steps).sum() == pytest.approx(summary["bn_bytes_ratio"] * bn * images)
    sent = summary["comm_bytes_ratio"] * gradient_bytes(dense) * math.ceil(60 / 16) * len(log)
    assert (log.gradient_bytes * steps).sum() == pytest.approx(sent)
    assert summary["val_accuracy"] == log.val_accuracy.iloc[-1]
    assert (log.train_flops_per_image * 60).sum() == pytest.approx((log.train_flops * steps).sum())

    load_pruned(undisturbed / "checkpoint.pt", dense)
    small = count_flops(dense, example)
    assert summary["inference_flops_ratio"] == small.inference / flops.inference
    assert summary["params_ratio"] == sum(p.numel() for p in dense.parameters()) / parameters
    assert summary["reconfigurations"][-1]["train_flops"] == small.training
    assert 0 < summary["train_flops_ratio"] < 1
    assert 0 < summary["comm_bytes_ratio"] < 1

    first_loss = log.loss.iloc[0]
    assert summary["lambda"] > 0
    assert first_loss > 0
    assert log.penalty.notna().all()  # in the fine-tuning too


def test_slices_are_nan_where_channels_were_pruned_and_channels_csv_counts_them(undisturbed: Path) -> None:
    run = read_run(undisturbed)
    model = build("tiny_net_for_tests:tiny", 10, 3)
    load_pruned(undisturbed / "checkpoint.pt", model)
    last = run.channels[run.channels.reconfiguration == run.channels.reconfiguration.max()].set_index("layer")
    assert list(run.slice_epochs) == list(range(7))
    pruned = 0
    for layer, sizes in run.slices.items():
        assert not np.isnan(sizes[0]).any()
        gone = np.isnan(sizes)
        assert (gone[1:] >= gone[:-1]).all(), "what was pruned does not come back"
        assert (~gone[-1]).sum() == last.out_kept[layer]
        pruned += gone[-1].sum()
        module = model.get_submodule(layer)
        if last.removed[layer]:
            assert gone[-1].all()
        else:
            weight = module.weight.detach()
            expected = weight.abs().flatten(1).amax(1).numpy()
            np.testing.assert_array_equal(sizes[-1][~gone[-1]], expected)
            assert weight.shape[1] == last.in_kept[layer]
    assert pruned
    assert set(last.index[last.removed == 1]) <= set(run.summary["removed_layers"] if run.summary else [])
    assert (last.removed == 1).any()


def test_a_dense_run_has_ratios_of_exactly_one(tmp_path: Path) -> None:
    # 33 images in batches of 16: the last image of each epoch is left out, by the dense count of steps too
    options = config(tmp_path / "run", **SHORT, dense=True, data="synthetic:33x8x8", grow_batch=False, batch_limit=None)
    train(options, progress=False)
    run = read_run(tmp_path / "run")
    assert run.summary is not None
    for ratio in ("train_flops", "inference_flops", "params", "bn_bytes", "comm_bytes"):
        assert run.summary[f"{ratio}_ratio"] == 1, ratio
    assert run.summary["images"] == 64
    assert list(run.log.steps) == [2, 2]
    assert run.summary["lambda"] is None
    assert run.summary["reconfigurations"] == []
    assert run.summary["batch_sizes"] == [16]
    assert run.log.penalty.isna().all()


def test_reconfigure_once_does_so_at_that_epoch_only(tmp_path: Path) -> None:
    train(config(tmp_path / "run", epochs=3, fine_tune_epochs=1, interval=0.25, reconfigure_once=2), progress=False)
    run = read_run(tmp_path / "run")
    assert run.summary is not None
    assert [r["epoch"] for r in run.summary["reconfigurations"]] == [2]
    assert run.log.params.iloc[0] > run.log.params.iloc[1] == run.log.params.iloc[3]
    assert sorted(set(run.channels.epoch)) == [0, 2]


def test_the_last_epochs_are_pruned_too_where_the_interval_does_not_divide(tmp_path: Path) -> None:
    train(config(tmp_path / "run", epochs=3, fine_tune_epochs=1, interval=2), progress=False)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [r["epoch"] for r in summary["reconfigurations"]] == [2, 3]


@pytest.mark.parametrize(("interval", "expected"), [(0.5, [0.5, 1, 1.5, 2]), (1.5, [1.5, 2]), (2 / 3, [0.75, 1.5, 2])])
def test_fractions_of_an_epoch_are_hit_at_the_next_step(tmp_path: Path, interval: float, expected: list[float]) -> None:
    options = config(
        tmp_path / "run", **{**SHORT, "interval": interval}, data="synthetic:64x8x8", grow_batch=False, batch_limit=None
    )
    train(options, progress=False)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [r["epoch"] for r in summary["reconfigurations"]] == pytest.approx(expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"amp": "bf16"},
        {"channels_last": True},
        {"amp": "bf16", "channels_last": True},
        {"fuse": True},
        {"fuse": True, "amp": "bf16", "channels_last": True},
        {"fuse": True, "amp": "fp16", "proximal": True},
    ],
)
def test_mixed_precision_and_channels_last_train_and_prune(tmp_path: Path, changes: dict[str, Any]) -> None:
    train(config(tmp_path / "run", **{**SHORT, "interval": 0.5}, **changes), progress=False)
    run = read_run(tmp_path / "run")
    assert run.summary is not None
    assert run.summary["params_ratio"] < 1
    assert run.log.loss.notna().all()
    if changes.get("channels_last"):
        weight = checkpoint_of(tmp_path / "run")["model"]["a.conv1.weight" if "a.conv1" not in
                 run.summary["removed_layers"] else "stem.weight"]  # fmt: skip
        assert weight.is_contiguous(memory_format=torch.channels_last)


def test_a_run_leaves_channels_last_where_a_cpu_would_corrupt_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A ResNet's strided 1x1 shortcut left with few input channels: the process used to die of a broken heap."""
    monkeypatch.setattr(layout, "SAFE_CHANNELS", 12)  # fewer are left here, but not under 8
    path = tmp_path / "run"
    few = TrainConfig(
        out=str(path), model="resnet20", data="synthetic:64x16x16", epochs=2, batch=16, interval=1, penalty_ratio=0.9,
        threshold=0.97, relative=True, zeroing_tolerance=float("inf"), channels_last=True, threads=1, device="cpu",
    )  # fmt: skip
    train(few)
    assert "going on in contiguous format" in capsys.readouterr().out
    rows = pd.read_csv(path / "channels.csv").query("layer == 'layer2.0.downsample.0' and reconfiguration > 0")
    assert rows["in_kept"].iloc[0] < 12
    assert checkpoint_of(path)["model"]["layer1.0.conv1.weight"].is_contiguous()


def unevenly(training: Any, progress: Any, indices: Tensor, epoch: int) -> None:
    """A step like `withering_step`, and some channels go in the layers that write them only."""
    withering_step(training, progress, indices, epoch)
    with torch.no_grad():
        for name in training.prunetrain.graph.layers:
            if name.endswith(".conv1"):
                kept = training.prunetrain.kept[name][1][training.prunetrain.graph.computed(name)[1]]
                training.model.get_submodule(name).weight[(kept % 3 == 0).nonzero().flatten()] = 0


@pytest.mark.parametrize(
    "changes",
    [
        {"channels_last": True},
        {"fuse": True},
        {"fuse": True, "proximal": True},
        {"policy": "gating"},
        {"policy": "gating", "fuse": True},
        {"target_flops": 0.6, "target_by": 1.0},
    ],
)
def test_resumes_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    if "policy" in changes:
        monkeypatch.setattr(loop, "make_step", unevenly)
    options = config(tmp_path / "whole", **SHORT, **changes)
    train(options, progress=False)
    assert bool(checkpoint_of(tmp_path / "whole")["gated"]) == ("policy" in changes)
    original = loop.train_epoch

    def stop(training: Any, progress: Any, epoch: int) -> None:
        if epoch == 1:
            raise KeyboardInterrupt
        original(training, progress, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            train(replace(options, out=str(tmp_path / "halves")), progress=False)
    train(replace(options, out=str(tmp_path / "halves")), resume=True, progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


def test_fused_training_is_training(tmp_path: Path) -> None:
    """The same run with fused operators: the same lambda, losses and pruned channels."""
    runs = []
    for fuse in (False, True):
        out = tmp_path / f"fuse-{fuse}"
        train(config(out, **SHORT, grow_batch=False, batch_limit=None, fuse=fuse), progress=False)
        runs.append(read_run(out))
    plain, fused = runs
    assert plain.summary is not None
    assert fused.summary is not None
    assert plain.summary["params_ratio"] < 1
    assert fused.summary["params_ratio"] == plain.summary["params_ratio"]
    assert fused.summary["removed_layers"] == plain.summary["removed_layers"]
    assert fused.summary["lambda"] == pytest.approx(plain.summary["lambda"], rel=1e-5)
    for column in ("loss", "penalty", "train_flops", "inference_flops", "bn_bytes", "params"):
        assert fused.log[column].tolist() == pytest.approx(plain.log[column].tolist(), rel=1e-4), column


def test_a_gated_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gating prunes the spaces as union does, and computes less of them."""
    monkeypatch.setattr(loop, "make_step", unevenly)
    runs = {}
    for policy in ("union", "gating", "auto"):
        out = tmp_path / policy
        train(config(out, **SHORT, grow_batch=False, batch_limit=None, policy=policy), progress=False)
        runs[policy] = read_run(out)
    for run in runs.values():
        last = run.channels[run.channels.reconfiguration == run.channels.reconfiguration.max()]
        alive = last[last.removed == 0]
        assert (alive.in_live <= alive.in_kept).all()
        fewer = (alive.in_live < alive.in_kept) | (alive.out_live < alive.out_kept)
        if run is not runs["auto"]:  # which decides by the roof of this machine, busy or not
            assert fewer.any() == (run is runs["gating"])
    saved = {name: run.summary["inference_flops"] for name, run in runs.items() if run.summary}
    assert saved["gating"] < saved["union"]


def test_round_to_gives_multiples(tmp_path: Path) -> None:
    train(resnet(tmp_path / "run", round_to=8), progress=False)
    channels = read_run(tmp_path / "run").channels
    last = channels[channels.reconfiguration == channels.reconfiguration.max()]
    alive = last[last.removed == 0]
    inner = alive[alive.layer != "fc"]
    assert (inner.out_kept % 8 == 0).all()
    assert (alive[alive.layer != "conv1"].in_kept % 8 == 0).all()
    assert (inner.out_kept < inner.out_total).any()


def test_a_validation_split_smaller_than_the_example_batch(tmp_path: Path) -> None:
    train(config(tmp_path / "run", epochs=1, fine_tune_epochs=0, interval=1, limit_val=3), progress=False)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["val_accuracy"] in (0, 1 / 3, 2 / 3, 1)


def test_crops_of_a_given_side(tmp_path: Path) -> None:
    train(config(tmp_path / "run", epochs=1, fine_tune_epochs=0, interval=1, crop=6), progress=False)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["crop"] == 6
    with pytest.raises(InputError, match="crop 9 does not fit"):
        train(config(tmp_path / "other", epochs=1, crop=9), progress=False)


def test_a_batch_larger_than_the_data(tmp_path: Path) -> None:
    train(
        config(tmp_path / "run", **{**SHORT, "epochs": 1}, batch=64, grow_batch=False, batch_limit=None), progress=False
    )
    assert list(read_run(tmp_path / "run").log.steps) == [1]


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "values"),
    {
        "epochs": [0, -1],
        "fine_tune_epochs": [-1],
        "batch": [1, 0, -4],
        "lr": [0, -0.1, math.nan, math.inf],
        "momentum": [-0.1, 1, math.nan],
        "weight_decay": [-1e-4, math.nan, math.inf],
        "decay": [0, -1, math.nan, math.inf],
        "decay_at": [(0.0,), (1.5,), (0.5, math.nan)],
        "penalty_ratio": [-0.1, 1, math.nan],
        "interval": [0, -1, math.nan, math.inf],
        "threshold": [-1e-4, math.nan, math.inf],
        "policy": ["gating?"],
        "round_to": [0, -8],
        "batch_granularity": [0],
        "memory_budget": [0, -1],
        "batch_limit": [8],
        "lr_rule": ["square"],
        "amp": ["fp8"],
        "reconfigure_once": [0, 6],
        "threads": [0],
        "seed": [2**64],
    }.items(),
)
def test_options_out_of_range_are_refused_by_name(tmp_path: Path, option: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InputError, match=f"^--{option.replace('_', '-')} must "):
            config(tmp_path, **{option: value}).check()
    assert asdict(config(tmp_path)).keys() >= {option}


def test_options_that_exclude_each_other() -> None:
    with pytest.raises(InputError, match="--dense has no lasso, so it cannot go with --proximal"):
        TrainConfig("out", dense=True, proximal=True).check()
    with pytest.raises(InputError, match="--dense"):
        TrainConfig("x", dense=True, reconfigure_once=3).check()
    for changes in ({"memory_budget": 1000}, {"batch_limit": 1000}):
        with pytest.raises(InputError, match="add --grow-batch"):
            TrainConfig("x", **changes).check()  # type: ignore[arg-type]


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = config(tmp_path / "run", **{**SHORT, "epochs": 3}, dense=True)
    original = loop.make_step

    def poison(training: Any, progress: Any, indices: Tensor, epoch: int) -> None:
        original(training, progress, indices, epoch)
        if epoch == 1 and progress.sums.steps == 1:
            with torch.no_grad():
                training.model.stem.weight[0, 0, 0, 0] = math.nan

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_step", poison)
        with pytest.raises(DivergedError, match=r"nan in epoch 2 .*epoch 1 is kept"):
            train(options, progress=False)
    run = read_run(tmp_path / "run")
    assert len(run.log) == 1
    assert run.summary is None
    assert checkpoint_of(tmp_path / "run")["extra"]["epoch"] == 1
    train(options, resume=True, progress=False)
    train(replace(options, out=str(tmp_path / "whole")), progress=False)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("interval", [1, 0.25])
def test_weights_spoilt_by_an_epochs_last_step_reach_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: float
) -> None:
    original = loop.make_step

    def poison(training: Any, progress: Any, indices: Tensor, epoch: int) -> None:
        original(training, progress, indices, epoch)
        if epoch == 1 and progress.sums.images + len(indices) == 60:  # no loss of this epoch has seen it
            with torch.no_grad():
                training.model.fc.bias[0] = math.inf

    monkeypatch.setattr(loop, "make_step", poison)
    with pytest.raises(DivergedError, match="epoch 1 is kept"):
        train(config(tmp_path / "run", **{**SHORT, "interval": interval}), progress=False)
    saved = checkpoint_of(tmp_path / "run")
    assert saved["extra"]["epoch"] == 1
    assert all(t.isfinite().all() for t in saved["model"].values())


def test_a_huge_learning_rate_diverges_with_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="lower --lr"):
        train(config(tmp_path / "run", lr=9e19, epochs=3), progress=False)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_model_with_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"wrong_logits.*10 classes.*\(8, 11\)"):
        train(config(tmp_path / "run", model="tiny_net_for_tests:wrong_logits"), progress=False)


def fail_once(monkeypatch: pytest.MonkeyPatch, at: set[int]) -> list[list[int]]:
    """The forward of the given steps runs out of memory; returns the images of every step that went through."""
    done: list[list[int]] = []
    calls = itertools.count()
    original = loop.make_step

    def step(training: Any, progress: Any, indices: Tensor, epoch: int) -> None:
        def refuse(module: nn.Module, arguments: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

        handle = training.model.fc.register_forward_pre_hook(refuse) if next(calls) in at else None
        try:
            original(training, progress, indices, epoch)
        finally:
            if handle is not None:
                handle.remove()
        done.append(indices.tolist())

    monkeypatch.setattr(loop, "make_step", step)
    return done


def test_out_of_memory_goes_on_with_one_granule_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = fail_once(monkeypatch, {1})
    options = config(tmp_path / "run", epochs=2, fine_tune_epochs=0, interval=2, batch=24, data="synthetic:64x8x8")
    train(options, progress=False)
    assert [len(images) for images in done] == [24, 16, 16, 8, 16, 16, 16, 16]
    assert sorted(itertools.chain(*done[:4])) == list(range(64)), "an image was skipped or repeated"
    run = read_run(tmp_path / "run")
    assert list(run.log.lr) == pytest.approx([0.05, 0.05 * 16 / 24])
    assert run.summary is not None
    assert run.summary["batch_sizes"] == [24, 16]
    assert run.summary["images"] == 128


def test_out_of_memory_without_growth_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_once(monkeypatch, {1})
    with pytest.raises(InputError, match=r"16 images does not fit.*smaller --batch"):
        train(config(tmp_path / "run", grow_batch=False, batch_limit=None), progress=False)


def test_out_of_memory_for_ever_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = fail_once(monkeypatch, set(range(1000)))
    with pytest.raises(InputError, match="does not fit"):
        train(config(tmp_path / "run"), progress=False)
    assert done == []


def _fill_the_disk(options: TrainConfig, messages: Any) -> None:
    """Trains one epoch, then resumes with a limit on the size of files that no checkpoint fits in."""
    original = loop.save
    saves = itertools.count()

    def save(training: Any, progress: Any) -> None:
        if next(saves) == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        original(training, progress)

    loop.save = save
    loop.make_step = withering_step
    try:
        train(options, progress=False)
    except CheckpointError as error:
        messages.put(str(error))
        messages.close()
        messages.join_thread()


def test_a_full_disk_during_a_checkpoint_keeps_the_old_one(tmp_path: Path, start: Any) -> None:
    context = multiprocessing.get_context("forkserver")
    messages = context.Queue()
    options = config(tmp_path / "run", **SHORT)
    process = context.Process(target=_fill_the_disk, args=(options, messages))
    process.start()
    assert "cannot write" in messages.get(timeout=60)
    process.join()
    assert checkpoint_of(tmp_path / "run")["extra"]["epoch"] == 1
    assert not list((tmp_path / "run").glob(".*"))
    train(options, resume=True, progress=False)
    train(replace(options, out=str(tmp_path / "whole")), progress=False)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
