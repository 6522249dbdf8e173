"""Every block of code in docs/training-loops.md runs, and prunes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from prunetrain_kernels.train import loop
from prunetrain_kernels.train.prunetrain import PruneReport, PruneTrain

PAGE = Path(loop.__file__).parents[2] / "docs" / "training-loops.md"


def blocks() -> dict[str, str]:
    """Code by the heading above it; the first is for all."""
    code = {}
    for section in PAGE.read_text().split("\n## "):
        for block in section.split("```python\n")[1:]:
            code[section.splitlines()[0]] = block.split("```")[0]
    return code


FIRST, *REST = blocks()


@pytest.mark.parametrize("heading", REST)
def test_the_loop_runs_and_prunes(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    original, reports = PruneTrain.reconfigure, []

    def dying(self: PruneTrain) -> PruneReport:
        with torch.no_grad():
            for block in (self.model.layer1[0], self.model.layer2[1]):  # type: ignore[index, union-attr]
                block.conv1.weight[:2] = 0
                block.conv2.weight[:, :2] = 0
        reports.append(original(self))
        return reports[-1]

    monkeypatch.setattr(PruneTrain, "reconfigure", dying)
    held: dict[str, Any] = {}
    code = blocks()
    exec(compile(code[FIRST] + code[heading], str(PAGE), "exec"), held)
    assert [report.reconfiguration.changed for report in reports] == [True, True]
    assert held["model"].layer1[0].conv1.out_channels == 12
    assert all(p.isfinite().all() for p in held["model"].parameters())
    assert held["prunetrain"].coefficient > 0
    if "averaged" in held:
        averaged, ema = held["averaged"].module.state_dict(), held["ema"].module.state_dict()
        assert all(torch.equal(t, averaged[name]) for name, t in ema.items())
    if "compile" in heading:
        assert [report.compilations for report in reports] == [1, 1]
    if "scheduler" in heading.lower():
        assert held["scheduler"].last_epoch == 2


def test_every_section_with_code_was_found() -> None:
    assert len(REST) == 7
