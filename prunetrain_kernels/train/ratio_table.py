"""What penalty ratios would do to a network that has not been trained yet: `prunetrain info --forecast`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.inputs import ExampleInputs
from prunetrain_kernels.regularizer import penalty_coefficient
from prunetrain_kernels.train import setup
from prunetrain_kernels.train.config import TrainConfig
from prunetrain_kernels.train.forecast import Forecast, forecast
from prunetrain_kernels.train.prunetrain import PruneTrain
from prunetrain_kernels.train.run_log import read_run

RATIOS = (0.1, 0.2, 0.25, 0.35, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Ratio:
    """A penalty ratio, the lambda that it gives, and where that leads if nothing resists."""

    ratio: float
    coefficient: float
    ahead: Forecast


def ratio_table(
    model: nn.Module,
    example: ExampleInputs,
    config: TrainConfig,
    *,
    classes: int,
    images: int,
    ratios: Sequence[float] = RATIOS,
) -> list[Ratio]:
    """Forecasts for a fresh network, whose first loss is taken for that of guessing, ln(classes).

    Args:
        model: stays as it is.
        example: its positional arguments.
        config: learning rate, its schedule, momentum, batch, epochs and threshold; the rest is ignored.
        images: of the training set.

    Raises:
        InputError: fewer images than a batch has, or one class only.
    """
    if images < config.batch:
        raise InputError(f"--images {images} make no batch of {config.batch}; give the size of the training set.")
    if classes < 2:
        raise InputError("a forecast starts from the loss of guessing, and one class leaves nothing to guess.")
    optimizer = setup.optimizer_of(config, model)
    scheduler = setup.scheduler(config, optimizer)
    prunetrain = PruneTrain(model, optimizer, example, scheduler=scheduler, epochs=config.epochs)
    assert prunetrain.course is not None
    prunetrain.course.steps_per_epoch = images // config.batch
    penalty = float(prunetrain.lasso.penalty().detach())
    rows = []
    for ratio in ratios:
        coefficient = penalty_coefficient(math.log(classes), penalty, ratio)
        now = replace(prunetrain.now(), coefficient=coefficient)
        dense = prunetrain.dense_flops
        ahead = forecast(prunetrain.course, now, epochs=config.epochs, threshold=config.threshold, dense=dense)
        rows.append(Ratio(ratio, coefficient, ahead))
    return rows


def expected_of(folder: Path) -> str:
    """What the last finished epoch of a run says of its end.

    Raises:
        InputError: no such run, or one without a lasso.
    """
    run = read_run(folder)
    rows = run.log[run.log["expected_inference"].notna()]
    if not len(rows):
        raise InputError(
            f"'{folder}' has no forecast: it has finished no epoch with a lasso, or is of an older version."
        )
    row, last = rows.iloc[-1], run.log.iloc[-1]
    text = (
        f"epoch {row['epoch']:g}: lambda {row['lambda']:.2g}, smallest slice {row['smallest_slice']:.2g}, median "
        f"{row['median_slice']:.2g}; {row['expected_inference']:.1%} of the inference FLOPs expected at the end"
    )
    share = last["inference_flops"] / run.log.iloc[0]["inference_flops"]
    return f"{text}\nepoch {last['epoch']:g}: {share:.1%} of the inference FLOPs of epoch 1 are left"


def table_text(rows: Sequence[Ratio]) -> str:
    """The forecasts for a reader: one line of what holds for all of them, and one line for each."""
    first = rows[0].ahead
    lines = [
        f"slices: smallest {first.smallest:.3g}, median {first.median:.3g}, sparse below {first.threshold:g}; in "
        f"{first.epochs:g} epochs the lasso moves a slice by",
        "",
        "ratio  lambda    by      median slices",
    ]
    lines += [
        f"{row.ratio:<5g}  {row.coefficient:<8.2g}  {row.ahead.moves:<6.2g}  {row.ahead.moves / row.ahead.median:.2g}"
        for row in rows
    ]
    lines += [
        "",
        "A slice that nothing holds goes when it has been moved by its norm; what the loss needs resists. `prunetrain "
        "train` measures that, and says after each epoch what it expects to be left. To name what shall be left "
        "instead of a ratio: --target-flops SHARE.",
    ]
    return "\n".join(lines)
