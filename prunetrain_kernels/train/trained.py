"""The network of a run folder, taken up again: for `prunetrain export`."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from prunetrain_kernels.data import ImageData, batch
from prunetrain_kernels.errors import CheckpointError, InputError
from prunetrain_kernels.models import build
from prunetrain_kernels.prune.checkpoint import load_pruned, read_checkpoint
from prunetrain_kernels.train import setup
from prunetrain_kernels.train.config import TrainConfig

EXAMPLES = 8


@dataclass(frozen=True)
class Trained:
    """A trained network on the CPU, in evaluation mode.

    Attributes:
        examples: images as it was trained on, fp32 (N, C, H, W): validation images, or random ones without the data.
        mean, std: of each channel of the training images, 0..1, by which its images are normalised:
            (image / 255 - mean) / std; None without the data.
        epoch: finished epochs.
    """

    model: nn.Module
    examples: Tensor
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    epoch: int


def load_trained(run: Path, input_shape: tuple[int, ...] | None = None, classes: int | None = None) -> Trained:
    """Rebuilds the network of a run folder of `prunetrain train`, pruned as it was last saved.

    Args:
        run: the folder, or its checkpoint.pt.
        input_shape, classes: (C, H, W) of the images and the number of classes; with both, the run's data are not
            needed, and not read.

    Raises:
        CheckpointError: no checkpoint there, or one that `prunetrain train` did not write.
        InputError: the run's data or model are not where they were.
    """
    path = run / setup.CHECKPOINT if run.is_dir() else run
    extra = read_checkpoint(path)["extra"]
    if "config" not in extra:
        raise CheckpointError(f"'{path}' was not written by `prunetrain train`; use export_program on your own model.")
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    config = TrainConfig(**{name: value for name, value in json.loads(extra["config"]).items() if name in known})
    mean = std = None
    if input_shape is None or classes is None:
        data = _data(config)
        mean, std, shape, found = data.mean, data.std, data.image_shape, data.classes
        for name, said, is_ in (("input", input_shape, shape), ("classes", classes, found)):
            if said is not None and said != is_:
                raise InputError(f"--{name} is {said}, but in the run's data it is {is_}; leave it out.")
        indices = torch.arange(min(EXAMPLES, len(data.val_labels)), device="cpu")
        examples = batch(data, indices, seed=config.seed, epoch=0, step=0, device="cpu", train=False)[0]
    else:
        shape, found = (input_shape[0], input_shape[1], input_shape[2]), classes
        examples = torch.randn(EXAMPLES, *shape, generator=torch.Generator(device="cpu").manual_seed(0), device="cpu")
    with torch.device("cpu"):
        model = build(config.model, found, in_channels=shape[0])
    load_pruned(path, model)
    try:
        with torch.no_grad():
            model.eval()(examples)
    except (RuntimeError, ValueError) as error:  # the first layer's channels are whatever was saved
        raise InputError(f"the network does not take images of {shape}: {str(error).splitlines()[0]}") from error
    return Trained(model, examples, mean, std, extra["epoch"])


def _data(config: TrainConfig) -> ImageData:
    try:
        return setup.load_data(config, torch.device("cpu"))
    except InputError as error:
        raise InputError(
            f"the run's data cannot be read: {str(error).rstrip('.')}; give --input CxHxW and --classes N instead."
        ) from error
