"""Numbers that modules hold as attributes, such as `self.width`, known again where a traced program passes them.

`split(x, self.width, 1)` writes a number into the program that tells nothing of where it comes from. So while a model
is traced by torch.fx, each whole number among the attributes of users' modules is a `Told`: it is an int, and knows its
place; products, quotients and sums know theirs. Where a call passes one as a number of channels, the attribute can be
set when channels go (`numbers.py`), and the forward splits what is there. A number that stands in the source itself, or
in an object that is no module, is a plain int, and what it counts stays.

That the forward does nothing else with an attribute cannot be read off a program. The trial cut (`trial.py`), which
runs the model itself with the attributes changed, shows it; where it fails, all that they count stays.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import nn

TOLD = "told"  # the kind of follower that such an attribute is: it tells the size of its space
NOTE = "_told_sizes"  # the attribute of a module that holds what such attributes were when it was built
MOST_FORMS = 4  # readings of a product that are kept
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Module)
_ENTRY = re.compile(r"(?P<name>[A-Za-z_]\w*)(\[(?P<entry>\d{1,4})\])?")


@dataclass(frozen=True)
class Place:
    """An attribute that holds a whole number: `attribute` is its name, `splits[1]` for an entry of a list or tuple."""

    module: str
    attribute: str
    value: int

    @property
    def name(self) -> str:
        """The qualified name."""
        return f"{self.module}.{self.attribute}" if self.module else self.attribute


Form = tuple[tuple[Place, Fraction], ...]  # a sum of places, each times a factor


class Told(int):
    """A whole number that knows from which attributes it was computed.

    Attributes:
        forms: its readings. Of `heads * size` there are two: so many times `heads`, and so many times `size`.
        places: all attributes that have a part in it; those that a reading leaves out must stay as they are for it.
    """

    forms: tuple[Form, ...]
    places: frozenset[Place]

    def __new__(cls, value: int, forms: Sequence[Form], *others: Any) -> "Told":
        number = super().__new__(cls, value)
        number.forms = tuple(forms[:MOST_FORMS])
        number.places = frozenset(place for form in forms for place, _ in form).union(
            *(other.places for other in others if isinstance(other, Told))
        )
        return number

    def __reduce__(self) -> Any:
        return int, (int(self),)

    def _scaled(self, factor: Fraction) -> list[Form]:
        return [tuple((place, share * factor) for place, share in form) for form in self.forms]

    def __mul__(self, other: Any) -> Any:
        value = super().__mul__(other)
        if value is NotImplemented or not value or isinstance(other, bool):
            return value
        others = other._scaled(Fraction(int(self))) if isinstance(other, Told) else []
        return Told(value, [*self._scaled(Fraction(int(other))), *others], self, other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        value = super().__floordiv__(other)
        if value is NotImplemented or int(self) % int(other):
            return value
        return Told(value, self._scaled(Fraction(1, int(other))), self, other)

    def __neg__(self) -> Any:
        return Told(-int(self), self._scaled(Fraction(-1)), self)

    def __add__(self, other: Any) -> Any:
        value = super().__add__(other)
        if value is NotImplemented or not (isinstance(other, Told) or other == 0):
            return value
        others = other.forms if isinstance(other, Told) else ((),)
        return Told(value, [_sum(a, b) for a in self.forms for b in others], self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self + -other if isinstance(other, Told) else super().__sub__(other)


def _sum(a: Form, b: Form) -> Form:
    total = dict(a)
    for place, share in b:
        total[place] = total.get(place, Fraction(0)) + share
    return tuple((place, share) for place, share in total.items() if share)


# -- while tracing -----------------------------------------------------------------------------------------------------


@contextmanager
def told_numbers(model: nn.Module) -> Iterator[None]:
    """Inside, whole numbers among the attributes of users' modules are `Told`. What the forward writes meanwhile stays,
    as plain numbers."""
    put: list[tuple[dict[str, Any], str, Any, Any]] = []
    try:
        for path, module in model.named_modules():
            attributes = vars(module)
            for name, value in list(attributes.items()) if is_users(module) else ():
                told = _told(path, name, value)
                if told is not None:
                    put.append((attributes, name, value, told))
                    attributes[name] = told
        yield
    finally:
        for attributes, name, value, told in put:
            now = attributes.get(name)
            if now is not told:
                attributes.update({name: _plain(now)} if name in attributes else {})
                continue
            attributes[name] = value
            if isinstance(value, list) and value != now:
                value[:] = _plain(now)


def is_users(module: nn.Module) -> bool:
    """Whether a module is of a user's class, and none of PyTorch's with something added."""
    kinds = [cls for cls in type(module).__mro__ if cls.__module__.startswith("torch.nn.")]
    return all(cls in _CONTAINERS for cls in kinds) and type(module) not in _CONTAINERS


def _told(path: str, name: str, value: Any) -> Any:
    if _is_count(value):
        return Told(value, [((Place(path, name, value), Fraction(1)),)])
    if type(value) not in (list, tuple) or not value or not all(map(_is_count, value)):
        return None
    entries = [Place(path, f"{name}[{i}]", entry) for i, entry in enumerate(value)]
    return type(value)(Told(place.value, [((place, Fraction(1)),)]) for place in entries)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _plain(value: Any) -> Any:
    if isinstance(value, Told):
        return int(value)
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


# -- attributes by name ------------------------------------------------------------------------------------------------


def is_attribute(name: str) -> bool:
    """Whether a text can name an attribute that tells a number: `width`, `splits[1]`."""
    return _ENTRY.fullmatch(name) is not None


def told_value(module: nn.Module, attribute: str) -> int | None:
    """The number that a module holds as `width` or `splits[1]`; None if it holds none there."""
    match = _ENTRY.fullmatch(attribute)
    value = vars(module).get(match["name"]) if match is not None else None
    if match is not None and match["entry"] is not None:
        listed, entry = type(value) in (list, tuple), int(match["entry"])
        value = value[entry] if listed and entry < len(value) else None  # type: ignore[index, arg-type]
    return value if _is_count(value) else None


def size_of(module: nn.Module, attribute: str) -> Any:
    """What a module holds as a size, of whatever kind; None if it holds nothing."""
    return told_value(module, attribute) if "[" in attribute else getattr(module, attribute, None)


def set_attribute(module: nn.Module, attribute: str, value: int) -> None:
    """Sets an attribute as `setattr` does; of `splits[1]` the list or tuple becomes another one."""
    match = _ENTRY.fullmatch(attribute)
    if match is None or match["entry"] is None:
        setattr(module, attribute, value)
        return
    listed = vars(module)[match["name"]]
    entries = list(listed)
    entries[int(match["entry"])] = value
    setattr(module, match["name"], type(listed)(entries))


# -- what they were ----------------------------------------------------------------------------------------------------


def note_told(module: nn.Module, attribute: str) -> None:
    """Notes what an attribute is, if there is no note of it yet, so that a checkpoint tells what it has become."""
    value = told_value(module, attribute)
    if value is not None:
        vars(module)[NOTE] = {attribute: value, **vars(module).get(NOTE, {})}


def noted(module: nn.Module) -> dict[str, int]:
    """What the attributes of a module that tell numbers of channels were when it was built: those that have changed."""
    found: dict[str, int] = vars(module).get(NOTE, {})
    return found


def can_be_told(module: nn.Module, attribute: str) -> bool:
    """Whether a checkpoint may set an attribute of a module: a whole number that a user's class holds."""
    return is_users(module) and told_value(module, attribute) is not None
