"""What the fused operators are built to reach, and whether this run did."""

from dataclasses import dataclass

from bench.harness import COMPILED, EAGER, OURS, Session
from bench.suites import gating
from bench.suites.bn import ALL
from bench.suites.sgd import FUSED, LAYER


@dataclass(frozen=True)
class Target:
    """A figure and its bound: at most `bound` if `at_most`, else at least."""

    name: str
    value: float | None
    bound: float
    at_most: bool

    @staticmethod
    def upper(name: str, value: float | None, bound: float) -> "Target":
        """A figure that is to be at most `bound`."""
        return Target(name, value, bound, at_most=True)

    @staticmethod
    def lower(name: str, value: float | None, bound: float) -> "Target":
        """A figure that is to be at least `bound`."""
        return Target(name, value, bound, at_most=False)

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        if self.value is None:
            return f"{self.name:<58} {'-':>7}  {sign} {self.bound:<5} not measured"
        met = self.value <= self.bound if self.at_most else self.value >= self.bound
        result = "met" if met else f"missed by {abs(self.value / self.bound - 1):.1%}"
        return f"{self.name:<58} {self.value:>7.3f}  {sign} {self.bound:<5} {result}"


def targets(session: Session) -> list[Target]:
    """Every target with what this run measured."""

    def ratio(above: float | None, below: float | None) -> float | None:
        return above / below if above is not None and below else None

    def both(provider: str) -> float | None:
        forward, backward = (session.p50.get((ALL, provider, d)) for d in ("forward", "backward"))
        return forward + backward if forward is not None and backward is not None else None

    def worst(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return max(known, default=None)

    gated = sorted({layer for layer, provider, _ in session.p50 if provider == gating.AUTO})

    def median(layer: str, provider: str, part: str = "all") -> float | None:
        return session.p50.get((f"{layer} {part}" if part != "all" else layer, provider, "step"))

    def best(layer: str) -> float | None:
        times = [median(layer, provider) for provider in (gating.UNION, *gating.BACKEND)]
        return min((time for time in times if time is not None), default=None)

    fused = [
        ratio(median(layer, provider, "conv"), median(layer, gating.NO_INDEX, "conv"))
        for layer in gated
        for provider in (gating.TRITON, gating.RUN)
    ]
    p50 = session.p50.get
    sgd, lasso = p50((LAYER, OURS, "SGD")), p50((LAYER, OURS, "SGD+lasso"))
    torch_fused = p50((LAYER, FUSED, "SGD"))
    floor = p50(("floor", "model", "SGD"))
    ours = both(OURS)
    moved = p50(("bytes", "model", "both"))
    achieved = moved / ours / 1e3 / session.roof.gb_s if moved and ours else None
    return [
        Target.upper("SGD + lasso / our SGD alone, time", ratio(lasso, sgd), 1.05),
        Target.upper("SGD + lasso / bandwidth floor (20 bytes a parameter), time", ratio(lasso, floor), 1.25),
        Target.upper("our SGD / torch's fused SGD, time", ratio(sgd, torch_fused), 1.05),
        Target.upper("SGD + lasso / torch's fused SGD alone, time", ratio(lasso, torch_fused), 1.05),
        Target.lower("BN (+ add) (+ ReLU) all layers / copy bandwidth", achieved, 0.90),
        Target.lower("BN (+ add) (+ ReLU) all layers, eager / ours, time", ratio(both(EAGER), ours), 1.3),
        Target.lower("BN (+ add) (+ ReLU) all layers, compile / ours, time", ratio(both(COMPILED), ours), 1.0),
        Target.upper("gated convolution / the same without index, worst layer", worst(fused), 1.03),
        Target.upper(
            "auto / better of union and gating, worst layer",
            worst([ratio(median(layer, gating.AUTO), best(layer)) for layer in gated]),
            1.02,
        ),
    ]


def verdict(session: Session) -> str:
    """The targets as a table, where anything was measured for them, and what was refused."""
    reached = targets(session)
    lines = []
    if any(target.value is not None for target in reached):
        lines += [f"{'target':<58} {'value':>7}  bound    verdict", *map(str, reached)]
        if session.device.type == "cpu":
            lines.append("Targets are for GPUs. On a CPU these figures compare references and show that suites work.")
    if session.quick:
        lines.append("--quick: tiny shapes, which say nothing about speed.")
    lines += [f"REFUSED {what}" for what in session.refused]
    return "\n".join(lines)
