"""An EMA beside PruneTrain: pruned with the network, in a stranger's loop and by `prunetrain train --ema`."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from strangers import Net, example, images, net, sgd, slices, step, wither
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from whole_runs import assert_same_run, checkpoint_of, config, tiny_module, withering  # noqa: F401  (fixtures)

from prunetrain_kernels.errors import CheckpointError, InputError, PruneTrainError
from prunetrain_kernels.models import build
from prunetrain_kernels.nn import BatchNormAct2d
from prunetrain_kernels.prune.checkpoint import load_pruned, save_pruned
from prunetrain_kernels.train import loop
from prunetrain_kernels.train.loop import train
from prunetrain_kernels.train.prunetrain import PruneTrain
from prunetrain_kernels.train.run_log import read_run
from prunetrain_kernels.train.step import Average


def averaged(model: Net) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)


@pytest.mark.parametrize("fuse", [False, True])
def test_an_ema_in_a_strangers_loop_is_that_of_a_masked_twin(fuse: bool) -> None:
    """Through three reconfigurations; the twin keeps its shape and has the same channels held at zero."""
    model = net()
    ema, optimizer = averaged(model), sgd(model, lr=0.02)
    prunetrain = PruneTrain(model, optimizer, example(), interval=1, fuse=fuse, also=[ema])
    assert any(isinstance(m, BatchNormAct2d) for m in ema.modules()) == fuse
    twin = net()
    twin_ema, twin_optimizer = averaged(twin), sgd(twin, lr=0.02)
    twin_prunetrain = PruneTrain(twin, twin_optimizer, example(), interval=1)
    identity = [id(p) for p in ema.parameters()]
    dead = 0
    for epoch in range(3):
        for number in range(4):
            losses = []
            for one, its_optimizer, its_prunetrain, its_ema in (
                (model, optimizer, prunetrain, ema),
                (twin, twin_optimizer, twin_prunetrain, twin_ema),
            ):
                losses.append(step(one, its_optimizer, its_prunetrain, 4 * epoch + number))
                wither(twin, dead, dead)
                its_ema.update_parameters(one)
            assert abs(losses[0] - losses[1]) < 1e-4 * losses[0]  # pruned slices no longer add sqrt(eps) each
        dead += 2
        wither(model, 2, 2)
        wither(twin, dead, dead)
        for weight, dim, index in slices(twin, dead, dead):  # what reconfigure drops
            twin_optimizer.state[weight]["momentum_buffer"].index_fill_(dim, index, 0)
        report = prunetrain.epoch_end()
        assert report is not None
        assert report.reconfiguration.changed
        assert len(report.reconfiguration.also_max_abs_dy) == 1
    assert [id(p) for p in ema.parameters()] == identity
    kept = 8 - dead
    assert ema.module.stem.weight.shape[0] == kept
    torch.testing.assert_close(ema.module.stem.weight, twin_ema.module.stem.weight[:kept], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        ema.module.a.bn2.running_var, twin_ema.module.a.bn2.running_var[:kept], rtol=1e-9, atol=0
    )
    # the same channels everywhere
    assert [p.shape for p in ema.parameters()] == [p.shape for p in model.parameters()]


def test_several_copies_and_a_teacher_in_evaluation_mode() -> None:
    model = net()
    teacher, snapshot = copy.deepcopy(model).eval(), copy.deepcopy(model)
    prunetrain = PruneTrain(model, sgd(model), example(), interval=1, also=[teacher, snapshot])
    step(model, prunetrain.optimizer, prunetrain, 0)
    wither(model, 3, 1)
    prunetrain.epoch_end()
    for other in (teacher, snapshot):
        assert [p.shape for p in other.parameters()] == [p.shape for p in model.parameters()]
        assert other(images(0)[0]).shape == (12, 5)
    assert not teacher.a.bn1.training


def test_a_failing_copy_leaves_model_optimizer_and_copies_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    ema = averaged(model)
    prunetrain = PruneTrain(model, sgd(model), example(), interval=1, also=[ema])
    step(model, prunetrain.optimizer, prunetrain, 0)
    wither(model, 3, 1)
    before = [{n: t.clone() for n, t in m.state_dict().items()} for m in (model, ema)]

    def fails(x: Tensor) -> Tensor:
        if ema.module.stem.out_channels < 8:
            raise ValueError("cannot")
        return Net.forward(ema.module, x)

    monkeypatch.setattr(ema.module, "forward", fails)
    with pytest.raises(PruneTrainError, match="cannot"):
        prunetrain.epoch_end()
    for state, now in zip(before, (model, ema), strict=True):
        assert all(torch.equal(t, now.state_dict()[n]) for n, t in state.items())


def test_what_is_no_copy_is_refused_at_once() -> None:
    model = net()
    with pytest.raises(InputError, match=r"also\[0\] shares 'stem.weight' with the model"):
        PruneTrain(model, sgd(model), example(), also=[model])
    with pytest.raises(InputError, match=r"also\[0\] is not like the model"):
        PruneTrain(model, sgd(model), example(), also=[net(width=9)])


def test_saved_and_loaded_in_a_strangers_loop(tmp_path: Path) -> None:
    def started() -> tuple[Net, AveragedModel, PruneTrain]:
        model = net()
        ema = averaged(model)
        return model, ema, PruneTrain(model, sgd(model), example(), interval=1, also=[ema])

    model, ema, prunetrain = started()

    def epoch(model: Net, ema: AveragedModel, prunetrain: PruneTrain, number: int) -> None:
        for i in range(3):
            step(model, prunetrain.optimizer, prunetrain, 3 * number + i)
            ema.update_parameters(model)
        wither(model, 2, 1)
        prunetrain.epoch_end()

    epoch(model, ema, prunetrain, 0)
    save_pruned(tmp_path / "c.pt", model, prunetrain.optimizer, prunetrain, also=[ema])
    other, other_ema, other_prunetrain = started()
    with pytest.raises(CheckpointError, match=r"a copy in `also` does not have the shape of the loaded model"):
        load_pruned(tmp_path / "c.pt", other, other_prunetrain.optimizer, other_prunetrain)
    other, other_ema, other_prunetrain = started()
    load_pruned(tmp_path / "c.pt", other, other_prunetrain.optimizer, other_prunetrain, also=[other_ema])
    for each in ((model, ema, prunetrain), (other, other_ema, other_prunetrain)):
        epoch(*each, 1)
    for a, b in ((model, other), (ema, other_ema)):
        assert all(torch.equal(t, b.state_dict()[n]) for n, t in a.state_dict().items())


def test_the_loops_average_is_pytorchs() -> None:
    model = net()
    average, averaged_model = (
        Average(model, 0.9),
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    )
    averaged_model.update_parameters(model)  # its first update only copies
    optimizer = sgd(model)
    prunetrain = PruneTrain(model, optimizer, example())
    for number in range(4):
        step(model, optimizer, prunetrain, number)
        average.update()
        averaged_model.update_parameters(model)
    for name, tensor in average.network.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, averaged_model.module.state_dict()[name], rtol=1e-12, atol=1e-14)
        else:
            assert torch.equal(tensor, model.state_dict()[name])


# -- prunetrain train --ema --------------------------------------------------------------------------------------------


def halted(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains one epoch, stops in the next and resumes."""
    original = loop.train_epoch

    def stop(training: Any, progress: Any, epoch: int) -> None:
        if epoch == 1:
            raise KeyboardInterrupt
        original(training, progress, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            train(options, progress=False)
    train(options, resume=True, progress=False)


def test_a_run_with_an_average_logs_its_accuracy_and_resumes_bitwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = config(tmp_path / "whole", epochs=2, fine_tune_epochs=1, ema=0.5)
    train(options, progress=False)
    halted(replace(options, out=str(tmp_path / "halves")), monkeypatch)
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    [whole], [halves] = (checkpoint_of(tmp_path / name)["also"] for name in ("whole", "halves"))
    assert all(torch.equal(t, halves["network"][n]) for n, t in whole["network"].items())

    run = read_run(tmp_path / "whole")
    assert run.log.ema_accuracy.between(0, 1).all()
    assert run.summary is not None
    assert run.summary["ema_accuracy"] == run.log.ema_accuracy.iloc[-1]
    model = build("tiny_net_for_tests:tiny", 10, in_channels=3)
    ema = copy.deepcopy(model)
    load_pruned(tmp_path / "whole" / "checkpoint.pt", model, also=[ema])
    assert ema.stem.weight.shape == model.stem.weight.shape
    assert not torch.equal(ema.stem.weight, model.stem.weight)


def test_an_average_does_not_change_the_training(tmp_path: Path) -> None:
    for name, ema in (("with", 0.9), ("without", None)):
        train(config(tmp_path / name, epochs=2, fine_tune_epochs=0, interval=1, ema=ema, fuse=True), progress=False)
    states = [checkpoint_of(tmp_path / name)["model"] for name in ("with", "without")]
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())
    assert read_run(tmp_path / "without").log.ema_accuracy.isna().all()
    assert "ema_accuracy" not in (read_run(tmp_path / "without").summary or {})
