"""`probe`: whatever is looked at stays as it was; outputs of any structure are named; differences are of something."""

import random
from collections import deque, namedtuple
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunetrain_kernels import probe


class Writing(nn.Module):
    """A forward that writes to everything that it can reach."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("count", torch.zeros(()))
        self.calls, self.kept, self._cache, self.by_name = 0, [1], None, {"a": 1}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.kept.append(x)
        self.by_name["b"] = x
        self._cache = x
        self.new = x
        self.count += 1
        self.count = self.count + 1
        self.norm.eval()
        return self.norm(x) * torch.rand(()) * random.random() * np.random.rand()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(training: bool, fails: bool) -> None:
    model = Writing().train()
    count, before = model.count, {name: b.clone() for name, b in model.named_buffers()}
    attributes = model.kept, model.by_name
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with pytest.raises(RuntimeError) if fails else pytest.MonkeyPatch.context():
        probe.outputs_of(model, (torch.rand(2, 3, 4, 4)[:, : 2 if fails else 3],), training=training)
    states = (*states, torch.get_rng_state(), random.getstate(), np.random.get_state()[1])
    assert model.count is count
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert (model.calls, model.kept, model._cache, model.by_name) == (0, [1], None, {"a": 1})
    assert (model.kept, model.by_name) == attributes
    assert not hasattr(model, "new")
    assert model.training
    assert model.norm.training
    # the input is drawn before the states are compared
    assert states[1] == states[4]
    assert np.array_equal(states[2], states[5])


def test_torchs_generator_is_as_it_was() -> None:
    model, x = Writing(), torch.rand(2, 3, 4, 4)
    before = torch.get_rng_state()
    probe.outputs_of(model, (x,))
    assert torch.equal(before, torch.get_rng_state())


def test_generators_that_modules_hold_are_as_they_were() -> None:
    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.torchs, self.numpys, self.pythons = torch.Generator(), np.random.default_rng(0), random.Random(0)

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rand((), generator=self.torchs) * self.numpys.random() * self.pythons.random()

    model = Drawing()
    first, second = (probe.outputs_of(model, (torch.ones(1),))[""] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, model(torch.ones(1)))
    assert not torch.equal(first, model(torch.ones(1)))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError(), "RuntimeError"),
        (RuntimeError("\n\n  what it is.\n more"), "what it is"),
        (ValueError("a: "), "a"),
        (KeyError("x"), "'x'"),
        (
            RuntimeError('t == nullptr INTERNAL ASSERT FAILED at "a.cpp":3, please report a bug to PyTorch. No t'),
            't == nullptr INTERNAL ASSERT FAILED at "a.cpp":3. No t',
        ),
        (
            RuntimeError("no such thing. If you don't need it, please leave a comment explaining your use case."),
            "no such thing",
        ),
        (ValueError("the mask is missing; please pass one"), "the mask is missing; please pass one"),
    ],
)
def test_the_first_line_of_an_error(error: Exception, line: str) -> None:
    assert probe.first_line(error) == line


def test_the_first_sentence_of_an_error() -> None:
    error = ValueError("x.y is 0.5 <class 'a.B'>, not a type.  (Sizes: none). See http://a.b/c. Ask them.")
    assert probe.first_sentence(error) == "x.y is 0.5 <class 'a.B'>, not a type"
    assert probe.first_sentence(ValueError("one.")) == "one"


Pair = namedtuple("Pair", "one two")


@dataclass
class Boxes:
    boxes: Tensor
    rest: Any = None


class Slots:
    __slots__ = ("scores",)

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores


class Instances:
    """detectron2's way: tensors in a dict of an object."""

    def __init__(self, **fields: Any) -> None:
        self._fields = fields
        self.me = self


T, U = torch.tensor([1.0]), torch.tensor([2])
STRUCTURES = [
    (T, {"": T}),
    ((T, [U, None]), {"[0]": T, "[1][0]": U}),
    (Pair(T, U), {".one": T, ".two": U}),
    ({"a": T, 3: U}, {"['a']": T, "[3]": U}),
    (Boxes(T, [Slots(U)]), {".boxes": T, ".rest[0].scores": U}),
    (Instances(logits=T, n=3, more=[Boxes(U)]), {"._fields['logits']": T, "._fields['more'][0].boxes": U}),
    ((T, T), {"[0]": T}),
    (deque([T]), {"[0]": T}),
    (iter([T, U]), {"[0]": T, "[1]": U}),
    ((t for t in (T, Boxes(U))), {"[0]": T, "[1].boxes": U}),
    ({"a": T, "b": U}.values(), {"[0]": T, "[1]": U}),
    ({"a": T}.items(), {"[0][1]": T}),
    (MappingProxyType({"a": T}), {"['a']": T}),
    ("text", {}),
    (nn.Linear(1, 1), {}),
]


