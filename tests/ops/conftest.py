"""Fewer, fatter steps for the interpreter, which pays by the operation and not by the number."""

import sys

import pytest
import torch

STEPPING = ("group_lasso", "sgd", "group_soft_threshold")


@pytest.fixture(autouse=True)
def _steps(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that walk down a tile do so in one or two steps, unless a test asks for `steps_as_on_a_gpu`."""
    if device.type == "cpu" and "steps_as_on_a_gpu" not in request.fixturenames:
        for name in STEPPING:
            module = sys.modules.get(f"prunetrain_kernels.ops.{name}")
            if module is not None:
                monkeypatch.setattr(module, "TILE_STEP", 64)


@pytest.fixture
def steps_as_on_a_gpu() -> None:
    """The steps that the launchers choose."""
