"""Networks made of random calls, and the program of each in readable lines."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE = (3, 4)  # channels, height and width
LARGEST = 8  # height and width that no value exceeds
MOST_CHANNELS = 24
MOST_HEADS = 3
WIDTHS = (4, 6, 8, 5, 12)
IMAGES = 9
# Operations whose channels are followed, and strange ones that freeze what they touch or have only one channel. An
# operation that does not fit its operand's shape is left out.
FOLLOWED = (
    "conv", "batch_norm", "relu", "add", "cat", "depthwise", "grouped", "chunk", "gate", "shuffle", "split", "linear",
    "strided", "transposed", "pixel_shuffle", "prelu", "again", "sum_of_parts", "repeat", "functional_norm", "conv",
    "batch_norm", "add", "cat", "max_pool", "upsample", "stacked_sum", "add_in_place", "unshuffle",
)  # fmt: skip
STRANGE = (
    "first_channels", "group_norm", "average", "mask", "squash", "less_mean", "softmax", "pad_channels", "flip",
    "every_other", "largest_channel",
)  # fmt: skip
# Operations with a module of their own, and operations on two values.
LAYERS = (
    "conv", "batch_norm", "prelu", "group_norm", "depthwise", "grouped", "transposed", "gate", "strided", "linear",
    "functional_norm", "mask", "squash",
)  # fmt: skip
JOINS = ("add", "cat", "stacked_sum", "add_in_place")


@dataclass(frozen=True)
class Step:
    """One drawn step: an operation and numbers that choose operands and sizes, each modulo what there is.

    `first` counts from the latest value backwards; `IMAGES` stands for the network's input.
    """

    operation: str
    first: int
    second: int = 0
    size: int = 0


@dataclass(frozen=True)
class Call:
    """`results = operation(operands)` with the module `module`, if the operation has one."""

    operation: str
    operands: tuple[int, ...]
    results: tuple[int, ...]
    module: str = ""
    settings: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A call that fits: the shapes of its results, its module if it has a new one, the call that it repeats."""

    shapes: list[tuple[int, int]]
    module: nn.Module | None = None
    operands: tuple[int, ...] = ()
    settings: tuple[int, ...] = ()
    again: Call | None = None


