"""The `prunetrain` command: train, report, info, export."""

import argparse
import dataclasses
import io
import math
import os
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunetrain_kernels.cost import (
    Unknown,
    batch_norm_bytes,
    count_flops_by_layer,
    flop_table,
    gradient_bytes,
    is_unknown,
    or_unknown,
    step_memory,
)
from prunetrain_kernels.errors import InputError, PruneTrainError, PruneTrainWarning, TrainingStopped
from prunetrain_kernels.graph import prunable, trace_channels
from prunetrain_kernels.models import NAMES, OLD_NAMES, build
from prunetrain_kernels.prune.program import FORMATS, export_program
from prunetrain_kernels.train.config import AMP_DTYPES, AUGMENTATIONS, SCHEDULES, TrainConfig
from prunetrain_kernels.train.loop import train
from prunetrain_kernels.train.ratio_table import expected_of, ratio_table, table_text
from prunetrain_kernels.train.stopping import Interrupted, end_silently, explain, heeding_signals
from prunetrain_kernels.train.trained import load_trained

DATA_HELP = (
    "digits (comes with scikit-learn); an official cifar-10-python or cifar-100-python archive or its folder; a folder "
    "of Parquet files in a layout of the Hugging Face Hub; a folder of train/CLASS/IMAGE files; or synthetic:NxCxHxW"
)

RANK, RANKS = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", "1"))  # by torchrun
LARGEST_IMAGE = 2**28  # numbers in one, which are a gigabyte
BROKEN_PIPE = 128 + 13  # what a shell says of a program that SIGPIPE stopped


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False
        return action.help if says_nothing else super()._get_help_string(action)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for input that cannot be used, 130 and 143 for SIGINT and SIGTERM.

    Options that argparse refuses raise its SystemExit, with the same code 2.
    """
    _print_any_name()
    if any("\0" in argument for argument in arguments or ()):
        explain("prunetrain: error: an argument holds the character NUL, which no file's name can; leave it out")
        return 2
    options = _parser().parse_args(arguments)
    name = getattr(options, "model", None)
    if name in OLD_NAMES and RANK == "0":
        print(
            f"prunetrain: {name} is the paper's CIFAR network, now called {OLD_NAMES[name]}; "
            f"ImageNet's is imagenet_{name}",
            file=sys.stderr,
        )
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with warnings.catch_warnings():
            _say_warnings_plainly(silent=getattr(options, "quiet", False))
            code: int = options.run(options)
        sys.stdout.flush()
        return code
    except TrainingStopped as stopped:
        if RANK == "0":
            explain(f"prunetrain: {stopped}; go on with: {_resuming(options.arguments)}")
        end_silently()
        return 128 + stopped.number
    except PruneTrainError as error:
        explain(f"prunetrain: {_who()}error: {' '.join(str(error).splitlines())}")
        return 2
    except KeyboardInterrupt as interrupt:
        kept = "; the last checkpoint, if there is one, is kept: go on with --resume" if options.run is _train else ""
        explain(f"prunetrain: {_who()}interrupted{kept}")
        return 128 + interrupt.number if isinstance(interrupt, Interrupted) else 130
    except BrokenPipeError:
        # Whoever read the output has gone (`| head`); nothing more can be said to them.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE if options.run is _train else 0  # a training that stopped there has not succeeded


def _print_any_name() -> None:
    """Has names of files that are no UTF-8 printed with their odd bytes as escapes, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _resuming(arguments: Sequence[str]) -> str:
    """The command that goes on with a training."""
    kept = [argument for argument in arguments if argument not in ("--overwrite", "--resume")]
    return shlex.join(["prunetrain", *kept, "--resume"]) + (" (by torchrun, as before)" if RANKS > 1 else "")


def _say_warnings_plainly(*, silent: bool) -> None:
    """The package's own warnings are one line for a terminal, without the place in the code; none if `silent`."""
    show = warnings.showwarning

    def say(message: Warning | str, category: type[Warning], filename: str, lineno: int, *more: Any) -> None:
        if issubclass(category, PruneTrainWarning):
            if not silent:
                print(f"prunetrain: {_who()}warning: {message}", file=sys.stderr, flush=True)
        else:
            show(message, category, filename, lineno, *more)

    warnings.showwarning = say  # type: ignore[assignment]


