"""Ids of channels, and which of them have become one: a union-find with what is known of each channel."""

from collections.abc import Iterable

Several = tuple[int, ...]


class Ids:
    """Ids of channels; joined ones are one channel, whatever was said of any of them holds of all.

    Attributes:
        origin: of each id the first one that was made together with it.
        frozen: why a channel must stay, by the id that stands for it.
        inputs, outputs: ids of channels that are the network's input, or its output.
        first_program: how many ids the first program has made; the values of the others are the same once more.
    """

    def __init__(self) -> None:
        self._parent: list[int] = []  # of each id: one that it has become one with, or itself
        self.origin: list[int] = []
        self.frozen: dict[int, str] = {}
        self._two_stay: set[int] = set()
        self.inputs: set[int] = set()
        self.outputs: set[int] = set()
        self.first_program = 0

    def new(self, size: int, frozen: str | None = None) -> Several:
        """Ids of `size` channels that nobody has seen yet; they stay if `frozen` says why."""
        first = len(self._parent)
        ids = tuple(range(first, first + size))
        self._parent += ids
        self.origin += [first] * size
        if frozen is not None:
            self.frozen |= dict.fromkeys(ids, frozen)
        return ids

    def end_program(self) -> None:
        """A program has been walked."""
        self.first_program = self.first_program or len(self._parent)

    def find(self, i: int) -> int:
        """The id that stands for all that are one with `i`."""
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def join(self, a: Several, b: Several) -> Several:
        """Makes the channels of both one, each with the one in its place."""
        for x, y in zip(a, b, strict=True):
            into, other = sorted((self.find(x), self.find(y)))
            if into == other:
                continue
            self._parent[other] = into
            if other in self.frozen:
                self.frozen.setdefault(into, self.frozen[other])
            for marked in (self.inputs, self.outputs):
                if other in marked:
                    marked.add(into)
        return tuple(self.find(i) for i in a)

    def freeze(self, ids: Iterable[int], reason: str) -> None:
        """The channels stay; the first reason that is given for one is kept."""
        for i in ids:
            self.frozen.setdefault(self.find(i), reason)

    def keep_two(self, ids: Several) -> None:
        """Two of the channels stay at least."""
        self._two_stay.update(ids)

    def mark_inputs(self, ids: Iterable[int]) -> None:
        """The network's input brings these channels."""
        self.inputs.update(map(self.find, ids))

    def mark_outputs(self, ids: Iterable[int]) -> None:
        """The network's output consists of these channels, among others."""
        self.outputs.update(map(self.find, ids))

    def of_two_stay(self) -> set[int]:
        """Channels of which two stay at least, by the ids that stand for them."""
        return set(map(self.find, self._two_stay))

    def roots(self) -> list[int]:
        """All channels, each by the id that stands for it, ascending."""
        return [i for i in range(len(self._parent)) if self.find(i) == i]
