"""What a user sees of a training: numbers for a log, TensorBoard's files, one line for a terminal."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from whole_runs import config, start, tiny_module  # noqa: F401  (fixtures)

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.optim import SGD
from prunetrain_kernels.train import logged
from prunetrain_kernels.train.loop import train
from prunetrain_kernels.train.mini_batch import MiniBatch
from prunetrain_kernels.train.prunetrain import PruneTrain
from prunetrain_kernels.train.run_log import read_run

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(288, 4)
    )


def trained(done: int, /, parts: int = 1, **options: Any) -> PruneTrain:
    """A PruneTrain after some epochs of one step each, in the first of which half of the channels go."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    prunetrain = PruneTrain(model, optimizer, (X,), **{"interval": 1, **options})
    for _ in range(done * parts):
        optimizer.zero_grad()
        prunetrain.regularize(F.cross_entropy(model(X), torch.arange(4))).backward()
        optimizer.step()
        if model[0].out_channels == 8:
            with torch.no_grad():
                model[0].weight[:4], model[3].weight[:, :4] = 0, 0
        prunetrain.advance(1 / parts)
    return prunetrain


def test_the_log_gets_the_numbers_after_each_epoch() -> None:
    seen: list[tuple[int, dict[str, float]]] = []
    prunetrain = trained(3, epochs=3, log=lambda values, step: seen.append((step, values)))
    assert [step for step, _ in seen] == [1, 2, 3]
    last = seen[-1][1]
    assert last["prunetrain/inference_flops"] == prunetrain.flops.inference / prunetrain.dense_flops.inference < 0.7
    assert last["prunetrain/parameters"] == sum(p.numel() for p in prunetrain.model.parameters())
    assert last["prunetrain/lambda"] == prunetrain.coefficient
    assert last["prunetrain/penalty"] == pytest.approx(float(prunetrain.last_penalty), rel=1e-6)
    assert last["prunetrain/smallest_slice"] <= last["prunetrain/median_slice"]
    assert 0 < last["prunetrain/expected_inference_flops"] <= last["prunetrain/inference_flops"]
    assert all(type(value) is float for _, values in seen for value in values.values())


@pytest.mark.parametrize(
    ("options", "absent"),
    [
        ({}, {"expected_inference_flops", "smallest_slice", "batch"}),
        ({"penalty_ratio": 0.0}, {"lambda", "penalty"}),
        ({"batch": 4, "epochs": 2}, set()),
    ],
)
def test_what_is_not_there_is_left_out(options: dict[str, Any], absent: set[str]) -> None:
    seen: list[dict[str, float]] = []
    trained(2, log=lambda values, step: seen.append(values), **options)
    names = {name.removeprefix("prunetrain/") for name in seen[-1]}
    assert {"training_flops", "inference_flops", "parameters", "removed_layers"} <= names
    assert not absent & names
    assert ("batch" in names) == ("batch" in options)


def test_between_epochs_it_is_called_where_a_reconfiguration_is() -> None:
    steps: list[int] = []
    trained(2, parts=4, interval=0.5, log=lambda values, step: steps.append(step))
    assert steps == [0, 1, 1, 2]


def wandb_log(data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None: ...


def mlflow_log_metrics(
    metrics: dict[str, float], step: int | None = None, synchronous: bool | None = None, run_id: str | None = None
) -> None: ...


@pytest.mark.parametrize("function", [wandb_log, mlflow_log_metrics])
def test_it_calls_as_other_libraries_want_it(function: Callable[..., None]) -> None:
    trained(1, log=function)


def test_a_log_that_fails_loses_no_epoch() -> None:
    def fails(values: dict[str, float], step: int) -> None:
        raise ConnectionError("the server is gone")

    prunetrain = trained(0, log=fails)
    with pytest.raises(ConnectionError):
        prunetrain.epoch_end()
    assert (prunetrain.epochs, len(prunetrain.history)) == (1, 1)
    assert copy.deepcopy(prunetrain).log is None


def test_one_line_for_a_terminal() -> None:
    prunetrain = trained(0, batch=4)
    assert repr(prunetrain) == (
        "<PruneTrain of Sequential: epoch 0, training FLOPs 100.0% of dense, inference 100.0%, lambda not set yet, "
        "batch 4>"
    )
    assert "no lasso" in repr(trained(0, penalty_ratio=0))
    assert "target 0.5>" in repr(trained(1, target=0.5, epochs=3))
    prunetrain = trained(1)
    with torch.no_grad():
        prunetrain.model[0].weight[:2], prunetrain.model[3].weight[:, :2] = 0, 0
    report = prunetrain.epoch_end()
    for text in (repr(prunetrain), repr(report)):
        assert "\n" not in text
        assert len(text) < 250
    assert f"lambda {prunetrain.coefficient:.2g}" in repr(prunetrain)
    assert "epoch 2" in repr(report)


def test_tensorboard_has_what_the_log_has(tmp_path: Path, start: Any) -> None:  # noqa: F811
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = tmp_path / "board"
    run = train(config(tmp_path / "run", tensorboard=str(board), epochs=2, fine_tune_epochs=0), progress=False)
    events = accumulator.EventAccumulator(str(board))
    events.Reload()
    log = read_run(run).log
    for tag, column in {
        "accuracy/val_accuracy": "val_accuracy",
        "training/loss": "loss",
        "flops/inference_flops": "inference_flops",
        "lasso/lambda": "lambda",
        "seconds/reconfigure_seconds": "reconfigure_seconds",
    }.items():
        scalars = events.Scalars(tag)
        assert [s.step for s in scalars] == [1, 2]
        assert [s.value for s in scalars] == pytest.approx(log[column].tolist(), rel=1e-5)


def test_without_the_package_the_option_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        train(config(tmp_path / "run", tensorboard=str(tmp_path / "board")), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write TensorBoard's files"):
        logged.TensorBoard(tmp_path / "file" / "board")


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(("images", "warned"), [(4, False), (3, True), (8, True)])
def test_a_loader_with_another_batch_than_the_loaded_one_is_warned_of(images: int, warned: bool, inside: bool) -> None:
    model = network()
    saved = trained(0, batch=MiniBatch(4)).state_dict()
    optimizer = (SGD if inside else torch.optim.SGD)(model.parameters(), lr=0.01)
    prunetrain = PruneTrain(model, optimizer, (X,), interval=5, batch=MiniBatch(4))
    prunetrain.load_state_dict(saved)
    x, y = torch.randn(images, 3, 8, 8), torch.zeros(images, dtype=torch.long)
    for step in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            prunetrain.regularize(F.cross_entropy(model(x), y)).backward()
        told = [w for w in caught if "build the loader" in str(w.message)]
        assert len(told) == (warned and step == 0)
        if told:
            assert told[0].filename == __file__
            assert f"{images} images" in str(told[0].message)
    assert not model._forward_pre_hooks
