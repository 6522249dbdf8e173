"""A pruned network as a program in a file, for machines without this package: torch.export, ONNX, TorchScript.

    export_program(model, example_inputs, "network.onnx")

What is written is `to_dense(model)`: the package's own operators and stand-ins have no place in such files.
"""

import inspect
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
from prunetrain_kernels.files import check_replaceable, is_folder, write_atomically
from prunetrain_kernels.inputs import ExampleInputs, arguments_of, call, checked_inputs, images_in, mapped, tensors_in
from prunetrain_kernels.probe import difference, first_line, looking
from prunetrain_kernels.prune.export import to_dense

FORMATS = {"torch": ".pt2", "onnx": ".onnx", "torchscript": ".pt"}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}  # of the scale
BATCHES = (3, 1, 5)  # the first one is traced
NEEDS_ONNX = "onnx export needs the packages onnx and onnxscript: pip install onnx onnxscript."

Program = Callable[[ExampleInputs], list[Tensor]]


@dataclass(frozen=True)
class Export:
    """A written program.

    Attributes:
        path, format, bytes: path, format and size of the file.
        batches: the batch sizes with which it was checked.
        max_abs_dy, scale: largest difference from the model's output, and that output's largest absolute value.
        checked_with: the library that ran it.
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
    model: nn.Module, example_inputs: ExampleInputs, path: str | Path, format: str | None = None
) -> Export:
    """Writes `model`, in evaluation mode, as a program that runs without this package, on batches of any size.

    The program is that of `to_dense(model)`. Before the file takes its place, it is read back and run, with batches of
    several sizes, against the model itself; `model` is not changed.

    Args:
        model: pruned or not, gated or not, fused or not.
        example_inputs: a tuple of its positional arguments, or a dict of its keyword arguments, by which the program is
            then called; dimension 0 of all tensors is the batch. They decide dtype, device and image size.
        path: the file, replaced only by a checked one.
        format: "torch" (`torch.export`, .pt2), "onnx" (needs onnx and onnxscript), or "torchscript" (traced, .pt); by
            default the one that the file's name tells.

    Raises:
        InputError: the format is unknown or a package is missing; the model cannot be exported, does not take batches
            of other sizes or returns nothing finite to compare; or the file cannot be written.
        PruneTrainError: the program computes something else than the model; nothing was written.
    """
    path = Path(path)
    format = _format_of(path, format)
    examples = _in_order(model, checked_inputs(example_inputs))
    if any(x.dim() == 0 or len(x) == 0 for x in tensors_in(examples)):
        raise InputError("example_inputs must be tensors with at least one example each.")
    plain = to_dense(model, examples).eval()
    inputs = [_of_batch(examples, batch) for batch in BATCHES]
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporters' own code
            data, program, checked_with = WRITERS[format](plain, inputs[0])
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{type(model).__name__} cannot be exported as {format}: {_why(error)}.") from error
    checks = [_check(model, program, format, x) for x in inputs]
    write_atomically(path, data)
    moved, scale = (max(side) for side in zip(*checks, strict=True))
    return Export(path, format, len(data), BATCHES, moved, scale, checked_with)


def _format_of(path: Path, format: str | None) -> str:
    """The format to write; raises InputError if it is unknown, or there can be no such file."""
    if not path.name:
        raise InputError(f"'{path}' is no name of a file; give one such as network.onnx.")
    by_name = {ending: name for name, ending in FORMATS.items()}
    if format is None and path.suffix not in by_name:
        raise InputError(f"'{path}' does not say the format; let it end in {', '.join(by_name)}, or give the format.")
    if format is not None and format not in FORMATS:
        raise InputError(f"format '{format}' is not known; the formats are: {', '.join(FORMATS)}.")
    if not is_folder(path.parent):
        raise InputError(f"cannot write {path}: there is no folder {path.parent}.")
    check_replaceable(path)
    return format or by_name[path.suffix]


def _check(model: nn.Module, program: Program, format: str, inputs: ExampleInputs) -> tuple[float, float]:
    """The largest difference of the program's output from the model's, and the scale of the model's.

    Raises:
        InputError: the program does not take such a batch, or nothing can be compared.
        PruneTrainError: the difference is too large.
    """
    with looking(model):
        expected = [leaf for leaf in tree_leaves(call(model, inputs)) if isinstance(leaf, Tensor)]
    batch = images_in(inputs)
    try:
        outputs = program(inputs)
    except Exception as error:
        raise InputError(f"the {format} program does not take a batch of {batch}: {_why(error)}.") from error
    if [y.shape for y in outputs] != [y.shape for y in expected]:
        shapes = [tuple(y.shape) for y in outputs]
        raise InputError(
            f"the {format} program gives {shapes} for a batch of {batch}; the model computes with its batch size as a "
            "plain number, which such a program cannot follow."
        )
    gap = difference(*({str(i): y.detach().cpu() for i, y in enumerate(side)} for side in (expected, outputs)))
    if not gap.compared:
        raise InputError(
            f"nothing of {type(model).__name__}'s output is finite for a batch of {batch}, so the {format} program "
            "cannot be checked; give example inputs for which it is."
        )
    if gap.largest > max((TOLERANCE.get(y.dtype, 1e-5) for y in expected), default=0.0) * max(gap.scale, 1e-6):
        others = " or ".join(name for name in FORMATS if name != format)
        raise PruneTrainError(
            f"the {format} program's output differs by {gap.largest:.1e} from the model's (scale {gap.scale:.1e}) for "
            f"a batch of {batch}, so nothing was written; export as {others}."
        )
    return gap.largest, gap.scale


def _in_order(model: nn.Module, inputs: ExampleInputs) -> ExampleInputs:
    """The inputs, keyword arguments in the order of the forward's; raises InputError where a list is among them."""
    if _holds_list(inputs):
        raise InputError(
            "example_inputs hold a list, one entry for each example, and a program takes no lists of other lengths: "
            "export the part that takes a tensor, or give tensors of a whole batch in a tuple."
        )
    if not isinstance(inputs, dict):
        return inputs
    names = [name for name in inspect.signature(model.forward).parameters if name in inputs]
    return {name: inputs[name] for name in dict.fromkeys([*names, *inputs])}


