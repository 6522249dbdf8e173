"""Channel spaces: who shares which channels (paper section 4.2, Fig. 5a).

A *space* is one set of channels that several layers share, because they produce it, read it or pass it on. All layers
that meet in a residual stage share one space; the edge between two convolutions of a VGG is another. Whatever is pruned
is pruned from a whole space, so that every layer on it keeps fitting every other. Where channels of several spaces lie
side by side, as behind a concatenation, they form a space with `members`, which keeps what its members keep.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.graph.told import TOLD, told_value
from prunetrain_kernels.inputs import ExampleInputs


@dataclass
class Layer:
    """A convolution or linear layer: it reads one space and produces another.

    In a convolution with groups the space it reads is that of one group: the same channels of every group stay.

    Attributes:
        name: the module's qualified name.
        kind: "conv", "linear" or "conv_transpose", whose weight is (C, K, ...), not (K, C, ...).
        input: index of the space it reads.
        output: index of the space it produces.
        block: features per input channel: H*W for a linear layer behind a flatten, else 1.
        live_in, live_out: the channels of either space that a gated layer computes, int64, in the order of its
            weight's; None for all.
        map_in, map_out: height and width of its input and output on the example inputs (at its first call).
        groups: the number of groups of a convolution.
    """

    name: str
    kind: str
    input: int
    output: int
    block: int = 1
    live_in: Tensor | None = None
    live_out: Tensor | None = None
    map_in: tuple[int, ...] = ()
    map_out: tuple[int, ...] = ()
    groups: int = 1

    @property
    def transposed(self) -> bool:
        return self.kind == "conv_transpose"

    @property
    def dims(self) -> tuple[int, int]:
        """The dimensions of the weight in which its input and its output channels lie."""
        return (0, 1) if self.transposed else (1, 0)


@dataclass
class Follower:
    """A module with one value per channel that passes its space on: batch norm, depthwise convolution, PReLU.

    `block` is the number of features per channel, as in `Layer`; `dim` the dimension of its tensors in which they lie.
    Where only one of a module's tensors has the space's channels (one of two layer scales), `tensor` is that one's name
    in the module, and `name` is its qualified name.
    """

    name: str
    kind: str
    space: int
    block: int = 1
    dim: int = 0
    tensor: str = ""

    @property
    def module(self) -> str:
        """The module's qualified name."""
        return self.name.removesuffix(self.tensor).removesuffix(".") if self.tensor else self.name

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors of its module that have its channels, by their names in the module."""
        every = {**module._parameters, **module._buffers}
        chosen = {self.tensor: every.get(self.tensor)} if self.tensor else every
        return {name: t for name, t in chosen.items() if t is not None and t.dim() > 0}


@dataclass
class Space:
    """One set of channels.

    Attributes:
        size: number of channels.
        producers, consumers, followers: names of the layers that write it, read it, pass it on.
        frozen: why its channels must stay as they are, or None.
        is_input, is_output: whether it is an input or output of the whole network.
        least: how many channels stay whatever happens; two where one would be something else (groups of one channel).
        members: for a space that is put together from others, as by a concatenation: for each of its channels the other
            space and the channel in that space, int64 (size, 2). What stays is decided in those spaces.
    """

    size: int
    producers: list[str] = field(default_factory=list)
    consumers: list[str] = field(default_factory=list)
    followers: list[str] = field(default_factory=list)
    frozen: str | None = None
    is_input: bool = False
    is_output: bool = False
    least: int = 1
    members: Tensor | None = None


@dataclass(frozen=True)
class Merge:
    """An addition of two values of one space and shape; `in_place` if it writes to the first."""

    node: fx.Node
    operands: tuple[fx.Node, fx.Node]
    in_place: bool


@dataclass
class ChannelSpaces:
    """Every channel space of a model, with the traced program that they come from; `ChannelGraph` is its public face.

    It describes the model's shape at that moment: trace again after a reconfiguration.

    Attributes:
        calls: for each called module its calls in `program`, and those calls in the model's other programs (of the
            other mode, say) that `program` does not have.
        opaque: submodules that tracing could not enter, and why.
        not_followed: the calls that froze what they touch, or whose value is read by others in another program.
        pinned: layers and followers that are also used where tracing does not look, and why: they are never removed.
        tracer: "torch.fx" or "torch.export".
        uncalled: modules with layers that the forward calls in no mode: a projector that the training loop calls, a
            head for later. They stay whole; but what they read of the network, other than its outputs, is not known,
            and may lose channels.
        doubts: what turned out wrong when the traced programs were compared with the model; all that it touches is
            frozen.
        alike_in_both_modes: whether the model's outputs had the same structure and shapes in training and evaluation
            mode when it was traced, so that evaluation mode shows all that there is to compare.
        excluded: layers whose channels the user has said must stay; no lasso pulls at them.
    """

    spaces: list[Space]
    layers: dict[str, Layer]
    followers: dict[str, Follower]
    merges: list[Merge]
    calls: dict[str, list[fx.Node]]
    program: fx.Graph
    example_inputs: ExampleInputs
    opaque: dict[str, str] = field(default_factory=dict)
    not_followed: frozenset[fx.Node] = frozenset()
    pinned: dict[str, str] = field(default_factory=dict)
    tracer: str = "torch.fx"
    uncalled: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    alike_in_both_modes: bool = False
    excluded: frozenset[str] = frozenset()

    @property
    def free_channels(self) -> int:
        """The number of channels that may go."""
        return sum(space.size for space in self.spaces if not space.frozen and space.members is None)

    def computed(self, name: str) -> tuple[Tensor, Tensor]:
        """The channels of a layer's input and output space that it computes, in the order of its weight's."""
        layer = self.layers[name]
        return (
            torch.arange(self.spaces[layer.input].size, device="cpu") if layer.live_in is None else layer.live_in,
            torch.arange(self.spaces[layer.output].size, device="cpu") if layer.live_out is None else layer.live_out,
        )

    def told_sizes(self, kept: Callable[[int], int]) -> dict[str, dict[str, int]]:
        """What the attributes that tell numbers of channels are to be, by the module's name, then by theirs.

        Args:
            kept: the number of channels that a space keeps.
        """
        sizes: dict[str, dict[str, int]] = {}
        for follower in self.followers.values():
            if follower.kind == TOLD:
                sizes.setdefault(follower.module, {})[follower.tensor] = kept(follower.space)
        return sizes

    def check(self, model: nn.Module) -> None:
        """Raises InputError where `model` no longer has the shape that was traced."""
        modules = dict(model.named_modules())
        for layer in self.layers.values():
            module = modules.get(layer.name)
            weight = getattr(module, "weight", None)
            inputs, outputs = (len(side) for side in self.computed(layer.name))
            expected = (outputs, inputs * layer.block)
            shape = tuple(weight.shape[dim] for dim in reversed(layer.dims)) if isinstance(weight, Tensor) else None
            if shape != expected:
                raise InputError(
                    f"layer '{layer.name}' does not have the shape that was traced, {expected[0]} x {expected[1]} "
                    "channels; call trace_channels(model, example_inputs) again after every change to the model."
                )
        for follower in self.followers.values():
            module, size = modules.get(follower.module), self.spaces[follower.space].size * follower.block
            tensors = {} if module is None else follower.tensors(module)
            other = any(tensor.shape[follower.dim] != size for tensor in tensors.values())
            if module is not None and follower.kind == TOLD:
                other = told_value(module, follower.tensor) != size
            if module is None or other:
                raise InputError(
                    f"'{follower.name}' does not have the {size} channels that were traced; call "
                    "trace_channels(model, example_inputs) again after every change to the model."
                )

    def __str__(self) -> str:
        """A table with one line per space: channels, who produces, reads and passes them on, and why it is frozen."""
        rows: list[tuple[str, ...]] = [
            ("space", "channels", "produced by", "read by", "passed on by", "stays as it is because")
        ]
        for i, space in enumerate(self.spaces):
            names = [_shorten(names) for names in (space.producers, space.consumers, space.followers)]
            rows.append((str(i), str(space.size), *names, space.frozen or ""))
        widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines += [f"not looked into: {name} ({reason})" for name, reason in self.opaque.items()]
        if self.uncalled:
            lines.append(
                f"never called by the forward: {', '.join(self.uncalled)} (they stay whole; what they read inside the "
                "network may lose channels)"
            )
        return "\n".join(lines)


def _shorten(names: list[str], most: int = 2) -> str:
    if len(names) <= most + 1:
        return ", ".join(names)
    return ", ".join(names[:most]) + f" and {len(names) - most} more"


def expand(channels: Tensor, block: int) -> Tensor:
    """The feature indices of channels that are blocks of `block` consecutive features each."""
    if block == 1:
        return channels
    return (channels[:, None] * block + torch.arange(block, device=channels.device)).flatten()
