"""Numbers of channels that a forward passes: read from a tensor's size, held by an attribute, or written out.

A size that the forward reads from a tensor and gives to a reshape is followed from the one to the other. A number that
a module's attribute tells (`told.py`) is followed to the attribute. What is left is written out: `-1` does not matter,
and any other number stays, with all channels that it counts.
"""

import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from prunetrain_kernels.graph.channels import Channels, Count
from prunetrain_kernels.graph.flow import Flow
from prunetrain_kernels.graph.heads import NUMBERS_OF_FEATURES, NUMBERS_OF_HEADS
from prunetrain_kernels.graph.told import Form, Place, Told

WRITTEN_OUT = "its number of channels is written out in the forward"
OF_OTHERS = "the forward computes its number of channels from that of others, which stay"
NUMBERS_OF_GROUPS = ("group", "radix", "cardinal", "path", "branch")  # parts of names
Ids = tuple[int, ...]


def is_fixed(number: Any) -> bool:
    """Whether a size is a number that the program holds, not one that it leaves open or reads."""
    return isinstance(number, int) and number != -1


def counts(flow: Flow, node: fx.Node) -> bool:
    """Rule for arithmetic on a number of channels: `c // 2`, `c * h * w`. True if its result is followed too."""
    numbers = [(n, count) for n in node.all_input_nodes if (count := flow.count_of(n)) is not None]
    value = flow.value(node)
    if len(numbers) != 1 or not isinstance(value, int) or len(node.args) != 2 or isinstance(value, bool):
        return False
    ((number, count),) = numbers
    other = node.args[1] if node.args[0] is number else node.args[0]
    known = flow.value(other) if isinstance(other, fx.Node) else other
    if not isinstance(known, int) or known == 0:
        return False
    if node.target is operator.mul:
        factor = count.factor * known
    elif node.target in (operator.floordiv, torch.floor_divide) and node.args[0] is number:
        factor = count.factor / known
    else:
        return False
    if count.channels.features * factor != value:
        return False  # it was rounded
    flow.set_count(node, Count(count.channels, factor))
    flow.understand(node, number)
    return True


def is_count_of(flow: Flow, node: fx.Node, number: Any, ids: Ids, factor: Fraction) -> bool:
    """Whether a size that is passed to `node` is, and stays, `factor` times the number of channels `ids`."""
    if isinstance(number, int):
        return number == -1 or follows(flow, node, number, ids, factor)
    count = flow.count_of(number)
    if count is None:
        return False
    per_channel = count.channels.block * count.factor
    roots, counted = (sorted(map(flow.find, side)) for side in (ids, count.channels.ids))
    if roots != counted:
        repeats = Fraction(len(roots), len(counted))
        if repeats == 1 and per_channel == factor:
            flow.join(ids, count.channels.ids)  # the program says that there are as many of both
        elif repeats.denominator != 1 or sorted(counted * int(repeats)) != roots:
            return False
        factor *= repeats
    if per_channel != factor:
        return False
    flow.understand(node, number)
    return True


def is_count_of_others(flow: Flow, numbers: Sequence[Any]) -> bool:
    """Whether one of the sizes is computed from a number of other channels, all of which stay."""
    known = [flow.count_of(number) for number in numbers if isinstance(number, fx.Node)]
    return any(count is not None and flow.all_stay(count.channels) for count in known)


# -- attributes --------------------------------------------------------------------------------------------------------


def follows(flow: Flow, node: fx.Node, number: Any, ids: Ids, factor: Fraction = Fraction(1)) -> bool:
    """Whether a number that attributes tell and that is passed to `node` is, and stays when these are set, `factor`
    times the number of channels `ids`: if so, the attributes are set with the channels."""
    if not isinstance(number, Told) or len(ids) * factor != number:
        return False
    readings = sorted(number.forms, key=lambda form: not any(_known(flow, place) for place, _ in form))
    for form in readings:  # one that has a meaning already comes first
        if _is_form_of(flow, form, ids, factor):
            flow.understand_told(node, (place for place, _ in form))
            return True
    return False


