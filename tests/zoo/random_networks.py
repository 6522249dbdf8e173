"""Networks made of random calls, and the program of each in readable lines."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    "batch_norm", "add", "cat", "max_pool", "upsample", "stacked_sum", "add_in_place", "unshuffle", "groups_norm",
    "frozen_norm", "glu", "larger", "chosen", "equalised", "turned", "place", "places", "powers", "generated",
    "swapped", "gated", "told_split", "told_list", "told_slices", "product", "einsum", "windows", "window_linear",
    "unflattened", "instance", "compared", "state", "told_groups",
)  # fmt: skip
STRANGE = (
    "first_channels", "group_norm", "average", "mask", "squash", "less_mean", "softmax", "pad_channels", "flip",
    "every_other", "largest_channel", "standardised", "rolled", "sorted_channels", "perceptron", "across", "attention",
    "products_of_heads", "rotated", "shared_heads", "gram", "channel_sum", "bilinear",
)  # fmt: skip


class Shape(NamedTuple):
    """The shape (N, channels, side, side) of a value."""

    channels: int
    side: int


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
    """The shapes of an operation's results, its module if it has one, and its settings."""

    shapes: list[Shape]
    module: nn.Module | None = None
    settings: tuple[int, ...] = ()


# -- operations: modules and shapes ------------------------------------------------------------------------------------


def _width(step: Step) -> int:
    return WIDTHS[step.size % len(WIDTHS)]


