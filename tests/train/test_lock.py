"""`PruneTrain.lock`: another thread runs the networks while they are pruned, and never sees a half of it."""

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from prunetrain_kernels import PruneTrain, load_pruned, save_pruned
from prunetrain_kernels.errors import PruneTrainError
from prunetrain_kernels.train import reconfiguration
from prunetrain_kernels.train.prunetrain import PruneTrain as Class

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def made(width: int = 56) -> tuple[nn.Module, torch.optim.Optimizer, AveragedModel, PruneTrain]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 4, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    average = AveragedModel(model)
    average.eval()
    prunetrain = PruneTrain(model, optimizer, (IMAGES,), interval=1, also=[average], coefficient=1e-3)
    return model, optimizer, average, prunetrain


@torch.no_grad()
def kill_first(networks: tuple[Any, ...]) -> None:
    """The first channel between the convolutions is dead in all networks: cutting it changes no output."""
    for network in networks:
        network[0].weight[0] = 0
        network[3].weight[:, 0] = 0


class Inference(threading.Thread):
    """Runs a network over and over, each time under the lock."""

    def __init__(self, lock: Any, network: Callable[[Tensor], Tensor]) -> None:
        super().__init__(daemon=True)
        self.lock, self.network, self.over = lock, network, threading.Event()
        self.outputs: list[Tensor] = []
        self.failed: list[BaseException] = []

    def run(self) -> None:
        with torch.no_grad():
            while not self.over.is_set():
                try:
                    with self.lock:
                        self.outputs.append(self.network(IMAGES))
                except BaseException as error:
                    self.failed.append(error)
                    return


@pytest.mark.filterwarnings("ignore:no step has had a lasso so far")
def test_a_thread_runs_the_average_during_fifty_reconfigurations() -> None:
    """Each takes a channel that is dead, so every output must be that of one of the networks between them."""
    model, _, average, prunetrain = made()
    thread, states = Inference(prunetrain.lock, average), []
    between = threading.Event()
    thread.start()
    for _ in range(50):
        with prunetrain.lock:
            kill_first((model, average.module))
            with torch.no_grad():
                states.append(average(IMAGES))
        report = prunetrain.epoch_end()
        assert report is not None
        assert report.reconfiguration.changed
        between.wait(0.002)  # for the thread to have a turn
    thread.over.set()
    thread.join()
    assert thread.failed == []
    assert len(thread.outputs) > 50
    assert average.module[0].out_channels == 6
    scale = float(torch.stack(states).abs().max())
    beginning = made()[2](IMAGES).detach()
    known = torch.stack([beginning, *states])
    for output in thread.outputs:
        assert float((known - output).abs().amax((1, 2)).min()) < 1e-5 * scale


def test_who_holds_it_and_when(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another thread gets the lock before and after a reconfiguration and a load, failed ones too; never inside."""
    model, optimizer, average, prunetrain = made(8)

    def free() -> bool:
        got: list[bool] = []

        def attempt() -> None:
            got.append(prunetrain.lock.acquire(blocking=False))
            if got[0]:
                prunetrain.lock.release()

        other = threading.Thread(target=attempt)
        other.start()
        other.join()
        return got[0]

    inside: list[bool] = []
    look, load_state = reconfiguration.look_again, Class.load_state_dict

    def looking(*arguments: Any) -> Any:
        inside.append(free())
        if len(inside) == 1:
            raise PruneTrainError("made to fail")
        return look(*arguments)

    def loading(self: Class, state: dict[str, Any]) -> None:
        inside.append(free())
        if len(inside) == 3:
            raise ValueError("made to fail")
        load_state(self, state)

    monkeypatch.setattr(reconfiguration, "look_again", looking)
    monkeypatch.setattr(Class, "load_state_dict", loading)
    kill_first((model, average.module))
    with pytest.raises(PruneTrainError, match="made to fail"):
        prunetrain.reconfigure()
    assert free()
    with prunetrain.lock:  # by the thread that reconfigures itself
        assert not free()
        prunetrain.reconfigure()
        assert not free()
    assert free()
    save_pruned(tmp_path / "c.pt", model, optimizer, prunetrain, also=[average])
    model, optimizer, average, prunetrain = made(8)
    with pytest.raises(PruneTrainError, match="made to fail"):
        load_pruned(tmp_path / "c.pt", model, optimizer, prunetrain, also=[average])
    load_pruned(tmp_path / "c.pt", model, optimizer, prunetrain, also=[average])
    assert free()
    assert inside == [False] * 4


def test_copies_have_locks_of_their_own() -> None:
    prunetrain = made(8)[3]
    with prunetrain.lock:
        for other in (copy.deepcopy(prunetrain), pickle.loads(pickle.dumps(prunetrain))):
            assert other.lock is not prunetrain.lock
            with other.lock:
                other.reconfigure()
