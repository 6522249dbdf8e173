"""Which layers compute fewer channels than their spaces keep: channel gating (paper section 4.2), and `auto`.

Under gating each convolution on a space computes only its own live channels. That saves FLOPs and costs an index, or a
pass over memory, depending on how it is done (`cost/convolution.py`). `auto` asks, layer by layer, which way is the
fastest: by an estimate from bytes, FLOPs and the device's measured speed, or by a short measurement.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunetrain_kernels.cost.convolution import Convolution, Form, RoofCost
from prunetrain_kernels.cost.roof import DTYPES, quick_roof, seconds_of
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.graph.spaces import ChannelSpaces, Layer
from prunetrain_kernels.ops.channel_index import ChannelIndex
from prunetrain_kernels.ops.conv2d import conv2d, triton_serves

# Gives the seconds of one training step of a layer in a form.
ConvolutionCost = Callable[[Convolution, Form], float]

COSTS = ("roof", "measure")
BATCH = 128  # images in the training step whose costs are compared, unless the caller says otherwise
UNION = Form()
ALL_LIVE = "all channels that its spaces keep are live in it"


@dataclass(frozen=True)
class Choice:
    """The form in which one layer is to be computed, and what each form costs.

    Attributes:
        form: the chosen one.
        seconds: time of a training step of this layer, by form; empty where there was nothing to choose.
        reason: why this form, in words.
    """

    form: Form
    seconds: dict[Form, float]
    reason: str

    def __str__(self) -> str:
        return f"{self.form}: {self.reason}"


@dataclass
class MeasuredCost:
    """Times forward and backward of each form on random data, on the device that the model is on.

    A batch norm behind the convolution counts by its bytes at the device's bandwidth, as in `RoofCost`.

    Attributes:
        seconds_each: time spent on each form of each different layer shape.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    channels_last: bool = True
    seconds_each: float = 0.1
    _known: dict[tuple[Convolution, Form], float] = field(default_factory=dict, repr=False)

    def __call__(self, conv: Convolution, form: Form) -> float:
        """The seconds of one training step of the layer in the form; measured once."""
        if (conv, form) not in self._known:
            self._known[conv, form] = self._measure(conv, form)
        return self._known[conv, form]

    def _measure(self, conv: Convolution, form: Form) -> float:
        generator = torch.Generator(device="cpu").manual_seed(0)

        def random_index(live: int, full: int, *, gated: bool) -> ChannelIndex | None:
            order = torch.randperm(full, generator=generator, device="cpu")[:live].sort().values
            return ChannelIndex(order, full, self.device) if gated else None

        inputs = random_index(conv.in_live, conv.in_full, gated=form.gates_input)
        outputs = random_index(conv.out_live, conv.out_full, gated=form.gates_output)
        in_channels = conv.in_live if inputs else conv.in_full
        out_channels = conv.out_live if outputs else conv.out_full
        memory = torch.channels_last if self.channels_last else torch.contiguous_format
        options: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        x = torch.randn((conv.batch, conv.in_full, *conv.map_in), **options).to(memory_format=memory)
        weight = (
            torch.randn((out_channels, in_channels, *conv.kernel), **options).to(memory_format=memory).requires_grad_()
        )
        x.requires_grad_(conv.input_gradient)
        placed = None if conv.places else outputs
        channels_made = out_channels if conv.places or outputs is None else conv.out_full
        dy = torch.randn((conv.batch, channels_made, *conv.map_out), **options).to(memory_format=memory)
        differentiated = [x, weight] if conv.input_gradient else [weight]

        def step() -> None:
            y = conv2d(
                x, weight, conv.stride, conv.padding, conv.dilation,
                input_index=inputs, output_index=placed, backend=form.backend if form.gated else "expanded",
            )  # fmt: skip
            assert isinstance(y, Tensor)
            torch.autograd.grad(y, differentiated, dy)

        seconds = statistics.median(seconds_of(step, self.seconds_each))
        batch_norm = 5 * channels_made * conv.batch * conv.map_out[0] * conv.map_out[1] * conv.itemsize
        return seconds + batch_norm / (quick_roof(self.device).gb_s * 1e9)

    def __str__(self) -> str:
        return "measured"


def cost_of(kind: "ConvolutionCost | str | None", model: nn.Module) -> ConvolutionCost:
    """The cost function that `kind` names for the model's device: "roof" (also None) or "measure".

    Raises:
        InputError: another name.
    """
    if callable(kind):
        return kind
    weight = next(model.parameters())
    if kind in (None, "roof"):
        names = {dtype: name for name, dtype in DTYPES.items()}
        return RoofCost(quick_roof(weight.device), names.get(weight.dtype, "fp32"))
    if kind == "measure":
        channels_last = any(
            m.weight.is_contiguous(memory_format=torch.channels_last) and not m.weight.is_contiguous()
            for m in model.modules()
            if isinstance(m, nn.Conv2d)
        )
        return MeasuredCost(weight.device, weight.dtype, channels_last)
    raise InputError(f"cost '{kind}' is not known; give 'roof', 'measure' or a function of your own.")


# -- what can be gated -------------------------------------------------------------------------------------------------