def layer(step: Step, channels: int, side: int) -> Plan | None:
    """An operation with a module on a value of some channels, `side` high and wide; None where it does not fit."""
    width = WIDTHS[step.size % len(WIDTHS)]
    shape = (channels, side)
    module: nn.Module
    match step.operation:
        case "conv":
            kernel = (3, 1)[step.second % 2]
            module = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=bool(step.second // 2 % 2))
            shape = (width, side)
        case "batch_norm":
            module = nn.BatchNorm2d(channels, eps=0.01)
        case "prelu":
            module = nn.PReLU(channels)
        case "group_norm":
            module = nn.GroupNorm(1, channels)
        case "depthwise":
            times = 1 + step.second % 2
            if channels < 2 or channels * times > MOST_CHANNELS:
                return None
            module = nn.Conv2d(channels, channels * times, 3, padding=1, groups=channels, bias=False)
            shape = (channels * times, side)
        case "grouped":
            groups, width = (2, 3)[step.second % 2], (2, 3, 4, 5)[step.size % 4]
            if channels % groups or channels == groups:
                return None
            module = nn.Conv2d(channels, groups * width, 3, padding=1, groups=groups)
            shape = (groups * width, side)
        case "transposed":
            if side * 2 > LARGEST:
                return None
            module = nn.ConvTranspose2d(channels, width, 2, stride=2)
            shape = (width, side * 2)
        case "gate":
            module = nn.Sequential(nn.Conv2d(channels, width, 1), nn.ReLU(), nn.Conv2d(width, channels, 1))
        case "strided":
            if side % 2:
                return None
            module = nn.Conv2d(channels, width, 3, stride=2, padding=1)
            shape = (width, side // 2)
        case "linear":
            module = nn.Linear(channels, width)
            shape = (width, side)
        case "functional_norm":
            module = nn.BatchNorm2d(channels, eps=0.01)
        case "mask":
            module = nn.Conv2d(channels, 1, 1)
        case "squash":
            module = nn.LayerNorm(channels)
        case _:
            raise ValueError(step.operation)
    return Plan([shape], module)


def rearrangement(step: Step, channels: int, side: int) -> Plan | None:
    """An operation without a module, likewise."""
    shapes = [(channels, side)]
    settings: tuple[int, ...] = ()
    match step.operation:
        case "split" | "sum_of_parts":
            if channels % 2 or channels == 2:
                return None
            shapes = [(channels // 2, side)] * (2 if step.operation == "split" else 1)
        case "pad_channels":
            settings = (1 + step.size % 3,)
            shapes = [(channels + settings[0], side)]
        case "every_other":
            shapes = [((channels + 1) // 2, side)]
        case "repeat":
            if channels * 2 > MOST_CHANNELS:
                return None
            shapes = [(channels * 2, side)]
        case "unshuffle":
            if side % 2 or channels * 4 > MOST_CHANNELS:
                return None
            shapes = [(channels * 4, side // 2)]
        case "largest_channel":
            shapes = [(1, side)]
        case "chunk" | "shuffle":
            settings = ((2, 3)[step.second % 2],)
            if channels % settings[0] or channels == settings[0]:
                return None
            if step.operation == "chunk":
                shapes = [(channels // settings[0], side)] * settings[0]
        case "first_channels":
            settings = (1 + step.size % channels,)
            shapes = [(settings[0], side)]
        case "max_pool":
            if side % 2:
                return None
            shapes = [(channels, side // 2)]
        case "upsample":
            if side * 2 > LARGEST:
                return None
            shapes = [(channels, side * 2)]
        case "pixel_shuffle":
            if channels % 4 or side * 2 > LARGEST:
                return None
            shapes = [(channels // 4, side * 2)]
        case "average":
            shapes = [(channels, 1)]
    return Plan(shapes, settings=settings)


def rearranged(operation: str, operands: list[Tensor], number: int = 0) -> list[Tensor]:
    """The results of an operation without a module; `number` is its setting, if it has one."""
    x = operands[0]
    match operation:
        case "relu":
            return [F.relu(x)]
        case "add":
            return [x + operands[1]]
        case "cat":
            return [torch.cat(operands, dim=1)]
        case "chunk":
            pieces = x.chunk(number, dim=1)
            return [pieces[i] for i in range(number)]
        case "shuffle":
            n, c, h, w = x.shape
            groups = number
            return [x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)]
        case "first_channels":
            return [x[:, :number]]
        case "max_pool":
            return [F.max_pool2d(x, 2)]
        case "upsample":
            return [F.interpolate(x, scale_factor=2)]
        case "pixel_shuffle":
            return [F.pixel_shuffle(x, 2)]
        case "average":
            return [x.flatten(2).mean(2)[:, :, None, None]]
        case "split":
            pieces = x.split(x.shape[1] // 2, dim=1)
            return [pieces[0], pieces[1]]
        case "sum_of_parts":
            return [x.view(x.shape[0], 2, x.shape[1] // 2, x.shape[2], x.shape[3]).sum(1)]
        case "stacked_sum":
            return [torch.stack(operands).sum(0)]
        case "add_in_place":
            total = x.clone()
            total += operands[1]
            return [total]
        case "less_mean":
            return [x - x.mean(1, keepdim=True)]
        case "softmax":
            return [x.softmax(1)]
        case "pad_channels":
            return [F.pad(x, (0, 0, 0, 0, 0, number))]
        case "flip":
            return [x.flip(1)]
        case "every_other":
            return [x[:, ::2]]
        case "repeat":
            return [x.repeat(1, 2, 1, 1)]
        case "unshuffle":
            return [F.pixel_unshuffle(x, 2)]
        case "largest_channel":
            return [x.amax(1, keepdim=True)]
    raise ValueError(operation)


class RandomNetwork(nn.Module):
    """The network that some steps describe; its outputs are one linear head for each of the last unused values.

    With `branches` the forward depends on a size, which torch.fx cannot trace, so torch.export does.
    """

    def __init__(self, steps: tuple[Step, ...], flat_heads: bool = False, branches: bool = False) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.shapes: list[tuple[int, int]] = [IMAGE]
        self.flat_heads = flat_heads
        self.branches = branches
        for step in (Step("conv", 0, 0, 1), *steps):
            self._plan(step)
        used = {i for call in self.calls for i in call.operands}
        self.ends = [i for i in range(len(self.shapes)) if i not in used][-MOST_HEADS:]
        self.heads = nn.ModuleList()
        for i in self.ends:
            channels, side = self.shapes[i]
            self.heads.append(nn.Linear(channels * side**2 if flat_heads else channels, 2))

    def _plan(self, step: Step) -> None:
        latest = len(self.shapes) - 1
        operand = latest - step.first % latest if step.first < IMAGES and latest else 0
        if step.operation in JOINS:
            plan = self._join(step, operand)
        elif step.operation == "again":
            plan = self._again(step, operand)
        else:
            fit = layer if step.operation in LAYERS else rearrangement
            plan = fit(step, *self.shapes[operand])
        if plan is None:
            return
        number = plan.again.module if plan.again is not None else f"m{len(self.calls)}"
        if plan.module is not None:
            self.add_module(number, plan.module)
        first = len(self.shapes)
        self.shapes += plan.shapes
        results = tuple(range(first, first + len(plan.shapes)))
        has_module = plan.module is not None or plan.again is not None
        name = plan.again.operation if plan.again is not None else step.operation
        operands = plan.operands or (operand,)
        self.calls.append(Call(name, operands, results, number if has_module else "", plan.settings))

    def _join(self, step: Step, operand: int) -> Plan | None:
        """An operation on two values of equal height, and of equal channels if it adds them."""
        channels, side = self.shapes[operand]
        concatenates = step.operation == "cat"
        partners = [
            i
            for i, shape in enumerate(self.shapes)
            if shape[1] == side and (concatenates or (shape[0] == channels and i != operand))
        ]
        if not partners:
            return None
        other = partners[-1 - step.second % len(partners)]
        total = channels + self.shapes[other][0]
        if concatenates and total > MOST_CHANNELS:
            return None
        return Plan([(total if concatenates else channels, side)], operands=(operand, other))

    def _again(self, step: Step, operand: int) -> Plan | None:
        """An earlier module once more, on a value of the shape that it had then."""
        earlier = [c for c in self.calls if c.module and self.shapes[c.operands[0]] == self.shapes[operand]]
        if not earlier:
            return None
        call = earlier[step.second % len(earlier)]
        return Plan([self.shapes[i] for i in call.results], settings=call.settings, again=call)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(N, 3, 4, 4) to a list of (N, 2)."""
        if self.branches and image.shape[2] > LARGEST:
            return []
        values: list[Tensor] = [image]
        for call in self.calls:
            operands = [values[i] for i in call.operands]
            values += self._run(call, operands)
        ends = [values[i] for i in self.ends]
        rows = [end.flatten(1) if self.flat_heads else end.mean((2, 3)) for end in ends]
        return [head(row) for head, row in zip(self.heads, rows, strict=True)]

    def _run(self, call: Call, operands: list[Tensor]) -> list[Tensor]:
        if not call.module:
            return rearranged(call.operation, operands, *call.settings)
        x = operands[0]
        module: Any = self.get_submodule(call.module)
        match call.operation:
            case "gate":
                return [x * torch.sigmoid(module(F.adaptive_avg_pool2d(x, 1)))]
            case "linear":
                return [module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)]
            case "squash":
                return [module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)]
            case "functional_norm":
                statistics = module.running_mean, module.running_var, module.weight, module.bias
                return [F.batch_norm(x, *statistics, training=module.training, eps=0.01)]
            case "mask":
                return [x * torch.sigmoid(module(x))]
        return [module(x)]

    def __repr__(self) -> str:
        """The program."""
        lines = [f"v0 = images (N, {IMAGE[0]}, {IMAGE[1]}, {IMAGE[1]})"]
        for call in self.calls:
            results = ", ".join(f"v{i}" for i in call.results)
            arguments = [f"v{i}" for i in call.operands] + [str(n) for n in call.settings]
            what = f"  # {call.module} = {self.get_submodule(call.module)}" if call.module else ""
            lines.append(f"{results} = {call.operation}({', '.join(arguments)}){what}")
        how = "flatten(1)" if self.flat_heads else "mean((2, 3))"
        lines.append(f"return [head(v.{how}) for v in ({', '.join(f'v{i}' for i in self.ends)})]")
        return "\n".join(lines)
