"""Channel gating as a module: a convolution that computes only its own live channels of wider spaces (paper 4.2).

`GatedConv2d` holds the live weights and where their channels lie. It reads and gives tensors of the whole spaces, so
the network around it does not know that it is gated: a channel that it does not compute is zero, which is what a
convolution gives whose slice is zero.

The batch norm behind it is another matter: of a zero it makes a constant, which must go on being added. A plain batch
norm, which is given the whole tensor, does that by itself. `pair(conv, batch_norm)` lets a `BatchNormAct2d` place the
channels, so that what the convolution gives is the live channels alone and no pass over memory is spent on the scatter.

`reconfigure` gates and pairs by itself where the policy says so; `GatedConv2d.of` makes one from a convolution by hand.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.graph.flow import Flow
from prunetrain_kernels.graph.gating import explicit_padding, why_not_gated
from prunetrain_kernels.graph.rules import register_rule
from prunetrain_kernels.nn.batch_norm import BatchNormAct2d
from prunetrain_kernels.ops.channel_index import ChannelIndex, Maps
from prunetrain_kernels.ops.conv2d import BACKENDS, conv2d_by_maps
from prunetrain_kernels.ops.launch import refuse_scripting

SIDES = ("input", "output")


class GatedConv2d(nn.Conv2d):
    """A 2-D convolution of some channels of a wider tensor into some channels of another.

    Args:
        in_channels, out_channels: of the tensors that it reads and gives.
        kernel_size, stride, padding, dilation, bias, device, dtype: as `nn.Conv2d`; padding in numbers.
        input_index, output_index: the channels that it computes, each once, in the order of the weight's; None for all.
        backend: as for `ops.conv2d`; None chooses.

    Attributes:
        weight: (live outputs, live inputs, R, S).
        bias: (out_channels,) or None; only without `output_index`, where no channel is left out.
        input_index, output_index: int32 (live,), part of the state dict: which channels a layer computes is learned,
            like its weights; or None.
        backend: may be changed at any time.

    Raises:
        InputError: an index that does not fit, or a bias with an output index.
    """

    gates_channels = True
    __prepare_scriptable__ = refuse_scripting

    input_index: Tensor | None
    input_inverse: Tensor | None
    output_index: Tensor | None
    output_inverse: Tensor | None
    backend: str | None
    paired: bool
    _moments: tuple[Tensor, Tensor] | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = False,  # noqa: FBT001, FBT002 - as nn.Conv2d
        device: Any = None,
        dtype: Any = None,
        *,
        input_index: ChannelIndex | Sequence[int] | Tensor | None = None,
        output_index: ChannelIndex | Sequence[int] | Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        inputs, outputs = _index(input_index, in_channels), _index(output_index, out_channels)
        live = tuple(n if i is None else i.live for i, n in ((inputs, in_channels), (outputs, out_channels)))
        super().__init__(
            live[0], live[1], kernel_size, stride, padding, dilation, bias=bias, device=device, dtype=dtype
        )
        _become_gated(self, in_channels, out_channels, inputs, outputs, backend)

    @classmethod
    def of(
        cls,
        conv: nn.Conv2d,
        input_index: ChannelIndex | Sequence[int] | Tensor | None = None,
        output_index: ChannelIndex | Sequence[int] | Tensor | None = None,
        backend: str | None = None,
    ) -> "GatedConv2d":
        """A new module that computes the given channels of `conv` as `conv` does, and zero in the other outputs.

        Raises:
            InputError: a convolution with groups, with other padding than zeros, or one with a bias whose outputs
                are to be gated.
        """
        why = why_not_gated(conv)
        if why:
            raise InputError(f"this convolution cannot be gated: {why}.")
        weight = conv.weight.detach()
        inputs, outputs = _index(input_index, conv.in_channels), _index(output_index, conv.out_channels)
        made = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, explicit_padding(conv), conv.dilation,  # type: ignore[arg-type]
            conv.bias is not None, weight.device, weight.dtype,
            input_index=inputs, output_index=outputs, backend=backend,
        )  # fmt: skip
        with torch.no_grad():
            for dim, index in ((1, inputs), (0, outputs)):
                weight = weight if index is None else weight.index_select(dim, index.index.to(weight.device))
            made.weight.data = weight.clone(memory_format=torch.preserve_format)
            if conv.bias is not None and made.bias is not None:
                made.bias.copy_(conv.bias)
        return made.train(conv.training)

    @property
    def live_in(self) -> int:
        """How many input channels the convolution reads."""
        return self.weight.shape[1]

    @property
    def live_out(self) -> int:
        """How many output channels the convolution computes."""
        return self.weight.shape[0]

    def maps(self, side: str) -> Maps | None:
        """The maps of one side, "input" or "output"; None where all channels are computed."""
        index, inverse = getattr(self, f"{side}_index"), getattr(self, f"{side}_inverse")
        return None if index is None else Maps(index, inverse, getattr(self, f"_{side}_first"))

    def forward(self, input: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, P, Q); paired with its batch norm (N, live outputs, P, Q)."""
        moments = self.paired and self.training and self.backend == "triton"
        output_maps = None if self.paired else self.maps("output")
        assert not isinstance(self.padding, str)
        out = conv2d_by_maps(
            input, self.weight, self.stride, self.padding, self.dilation, input_maps=self.maps("input"),
            output_maps=output_maps, moments=moments, backend=self.backend,
        )  # fmt: skip
        if isinstance(out, tuple):
            out, self._moments = out[0], (out[1], out[2])
        bias = self.bias
        return out if bias is None else out + bias.to(out.dtype).view(1, -1, 1, 1)

    def take_moments(self) -> tuple[Tensor, Tensor] | None:
        """Mean and variance of the last output, once, if its epilogue computed them: for the paired batch norm."""
        moments, self._moments = self._moments, None
        return moments

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Checks loaded indices and derives their maps."""
        for side, channels in zip(SIDES, (self.in_channels, self.out_channels), strict=True):
            loaded, present = state_dict.get(f"{prefix}{side}_index"), getattr(self, f"{side}_index")
            if isinstance(loaded, Tensor) and present is not None and loaded.shape == present.shape:
                try:
                    _set_index(self, side, ChannelIndex(loaded, channels, present.device))
                except InputError as error:
                    args[-1].append(f"'{prefix}{side}_index' cannot be loaded: {error}")
                    return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_moments": None})

    def extra_repr(self) -> str:
        live = f"live={self.live_in}->{self.live_out}"
        backend = f", backend={self.backend}" if self.backend else ""
        return f"{super().extra_repr()}, {live}{backend}{', paired' if self.paired else ''}"


def _index(index: ChannelIndex | Sequence[int] | Tensor | None, channels: int) -> ChannelIndex | None:
    if index is None:
        return None
    checked = index if isinstance(index, ChannelIndex) else ChannelIndex(index, channels)
    if checked.channels != channels:
        raise InputError(f"the index is into {checked.channels} channels, the convolution has {channels}.")
    if checked.live == 0:
        raise InputError("a gated convolution computes at least one channel; give its index one.")
    return checked


def _set_index(conv: GatedConv2d, side: str, index: ChannelIndex | None) -> None:
    device = conv.weight.device
    index = None if index is None else index.to(device)
    conv.register_buffer(f"{side}_index", None if index is None else index.index)
    conv.register_buffer(f"{side}_inverse", None if index is None else index.inverse, persistent=False)
    setattr(conv, f"_{side}_first", None if index is None else index.first)


def _become_gated(
    conv: nn.Conv2d,
    in_channels: int,
    out_channels: int,
    inputs: ChannelIndex | None,
    outputs: ChannelIndex | None,
    backend: str | None,
) -> None:
    if backend is not None and backend not in BACKENDS:
        raise InputError(f"backend '{backend}' is not known; the backends are: {', '.join(BACKENDS)}.")
    if outputs is not None and conv.bias is not None:
        raise InputError("a convolution with a bias gives no zeros to leave out; gate its inputs only.")
    conv.__class__ = GatedConv2d
    assert isinstance(conv, GatedConv2d)
    conv.in_channels, conv.out_channels = in_channels, out_channels
    padding = explicit_padding(conv)
    assert padding is not None
    conv.padding = padding
    conv.backend, conv.paired = backend, False
    conv._moments = None
    for side, index in zip(SIDES, (inputs, outputs), strict=True):
        _set_index(conv, side, index)


# -- what reconfigure does to a convolution, in place ------------------------------------------------------------------


def gate_(
    conv: nn.Conv2d,
    in_channels: int,
    out_channels: int,
    input_index: ChannelIndex | None,
    output_index: ChannelIndex | None,
    backend: str | None = None,
) -> None:
    """Turns a convolution whose weight holds its live channels already into a `GatedConv2d`, or changes the indices of
    one, or with neither index turns it into an `nn.Conv2d` again. Any pairing ends. In place."""
    if input_index is None and output_index is None:
        if isinstance(conv, GatedConv2d):
            for side in SIDES:
                del conv._buffers[f"{side}_index"], conv._buffers[f"{side}_inverse"]
                conv._non_persistent_buffers_set.discard(f"{side}_inverse")
                del conv.__dict__[f"_{side}_first"]
            for name in ("backend", "paired", "_moments"):
                del conv.__dict__[name]
            conv.__class__ = nn.Conv2d  # type: ignore[assignment]
        conv.in_channels, conv.out_channels = in_channels, out_channels
        return
    _become_gated(conv, in_channels, out_channels, input_index, output_index, backend)


def pair(conv: GatedConv2d, batch_norm: BatchNormAct2d) -> None:
    """Lets `conv` give its live channels only, and `batch_norm`, which reads nothing else, place them.

    Raises:
        InputError: `conv` computes all its outputs, or `batch_norm` has another number of channels.
    """
    if conv.output_index is None:
        raise InputError("this convolution computes all its output channels; there is nothing to place.")
    if batch_norm.num_features != conv.out_channels:
        raise InputError(
            f"the batch norm has {batch_norm.num_features} channels, the convolution {conv.out_channels}; pair a "
            "convolution with the batch norm that reads it."
        )
    conv.paired = True
    batch_norm.__dict__["_places_of"] = (conv,)  # in a tuple: it is no submodule of the batch norm


def unpair(batch_norm: BatchNormAct2d) -> None:
    """Undoes `pair`."""
    conv = batch_norm.places_of
    if isinstance(conv, GatedConv2d):
        conv.paired = False
    batch_norm.__dict__.pop("_places_of", None)


# -- in a checkpoint ---------------------------------------------------------------------------------------------------


def describe_gating(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The gated convolutions of a model as plain values, from which `restore_gating` makes them again."""
    batch_norms = {id(m.places_of): name for name, m in model.named_modules() if isinstance(m, BatchNormAct2d)}
    described: dict[str, dict[str, Any]] = {}
    for name, conv in model.named_modules():
        if isinstance(conv, GatedConv2d):
            described[name] = {"backend": conv.backend, "batch_norm": batch_norms.get(id(conv))}
            for side, channels in zip(SIDES, (conv.in_channels, conv.out_channels), strict=True):
                index = getattr(conv, f"{side}_index")
                described[name] |= {f"{side}_channels": channels}
                described[name] |= {f"{side}_index": None if index is None else index.tolist()}
    return described