def why_not_gated(conv: nn.Module) -> str:
    """Why a module cannot become an `nn.GatedConv2d` of this package; empty if it can, or is one."""
    if type(conv) is not nn.Conv2d and not getattr(type(conv), "gates_channels", False):
        return f"it is a {type(conv).__name__}"
    assert isinstance(conv, nn.Conv2d)
    if conv.groups != 1:
        return "it has groups"
    if conv.padding_mode != "zeros":
        return f"its padding is '{conv.padding_mode}'"
    if explicit_padding(conv) is None:
        return "its padding is not the same on both sides"
    if "forward" in vars(conv):
        return "its forward was replaced on this instance"
    return ""


def explicit_padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    """A convolution's padding in numbers; None where "same" means one pixel more on one side than on the other."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        both = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if both[0] % 2 or both[1] % 2 else (both[0] // 2, both[1] // 2)
    return conv.padding  # type: ignore[return-value]


def gateable_sides(graph: ChannelSpaces, module: nn.Module, layer: Layer) -> tuple[bool, bool]:
    """Whether a layer's input and output may be gated.

    Not those of the network's own input and output; nor the output of a layer with a bias, which gives no zeros to
    leave out; nor a layer whose weight others use too, or whose class computes something else than `nn.Conv2d`.
    """
    if layer.kind != "conv" or layer.name in graph.pinned or why_not_gated(module):
        return False, False
    return not graph.spaces[layer.input].is_input, not graph.spaces[layer.output].is_output and module.bias is None


def batch_norm_behind(graph: ChannelSpaces, modules: dict[str, nn.Module], name: str) -> str | None:
    """The batch norm that alone reads a layer's output, and reads nothing else; None if there is none."""
    if len(graph.calls.get(name, ())) != 1:
        return None
    (node,) = graph.calls[name]
    if node in graph.not_followed or len(node.users) != 1:
        return None
    (user,) = node.users
    if user.op != "call_module" or user in graph.not_followed or user.args[:1] != (node,):
        return None
    target = str(user.target)
    alone = len(graph.calls[target]) == 1 and target not in graph.pinned
    return target if alone and isinstance(modules[target], nn.BatchNorm2d) else None


# -- the choice --------------------------------------------------------------------------------------------------------


def convolution(
    graph: ChannelSpaces,
    modules: dict[str, nn.Module],
    layer: Layer,
    channels: tuple[int, int],
    live: tuple[int, int],
    *,
    batch: int,
    places: bool,
) -> Convolution:
    """The layer as `cost/convolution.py` sees it.

    Args:
        channels: how many channels its input and its output space keep.
        live: how many of them it computes.
        batch: images in a training step.
        places: whether the batch norm behind it places the output channels.
    """
    module = modules[layer.name]
    assert isinstance(module, nn.Conv2d)
    padding = explicit_padding(module)
    assert padding is not None  # such a layer is not gated
    return Convolution(
        batch=batch,
        map_in=layer.map_in,  # type: ignore[arg-type]
        map_out=layer.map_out,  # type: ignore[arg-type]
        kernel=module.kernel_size,  # type: ignore[arg-type]
        stride=module.stride,  # type: ignore[arg-type]
        padding=padding,
        dilation=module.dilation,  # type: ignore[arg-type]
        in_full=channels[0],
        in_live=live[0],
        out_full=channels[1],
        out_live=live[1],
        itemsize=module.weight.element_size(),
        places=places,
        input_gradient=not graph.spaces[layer.input].is_input,
    )


def forms(conv: Convolution, sides: tuple[bool, bool], device: torch.device, dtype: torch.dtype) -> Iterator[Form]:
    """The union form, and every form in which a layer can be gated on these sides (input, output)."""
    yield UNION
    fewer = (sides[0] and conv.in_live < conv.in_full, sides[1] and conv.out_live < conv.out_full)
    backends = ["expanded", "naive"]
    if triton_serves(device, dtype, conv.dilation):
        backends.append("triton")
    for gates_input, gates_output in ((True, True), (True, False), (False, True)):
        if (gates_input and not fewer[0]) or (gates_output and not fewer[1]):
            continue
        for backend in backends:
            if backend == "naive" and not gates_input and conv.places:
                continue  # where the batch norm places the outputs, naive is the same as expanded
            if backend == "naive" and gates_input and device.type == "cpu" and _is_strided_pointwise(conv):
                continue  # with few channels in channels_last, oneDNN's gradient of it writes beyond its memory
            yield Form(gates_input, gates_output, backend)


def _is_strided_pointwise(conv: Convolution) -> bool:
    return conv.kernel == (1, 1) and max(conv.stride) > 1


def live_channels(conv: Convolution) -> str:
    """The numbers of live channels, in words."""
    return f"{conv.in_live} of {conv.in_full} inputs, {conv.out_live} of {conv.out_full} outputs live"


def choose_form(conv: Convolution, candidates: list[Form], cost: ConvolutionCost) -> Choice:
    """Chooses the cheapest of the forms; union where they tie."""
    if len(candidates) == 1:
        return Choice(UNION, {}, ALL_LIVE)
    seconds = {form: cost(conv, form) for form in candidates}
    best = min(candidates, key=lambda form: (seconds[form], form.gated))
    union, gated = seconds[UNION], min(value for form, value in seconds.items() if form.gated)
    reason = f"union {union * 1e6:.0f} us, gating {gated * 1e6:.0f} us, {cost if str(cost)[0] != '<' else 'given'}"
    return Choice(best, seconds, f"{live_channels(conv)}; {reason}")