def _who() -> str:
    return f"rank {RANK}: " if RANKS > 1 else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prunetrain",
        description="Trains convolutional networks that shrink while they train (PruneTrain, SC'19).",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_report(commands)
    _add_info(commands)
    _add_export(commands)
    return parser


def _add_train(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    defaults = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    parser = commands.add_parser(
        "train",
        help="train a network, pruning it on the way",
        description="Trains a network with group lasso from the first step, prunes it every few epochs, and writes a "
        "run folder: config.json, log.csv, channels.csv, slices.npz, summary.json, checkpoint.pt.",
        epilog="example: prunetrain train --model resnet20 --data digits --epochs 60 --batch 32 --penalty-ratio 0.5 "
        "--interval 2 --out runs/digits; on all GPUs: torchrun --nproc-per-node gpu -m prunetrain_kernels.cli train ..",
        formatter_class=_HelpFormatter,
    )
    parser.set_defaults(run=_train)
    add = parser.add_argument_group("what to train").add_argument
    add("--model", default=defaults["model"], help=f"{', '.join(NAMES)}, or an import path package.module:function")
    add("--data", default=defaults["data"], help=DATA_HELP)
    add("--out", required=True, help="the run folder (will be made)")
    add("--classes", type=int, help="number of classes; checked against the data")
    add(
        "--image-size",
        type=int,
        metavar="N",
        help="side of the square that digits and images of a folder or Parquet file are scaled to; with --augment "
        "resized-crop what their shorter side is scaled to for validation (then by default 8/7 of --crop)",
    )
    add(
        "--crop",
        type=int,
        metavar="N",
        help="train on random N x N squares of the images and validate on the middle one, instead of padding them",
    )
    add(
        "--augment",
        choices=AUGMENTATIONS,
        default=defaults["augment"],
        help="crop: a random square of the padded image, or of --crop pixels, from images decoded once at "
        "--image-size; resized-crop, the recipe for ImageNet (--augment resized-crop --crop 224): a random part of 8 "
        "to 100 %% of the image, scaled to --crop, from a folder of images that stay files; both mirror half of the "
        "photographs",
    )
    add(
        "--workers",
        type=int,
        metavar="N",
        help="with --augment resized-crop: threads that decode images ahead of the training, in each process (default: "
        "all cores)",
    )
    add(
        "--cache-limit",
        type=_bytes,
        metavar="BYTES",
        help="with --augment resized-crop: keep the images decoded in --cache if all of them together take no more "
        "than this (default: 8G; 0: never)",
    )
    add("--limit-train", type=int, metavar="N", help="use N training images only, the same number of each class")
    add("--limit-val", type=int, metavar="N", help="use N validation images only")
    add("--cache", help="folder for decoded images (default: the user's cache folder)")
    add("--tensorboard", metavar="DIR", help="write the numbers of log.csv for TensorBoard too, into this folder")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=defaults["epochs"], help="epochs with the lasso (182: the paper's CIFAR runs)")
    add("--fine-tune-epochs", type=int, default=0, help="further epochs without the lasso, at the last learning rate")
    add("--batch", type=int, default=defaults["batch"], help="images per step (at the start), all processes together")
    add("--lr", type=float, default=defaults["lr"], help="learning rate of SGD")
    add("--momentum", type=float, default=defaults["momentum"], help="momentum of SGD")
    add("--weight-decay", type=float, default=defaults["weight_decay"], help="weight decay (paper: 1e-4 for ImageNet)")
    add(
        "--decay-at",
        type=_shares,
        default="0.5,0.75",
        metavar="A,B",
        help="when, as shares of --epochs, the learning rate decays",
    )
    add("--decay", type=float, default=defaults["decay"], help="factor of each decay")
    add(
        "--schedule",
        choices=SCHEDULES,
        default="step",
        help="the learning rate, changed after each epoch: step (--decay-at), cosine (down to 0 over --epochs) or "
        "onecycle (up to --lr over 30%% of --epochs, then down to almost 0); fine-tuning goes on at the last rate",
    )
    add(
        "--warmup",
        type=int,
        default=0,
        metavar="EPOCHS",
        help="epochs over which the learning rate first rises to --lr",
    )
    add("--no-decay-norms", action="store_true", help="no weight decay for normalisation and biases")
    add(
        "--accumulate",
        type=int,
        default=1,
        metavar="K",
        help="cut each batch into K micro-batches and add up their gradients: a step needs the memory of one of them",
    )
    add(
        "--clip-grad",
        type=float,
        metavar="NORM",
        help="scale the gradient down to this norm where it is longer; the lasso's, added after that, is not clipped",
    )
    add(
        "--ema",
        type=float,
        metavar="DECAY",
        help="keep an exponential moving average of the weights, such as 0.999 per step, pruned with the network; its "
        "accuracy is logged as ema_accuracy, and it is saved in the checkpoint",
    )
    add("--seed", type=int, default=0, help="of weights, order and augmentation; the same seed gives the same run")
    add = parser.add_argument_group("pruning").add_argument
    add("--dense", action="store_true", help="plain training, for comparison: no lasso, no pruning")
    add(
        "--penalty-ratio",
        type=float,
        default=defaults["penalty_ratio"],
        help="share of the lasso in the first loss, which sets lambda (paper: 0.1 to 0.25)",
    )
    add(
        "--coefficient",
        type=float,
        metavar="LAMBDA",
        help="lambda itself, in place of --penalty-ratio: for --start-from and pretrained networks, whose first loss "
        "is no guide",
    )
    add(
        "--target-flops",
        type=float,
        metavar="SHARE",
        help="shrink to this share of the dense network's inference FLOPs, such as 0.5: lambda begins as "
        "--penalty-ratio has it and is adjusted after every epoch; the lasso rests once the target is met",
    )
    add(
        "--target-train-flops",
        type=float,
        metavar="SHARE",
        help="the same for the FLOPs of the whole training, as a share of what the dense network would take",
    )
    add(
        "--target-by",
        type=float,
        default=defaults["target_by"],
        metavar="SHARE",
        help="the share of --epochs by which the target is to be met",
    )
    add(
        "--target-focus",
        action=argparse.BooleanOptionalAction,
        default=defaults["target_focus"],
        help="from half of that time on the lasso spares the channels that are forecast to stay",
    )
    add(
        "--exclude",
        type=_names,
        default=(),
        metavar="NAME,NAME",
        help="layers, or modules around some, whose channels all stay and that have no lasso",
    )
    add(
        "--coefficients",
        type=_names,
        default=(),
        metavar="NAME=X,NAME=X",
        help="multiples of lambda for some layers, or modules around some, such as layer3=2,fc=0 (0: no lasso)",
    )
    add("--min-channels", type=int, default=1, metavar="N", help="no layer keeps fewer channels")
    add(
        "--interval",
        type=float,
        help="epochs, or a fraction of one, between reconfigurations (paper: 10, 5 for ImageNet; default: 10, with a "
        "target a twentieth of --epochs)",
    )
    add(
        "--reconfigure-once",
        type=int,
        metavar="EPOCH",
        help="reconfigure at the end of this epoch only (the prior work of the paper's section 3)",
    )
    add(
        "--threshold",
        type=float,
        default=defaults["threshold"],
        help="a channel slice whose largest weight is below this is sparse",
    )
    add("--relative", action="store_true", help="the threshold is a share of the layer's largest slice")
    add(
        "--zeroing-tolerance",
        type=float,
        default=defaults["zeroing_tolerance"],
        metavar="SHARE",
        help="stop where setting the sparse slices to zero would move an output by more than this share of its scale: "
        "the threshold is too high then (inf: never; may be changed with --resume)",
    )
    add(
        "--keep-momentum",
        action="store_true",
        help="keep the momentum of slices that are zeroed but stay, because other layers need their channels; without "
        "it they revive less",
    )
    add(
        "--policy",
        default="union",
        help="how layers that share channels agree on them: union (all keep the same), gating (each convolution "
        "computes its own live channels only) or auto (per layer, whichever is faster)",
    )
    add(
        "--policy-cost",
        default="roof",
        help="how --policy auto finds out: roof (estimates from bytes, FLOPs and this device's speed) or measure",
    )
    add(
        "--round-to",
        type=int,
        default=1,
        metavar="N",
        help="keep a few sparse channels so that counts are multiples of N (8 suits CPUs and tensor cores)",
    )
    add(
        "--proximal",
        action="store_true",
        help="the lasso by soft-thresholding after each update instead of its gradient: exact zeros, sooner (an "
        "extension beyond the paper)",
    )
    add(
        "--start-from",
        metavar="CHECKPOINT",
        help="take weights and batch-norm statistics from this checkpoint.pt, or run folder, of a finished --dense run "
        "of the same model; lambda is still set by the first loss of the fresh network, because a trained network's is "
        "next to nothing. With --interval EPOCHS, which reconfigures at the end only, this is SSL (paper section 5.2)",
    )
    add(
        "--start-from-other-data",
        action="store_true",
        help="with --start-from: the dense run may have been trained on other data, whose classes are as many; its "
        "images may then be among this run's validation images",
    )
    add = parser.add_argument_group("mini-batch growth (paper section 4.3)").add_argument
    add("--grow-batch", action="store_true", help="grow the batch, and the learning rate, into the freed memory")
    add("--batch-granularity", type=int, default=32, metavar="N", help="grow in multiples of N images")
    add(
        "--memory-budget",
        type=_bytes,
        metavar="BYTES",
        help="memory of one step in one process, such as 11G (default: what the dense network needs)",
    )
    add("--batch-limit", type=int, metavar="N", help="never more than N images per step")
    add(
        "--lr-rule",
        choices=("linear", "sqrt", "none"),
        default="linear",
        help="how the learning rate follows the batch",
    )
    running = parser.add_argument_group("running")
    add = running.add_argument
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")
    add("--amp", choices=tuple(AMP_DTYPES), default="off", help="automatic mixed precision")
    add("--channels-last", action="store_true", help="NHWC memory layout")
    add(
        "--fuse",
        action="store_true",
        help="fused operators: batch norm with the addition and ReLU behind it, SGD with the lasso inside",
    )
    add(
        "--compile",
        action="store_true",
        help="compile the network with torch.compile, anew after each reconfiguration (seconds to minutes each time)",
    )
    add(
        "--cuda-graphs",
        action="store_true",
        help="on a GPU: capture the whole step as a CUDA graph, anew after each reconfiguration; the update is that of "
        "--fuse, with the lasso inside",
    )
    add("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's own choice)")
    add(
        "--sync-batch-norm",
        action="store_true",
        help="under torchrun: batch-norm statistics over the batches of all processes, instead of each its own",
    )
    add(
        "--rank-timeout",
        type=float,
        default=defaults["rank_timeout"],
        metavar="SECONDS",
        help="under torchrun: give up a process that does not answer for so long",
    )
    add = running.add_mutually_exclusive_group().add_argument
    add(
        "--resume",
        action="store_true",
        help="go on from the folder's checkpoint, on the same data; start if there is none",
    )
    add("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    running.add_argument(
        "--quiet",
        action="store_true",
        help="no progress bar, no lines per epoch and no warnings of what little will be pruned",
    )


