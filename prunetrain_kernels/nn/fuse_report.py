"""The changes that `fuse` made to a model, as data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FusedBatchNorm:
    """One batch norm that became a `BatchNormAct2d`.

    Attributes:
        name: its qualified name.
        what: the operations that it took over: "add + ReLU", "add", "ReLU", or "alone" for none.
        inside: the module whose forward calls it ("" for the model itself).
        note: why it took over no more, if more follows it.
    """

    name: str
    what: str
    inside: str
    note: str = ""


@dataclass(frozen=True)
class LeftAlone:
    """One batch norm that stayed as it was, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class FuseReport:
    """The changes that one call of `fuse` made.

    Attributes:
        model: class name of the model.
        fused: batch norms that became `BatchNormAct2d`.
        left: batch norms that did not.
        rewritten: modules whose forward was rewritten ("" for the model itself).
    """

    model: str
    fused: tuple[FusedBatchNorm, ...]
    left: tuple[LeftAlone, ...]
    rewritten: tuple[str, ...]

    def __str__(self) -> str:
        """A line that sums up, then one line per batch norm."""
        head = f"{self.model}: {len(self.fused)} batch norms fused, {len(self.left)} left alone"
        rows = [
            (b.name, b.what, f"in {b.inside or self.model}" + (f" ({b.note})" if b.note else "")) for b in self.fused
        ] + [(b.name, "left alone", b.reason) for b in self.left]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
        lines = [f"  {name.ljust(widths[0])}  {what.ljust(widths[1])}  {rest}".rstrip() for name, what, rest in rows]
        return "\n".join([head, *lines])
