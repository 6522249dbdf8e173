"""Attention heads: a value whose features are split by a number of heads that a module's attribute tells.

`view(n, length, heads, head_dim)` writes the number of heads out, as tracing sees it. Where a module around the layer
has an attribute of that value, such as `num_heads`, it is taken for the number's source: a head can go if the attribute
is set with it. Whether that is true is seen by the trial cut (`trial.py`), which runs the model itself with fewer
heads; where it fails, all heads stay.
"""

from typing import Any

from torch import nn

NUMBERS_OF_HEADS = (
    "num_heads", "num_attention_heads", "n_heads", "n_head", "nheads", "heads", "num_key_value_heads", "num_kv_heads",
    "n_kv_heads", "n_kv_head",
)  # fmt: skip
NUMBERS_OF_FEATURES = ("attn_dim", "all_head_size", "inner_dim")  # of all heads together
HEADS = "heads"  # the kind of follower that a module with such attributes is


def heads_of(module: nn.Module) -> int | None:
    """The number of heads that a module tells; None for one that has no such attribute, or tensors of its own."""
    if module._parameters or module._buffers or type(module).__module__.startswith("torch.nn."):
        return None
    numbers = [vars(module)[name] for name in NUMBERS_OF_HEADS if _is_count(vars(module).get(name))]
    return numbers[0] if numbers else None


def head_sizes(module: nn.Module, before: int, after: int) -> dict[str, int]:
    """The attributes that a module should have with another number of heads, by name."""
    attributes = vars(module)
    sizes = {name: after for name in NUMBERS_OF_HEADS if attributes.get(name) == before}
    for name in NUMBERS_OF_FEATURES:
        if _is_count(attributes.get(name)) and attributes[name] % before == 0:
            sizes[name] = attributes[name] // before * after
    return sizes


def told_sizes(module: nn.Module) -> list[str]:
    """The names of those attributes that a module has."""
    if heads_of(module) is None:
        return []
    return [name for name in (*NUMBERS_OF_HEADS, *NUMBERS_OF_FEATURES) if _is_count(vars(module).get(name))]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
