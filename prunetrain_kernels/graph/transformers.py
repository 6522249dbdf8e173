"""PyTorch's own transformer layers, as what they compute.

`nn.TransformerEncoderLayer` and the modules around it decide by the shapes and masks of a call between a fused kernel
and the plain computation, which torch.fx cannot follow. The functions here are the plain computation alone, for
tracing; as every traced program, it is compared with what the module itself computes.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

Forward = Callable[..., Any]

# Layers whose tensors the fused kernel reads without calling them; they are cut, but never replaced or removed.
READ_BY_FUSED = ("self_attn", "linear1", "linear2", "norm1", "norm2")


def _encoder_layer(
    layer: Any, src: Any, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: Any = None
) -> Any:
    """Attention and two linear layers, each with a residual (`nn.TransformerEncoderLayer.forward` without its mask's
    change of dtype, which attention does as well)."""
    masks, causal = (src_mask, src_key_padding_mask), {"is_causal": bool(is_causal)}
    if layer.norm_first:
        src = src + layer._sa_block(layer.norm1(src), *masks, **causal)
        return src + layer._ff_block(layer.norm2(src))
    src = layer.norm1(src + layer._sa_block(src, *masks, **causal))
    return layer.norm2(src + layer._ff_block(src))


def _encoder(encoder: Any, src: Any, mask: Any = None, src_key_padding_mask: Any = None, is_causal: Any = None) -> Any:
    """One layer after another. With padding, evaluation mode computes zeros for it: that is not followed."""
    if src_key_padding_mask is not None and encoder.enable_nested_tensor:
        raise NotImplementedError("with a padding mask and enable_nested_tensor=True, padding becomes 0 in evaluation")
    for layer in encoder.layers:
        src = layer(src, src_mask=mask, is_causal=bool(is_causal), src_key_padding_mask=src_key_padding_mask)
    return src if encoder.norm is None else encoder.norm(src)


def _decoder(decoder: Any, tgt: Any, memory: Any, *masks: Any, **options: Any) -> Any:
    """One layer after another; whether a mask is causal is a hint only, and a layer does not take None for it."""
    for name in ("tgt_is_causal", "memory_is_causal"):
        options[name] = bool(options.get(name))
    for layer in decoder.layers:
        tgt = layer(tgt, memory, *masks, **options)
    return tgt if decoder.norm is None else decoder.norm(tgt)


def _transformer(
    transformer: Any, src: Any, tgt: Any, src_mask: Any = None, tgt_mask: Any = None, memory_mask: Any = None,
    **options: Any,
) -> Any:  # fmt: skip
    """The encoder, and the decoder over what it gives."""
    padding, causal = options.pop("src_key_padding_mask", None), options.pop("src_is_causal", None)
    memory = transformer.encoder(src, mask=src_mask, src_key_padding_mask=padding, is_causal=causal)
    return transformer.decoder(tgt, memory, tgt_mask=tgt_mask, memory_mask=memory_mask, **options)


def _as_it_is(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module.forward(*args, **kwargs)


_PLAIN: Mapping[type[nn.Module], Forward] = {
    nn.TransformerEncoderLayer: _encoder_layer,
    nn.TransformerEncoder: _encoder,
    nn.TransformerDecoderLayer: _as_it_is,
    nn.TransformerDecoder: _decoder,
    nn.Transformer: _transformer,
}


def plain_forward(module: nn.Module) -> Forward | None:
    """What the module computes, as a function of it and its arguments; None for one that is no transformer layer of
    PyTorch's, or computes something of its own."""
    kind = next((cls for cls in _PLAIN if isinstance(module, cls)), None)
    if kind is None or type(module).forward is not kind.forward or "forward" in vars(module):
        return None
    return _PLAIN[kind]


def read_without_call(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """The modules, by name, that a fused kernel reads without calling them, each with the reason in words."""
    return {
        f"{name}.{part}" if name else part: "nn.TransformerEncoderLayer reads its weight without calling it"
        for name, module in modules.items()
        if isinstance(module, nn.TransformerEncoderLayer)
        for part in READ_BY_FUSED
    }