def _add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "report",
        help="draw one or more runs",
        description="Prints a table of one or more run folders side by side, and draws them: FLOPs, channels, memory "
        "and batch, channel sparsity, accuracy, as PNG files and one HTML page that opens without a network.",
    )
    parser.add_argument("runs", nargs="+", type=_path, metavar="RUN", help="a run folder; finished or still training")
    parser.add_argument("--out", type=_path, help="folder for the report (default: FIRST_RUN/report)")
    parser.set_defaults(run=_report)


def _add_info(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "info",
        help="show a network's channel spaces and costs",
        description="Shows which layers share which channels, what stays as it is and why, and what the network costs.",
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--model", default="resnet20", help=f"{', '.join(NAMES)}, or package.module:function")
    parser.add_argument("--input", type=_shape, default="3x32x32", metavar="CxHxW", help="shape of one image")
    parser.add_argument("--classes", type=int, default=10, help="number of classes")
    parser.add_argument("--batch", type=int, default=128, help="images per step, for memory and traffic")
    parser.add_argument("--amp", choices=tuple(AMP_DTYPES), default="off", help="mixed precision of memory and traffic")
    parser.add_argument("--layers", action="store_true", help="inference FLOPs layer by layer")
    defaults = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    add = parser.add_argument_group("forecast").add_argument
    add(
        "--forecast",
        action="store_true",
        help="what different penalty ratios would leave of the fresh network in --epochs of --images images",
    )
    add("--images", type=int, default=50_000, metavar="N", help="images of the training set")
    for name, what in (("epochs", "of the training"), ("lr", "learning rate"), ("momentum", "of SGD")):
        add(f"--{name}", type=type(defaults[name]), default=defaults[name], help=what)
    add("--decay-at", type=_shares, default="0.5,0.75", metavar="A,B", help="when the learning rate decays")
    add(
        "--run",
        dest="run_folder",
        type=_path,
        metavar="FOLDER",
        help="where a run that trains, or has ended, is going; no --model needed",
    )
    parser.set_defaults(run=_info)


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "export",
        help="write a run's network as a program that needs no prunetrain_kernels",
        description="Writes the network of a run folder, as it was last saved, for torch.export, ONNX or TorchScript. "
        "The file takes batches of any size; it is run against the network before it takes its place.",
        epilog="example: prunetrain export runs/digits --format onnx --out digits.onnx",
    )
    parser.add_argument("run_folder", type=_path, metavar="RUN", help="a run folder, or its checkpoint.pt")
    parser.add_argument("--out", type=_path, required=True, metavar="FILE", help="the file; replaced if it is there")
    parser.add_argument(
        "--format",
        choices=tuple(FORMATS),
        help="torch (torch.export), onnx (needs the packages onnx and onnxscript) or torchscript; default: by the "
        f"file's name, {', '.join(f'{ending} for {name}' for name, ending in FORMATS.items())}",
    )
    parser.add_argument(
        "--input", type=_shape, metavar="CxHxW", help="shape of one image (default: that of the run's data)"
    )
    parser.add_argument(
        "--classes", type=int, metavar="N", help="number of classes; with --input, the run's data are not read"
    )
    parser.set_defaults(run=_export)


