"""Numbers that know the attribute they come from: their arithmetic, and what of a forward they are followed through."""

import copy
import pickle
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetrain_kernels import CheckpointError, InputError, apply_shape, pruned_shape, reconfigure, trace_channels
from prunetrain_kernels.graph.told import Place, Told, set_attribute, told_numbers, told_value

A, B = Place("m", "a", 12), Place("m", "b[1]", 4)


def told(place: Place) -> Told:
    return Told(place.value, [((place, Fraction(1)),)])


@pytest.mark.parametrize(
    ("make", "value", "forms"),
    [
        (lambda a, b: a * 2, 24, [{A: 2}]),
        (lambda a, b: 2 * a, 24, [{A: 2}]),
        (lambda a, b: a // 3, 4, [{A: Fraction(1, 3)}]),
        (lambda a, b: a // b, 3, [{A: Fraction(1, 4)}]),
        (lambda a, b: a * b, 48, [{A: 4}, {B: 12}]),
        (lambda a, b: a + b, 16, [{A: 1, B: 1}]),
        (lambda a, b: a - b, 8, [{A: 1, B: -1}]),
        (lambda a, b: -a, -12, [{A: -1}]),
        (lambda a, b: sum([a, b, a]), 28, [{A: 2, B: 1}]),
        (lambda a, b: a + a - a, 12, [{A: 1}]),
        (lambda a, b: (a + b) * 2 // 4, 8, [{A: Fraction(1, 2), B: Fraction(1, 2)}]),
    ],
)
def test_arithmetic(make: Callable[[Told, Told], int], value: int, forms: list[dict[Place, Fraction]]) -> None:
    number = make(told(A), told(B))
    assert number == value
    assert isinstance(number, Told)
    assert [dict(form) for form in number.forms] == forms


@pytest.mark.parametrize(
    "make",
    [
        lambda a: a + 1,
        lambda a: a // 5,
        lambda a: a % 5,
        lambda a: a**2,
        lambda a: a / 2,
        lambda a: int(a),
        lambda a: a - 1,
    ],
)
def test_what_does_not_go_with_the_attribute_is_a_plain_number(make: Callable[[Told], int | float]) -> None:
    assert type(make(told(A))) in (int, float)
    assert make(told(A)) == make(12)  # type: ignore[arg-type]


def test_is_like_any_number() -> None:
    number = told(A)
    assert {number: 1}[12] == 1
    assert repr(number) == "12"
    assert type(copy.deepcopy(number)) is int
    assert type(pickle.loads(pickle.dumps(number))) is int
    assert torch.zeros(2, number).view(number, 2).shape == (12, 2)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width, self.splits, self.pair, self.flag, self.text = 4, [2, 3], (5, 6), True, "x"
        self.conv = nn.Conv2d(3, 4, 1)
        self.calls = 0


def test_attributes_are_as_they_were_and_what_a_forward_writes_stays() -> None:
    model = Holder()
    splits = model.splits
    with told_numbers(model):
        assert all(isinstance(n, Told) for n in (model.width, *model.splits, *model.pair))
        assert not isinstance(model.flag, Told)
        assert not isinstance(model.conv.out_channels, Told)
        model.calls += 1
        model.last = model.width * 2
        model.pair = (model.width, 1)
        model.splits.append(7)
    assert (model.width, model.splits, model.pair, model.calls) == (4, [2, 3, 7], (4, 1), 1)
    assert model.splits is splits
    assert all(type(n) is int for n in (model.width, *model.splits, *model.pair, model.calls))


def test_entries_of_lists_and_tuples() -> None:
    model = Holder()
    assert [told_value(model, name) for name in ("width", "splits[1]", "pair[0]", "flag", "pair[2]", "text")] == [
        4, 3, 5, None, None, None,
    ]  # fmt: skip
    before = model.splits
    set_attribute(model, "splits[1]", 9)
    set_attribute(model, "pair[0]", 8)
    set_attribute(model, "width", 2)
    assert (model.splits, model.pair, model.width, before) == ([2, 9], (8, 6), 2, [2, 3])


class Split(nn.Module):
    """Two pieces, of which `use` says where their number comes from, or what else the forward does with it."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.width, self.use, self.config = 6, use, {"width": 6}
        self.first, self.last = nn.Conv2d(3, 12, 1), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.use == "written out":
            a, b = x[:, :6], x[:, 6:]
        elif self.use == "of a dict":
            a, b = x[:, : self.config["width"]], x[:, self.config["width"] :]
        else:
            a, b = x[:, : self.width], x[:, self.width :]
        a, b = F.relu(a), torch.sigmoid(b)
        if self.use == "divides":
            a = a / self.width
        if self.use == "kernel":
            a = F.avg_pool2d(a, self.width // 6 * 3, 1, 1)
        if self.use == "branches" and self.width % 2 == 0:
            a = a * 2
        return self.last(a * b)


IMAGES = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def test_an_attribute_is_set_with_the_channels() -> None:
    torch.manual_seed(0)
    model = Split("told").double()
    graph = trace_channels(model, (IMAGES.double(),))
    assert graph.followers["width"].kind == "told"
    assert "width" in str(graph)
    with torch.no_grad():
        for rows in (slice(1, 3), slice(7, 9)):
            model.first.weight[rows] = 0
        model.last.weight[:, 1:3] = 0
    twin = copy.deepcopy(model)
    reconfigure(model, None, graph.keep(model, 0))
    assert (model.width, model.first.out_channels) == (4, 8)
    torch.testing.assert_close(model(IMAGES.double()), twin(IMAGES.double()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        ("written out", "the forward picks channels by number"),
        ("of a dict", "the forward picks channels by number"),
        ("divides", "the forward also uses 'width', which tells its number, for something else"),
        ("kernel", "the forward also uses 'width', which tells its number, for something else"),
        (
            "branches",
            "it does not follow the attribute that tells its number: without some of its channels the forward",
        ),
    ],
)
def test_what_a_number_counts_stays(use: str, reason: str) -> None:
    torch.manual_seed(0)
    model = Split(use)
    graph = trace_channels(model, (IMAGES,))
    held = {space.frozen for space in graph.spaces if not space.is_input and not space.is_output}
    assert all(frozen is not None and frozen.startswith(reason) for frozen in held), str(graph)
    assert model.width == 6


class TwoMeanings(nn.Module):
    """One attribute for two sets of channels: as many of one go as of the other, together."""

    def __init__(self, second: int) -> None:
        super().__init__()
        self.width = 4
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(3, second, 1)
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.one(x), self.two(x)
        return self.last(torch.cat([a[:, : self.width] + a[:, self.width :], b[:, : self.width].tanh()], 1))


def test_two_sets_that_one_attribute_counts_go_together() -> None:
    graph = trace_channels(TwoMeanings(4), (IMAGES,))  # which takes all of the second one's, until one goes
    assert graph.layers["one"].output != graph.layers["two"].output
    members = graph.spaces[graph.layers["one"].output].members
    assert members is not None
    assert set(members[:, 0].tolist()) == {graph.layers["two"].output}  # each is there twice
    other = trace_channels(TwoMeanings(6), (IMAGES,))
    assert other.free_channels == 6


def test_a_shape_may_set_whole_numbers_of_users_modules_only() -> None:
    torch.manual_seed(0)
    model = Split("told")
    shape = pruned_shape(model)
    for wrong in (
        {"": {"use": 3}},
        {"": {"width": 7}},
        {"": {"forward": 3}},
        {"": {"nothing": 3}},
        {"first": {"bias": 1}},
    ):
        with pytest.raises(CheckpointError):
            apply_shape(Split("told"), shape | {"sizes": wrong})


def test_a_changed_attribute_is_seen() -> None:
    model = Split("told")
    graph = trace_channels(model, (IMAGES,))
    model.width = 5
    with pytest.raises(InputError, match="'width'"):
        graph.keep(model, 0)
