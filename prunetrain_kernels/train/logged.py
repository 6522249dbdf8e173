"""A training in numbers for somebody's log: what `PruneTrain(log=...)` calls with, and TensorBoard's files.

PruneTrain(..., log=wandb.log)              # Weights & Biases, after wandb.init()
PruneTrain(..., log=mlflow.log_metrics)     # MLflow, after mlflow.start_run()
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from prunetrain_kernels.cost import share
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.files import reason
from prunetrain_kernels.train.state import PruningState, multiples


class Log(Protocol):
    """What `PruneTrain(log=...)` takes: any function that is called so."""

    def __call__(self, values: dict[str, float], /, *, step: int) -> Any: ...


def numbers_of(state: PruningState) -> dict[str, float]:
    """A training in numbers, by name; what is unknown or not there is left out.

    Returns:
        prunetrain/training_flops, prunetrain/inference_flops: FLOPs per image, as a share of the dense network's;
        prunetrain/parameters; prunetrain/removed_layers; prunetrain/batch: images per step of one rank, if PruneTrain
        manages them; and while there is a lasso prunetrain/lambda, prunetrain/penalty: R(W); prunetrain/smallest_slice
        and prunetrain/median_slice: their norms; prunetrain/expected_inference_flops: the forecast for the end, where
        PruneTrain knows how many epochs there are.
    """
    dense, flops = state.dense_flops, state.flops
    numbers: dict[str, float | None] = {
        "training_flops": share(flops.training, dense.training),
        "inference_flops": share(flops.inference, dense.inference),
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "removed_layers": len(state.removed),
        "batch": state.batch_size,
    }
    if state.active:
        penalty = state.last_penalty
        numbers |= {"lambda": state.coefficient, "penalty": None if penalty is None else float(penalty)}
        if state.course is not None and state.course.epochs is not None:
            ahead = state.forecast()
            numbers |= {
                "smallest_slice": ahead.smallest,
                "median_slice": ahead.median,
                "expected_inference_flops": ahead.inference,
            }
    return {f"prunetrain/{name}": float(n) for name, n in numbers.items() if n is not None and math.isfinite(n)}


def log_numbers(state: PruningState) -> None:
    """Calls the log with the training's numbers and the epochs that have ended, in the first process."""
    if state.log is not None and state.ranks.first:
        state.log(numbers_of(state), step=multiples(state.epochs, 1))


class TensorBoard:
    """TensorBoard's event files in a folder. With `directory` None, nothing.

    Args:
        directory: made if it is not there.
        after: epochs that are there already; what an earlier run wrote of later ones is hidden.

    Raises:
        InputError: the package tensorboard is missing, or the folder cannot be written to.
    """

    def __init__(self, directory: Path | None = None, after: int = 0) -> None:
        self._writer: Any = None
        if directory is None:
            return
        check_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer = SummaryWriter(str(directory), purge_step=after + 1 if after else None)
        except (OSError, ValueError) as error:  # a ValueError: its name is no UTF-8
            raise InputError(f"cannot write TensorBoard's files to {directory}: {reason(error)}") from error

    def add(self, row: Mapping[str, Any], epoch: int) -> None:
        """Adds the numbers of an epoch; text, and what is unknown, is left out."""
        if self._writer is None:
            return
        for name, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "epoch":
                self._writer.add_scalar(f"{_group(name)}/{name}", value, epoch)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def check_tensorboard() -> None:
    """Raises InputError where TensorBoard's files cannot be written."""
    try:
        import torch.utils.tensorboard  # noqa: F401 - imports the package tensorboard
    except ImportError as error:
        raise InputError(f"--tensorboard needs the package tensorboard ({error}): pip install tensorboard") from error


_GROUPS = {"accuracy": "accuracy", "flops": "flops", "bytes": "bytes", "seconds": "seconds", "slice": "lasso"}
_LASSO = ("lambda", "penalty", "expected_inference")


def _group(name: str) -> str:
    """The heading under which TensorBoard shows a column of log.csv."""
    if name in _LASSO:
        return "lasso"
    return next((group for part, group in _GROUPS.items() if part in name), "training")