# -- values ------------------------------------------------------------------------------------------------------------


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of numbers such as 0.5,0.75") from None


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name for part in text.split(",") if (name := part.strip()))
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing; give names, or leave the option out")
    return names


def _bytes(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    number, factor = (text[:-1], units[text[-1].upper()]) if text and text[-1].upper() in units else (text, 1)
    try:
        return int(float(number) * factor)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"'{text}' is no number of bytes such as 11G or 800M") from None


def _shape(text: str) -> tuple[int, ...]:
    shape = re.fullmatch(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})x([1-9][0-9]{0,8})", text.lower())
    if shape is None:
        raise argparse.ArgumentTypeError(f"'{text}' is no image shape such as 3x32x32")
    sizes = tuple(int(part) for part in shape.groups())
    if math.prod(sizes) > LARGEST_IMAGE:
        raise argparse.ArgumentTypeError(f"'{text}' has more than {LARGEST_IMAGE:,} numbers; give a smaller image")
    return sizes


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("'' is no name of a file or folder")
    return Path(text)


# -- commands ----------------------------------------------------------------------------------------------------------


def train_config(arguments: Sequence[str]) -> TrainConfig:
    """The configuration that `prunetrain train ARGUMENTS` would train; arguments that argparse refuses exit with 2."""
    return _config(_parser().parse_args(["train", *arguments]))