def _holds_list(value: Any) -> bool:
    if isinstance(value, list):
        return bool(tensors_in(value))
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return any(map(_holds_list, parts))


def _of_batch(inputs: ExampleInputs, batch: int) -> ExampleInputs:
    """A batch of that size, of the examples over and over."""
    repeated: ExampleInputs = mapped(inputs, lambda x: x.detach()[torch.arange(batch, device=x.device) % len(x)])
    return repeated


def _dynamic(inputs: Any) -> Any:
    """The shapes of the inputs for torch.export: dimension 0 of each tensor is the same variable."""
    batch = torch.export.Dim("batch")

    def shape(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {0: batch}
        if isinstance(value, dict):
            return {name: shape(part) for name, part in value.items()}
        return tuple(map(shape, value)) if isinstance(value, tuple) else None

    return shape(inputs)


def _write_torch(plain: nn.Module, inputs: ExampleInputs) -> tuple[bytes, Program, str]:
    buffer = io.BytesIO()
    exported = torch.export.export(plain, *arguments_of(inputs), dynamic_shapes=_dynamic(inputs))
    with torch.device("cpu"):  # PyTorch reads the file through tensors that go where new tensors go by default
        torch.export.save(exported, buffer)
        loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    return buffer.getvalue(), lambda x: tree_leaves(call(loaded, x)), "torch.export"


def _write_torchscript(plain: nn.Module, inputs: ExampleInputs) -> tuple[bytes, Program, str]:
    buffer = io.BytesIO()
    positional, keywords = arguments_of(inputs)
    traced = torch.jit.trace(  # type: ignore[no-untyped-call]
        plain, positional or None, check_trace=False, example_kwarg_inputs=keywords or None, strict=False
    )
    torch.jit.save(traced, buffer)  # type: ignore[no-untyped-call]
    loaded = torch.jit.load(io.BytesIO(buffer.getvalue()))  # type: ignore[no-untyped-call]
    return buffer.getvalue(), lambda x: tree_leaves(call(loaded, x)), "TorchScript"


def _write_onnx(plain: nn.Module, inputs: ExampleInputs) -> tuple[bytes, Program, str]:
    try:
        import onnx
        import onnxscript  # noqa: F401  # torch.onnx needs it
    except ImportError as error:
        raise InputError(NEEDS_ONNX) from error
    positional, keywords = arguments_of(inputs)
    exported = torch.onnx.export(
        plain, positional, kwargs=keywords, dynamo=True, dynamic_shapes=_dynamic(inputs), verbose=False
    )
    assert exported is not None
    data = exported.model_proto.SerializeToString()
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        evaluator = ReferenceEvaluator(onnx.load_from_string(data))
        names, checked_with = evaluator.input_names, "onnx's reference evaluator"
    else:
        evaluator = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        names, checked_with = [value.name for value in evaluator.get_inputs()], "onnxruntime"

    def run(x: ExampleInputs) -> list[Tensor]:
        feeds = {name: tensor.cpu().numpy() for name, tensor in zip(names, tensors_in(x), strict=True)}
        return [torch.from_numpy(y) for y in evaluator.run(None, feeds)]

    return data, run, checked_with


WRITERS = {"torch": _write_torch, "onnx": _write_onnx, "torchscript": _write_torchscript}


def _why(error: Exception) -> str:
    """The first line of the innermost cause of an error."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return first_line(error)