def follows_heads(flow: Flow, node: fx.Node, number: Any) -> None:
    """Says that a number that is passed to `node` follows the heads of a module, if it is one of those that do."""
    if isinstance(number, Told):
        names = (*NUMBERS_OF_HEADS, *NUMBERS_OF_FEATURES)
        flow.understand_told(node, (place for place in number.places if place.attribute in names))


def pin_told(flow: Flow, nodes: Iterable[fx.Node]) -> None:
    """Freezes what attributes count that a forward also uses where the number is not followed: they stay."""
    pinned = {
        place: None
        for node in nodes
        for number in _told_in((node.args, node.kwargs))
        for place in sorted(number.places, key=lambda place: place.name)
        if not flow.understands_told(node, place)
    }
    for place in pinned:
        known = _known(flow, place)
        if known is not None:
            reason = f"the forward also uses '{place.name}', which tells its number, for something else"
            flow.freeze(Channels(known), reason)


def _told_in(value: Any) -> Iterator[Told]:
    if isinstance(value, Told):
        yield value
    elif isinstance(value, slice):
        yield from _told_in((value.start, value.stop, value.step))
    elif isinstance(value, dict):
        yield from _told_in(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _told_in(part)


def is_told_already(flow: Flow, number: Told) -> bool:
    """Whether it is known what an attribute behind a number counts."""
    return any(_known(flow, place) is not None for form in number.forms for place, _ in form)


def tells_groups(number: Told) -> bool:
    """Whether the number is one of groups or branches, by the attribute's name."""
    names = [place.attribute.lower() for form in number.forms for place, _ in form]
    return any(word in name for name in names for word in NUMBERS_OF_GROUPS)


def _known(flow: Flow, place: Place) -> Ids | None:
    """The channels that an attribute counts."""
    told = flow.told(place)
    if told is None and place.attribute in NUMBERS_OF_HEADS:
        told = flow.heads_of_module(place.module)
    return told if told is not None and len(told) == place.value else None


def _is_form_of(flow: Flow, form: Form, ids: Ids, factor: Fraction) -> bool:
    """As `follows`, for one reading of a number."""
    known = {place: told for place, _ in form if (told := _known(flow, place)) is not None}
    if len(form) == 1 and known:
        return _is_known(flow, known[form[0][0]], ids, factor / form[0][1])
    if len(form) - len(known) > 1:
        return _in_order(flow, form, ids, factor)
    left = {root: factor * times for root, times in Counter(map(flow.find, ids)).items()}
    for place, share in form:
        for root in map(flow.find, known.get(place, ())):
            left[root] = left.get(root, Fraction(0)) - share
    if len(known) == len(form):
        return not any(left.values())
    ((place, share),) = (pair for pair in form if pair[0] not in known)
    each = {root: number / share for root, number in left.items() if number}
    if not each or any(number.denominator != 1 or number < 0 for number in each.values()):
        return False
    flow.tell(place, tuple(root for root, number in each.items() for _ in range(int(number))))
    return True


def _is_known(flow: Flow, known: Ids, ids: Ids, factor: Fraction) -> bool:
    """As `follows`, for a number of channels `known`, of which it is `factor` times the number `ids`."""
    told = Counter(map(flow.find, known))
    counted = {i: n * factor for i, n in Counter(map(flow.find, ids)).items()}
    if counted == told:
        return True
    if list(counted.values()) != list(told.values()):
        return False
    flow.join(tuple(told), tuple(counted))  # the program says that there are as many of both
    return True


def _in_order(flow: Flow, form: Form, ids: Ids, factor: Fraction) -> bool:
    """As `follows`, for a sum of which several parts are not known: they count the channels one after the other."""
    if factor != 1 or any(share != 1 for _, share in form) or sum(place.value for place, _ in form) != len(ids):
        return False
    start = 0
    for place, share in form:
        part = ids[start : start + place.value]
        if not _is_form_of(flow, ((place, share),), part, factor):
            return False
        start += place.value
    return True
