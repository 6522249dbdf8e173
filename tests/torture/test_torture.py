"""A small sample of `python -m tests.torture`, which has the figures; each part must also be able to find a fault."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from prunetrain_kernels.prune import archive, checkpoint
from prunetrain_kernels.prune.undo import AllOrNothing
from tests.torture import contents, flips, injections
from tests.torture.__main__ import main
from tests.torture.report import Outcomes

SAMPLES: list[tuple[Callable[[int, int], Outcomes], int]] = [
    (flips.run, 10),
    (contents.run, 10),
    (partial(injections.run, ways=("inside",)), 3),
]


@pytest.mark.parametrize(("run", "count"), SAMPLES, ids=["flips", "contents", "injections"])
def test_a_sample(run: Callable[[int, int], Outcomes], count: int) -> None:
    torch.set_num_threads(1)
    outcomes = run(count, 17)
    assert outcomes.faults == []
    assert outcomes.total == count


def nothing(*_: Any, **__: Any) -> None:
    pass


BLINDED: list[tuple[Callable[[int, int], Outcomes], int, Any, str]] = [
    (flips.run, 4, archive, "_check_members"),
    (partial(injections.run, ways=("inside",)), 1, AllOrNothing, "put_back"),
    (contents.run, 5, checkpoint, "check_payload"),
]


@pytest.mark.parametrize(("run", "count", "owner", "name"), BLINDED, ids=["flips", "injections", "contents"])
def test_without_the_check_faults_are_found(
    run: Callable[[int, int], Outcomes], count: int, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, nothing)
    assert run(count, 3).faults


def test_the_command_prints_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flips", "--count", "3"]) == 0
    assert capsys.readouterr().out.startswith("bit flips: 3; ")
    with pytest.raises(SystemExit):
        main(["nothing"])