def restore_gating(model: nn.Module, described: dict[str, dict[str, Any]]) -> None:
    """Makes convolutions of a model gated as described; their weights are to be filled in by the caller.

    A batch norm that is not fused in this model reads the whole tensor, as a plain one does.
    """
    for name, gating in described.items():
        conv = model.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        inputs, outputs = (
            None
            if gating[f"{side}_index"] is None
            else ChannelIndex(gating[f"{side}_index"], gating[f"{side}_channels"])
            for side in SIDES
        )
        gate_(conv, gating["input_channels"], gating["output_channels"], inputs, outputs, gating["backend"])
        batch_norm = None if gating["batch_norm"] is None else model.get_submodule(gating["batch_norm"])
        if isinstance(batch_norm, BatchNormAct2d) and isinstance(conv, GatedConv2d):
            conv.paired = True
            batch_norm.__dict__["_places_of"] = (conv,)


# -- in the channel graph ----------------------------------------------------------------------------------------------


def _gated_rule(flow: Flow, node: fx.Node, name: str, module: GatedConv2d) -> bool:
    shape = flow.shape(node.args[0]) if len(node.args) == 1 else None
    plain = module._parameters.keys() <= {"weight", "bias"} and not hasattr(module, "parametrizations")
    if shape is None or len(shape) != 4 or not plain:
        return False
    read = flow.read_in(node, 1, module.in_channels)  # as of the plain convolution that it was
    if read is None:
        return False
    value = read.plain()
    live_in, live_out = (None if i is None else i.long().cpu() for i in (module.input_index, module.output_index))
    return flow.make_layer(node, name, "conv", value, module.out_channels, (live_in, live_out))


register_rule(GatedConv2d, _gated_rule)
