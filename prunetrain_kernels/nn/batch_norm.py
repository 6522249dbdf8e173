"""Batch norm with what follows it: a residual added, a ReLU applied, in the same pass over memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.graph.flow import Flow
from prunetrain_kernels.graph.rules import batch_norm_rule, expand_sum_and_relu, register_expansion, register_rule
from prunetrain_kernels.ops.batch_norm_act import batch_norm_act, batch_norm_act_by_maps
from prunetrain_kernels.ops.channel_index import ChannelIndex
from prunetrain_kernels.ops.launch import is_transformed, refuse_scripting


class BatchNormAct2d(nn.BatchNorm2d):
    """`relu(batch_norm(x) + residual)` in one module; parameters, buffers and state dict are `nn.BatchNorm2d`'s.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as `nn.BatchNorm2d`.
        relu: what a call does that does not say: apply the ReLU (default) or not.
    """

    relu: bool

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,  # noqa: FBT001, FBT002 - as nn.BatchNorm2d
        track_running_stats: bool = True,  # noqa: FBT001, FBT002
        device: Any = None,
        dtype: Any = None,
        *,
        relu: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.relu = relu

    @property
    def places_of(self) -> nn.Module | None:
        """The gated convolution whose live channels are this batch norm's input; see `pair`."""
        paired: tuple[nn.Module, ...] = self.__dict__.get("_places_of", ())
        return paired[0] if paired else None

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        relu: bool | None = None,  # noqa: FBT001 - by position in graphs and code that are there
        scatter: ChannelIndex | None = None,
    ) -> Tensor:
        """Batch norm of `input`, plus `residual`, through a ReLU.

        Args:
            input: (N, C, H, W), fp32, fp16 or bf16; contiguous and channels_last alike.
            residual: added before the ReLU, with the dtype and shape that `batch_norm(input) + residual` has. In
                the same pass if it has the shape of `input` and a dtype that does not widen the sum, or is one value
                per channel, (1, C, 1, 1); else in a pass of its own.
            relu: apply the ReLU; None for the module's own setting.
            scatter: `input` has fewer channels than `residual`, and these are their places; see `batch_norm_act`.

        Returns:
            (N, C, H, W), in the layout of `input`; with `scatter`, the channels of `residual`. Paired with a gated
            convolution (`places_of`), the module's own channels.

        Raises:
            InputError: `scatter` without a residual, or what `batch_norm_act` refuses.
            ValueError: `input` is not 4-D.
        """
        if isinstance(input, fx.Proxy):  # closed to every torch.fx tracer, as nn.BatchNorm2d is
            return _recorded(self, input, residual, relu, scatter)
        self._check_input_dim(input)
        relu = self.relu if relu is None else relu
        conv: Any = self.places_of
        if residual is None and scatter is not None:
            raise InputError("scatter places a branch's channels in a residual; pass the residual too.")
        momentum = self._momentum()
        if conv is not None and scatter is not None:
            raise InputError("this batch norm places a gated convolution's channels already; leave scatter out.")
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        separate: Tensor | None = None
        if residual is not None and scatter is None:
            weight, bias, residual, separate = self._addends(input, residual)
        keeps = not self.training or self.track_running_stats
        running = (self.running_mean, self.running_var) if keeps else (None, None)
        options: dict[str, Any] = {
            "training": self.training or (self.running_mean is None and self.running_var is None),
            "momentum": momentum,
            "eps": self.eps,
            "residual": residual,
            "relu": relu and separate is None,
        }
        if conv is None:
            out = batch_norm_act(input, *running, weight, bias, **options, scatter=scatter)
        else:
            maps, moments = conv.maps("output"), conv.take_moments()
            statistics = moments if options["training"] else None
            out = batch_norm_act_by_maps(input, *running, weight, bias, **options, maps=maps, statistics=statistics)
        if separate is None:
            return out
        out = out + separate
        return F.relu(out) if relu else out

    def _momentum(self) -> float:
        """The weight of this call's statistics in the running ones; counts the batch in training."""
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            count_batch(self)
            if self.momentum is None:  # cumulative average
                return 1.0 / float(self.num_batches_tracked)
        return 0.0 if self.momentum is None else self.momentum

    def _addends(
        self, input: Tensor, residual: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Weight and bias, the residual that the operator adds, and what is added in a pass of its own: the residual is
        a part of the bias, or one of the last two."""
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        shape = input.shape if self.places_of is None else (input.shape[0], self.num_features, *input.shape[2:])
        if torch.promote_types(input.dtype, residual.dtype) != input.dtype:
            return weight, bias, None, residual
        if residual.shape == shape:
            return weight, bias, residual.to(input.dtype), None
        if residual.shape == (1, shape[1], 1, 1):
            shift = residual.flatten()
            bias = shift if bias is None else bias + shift
            return torch.ones_like(bias) if weight is None else weight, bias, None, None
        if _broadcasts is not None:
            _broadcasts.add(id(self))
        return weight, bias, None, residual

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relu={self.relu}"

    __prepare_scriptable__ = refuse_scripting


_broadcasts: set[int] | None = None


@contextmanager
def broadcasts_noted() -> Iterator[set[int]]:
    """Collects the batch norms (by id) that are called, inside, with a residual of another shape than their input."""
    global _broadcasts
    before, _broadcasts = _broadcasts, set()
    try:
        yield _broadcasts
    finally:
        _broadcasts = before


def count_batch(module: nn.modules.batchnorm._BatchNorm) -> None:
    """Adds 1 to `num_batches_tracked`, or says why a torch.func transform does not let it."""
    assert module.num_batches_tracked is not None
    if not is_transformed():
        module.num_batches_tracked.add_(1)
        return
    try:
        module.num_batches_tracked.add_(1)
    except RuntimeError as error:
        raise InputError(
            f"a {type(module).__name__} in training mode cannot count its batches and update its running statistics "
            "inside this torch.func transform; call it in eval mode, or make it with track_running_stats=False "
            "(torch.func.replace_all_batch_norm_modules_ does)."
        ) from error


def _recorded(module: nn.Module, input: fx.Proxy, *options: Any) -> Any:
    tracer = input.tracer
    assert isinstance(tracer, fx.Tracer)
    named = dict(zip(("residual", "relu", "scatter"), options, strict=True))
    keywords = {name: value for name, value in named.items() if value is not None}
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (input,), keywords)


def _rule(flow: Flow, node: fx.Node, name: str, module: BatchNormAct2d) -> bool:
    """The rule of a batch norm; the input of a paired one has the live channels of its own space."""
    if module.places_of is None:
        return batch_norm_rule(flow, node, name, module) is True
    value = flow.channels_of(node.args[0])
    if value is None or node.kwargs.keys() - {"relu"}:
        return False
    return flow.follow_value(node, name, "batch_norm", value)


# For the channel graph a call is a batch norm, a sum and a ReLU, each by itself.
register_rule(BatchNormAct2d, _rule)
register_expansion(BatchNormAct2d, lambda graph, node, module: expand_sum_and_relu(graph, node, relu=module.relu))