@pytest.mark.parametrize(("value", "expected"), STRUCTURES)
def test_tensors_are_named_by_where_they_are(value: object, expected: dict[str, Tensor]) -> None:
    named = probe.named_tensors_in(value)
    assert named.keys() == expected.keys()
    assert all(named[name] is tensor for name, tensor in expected.items())


@pytest.mark.parametrize("layout", ["sparse", "csr", "nested", "quantized"])
def test_tensors_of_other_layouts_are_compared_too(layout: str) -> None:
    def made(scale: float) -> Tensor:
        x = torch.eye(3) * scale
        if layout == "nested":
            return torch.nested.nested_tensor([x, x[:2]])
        if layout == "quantized":
            return torch.quantize_per_tensor(x, 0.5, 0, torch.qint8)
        return x.to_sparse() if layout == "sparse" else x.to_sparse_csr()

    one, two = (probe.named_tensors_in([made(scale)]) for scale in (1.0, 2.0))
    assert probe.difference(one, one).largest == 0
    assert probe.difference(one, two).largest == 1
    assert probe.difference(one, two).compared == (15 if layout == "nested" else 9)


def test_a_model_output_of_hugging_face_is_a_mapping_with_attributes() -> None:
    class Output(dict):  # type: ignore[type-arg]
        def __init__(self, **fields: Tensor) -> None:
            super().__init__(fields)
            self.__dict__ |= fields

    assert probe.named_tensors_in(Output(logits=T)).keys() == {"['logits']"}


inf, nan = float("inf"), float("nan")
DIFFERENCES = [
    ([1.0, 2.0], [1.0, 2.0], 0.0, 2, True),
    ([1.0, 2.0], [1.0, 2.0 + 2**-20], 2**-20, 2, True),
    ([1.0, 2.0], [1.0, 2.1], 0.1, 2, False),
    ([1.0, -inf], [1.0, -inf], 0.0, 1, True),
    ([1.0, -inf], [1.0, inf], inf, 1, False),
    ([1.0, nan], [1.0, nan], 0.0, 1, True),
    ([1.0, nan], [1.0, 2.0], inf, 1, False),
    ([1.0, 2.0], [nan, 2.0], inf, 2, False),
    ([nan, nan], [nan, nan], 0.0, 0, True),
    ([100.0, -inf], [100.05, -inf], 0.05, 1, True),  # the scale is that of what is finite
    ([1.0], [1.0, 2.0], inf, 1, False),
    ([True, False], [True, False], 0.0, 2, True),
    ([True, False], [True, True], inf, 2, False),
    ([3, 4], [3, 5], inf, 2, False),
    ([1 + 1j], [1 + 1.5j], 0.5, 2, False),
    ([], [], 0.0, 0, True),
]


@pytest.mark.parametrize(("a", "b", "largest", "compared", "rounding"), DIFFERENCES)
def test_differences(a: list[Any], b: list[Any], largest: float, compared: int, rounding: bool) -> None:
    got = probe.difference({"x": torch.tensor(a)}, {"x": torch.tensor(b)})
    assert got.largest == pytest.approx(largest, rel=1e-2)
    assert got.compared == compared
    assert got.is_rounding == rounding
    assert got.where == ("x" if largest else "")


def test_each_tensor_is_judged_by_its_own_scale() -> None:
    before = {"large": torch.tensor([1000.0]), "small": torch.tensor([5.0])}
    after = {"large": torch.tensor([1000.5]), "small": torch.tensor([5.5])}
    got = probe.difference(before, after)
    assert not got.is_rounding
    assert got.where == "small"


def test_an_output_that_is_not_there_any_more_is_a_difference() -> None:
    got = probe.difference({"x": T, "y": T}, {"x": T})
    assert (got.largest, got.where) == (inf, "y")
