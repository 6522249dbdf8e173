"""The network of a run folder, taken up again: for `prunetrain export`."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunetrain_kernels.data import ImageData, batch, record_of
from prunetrain_kernels.errors import CheckpointError, InputError
from prunetrain_kernels.models import build
from prunetrain_kernels.probe import first_line
from prunetrain_kernels.prune.checkpoint import load_payload
from prunetrain_kernels.train import setup
from prunetrain_kernels.train.config import TrainConfig
from prunetrain_kernels.train.run_checkpoint import newest, options_of

EXAMPLES = 8


@dataclass(frozen=True)
class Trained:
    """A trained network on the CPU, in evaluation mode.

    Attributes:
        examples: images as it was trained on, fp32 (N, C, H, W): validation images, or random ones where the run's data
            are not needed, not there, or not what they were.
        mean, std: of each channel of the images it was trained on, 0..1, by which its images are normalised:
            (image / 255 - mean) / std; None where neither the run nor its data say.
        epoch: finished epochs.
        class_names: in the order of the logits; None as for `mean`.
        note: why the examples are random although the data were looked for, "" where they are not.
        fallback: why the network is that of the checkpoint before the newest, "" where it is not.
    """

    model: nn.Module
    examples: Tensor
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    epoch: int
    class_names: tuple[str, ...] | None = None
    note: str = ""
    fallback: str = ""


@dataclass(frozen=True)
class _TrainedOn:
    """What a network was trained on, as far as it is known."""

    shape: tuple[int, ...]
    class_names: tuple[str, ...] | None
    classes: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def load_trained(run: Path, input_shape: tuple[int, ...] | None = None, classes: int | None = None) -> Trained:
    """Rebuilds the network of a run folder of `prunetrain train`, pruned as it was last saved.

    Mean, standard deviation and classes are those that the run wrote down, whatever its data are now. An older run
    wrote none down: there they are measured on the data as they are.

    Args:
        run: the folder, or its checkpoint.pt.
        input_shape, classes: (C, H, W) of the images and the number of classes; with both, the run's data are not
            needed, and not read.

    Raises:
        CheckpointError: no checkpoint there, or one that `prunetrain train` did not write.
        InputError: an older run whose data are not where they were, a shape or count that is not the run's, or a model
            that cannot be built.
    """
    path, payload, fallback = newest(run)
    extra = payload["extra"]
    if "config" not in extra:
        raise CheckpointError(f"'{path}' was not written by `prunetrain train`; use export_program on your own model.")
    known = json.loads(json.dumps(dataclasses.asdict(TrainConfig(out=""))))
    options = options_of(path, extra, known)
    config = TrainConfig(**{name: options[name] for name in known})
    told = input_shape is not None and classes is not None
    data, note = (None, "") if told else _data(config, path, payload)
    on = _trained_on(config, path, extra, data, (input_shape, classes))
    if data is not None and not note:
        if on.mean is not None and on.std is not None:
            data = dataclasses.replace(data, mean=on.mean, std=on.std)
        indices = torch.arange(min(EXAMPLES, len(data.val_labels)), device="cpu")
        examples = batch(data, indices, seed=config.seed, epoch=0, step=0, device="cpu", train=False)[0]
    else:
        examples = torch.randn(
            EXAMPLES, *on.shape, generator=torch.Generator(device="cpu").manual_seed(0), device="cpu"
        )
    with torch.device("cpu"):
        model = build(config.model, on.classes, in_channels=on.shape[0])
    try:
        load_payload(path, payload, model, None, (None, ()))
    except CheckpointError as error:
        if not told:
            raise
        raise InputError(
            f"the network does not take images of {on.shape}, or has not {on.classes} classes: {error}"
        ) from error
    try:
        with torch.no_grad():
            model.eval()(examples)
    except (RuntimeError, ValueError) as error:  # the first layer's channels are whatever was saved
        raise InputError(f"the network does not take images of {on.shape}: {first_line(error)}.") from error
    return Trained(model, examples, on.mean, on.std, extra["epoch"], on.class_names, note, fallback)


def _data(config: TrainConfig, path: Path, payload: dict[str, Any]) -> tuple[ImageData | None, str]:
    """The run's data, and why they cannot serve as examples, "" where they can."""
    recorded = payload["extra"].get("data") is not None
    try:
        # of a few examples no image that stays a file has to be cached
        limit = 0 if config.augment == "resized-crop" else None
        data = setup.load_data(dataclasses.replace(config, cache_limit=limit), torch.device("cpu"))
    except InputError as error:
        if recorded:
            return None, f"the run's data cannot be read ({str(error).rstrip('.')})"
        raise InputError(
            f"the run's data cannot be read: {str(error).rstrip('.')}; give --input CxHxW and --classes N instead."
        ) from error
    differs = setup.difference_from(path, payload, record_of(data)) if recorded else None
    return data, "" if differs is None else f"the run's data are no longer what it was trained on ({differs})"


def _trained_on(
    config: TrainConfig,
    path: Path,
    extra: dict[str, Any],
    data: ImageData | None,
    said: tuple[tuple[int, ...] | None, int | None],
) -> _TrainedOn:
    """What the run's own record says, or else its data; what the user says comes first, and must agree with that."""
    record = extra.get("data")
    if record is None and data is not None:
        record = record_of(data)
    if record is None:
        assert said[0] is not None
        assert said[1] is not None
        return _TrainedOn(said[0], None, said[1])
    try:
        on = _of_record(config, record)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the record of the data in '{path}' cannot be read.") from error
    both = None not in said
    for name, value, is_ in (("input", said[0], on.shape), ("classes", said[1], on.classes)):
        # a network may well take images of another size, if the user says all of it
        if value is not None and value != is_ and not (both and name == "input"):
            raise InputError(f"--{name} is {value}, but in the run's data it is {is_}; leave it out.")
    return dataclasses.replace(on, shape=said[0]) if said[0] is not None else on


def _of_record(config: TrainConfig, record: dict[str, Any]) -> _TrainedOn:
    channels, height, width = record["image"]
    return _TrainedOn(
        (channels, config.crop or height, config.crop or width),
        tuple(record["class_names"]),
        len(record["class_names"]),
        tuple(record["mean"]),
        tuple(record["std"]),
    )