def _conv(step: Step, x: Shape) -> Plan:
    kernel = (3, 1)[step.second % 2]
    bias = bool(step.second // 2 % 2)
    module = nn.Conv2d(x.channels, _width(step), kernel, padding=kernel // 2, bias=bias)
    return Plan([Shape(_width(step), x.side)], module)


def _batch_norm(step: Step, x: Shape) -> Plan:
    return Plan([x], nn.BatchNorm2d(x.channels, eps=0.01))


def _prelu(step: Step, x: Shape) -> Plan:
    return Plan([x], nn.PReLU(x.channels))


def _group_norm(step: Step, x: Shape) -> Plan:
    return Plan([x], nn.GroupNorm(1, x.channels))


class FrozenNorm(nn.Module):
    """A batch norm of buffers, in the arithmetic of detectors (DETR's backbone)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Any) -> Tensor:
        scale = (self.weight * (self.running_var + 0.01).rsqrt()).view(1, -1, 1, 1)
        return x * scale + (self.bias.view(1, -1, 1, 1) - self.running_mean[None, :, None, None] * scale)


class Equalised(nn.Module):
    """A convolution whose weight is scaled in the forward, or standardised."""

    def __init__(self, inputs: int, outputs: int, *, standardised: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3) / 3)
        self.gain = nn.Parameter(torch.rand(outputs, 1, 1, 1) + 0.5)
        self.bias = nn.Parameter(torch.randn(outputs))
        self.standardised = standardised

    def forward(self, x: Any) -> Tensor:
        weight = self.weight
        if self.standardised:
            variance, mean = torch.var_mean(weight, (1, 2, 3), keepdim=True)
            weight = (weight - mean) * (variance + 0.01).rsqrt()
        return F.conv2d(x, weight * self.gain * 0.7, self.bias * 0.5, padding=1)


class Place(nn.Module):
    """A value for each channel and pixel, which is added."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.randn(1, channels, side, side))

    def forward(self, x: Any) -> Tensor:
        return x + self.values


def _groups_norm(step: Step, x: Shape) -> Plan | None:
    size = (2, 3)[step.second % 2]
    if x.channels % size or x.channels == size or x.side < 2:
        return None
    return Plan([x], nn.GroupNorm(x.channels // size, x.channels, eps=0.01, affine=bool(step.size % 3)))


def _frozen_norm(step: Step, x: Shape) -> Plan:
    return Plan([x], FrozenNorm(x.channels))


def _equalised(step: Step, x: Shape) -> Plan:
    standardised = step.operation == "standardised"
    return Plan([Shape(_width(step), x.side)], Equalised(x.channels, _width(step), standardised=standardised))


def _place(step: Step, x: Shape) -> Plan:
    return Plan([x], Place(x.channels, x.side))


def _generated(step: Step, x: Shape) -> Plan:
    return Plan([Shape(_width(step), 2)], nn.Linear(x.channels, _width(step) * 4))


def _places(step: Step, x: Shape) -> Plan | None:
    return None if x.side % 2 else Plan([x])


def _depthwise(step: Step, x: Shape) -> Plan | None:
    outputs = x.channels * (1 + step.second % 2)
    if x.channels < 2 or outputs > MOST_CHANNELS:
        return None
    module = nn.Conv2d(x.channels, outputs, 3, padding=1, groups=x.channels, bias=False)
    return Plan([Shape(outputs, x.side)], module)


def _grouped(step: Step, x: Shape) -> Plan | None:
    groups, width = (2, 3)[step.second % 2], (2, 3, 4, 5)[step.size % 4]
    if x.channels % groups or x.channels == groups:
        return None
    module = nn.Conv2d(x.channels, groups * width, 3, padding=1, groups=groups)
    return Plan([Shape(groups * width, x.side)], module)


def _transposed(step: Step, x: Shape) -> Plan | None:
    if x.side * 2 > LARGEST:
        return None
    return Plan([Shape(_width(step), x.side * 2)], nn.ConvTranspose2d(x.channels, _width(step), 2, stride=2))


def _gate(step: Step, x: Shape) -> Plan:
    width = _width(step)
    return Plan([x], nn.Sequential(nn.Conv2d(x.channels, width, 1), nn.ReLU(), nn.Conv2d(width, x.channels, 1)))


def _strided(step: Step, x: Shape) -> Plan | None:
    if x.side % 2:
        return None
    return Plan([Shape(_width(step), x.side // 2)], nn.Conv2d(x.channels, _width(step), 3, stride=2, padding=1))


def _linear(step: Step, x: Shape) -> Plan:
    return Plan([Shape(_width(step), x.side)], nn.Linear(x.channels, _width(step)))


def _mask(step: Step, x: Shape) -> Plan:
    return Plan([x], nn.Conv2d(x.channels, 1, 1))


def _squash(step: Step, x: Shape) -> Plan:
    return Plan([x], nn.LayerNorm(x.channels))


def _perceptron(step: Step, x: Shape) -> Plan:
    width = _width(step)
    return Plan([x], nn.Sequential(nn.Linear(x.channels, width), nn.GELU(), nn.Linear(width, x.channels)))


def _across(step: Step, x: Shape) -> Plan:
    width = _width(step)
    return Plan([x], nn.Sequential(nn.Linear(x.side, width), nn.ReLU(), nn.Linear(width, x.side)))


class Attention(nn.Module):
    """Attention over the pixels of a map."""

    def __init__(self, channels: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.project = nn.Linear(channels, 3 * heads * head_dim), nn.Linear(heads * head_dim, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        tokens = x.flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).reshape(x.shape[0], tokens.shape[1], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.project(mixed).transpose(1, 2).reshape(x.shape)


class WrittenAttention(nn.Module):
    """Attention as products over heads, rotated by halves and with fewer keys than queries if asked for."""

    def __init__(self, channels: int, heads: int, head_dim: int, *, shared: int = 1, rotated: bool = False) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = heads * shared, heads, head_dim
        self.shared, self.rotated = shared, rotated
        self.q = nn.Linear(channels, heads * shared * head_dim)
        self.k, self.v = (nn.Linear(channels, heads * head_dim) for _ in range(2))
        self.project = nn.Linear(heads * shared * head_dim, channels)
        self.register_buffer("turn", torch.randn(2, head_dim))

    def _turned(self, x: Tensor) -> Tensor:
        first, second = x[..., : self.head_dim // 2], x[..., self.head_dim // 2 :]
        return x * self.turn[0] + torch.cat((-second, first), dim=-1) * self.turn[1]

    def _repeated(self, x: Tensor) -> Tensor:
        n, heads, length, features = x.shape
        x = x[:, :, None].expand(n, heads, self.shared, length, features)
        return x.reshape(n, heads * self.shared, length, features)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        tokens = x.flatten(2).transpose(1, 2)
        n, length, _ = tokens.shape
        query = self.q(tokens).view(n, length, self.num_heads, self.head_dim).transpose(1, 2)
        key = self.k(tokens).view(n, length, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        value = self.v(tokens).view(n, length, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        if self.rotated:
            query, key = self._turned(query), self._turned(key)
        if self.shared > 1:
            key, value = self._repeated(key), self._repeated(value)
        weights = torch.matmul(query, key.transpose(-1, -2)).mul(0.5).softmax(-1)
        mixed = torch.matmul(weights, value).transpose(1, 2).reshape(n, length, -1)
        return self.project(mixed).transpose(1, 2).reshape(x.shape)


def _products_of_heads(step: Step, x: Shape) -> Plan:
    heads, features = 1 + step.second % 3, 2 * (1 + step.size % 2)
    options = {"shared": 2 if step.operation == "shared_heads" else 1, "rotated": step.operation == "rotated"}
    return Plan([x], WrittenAttention(x.channels, heads, features, **options))


class Told(nn.Module):
    """Pieces, slices and zeros whose numbers of channels are attributes."""

    def __init__(self, channels: int, how: str, number: int) -> None:
        super().__init__()
        self.how, self.width, self.first = how, channels // 2, 1 + number % (channels - 1)
        self.sizes = [self.first, channels - self.first]
        self.channels, self.groups = channels, 2

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "told_split":
            pieces = x.split(self.width, dim=1)
            return torch.cat([pieces[1], F.relu(pieces[0])], 1)
        if self.how == "told_list":
            a, b = torch.split(x, self.sizes, 1)
            return torch.cat([b.sigmoid(), a], 1)
        if self.how == "told_slices":
            return torch.cat([x[:, self.first :], x[:, : self.first].tanh()], 1)
        if self.how == "told_groups":
            y = x.view(x.shape[0], self.groups, self.width, x.shape[2], x.shape[3])
            return y.transpose(1, 2).reshape(x.shape[0], self.groups * self.width, x.shape[2], x.shape[3])
        return x + torch.zeros(x.shape[0], self.channels, x.shape[2], x.shape[3], dtype=x.dtype)


def _told(step: Step, x: Shape) -> Plan | None:
    even = step.operation in ("told_split", "told_groups")
    if x.channels < 3 or (even and x.channels % 2):
        return None
    return Plan([x], Told(x.channels, step.operation, step.size))


def _product(step: Step, x: Shape) -> Plan:
    return Plan([x], nn.Linear(x.side, x.side, bias=False))


def _bilinear(step: Step, x: Shape) -> Plan:
    return Plan([Shape(_width(step), x.side)], nn.Linear(x.channels, _width(step), bias=False))


def _window_linear(step: Step, x: Shape) -> Plan | None:
    return None if x.side % 2 else Plan([Shape(_width(step), x.side // 2)], nn.Linear(x.channels * 4, _width(step)))


def _instance(step: Step, x: Shape) -> Plan | None:
    affine = bool(step.second % 2)
    return None if x.side < 2 else Plan([x], nn.InstanceNorm2d(x.channels, eps=0.01, affine=affine))


def _attention(step: Step, x: Shape) -> Plan:
    return Plan([x], Attention(x.channels, 1 + step.second % 3, 2 + step.size % 3))


# -- operations: shapes ------------------------------------------------------------------------------------------------


def _same_shape(step: Step, x: Shape, *others: Shape) -> Plan:
    return Plan([x])


def _halves(step: Step, x: Shape) -> Plan | None:
    return None if x.channels % 2 or x.channels == 2 else Plan([Shape(x.channels // 2, x.side)] * 2)


def _sum_of_halves(step: Step, x: Shape) -> Plan | None:
    return None if x.channels % 2 or x.channels == 2 else Plan([Shape(x.channels // 2, x.side)])


def _chunk(step: Step, x: Shape) -> Plan | None:
    pieces = (2, 3)[step.second % 2]
    if x.channels % pieces or x.channels == pieces:
        return None
    return Plan([Shape(x.channels // pieces, x.side)] * pieces, settings=(pieces,))


def _shuffle(step: Step, x: Shape) -> Plan | None:
    groups = (2, 3)[step.second % 2]
    return None if x.channels % groups or x.channels == groups else Plan([x], settings=(groups,))


def _pad_channels(step: Step, x: Shape) -> Plan:
    more = 1 + step.size % 3
    return Plan([Shape(x.channels + more, x.side)], settings=(more,))


def _first_channels(step: Step, x: Shape) -> Plan:
    count = 1 + step.size % x.channels
    return Plan([Shape(count, x.side)], settings=(count,))


def _every_other(step: Step, x: Shape) -> Plan:
    return Plan([Shape((x.channels + 1) // 2, x.side)])


def _repeat(step: Step, x: Shape) -> Plan | None:
    return None if x.channels * 2 > MOST_CHANNELS else Plan([Shape(x.channels * 2, x.side)])


def _unshuffle(step: Step, x: Shape) -> Plan | None:
    return None if x.side % 2 or x.channels * 4 > MOST_CHANNELS else Plan([Shape(x.channels * 4, x.side // 2)])


def _pixel_shuffle(step: Step, x: Shape) -> Plan | None:
    return None if x.channels % 4 or x.side * 2 > LARGEST else Plan([Shape(x.channels // 4, x.side * 2)])


def _largest_channel(step: Step, x: Shape) -> Plan:
    return Plan([Shape(1, x.side)])


def _cat(step: Step, x: Shape, y: Shape) -> Plan | None:
    total = x.channels + y.channels
    return None if total > MOST_CHANNELS else Plan([Shape(total, x.side)])


def _max_pool(step: Step, x: Shape) -> Plan | None:
    return None if x.side % 2 else Plan([Shape(x.channels, x.side // 2)])


def _upsample(step: Step, x: Shape) -> Plan | None:
    return None if x.side * 2 > LARGEST else Plan([Shape(x.channels, x.side * 2)])


def _average(step: Step, x: Shape) -> Plan:
    return Plan([Shape(x.channels, 1)])


TWO_OPERANDS = ("add", "cat", "stacked_sum", "add_in_place", "larger", "chosen")
# Plans an operation on operands of these shapes; None if it does not fit them.
PLANS: dict[str, Callable[..., Plan | None]] = {
    "conv": _conv, "batch_norm": _batch_norm, "prelu": _prelu, "group_norm": _group_norm, "depthwise": _depthwise,
    "grouped": _grouped, "transposed": _transposed, "gate": _gate, "strided": _strided, "linear": _linear,
    "functional_norm": _batch_norm, "mask": _mask, "squash": _squash, "perceptron": _perceptron, "across": _across,
    "attention": _attention, "split": _halves, "sum_of_parts": _sum_of_halves,
    "chunk": _chunk, "shuffle": _shuffle, "pad_channels": _pad_channels, "first_channels": _first_channels,
    "every_other": _every_other, "repeat": _repeat, "unshuffle": _unshuffle, "pixel_shuffle": _pixel_shuffle,
    "largest_channel": _largest_channel, "cat": _cat, "max_pool": _max_pool, "upsample": _upsample,
    "average": _average, "groups_norm": _groups_norm, "frozen_norm": _frozen_norm, "glu": _sum_of_halves,
    "equalised": _equalised, "standardised": _equalised, "place": _place, "places": _places, "generated": _generated,
    **dict.fromkeys(("relu", "add", "stacked_sum", "add_in_place", "less_mean", "softmax", "flip"), _same_shape),
    **dict.fromkeys(("larger", "chosen", "turned", "powers", "rolled", "sorted_channels"), _same_shape),
    **dict.fromkeys(("swapped", "gated", "gram", "channel_sum", "compared"), _same_shape),
    **dict.fromkeys(("told_split", "told_list", "told_slices", "told_groups", "state"), _told),
    **dict.fromkeys(("products_of_heads", "rotated", "shared_heads"), _products_of_heads),
    **dict.fromkeys(("product", "einsum"), _product), "bilinear": _bilinear, "window_linear": _window_linear,
    "windows": _places, "unflattened": _shuffle, "instance": _instance,
}  # fmt: skip


# -- operations: values ------------------------------------------------------------------------------------------------


def _apply(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def _on_last_dimension(module: nn.Module, x: Tensor) -> Tensor:
    return module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _behind_the_unknown(module: nn.Module, x: Tensor) -> Tensor:
    return x + module(x.permute(0, 2, 3, 1).roll(1, 3)).permute(0, 3, 1, 2)


def _gated(module: nn.Module, x: Tensor) -> Tensor:
    return x * torch.sigmoid(module(F.adaptive_avg_pool2d(x, 1)))


def _masked(module: nn.Module, x: Tensor) -> Tensor:
    return x * torch.sigmoid(module(x))


def _normalised(norm: Any, x: Tensor) -> Tensor:
    statistics = norm.running_mean, norm.running_var, norm.weight, norm.bias
    return F.batch_norm(x, *statistics, training=norm.training, eps=0.01)


def _maps_of(module: nn.Module, x: Tensor) -> Tensor:
    return module(x.mean((2, 3))).view(x.shape[0], -1, 2, 2)


def _linear_of_windows(module: nn.Module, x: Tensor) -> Tensor:
    rows = F.unfold(x, 2, stride=2).transpose(1, 2)
    return module(rows).transpose(1, 2).unflatten(2, (x.shape[2] // 2, x.shape[3] // 2))


# How operations with a module use it, where they do not just call it.
CALLS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "linear": _on_last_dimension, "squash": _on_last_dimension, "gate": _gated, "mask": _masked,
    "functional_norm": _normalised, "perceptron": _behind_the_unknown, "generated": _maps_of,
    "product": lambda m, x: x @ m.weight, "einsum": lambda m, x: torch.einsum("nchw,hk->nckw", x, m.weight),
    "bilinear": lambda m, x: torch.einsum("nchw,kc->nkhw", x, m.weight), "window_linear": _linear_of_windows,
}  # fmt: skip


def _chunks_of(call: Call, x: Tensor) -> list[Tensor]:
    pieces = x.chunk(call.settings[0], dim=1)
    return [pieces[i] for i in range(call.settings[0])]


def _shuffled(call: Call, x: Tensor) -> list[Tensor]:
    n, c, h, w = x.shape
    groups = call.settings[0]
    return [x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)]


def _halves_of(call: Call, x: Tensor) -> list[Tensor]:
    pieces = x.split(x.shape[1] // 2, dim=1)
    return [pieces[0], pieces[1]]


def _added_in_place(call: Call, x: Tensor, y: Tensor) -> list[Tensor]:
    total = x.clone()
    total += y
    return [total]


def _windows(call: Call, x: Tensor) -> list[Tensor]:
    return [F.fold(F.unfold(x, 2, stride=2).tanh(), x.shape[2:], 2, stride=2)]


def _gram(call: Call, x: Tensor) -> list[Tensor]:
    rows = x.flatten(2)
    return [torch.bmm(torch.bmm(rows, rows.mT).softmax(-1), rows).reshape(x.shape)]


def _put_back(call: Call, x: Tensor) -> list[Tensor]:
    largest, places = F.max_pool2d(x, 2, return_indices=True)
    return [F.max_unpool2d(largest, places, 2)]


# Operations without a module, on the call and its operands.
FUNCTIONS: dict[str, Callable[..., list[Tensor]]] = {
    "relu": lambda call, x: [F.relu(x)],
    "add": lambda call, x, y: [x + y],
    "cat": lambda call, x, y: [torch.cat([x, y], dim=1)],
    "chunk": _chunks_of,
    "shuffle": _shuffled,
    "first_channels": lambda call, x: [x[:, : call.settings[0]]],
    "max_pool": lambda call, x: [F.max_pool2d(x, 2)],
    "upsample": lambda call, x: [F.interpolate(x, scale_factor=2)],
    "pixel_shuffle": lambda call, x: [F.pixel_shuffle(x, 2)],
    "average": lambda call, x: [x.flatten(2).mean(2)[:, :, None, None]],
    "split": _halves_of,
    "sum_of_parts": lambda call, x: [x.view(x.shape[0], 2, x.shape[1] // 2, x.shape[2], x.shape[3]).sum(1)],
    "stacked_sum": lambda call, x, y: [torch.stack([x, y]).sum(0)],
    "add_in_place": _added_in_place,
    "less_mean": lambda call, x: [x - x.mean(1, keepdim=True)],
    "softmax": lambda call, x: [x.softmax(1)],
    "pad_channels": lambda call, x: [F.pad(x, (0, 0, 0, 0, 0, call.settings[0]))],
    "flip": lambda call, x: [x.flip(1)],
    "every_other": lambda call, x: [x[:, ::2]],
    "repeat": lambda call, x: [x.repeat(1, 2, 1, 1)],
    "unshuffle": lambda call, x: [F.pixel_unshuffle(x, 2)],
    "largest_channel": lambda call, x: [x.amax(1, keepdim=True)],
    "glu": lambda call, x: [F.glu(x, 1)],
    "larger": lambda call, x, y: [torch.max(x, y)],
    "chosen": lambda call, x, y: [torch.where(x > 0.1, y, torch.lerp(x, y, 0.2))],
    "turned": lambda call, x: [x.flip(2).roll(1, 3).cumsum(2) / x.shape[2] - torch.max(x, 3, keepdim=True)[0]],
    "places": _put_back,
    "powers": lambda call, x: [(x.sigmoid() + 0.1).pow(1.5).masked_fill(x > 2, 0.5) + torch.zeros_like(x)],
    "rolled": lambda call, x: [x.roll(1, 1)],
    "swapped": lambda call, x: [x.flatten(2).mT.sigmoid().mT.reshape(*x.shape[:2], *x.size()[-2:])],
    "gated": lambda call, x: [x * x.mean((2, 3)).T.sigmoid().t().view(*x.shape[:2], 1, 1)],
    "windows": _windows,
    "gram": _gram,
    "channel_sum": lambda call, x: [x * torch.einsum("nchw,nchw->nhw", x, x)[:, None].sigmoid()],
    "compared": lambda call, x: [torch.minimum(x, x.mean((2, 3), keepdim=True)) * (x > x.flip(3)) + x.clamp(min=0.2)],
    "unflattened": lambda call, x: [x.unflatten(1, (call.settings[0], -1)).transpose(1, 2).flatten(1, 2)],
    "sorted_channels": lambda call, x: [x.sort(1)[0]],
}


# -- networks ----------------------------------------------------------------------------------------------------------


class RandomNetwork(nn.Module):
    """The network that some steps describe; its outputs are one linear head for each of the last unused values.

    With `branches` the forward depends on a size, which torch.fx cannot trace, so torch.export does.
    """

    def __init__(self, steps: tuple[Step, ...], *, flat_heads: bool = False, branches: bool = False) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.shapes = [Shape(*IMAGE)]
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
        """Adds the call of a step, its module and the shapes of its results; nothing if the operation does not fit."""
        latest = len(self.shapes) - 1
        operand = latest - step.first % latest if step.first < IMAGES and latest else 0
        if step.operation == "again":
            self._plan_again(step, operand)
            return
        operands: tuple[int, ...] = (operand,)
        if step.operation in TWO_OPERANDS:
            others = self._partners(step.operation, operand)
            if not others:
                return
            operands = (operand, others[-1 - step.second % len(others)])
        plan = PLANS[step.operation](step, *(self.shapes[i] for i in operands))
        if plan is None:
            return
        name = f"m{len(self.calls)}" if plan.module is not None else ""
        if plan.module is not None:
            self.add_module(name, plan.module)
        self._call(step.operation, operands, plan.shapes, name, plan.settings)

    def _plan_again(self, step: Step, operand: int) -> None:
        """Adds another call of a module that was called with an operand of the same shape."""
        earlier = [c for c in self.calls if c.module and self.shapes[c.operands[0]] == self.shapes[operand]]
        if earlier:
            again = earlier[step.second % len(earlier)]
            shapes = [self.shapes[i] for i in again.results]
            self._call(again.operation, (operand,), shapes, again.module, again.settings)

    def _call(
        self, operation: str, operands: tuple[int, ...], shapes: list[Shape], module: str, settings: tuple[int, ...]
    ) -> None:
        first = len(self.shapes)
        self.shapes += shapes
        self.calls.append(Call(operation, operands, tuple(range(first, len(self.shapes))), module, settings))

    def _partners(self, operation: str, operand: int) -> list[int]:
        """The values that can be the second operand beside a first one."""
        channels, side = self.shapes[operand]
        return [
            i
            for i, shape in enumerate(self.shapes)
            if shape[1] == side and (operation == "cat" or (shape[0] == channels and i != operand))
        ]

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
        if call.module:
            return [CALLS.get(call.operation, _apply)(self.get_submodule(call.module), operands[0])]
        return FUNCTIONS[call.operation](call, *operands)

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
