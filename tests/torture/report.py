"""What came of many attempts to break something, in figures."""

from collections import Counter
from collections.abc import Sequence


class Outcomes:
    """Counts of outcomes, and the faults in words.

    Args:
        name: of what was done; `kinds`: the outcomes that are right, in the order in which they are told.
    """

    def __init__(self, name: str, kinds: Sequence[str]) -> None:
        self.name, self.kinds = name, kinds
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []

    def add(self, kind: str) -> None:
        assert kind in self.kinds, kind
        self.counts[kind] += 1

    def fault(self, what: str) -> None:
        self.faults.append(what)

    @property
    def total(self) -> int:
        return self.counts.total() + len(self.faults)

    def __str__(self) -> str:
        parts = [f"{self.counts[kind]} {kind}" for kind in self.kinds]
        lines = [f"{self.name}: {self.total}; {', '.join(parts)}; {len(self.faults)} faults"]
        return "\n".join([*lines, *(f"  fault: {what}" for what in self.faults)])
