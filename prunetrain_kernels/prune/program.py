"""A pruned network as a program in a file, for machines without this package: torch.export, ONNX, TorchScript.

    export_program(model, example_inputs, "network.onnx")

What is written is `to_dense(model)`: the package's own operators and stand-ins have no place in such files.
"""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunetrain_kernels.errors import InputError, PruneTrainError
from prunetrain_kernels.files import write_atomically
from prunetrain_kernels.probe import looking
from prunetrain_kernels.prune.export import to_dense

FORMATS = {"torch": ".pt2", "onnx": ".onnx", "torchscript": ".pt"}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}  # of the scale
BATCHES = (3, 1, 5)  # the first one is traced
NEEDS_ONNX = "onnx export needs the packages onnx and onnxscript: pip install onnx onnxscript."

Program = Callable[[tuple[Tensor, ...]], list[Tensor]]


@dataclass(frozen=True)
class Export:
    """A written program.

    Attributes:
        path, format, bytes: of the file.
        batches: the batch sizes it was checked with.
        max_abs_dy, scale: largest difference from the model's output there, and that output's largest absolute value.
        checked_with: what ran it.
    """

    path: Path
    format: str
    bytes: int
    batches: tuple[int, ...]
    max_abs_dy: float
    scale: float
    checked_with: str

    def __str__(self) -> str:
        """One line for a terminal."""
        batches = ", ".join(map(str, self.batches))
        return (
            f"{self.path}: {self.format}, {self.bytes / 2**20:.2f} MiB; run by {self.checked_with} on batches "
            f"of {batches}, max|dy| {self.max_abs_dy:.1e} of scale {self.scale:.1e}"
        )


def export_program(
    model: nn.Module, example_inputs: tuple[Tensor, ...], path: str | Path, format: str | None = None
) -> Export:
    """Writes `model`, in evaluation mode, as a program that runs without this package, on batches of any size.

    The program is that of `to_dense(model)`. Before the file takes its place, it is read back and run, with batches of
    several sizes, against the model itself; `model` is not changed.

    Args:
        model: pruned or not, gated or not, fused or not.
        example_inputs: its positional arguments, dimension 0 the batch; they decide dtype, device and image size.
        path: the file, replaced only by a checked one.
        format: "torch" (`torch.export`, .pt2), "onnx" (needs onnx and onnxscript), or "torchscript" (traced, .pt); by
            default what the file's name says.

    Raises:
        InputError: an unknown format, a missing package, a model that cannot be exported or does not take batches of
            other sizes, or a file that cannot be written.
        PruneTrainError: the program computes something else than the model; nothing was written.
    """
    path = Path(path)
    format = _format_of(path, format)
    if not example_inputs or any(x.dim() == 0 or len(x) == 0 for x in example_inputs):
        raise InputError("example_inputs must be tensors with at least one example each.")
    plain = to_dense(model, example_inputs).eval()
    inputs = [_of_batch(example_inputs, batch) for batch in BATCHES]
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporters' own code
            data, program, checked_with = WRITERS[format](plain, inputs[0])
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{type(model).__name__} cannot be exported as {format}: {_why(error)}.") from error
    checks = [_check(model, program, format, each) for each in inputs]
    write_atomically(path, data)
    moved, scale = (max(side) for side in zip(*checks, strict=True))
    return Export(path, format, len(data), BATCHES, moved, scale, checked_with)


def _format_of(path: Path, format: str | None) -> str:
    by_name = {ending: name for name, ending in FORMATS.items()}
    if format is None and path.suffix not in by_name:
        raise InputError(f"'{path}' does not say the format; let it end in {', '.join(by_name)}, or give the format.")
    if format is not None and format not in FORMATS:
        raise InputError(f"format '{format}' is not known; the formats are: {', '.join(FORMATS)}.")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}.")
    return format or by_name[path.suffix]


def _check(model: nn.Module, program: Program, format: str, inputs: tuple[Tensor, ...]) -> tuple[float, float]:
    """How far the program's output is from the model's, and the latter's scale; raises where that is too far."""
    with looking(model):
        expected = [leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]
    batch = len(inputs[0])
    try:
        found = program(inputs)
    except Exception as error:
        raise InputError(f"the {format} program does not take a batch of {batch}: {_why(error)}.") from error
    if [y.shape for y in found] != [y.shape for y in expected]:
        shapes = [tuple(y.shape) for y in found]
        raise InputError(
            f"the {format} program gives {shapes} for a batch of {batch}; the model computes with its batch size as a "
            "plain number, which such a program cannot follow."
        )
    moved, scale = _distance(found, expected), _largest(expected)
    if moved > max((TOLERANCE.get(y.dtype, 1e-5) for y in expected), default=0.0) * max(scale, 1e-6):
        raise PruneTrainError(
            f"the {format} program's output differs by {moved:.1e} from the model's (scale {scale:.1e}) for a batch of "
            f"{batch}, so nothing was written; please report it with the model."
        )
    return moved, scale


def _of_batch(inputs: tuple[Tensor, ...], batch: int) -> tuple[Tensor, ...]:
    """The examples over and over."""
    return tuple(x.detach()[torch.arange(batch, device=x.device) % len(x)] for x in inputs)


def _dynamic(inputs: tuple[Tensor, ...]) -> tuple[dict[int, Any], ...]:
    batch = torch.export.Dim("batch")
    return tuple({0: batch} for _ in inputs)


def _write_torch(plain: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[bytes, Program, str]:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(plain, inputs, dynamic_shapes=_dynamic(inputs)), buffer)
    loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    return buffer.getvalue(), lambda x: tree_leaves(loaded(*x)), "torch.export"


def _write_torchscript(plain: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[bytes, Program, str]:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(plain, inputs, check_trace=False), buffer)  # type: ignore[no-untyped-call]
    loaded = torch.jit.load(io.BytesIO(buffer.getvalue()))  # type: ignore[no-untyped-call]
    return buffer.getvalue(), lambda x: tree_leaves(loaded(*x)), "TorchScript"


def _write_onnx(plain: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[bytes, Program, str]:
    try:
        import onnx
        import onnxscript  # noqa: F401  # torch.onnx needs it
    except ImportError as error:
        raise InputError(NEEDS_ONNX) from error
    done = torch.onnx.export(plain, inputs, dynamo=True, dynamic_shapes=_dynamic(inputs), verbose=False)
    assert done is not None
    data = done.model_proto.SerializeToString()
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        evaluator = ReferenceEvaluator(onnx.load_from_string(data))
        names, by = evaluator.input_names, "onnx's reference evaluator"
    else:
        evaluator = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        names, by = [value.name for value in evaluator.get_inputs()], "onnxruntime"

    def run(x: tuple[Tensor, ...]) -> list[Tensor]:
        given = {name: tensor.cpu().numpy() for name, tensor in zip(names, x, strict=True)}
        return [torch.from_numpy(y) for y in evaluator.run(None, given)]

    return data, run, by


WRITERS = {"torch": _write_torch, "onnx": _write_onnx, "torchscript": _write_torchscript}


def _why(error: Exception) -> str:
    """The innermost cause, in one line."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")


def _largest(tensors: list[Tensor]) -> float:
    return max((float(t.detach().abs().max()) for t in tensors if t.numel()), default=0.0)


def _distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference; infinite where only one is NaN."""
    pairs = [(a.detach().cpu().double(), b.cpu().double()) for a, b in zip(found, expected, strict=True)]
    gaps = [(a - b).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0) for a, b in pairs]
    return _largest([gap.nan_to_num(nan=float("inf"), posinf=float("inf")) for gap in gaps])