def _config(options: argparse.Namespace) -> TrainConfig:
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    return TrainConfig(**{name: value for name, value in vars(options).items() if name in names})


def _train(options: argparse.Namespace) -> int:
    why = "stopped by a signal, which torchrun sends when another process has ended" if RANKS > 1 else "stopped at once"
    where = ", on any number of processes" if RANKS > 1 else ""
    kept = f"prunetrain: {_who()}{why}; the last checkpoint in {options.out} is kept: start again with --resume{where}"
    with heeding_signals(kept, ranks=RANKS) as stop:
        folder = train(
            _config(options),
            resume=options.resume,
            overwrite=options.overwrite,
            progress=not options.quiet,
            stop=stop,
        )
    if not options.quiet and RANK == "0":
        print(f"finished: {folder} (draw it with: prunetrain report {folder})")
    return 0


def _report(options: argparse.Namespace) -> int:
    from prunetrain_kernels.train.report import comparison_table, write_report
    from prunetrain_kernels.train.run_log import read_run

    print(comparison_table([read_run(run) for run in options.runs]))
    print(f"report: {write_report(options.runs, options.out)}")
    return 0


def _info(options: argparse.Namespace) -> int:
    if options.run_folder is not None:
        print(expected_of(options.run_folder))
        return 0
    if options.batch < 1 or options.classes < 1:
        raise InputError("--batch and --classes must be at least 1.")
    channels, height, width = options.input
    with torch.device("cpu"):
        model = build(options.model, options.classes, in_channels=channels)
    if min(height, width) < getattr(model, "minimum_input_size", 1):
        raise InputError(f"{options.model} needs images of at least {model.minimum_input_size} pixels a side.")
    example = (torch.zeros(2, channels, height, width, device="cpu"),)
    graph = trace_channels(model, example)
    by_layer = or_unknown(count_flops_by_layer, model, example)
    print(f"{graph}\n\n{prunable(graph, None if isinstance(by_layer, Unknown) else by_layer)}")
    print("\n" + "\n".join(f"{name:<11} {value}" for name, value in _costs(model, example, options)))
    if options.layers:
        print("\ninference MFLOP per image")
        if isinstance(by_layer, Unknown):
            print(f"  {by_layer}")
        else:
            print("\n".join(f"  {count / 1e6:>10,.3f}  {name}" for name, count in by_layer.items()))
    if options.forecast:
        names = ("batch", "epochs", "lr", "momentum", "decay_at")
        config = TrainConfig(out="none", **{name: getattr(options, name) for name in names})
        config.check()
        print("\n" + table_text(ratio_table(model, example, config, classes=options.classes, images=options.images)))
    return 0


