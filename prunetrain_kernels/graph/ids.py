"""Ids of channels, and which of them were joined: a union-find with what is known of each channel."""

from collections.abc import Iterable

ChannelIds = tuple[int, ...]


class Ids:
    """Ids of channels; joined ids are one channel, and what was said of any of them holds for all.

    Attributes:
        origin: for each id the first one that was made together with it.
        frozen: why a channel must stay, by the id that stands for it.
        inputs, outputs: ids of channels that are the network's input, or its output.
        first_program: how many ids the first program has made; the later programs have the same values once more.
    """

    def __init__(self) -> None:
        self._parent: list[int] = []  # for each id: one that it was joined with, or itself
        self.origin: list[int] = []
        self.frozen: dict[int, str] = {}
        self._weak: set[int] = set()  # of the frozen ones those whose reason says no more than "not followed"
        self._two_stay: set[int] = set()
        self.inputs: set[int] = set()
        self.outputs: set[int] = set()
        self.first_program = 0

    def new(self, size: int, frozen: str | None = None, *, weak: bool = False) -> ChannelIds:
        """The ids of `size` new channels; they stay if `frozen` says why; `weak`: as for `freeze`."""
        first = len(self._parent)
        ids = tuple(range(first, first + size))
        self._parent += ids
        self.origin += [first] * size
        if frozen is not None:
            self.freeze(ids, frozen, weak=weak)
        return ids

    def end_program(self) -> None:
        """Notes that a program has been walked to its end."""
        self.first_program = self.first_program or len(self._parent)

    def find(self, i: int) -> int:
        """The id that stands for all ids that were joined with `i`."""
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def join(self, a: ChannelIds, b: ChannelIds) -> ChannelIds:
        """Joins two tuples of ids place by place: the channels in one place are one from now on."""
        for x, y in zip(a, b, strict=True):
            into, other = sorted((self.find(x), self.find(y)))
            if into == other:
                continue
            self._parent[other] = into
            if other in self.frozen:
                self.freeze((into,), self.frozen[other], weak=other in self._weak)
            for marked in (self.inputs, self.outputs):
                if other in marked:
                    marked.add(into)
        return tuple(self.find(i) for i in a)

    def freeze(self, ids: Iterable[int], reason: str, *, weak: bool = False) -> None:
        """Says that the channels stay; each keeps the first reason that was said, but for a `weak` one, which gives
        way to a better one: that an operation is not followed tells less than that a layer norm needs all channels."""
        for root in map(self.find, ids):
            if root not in self.frozen or (root in self._weak and not weak):
                self.frozen[root] = reason
                (self._weak.add if weak else self._weak.discard)(root)

    def keep_two(self, ids: ChannelIds) -> None:
        """Says that at least two of the channels stay."""
        self._two_stay.update(ids)

    def mark_inputs(self, ids: Iterable[int]) -> None:
        """Says that the network's input brings these channels."""
        self.inputs.update(map(self.find, ids))

    def mark_outputs(self, ids: Iterable[int]) -> None:
        """Says that these channels are among those of the network's output."""
        self.outputs.update(map(self.find, ids))

    def of_two_stay(self) -> set[int]:
        """Channels of which at least two stay, by the ids that stand for them."""
        return set(map(self.find, self._two_stay))

    def roots(self) -> list[int]:
        """All channels, each by the id that stands for it, ascending."""
        return [i for i in range(len(self._parent)) if self.find(i) == i]
