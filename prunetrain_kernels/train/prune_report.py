"""What one reconfiguration of a training changed: for the user, for a log's line and for the history."""

from dataclasses import dataclass
from typing import Any

from prunetrain_kernels.cost import Flops, known_or_none, share_text
from prunetrain_kernels.prune.changes import Reconfiguration


@dataclass(frozen=True, repr=False)
class PruneReport:
    """What one reconfiguration changed.

    Attributes:
        epoch: epochs trained so far.
        reconfiguration: layer by layer, with max|dy| of zeroing and of cutting, and seconds.
        flops: FLOPs per image, now; NaN where they cannot be counted.
        training_ratio, inference_ratio: those FLOPs as a share of the dense network's; NaN where either is unknown.
        batch_before, batch: images per step of one rank, if PruneTrain manages the batch, else None.
        seconds: wall time of all of it: choosing, rewriting, tracing and counting anew, fitting the batch.
        ranks: processes that train together.
        compilations, compile_seconds: graphs that `torch.compile` has compiled in this process since the last
            reconfiguration, which made it forget the ones before, and the time that took; 0 where it is not in use.
        unknown: which costs cannot be counted, and why; empty where all are known.
    """

    epoch: float
    reconfiguration: Reconfiguration
    flops: Flops
    training_ratio: float
    inference_ratio: float
    batch_before: int | None
    batch: int | None
    seconds: float
    ranks: int = 1
    compilations: int = 0
    compile_seconds: float = 0.0
    unknown: str = ""

    def __str__(self) -> str:
        """One line for a log."""
        done = self.reconfiguration
        text = (
            f"epoch {self.epoch:g}: training FLOPs {share_text(self.training_ratio)} of dense, inference "
            f"{share_text(self.inference_ratio)}, parameters {done.parameters_before:,} -> {done.parameters_after:,}, "
            f"{done.moved}, {self.seconds:.2f} s"
        )
        if done.removed:
            text += f", removed {', '.join(done.removed)}"
        if self.batch != self.batch_before:
            text += f", batch {self.batch_before} -> {self.batch}"
            text += f" on each of {self.ranks} ranks" if self.ranks > 1 else ""
        if self.compilations:
            graphs = "1 graph" if self.compilations == 1 else f"{self.compilations} graphs"
            text += f", {graphs} compiled in {self.compile_seconds:.1f} s since the last"
        if self.unknown:
            text += f", unknown {self.unknown}"
        return text

    def __repr__(self) -> str:
        return f"<PruneReport of {self}>"

    def entry(self) -> dict[str, Any]:
        """The report in the history: plain numbers."""
        done = self.reconfiguration
        return {
            "epoch": self.epoch,
            "seconds": self.seconds,
            "max_abs_dy": done.max_abs_dy,
            "max_abs_dy_zeroing": done.max_abs_dy_zeroing,
            "scale": done.scale,
            "train_flops": known_or_none(self.flops.training),
            "inference_flops": known_or_none(self.flops.inference),
            "parameters": done.parameters_after,
            "batch": self.batch,
            "compilations": self.compilations,
            "compile_seconds": self.compile_seconds,
        }