def _costs(model: nn.Module, example: tuple[Tensor, ...], options: argparse.Namespace) -> list[tuple[str, str]]:
    """The lines of what a network costs; one that cannot be counted says so, and why."""
    step, amp = f"per step of {options.batch} images", AMP_DTYPES[options.amp]
    flops, _ = flop_table(model, example, amp=amp)
    memory = or_unknown(step_memory, model, example, amp=amp)
    traffic = or_unknown(batch_norm_bytes, model, example, options.batch, amp=amp)

    def mflop(count: float, more: str = "") -> str:
        return f"unknown: {flops.unknown}" if is_unknown(count) else f"{count / 1e6:,.1f} MFLOP per image{more}"

    rows = [
        ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
        ("inference", mflop(flops.inference, f" ({flops.inference / 2e6:,.1f} M multiply-adds)")),
        ("training", mflop(flops.training)),
        ("batch norm", str(traffic) if isinstance(traffic, Unknown) else f"{traffic / 2**20:,.1f} MiB {step}"),
    ]
    if isinstance(memory, Unknown):
        rows.append(("memory", str(memory)))
    else:
        rows.append(("memory", f"{memory.bytes(options.batch) / 2**20:,.1f} MiB {step}"))
        rows.append(("", f"= {memory.fixed / 2**20:,.1f} MiB + {memory.per_image / 2**20:,.3f} MiB per image"))
    return [*rows, ("gradients", f"{gradient_bytes(model) / 2**20:,.1f} MiB to all-reduce per step")]


def _export(options: argparse.Namespace) -> int:
    trained = load_trained(options.run_folder, options.input, options.classes)
    if trained.fallback:
        explain(f"prunetrain: {trained.fallback}")
    print(export_program(trained.model, (trained.examples,), options.out, options.format))
    shape = ", ".join(map(str, trained.examples.shape[1:]))
    print(f"epoch {trained.epoch}; input: float32 images (N, {shape})", end="")
    if trained.mean is not None and trained.std is not None:
        mean, std = (", ".join(f"{v:.6g}" for v in values) for values in (trained.mean, trained.std))
        print(f", (image / 255 - mean) / std with mean {mean} and std {std}", end="")
    print(f"\nchecked with random images: {trained.note}" if trained.note else "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
