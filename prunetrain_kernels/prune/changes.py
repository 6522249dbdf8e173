"""The changes that a reconfiguration made, as values: layer by layer, and how far it moved the model's outputs."""

from dataclasses import dataclass

from torch import Tensor

from prunetrain_kernels.graph.keep import Keep


@dataclass(frozen=True)
class LayerChange:
    """The channels of one layer's spaces before and after.

    Attributes:
        kept_in, kept_out: the kept channels in their new order, by their numbers before.
        live_in, live_out: how many of them the layer computes: all, unless it is gated.
        form: how it is computed from now on, "union" or a form of gating, and why; empty where there was no choice.
    """

    name: str
    kind: str
    in_before: int
    in_after: int
    out_before: int
    out_after: int
    kept_in: Tensor
    kept_out: Tensor
    removed: bool
    live_in: int
    live_out: int
    form: str = ""


@dataclass(frozen=True)
class Reconfiguration:
    """The changes that a reconfiguration made.

    Attributes:
        layers: the change of every convolution and linear layer.
        removed: layers and batch norms that went with dead branches.
        branches: number of dead branches removed.
        max_abs_dy: largest difference of the outputs on the example inputs that cutting made, after the sparse slices
            had been set to zero.
        max_abs_dy_zeroing: the same for setting them to zero; infinite where an integer, a bool or a shape changed.
        scale: largest finite absolute output before either.
        seconds: wall time of the whole reconfiguration.
        parameters_before, parameters_after: number of weights.
        changed: whether any channel or layer went, moved or came back.
        also_max_abs_dy: for each copy in `also`, how far its output moved: channels that went may have been alive in
            the copy.
        compared: the modes whose outputs were compared, in words; empty where nothing was sparse, so nothing was done.
    """

    layers: tuple[LayerChange, ...]
    removed: tuple[str, ...]
    branches: int
    max_abs_dy: float
    max_abs_dy_zeroing: float
    scale: float
    seconds: float
    parameters_before: int
    parameters_after: int
    changed: bool
    also_max_abs_dy: tuple[float, ...] = ()
    compared: str = ""

    @property
    def moved(self) -> str:
        """A few words for a log: how far zeroing and cutting moved the outputs."""
        if not self.compared:
            return "nothing zeroed or cut"
        text = (
            f"max|dy| {self.max_abs_dy_zeroing:.1e} by zeroing, {self.max_abs_dy:.1e} by cutting, "
            f"of scale {self.scale:.1e}"
        )
        return text if self.compared == EVALUATION else f"{text} ({self.compared})"

    def __str__(self) -> str:
        """One line, then one line per layer that changed."""
        head = (
            f"parameters {self.parameters_before:,} -> {self.parameters_after:,}, {self.branches} branches removed, "
            f"{self.moved}, {self.seconds:.2f} s"
        )
        lines = []
        for c in self.layers:
            text = f"in {c.in_before} -> {c.in_after}, out {c.out_before} -> {c.out_after}"
            if (c.live_in, c.live_out) != (c.in_after, c.out_after):
                text += f", computes {c.live_in} x {c.live_out}"
            text = "removed" if c.removed else text + (f" ({c.form})" if c.form else "")
            if c.removed or c.form or (c.in_before, c.out_before) != (c.in_after, c.out_after):
                lines.append(f"  {c.name}: {text}")
        return "\n".join([head, *lines])


EVALUATION = "evaluation mode"


def layer_changes(keep: Keep) -> tuple[LayerChange, ...]:
    """The change of every convolution and linear layer that carrying out `keep` makes."""
    graph, changes = keep.graph, []
    for layer in graph.layers.values():
        removed = layer.name in keep.removed
        kept_in, kept_out = keep.channels[layer.input], keep.channels[layer.output]
        if removed:
            kept_in, kept_out = kept_in[:0], kept_out[:0]
        changes.append(
            LayerChange(
                name=layer.name,
                kind=layer.kind,
                in_before=graph.spaces[layer.input].size,
                in_after=len(kept_in),
                out_before=graph.spaces[layer.output].size,
                out_after=len(kept_out),
                kept_in=kept_in,
                kept_out=kept_out,
                removed=removed,
                live_in=0 if removed else len(keep.live[layer.name][0]),
                live_out=0 if removed else len(keep.live[layer.name][1]),
                form=str(keep.choices[layer.name]) if layer.name in keep.choices else "",
            )
        )
    return tuple(changes)
