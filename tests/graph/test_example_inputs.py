"""Example inputs in every form: keyword arguments, nested tuples and dicts, lists of images and of targets, options.

One network, called in each of these ways, loses channels beside a twin that keeps them as zeros, traced by torch.fx and
by torch.export.
"""

import copy
from collections import OrderedDict, UserDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import Tensor, nn

from prunetrain_kernels import (
    PruneTrain,
    export_program,
    load_pruned,
    reconfigure,
    save_pruned,
    to_dense,
    trace_channels,
)
from prunetrain_kernels.cost import batch_norm_bytes, count_flops, step_memory
from prunetrain_kernels.errors import InputError, TraceError
from prunetrain_kernels.inputs import call, checked_inputs, first_of, mapped, of_batch, tensors_in
from prunetrain_kernels.nn import fuse


class Body(nn.Module):
    """Three convolutions; where `by_data`, the forward asks for a size, which torch.fx cannot follow."""

    def __init__(self, *, by_data: bool = False) -> None:
        super().__init__()
        self.by_data = by_data
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.head = nn.Conv2d(12, 2, 1)

    def run(self, images: Tensor, mask: Tensor | None) -> Tensor:
        if self.by_data and images.shape[-1] > 4:
            images = images * 2
        x = self.middle(self.stem(images))
        return self.head(x if mask is None else x * mask)


class Keywords(Body):
    def forward(self, pixel_values: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> dict[str, Tensor]:
        return {"logits": self.run(pixel_values, mask) * scale}


class Pair(NamedTuple):
    small: Tensor
    large: Tensor


class Nested(Body):
    def forward(self, pair: Pair, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return self.run(pair.small, options["mask"]), self.run(pair.large, None) * options["scale"]


class Listed(Body):
    """A detector: a list of images, a list of what is in them; losses in training, boxes in evaluation."""

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Any:
        y = self.run(torch.stack(list(images)), None).mean((2, 3))
        if self.training:
            wanted = torch.stack([target["box"] for target in targets])
            return {"loss": (y - wanted).square().mean()}
        return [{"box": y[i]} for i in range(len(images))]


class Several(Body):
    def forward(self, *maps: Tensor, mask: Tensor | None = None) -> Tensor:
        return sum(self.run(x, mask) for x in maps)  # type: ignore[return-value]


def image(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
BOXES = [{"box": torch.tensor([0.5 * i, 1.0], dtype=torch.float64)} for i in range(4)]
WAYS: dict[str, tuple[type[Body], Any]] = {
    "keywords": (Keywords, {"pixel_values": image(4, 3)}),
    "all-keywords": (Keywords, {"scale": 2.0, "mask": MASK, "pixel_values": image(4, 3)}),
    "none": (Keywords, OrderedDict(mask=None, pixel_values=image(4, 3))),
    "nested": (Nested, (Pair(image(4, 3), image(4, 3, seed=1)), {"mask": MASK, "scale": 3})),
    "nested-keywords": (
        Nested,
        {"options": {"mask": MASK, "scale": 3}, "pair": Pair(image(4, 3), image(4, 3, seed=1))},
    ),
    "lists": (Listed, ([image(3, seed=i) for i in range(4)], BOXES)),
    "lists-keywords": (Listed, {"images": [image(3, seed=i) for i in range(4)], "targets": BOXES}),
    "several": (Several, (image(4, 3), image(4, 3, seed=1))),
}


def built(way: str, *, by_data: bool = False) -> tuple[Body, Any]:
    torch.manual_seed(0)
    kind, inputs = WAYS[way]
    model = kind(by_data=by_data).double()
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            if tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5)
    return model, inputs


def zero_some(model: Body) -> None:
    with torch.no_grad():
        model.stem[0].weight[[1, 4, 5]] = 0
        model.middle[0].weight[:, [1, 4, 5]] = 0
        model.middle[0].weight[[0, 7]] = 0
        model.head.weight[:, [0, 7]] = 0


def values(model: nn.Module, inputs: Any, *, training: bool = False) -> list[Tensor]:
    with torch.no_grad():
        outputs = call(copy.deepcopy(model).train(training), inputs)
    return tensors_in(outputs if isinstance(outputs, dict | list | tuple) else (outputs,))


def assert_alike(model: nn.Module, twin: nn.Module, inputs: Any) -> None:
    for training in (False, True):
        for a, b in zip(values(model, inputs, training=training), values(twin, inputs, training=training), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("by_data", [False, True], ids=["torch.fx", "torch.export"])
@pytest.mark.parametrize("way", WAYS)
def test_channels_go_however_the_model_is_called(way: str, by_data: bool) -> None:
    model, inputs = built(way, by_data=by_data)
    graph = trace_channels(model, inputs)
    assert graph.tracer == ("torch.export" if by_data else "torch.fx")
    assert graph.free_channels == 20, str(graph)
    zero_some(model)
    twin = copy.deepcopy(model)
    report = reconfigure(model, None, graph.keep(model, threshold=0))
    assert report.max_abs_dy <= 1e-9
    assert (model.stem[0].out_channels, model.middle[0].out_channels) == (5, 10)
    assert_alike(model, twin, inputs)


@pytest.mark.parametrize("way", WAYS)
def test_everything_that_runs_a_model_takes_it(way: str, tmp_path: Path) -> None:
    """Costs, fusing, plain copies, PruneTrain with a growing batch, a checkpoint."""
    model, inputs = built(way)
    images = 2 if way.startswith("nested") or way == "several" else 1
    assert count_flops(model, inputs).inference == images * 2 * 36 * (3 * 8 * 9 + 8 * 12 * 9 + 12 * 2)
    assert batch_norm_bytes(model, inputs) == images * 8 * 8 * 36 * 20
    assert step_memory(model, inputs).per_image > 0
    assert len(fuse(copy.deepcopy(model), inputs).fused) == 2
    zero_some(model)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    prunetrain = PruneTrain(model, optimizer, inputs, coefficient=1e-6, interval=1, batch=4, fuse=True, threshold=1e-12)
    model.train()
    outputs = call(model, inputs)
    loss = sum(t.square().mean() for t in tensors_in(outputs if isinstance(outputs, dict | tuple) else (outputs,)))
    prunetrain.regularize(loss).backward()
    optimizer.step()
    report = prunetrain.epoch_end()
    assert report is not None
    assert report.reconfiguration.max_abs_dy <= 1e-9
    assert model.middle[0].weight.shape == (10, 5, 3, 3)
    twin.train()
    call(twin, inputs)  # its running statistics have seen the batch, too
    assert_alike(model, twin, inputs)
    assert_alike(to_dense(model, inputs), twin, inputs)
    save_pruned(tmp_path / "a.pt", model)
    loaded = built(way)[0]
    load_pruned(tmp_path / "a.pt", loaded)
    assert_alike(loaded, twin, inputs)


@pytest.mark.parametrize("name", ["a.pt2", pytest.param("a.onnx", marks=pytest.mark.slow), "a.pt"])
def test_programs_are_called_by_the_same_keywords(name: str, tmp_path: Path) -> None:
    if name.endswith("onnx"):  # the exporter alone takes 10 s
        pytest.importorskip("onnxscript")
    model, inputs = built("all-keywords")
    inputs = {key: value for key, value in inputs.items() if isinstance(value, Tensor)}
    if name.endswith("onnx"):  # its runtime has no convolution in float64
        model.float()
        inputs = {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
    zero_some(model)
    reconfigure(model, None, trace_channels(model, inputs).keep(model, threshold=0))
    done = export_program(model, inputs, tmp_path / name)
    assert done.batches == (3, 1, 5)
    if name == "a.pt2":
        program = torch.export.load(tmp_path / name).module()
        torch.testing.assert_close(program(**inputs)["logits"], values(model, inputs)[0])


def test_programs_of_nested_tensors(tmp_path: Path) -> None:
    class Plain(Body):
        def forward(self, pair: tuple[Tensor, Tensor], options: dict[str, Tensor]) -> Tensor:
            return self.run(pair[0], options["mask"]) + self.run(pair[1], None)

    model = Plain().double()
    inputs = ((image(4, 3), image(4, 3, seed=1)), {"mask": MASK})
    assert export_program(model, inputs, tmp_path / "a.pt2").max_abs_dy < 1e-12
    detector, lists = built("lists")
    with pytest.raises(InputError, match=r"hold a list, one entry for each example, and a program takes no lists"):
        export_program(detector, lists, tmp_path / "b.pt2")


def test_batches_of_every_form() -> None:
    for _, inputs in WAYS.values():
        inputs = checked_inputs(inputs)
        assert [t.shape for t in tensors_in(of_batch(inputs, 4))] == [t.shape for t in tensors_in(inputs)]
        for batch in (1, 6):
            twice = of_batch(of_batch(inputs, batch), 4)
            assert type(twice) is type(inputs)
        small = first_of(inputs, 2)
        assert {id(t) for t in tensors_in(small)}.isdisjoint(map(id, tensors_in(inputs)))
    images, targets = first_of(checked_inputs(WAYS["lists"][1]), 2)
    assert (len(images), len(targets), images[0].shape) == (2, 2, (3, 6, 6))
    options = of_batch(checked_inputs(WAYS["nested"][1]), 6)[1]
    assert (options["mask"].shape[0], options["scale"]) == (6, 3)


def test_what_a_caller_writes_into_later_is_not_seen() -> None:
    model, inputs = built("lists")
    graph = trace_channels(model, inputs)
    before = [t.clone() for t in tensors_in(graph.example_inputs)]
    inputs[0][0].zero_()
    inputs[0].append(inputs[0][0])
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_in(graph.example_inputs), strict=True))


class Batch(UserDict):
    """As a tokenizer's `BatchEncoding`: a mapping that is no dict."""


def test_a_mapping_counts_as_a_dict() -> None:
    model, inputs = built("keywords")
    assert trace_channels(model, Batch(inputs)).free_channels == 20
    assert type(checked_inputs(Batch(inputs))) is dict


WRONG = {
    "array": ((numpy.zeros(3),), r"example_inputs\[0\] is a ndarray: turn it into a tensor"),
    "inside": (({"a": [image(3), object()]},), r"example_inputs\[0\]\['a'\]\[1\] is a object"),
    "no-tensor": ({"x": 1, "y": None}, "there is no tensor in it"),
    "empty": ({}, "there is no tensor in it"),
    "key": ({1: image(1, 3)}, "keys of the dict are names of arguments, not 1"),
    "generator": ((x for x in ()), "not a generator"),
    "nothing": (None, "not None"),
}


@pytest.mark.parametrize("case", WRONG)
def test_one_sentence_says_what_is_wrong(case: str, tmp_path: Path) -> None:
    inputs, why = WRONG[case]
    model, _ = built("keywords")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = [
        lambda: trace_channels(model, inputs),
        lambda: PruneTrain(model, optimizer, inputs),
        lambda: count_flops(model, inputs),
        lambda: export_program(model, inputs, tmp_path / "a.pt2"),
    ]
    for each in calls + [lambda: fuse(model, inputs)] * (inputs is not None):
        with pytest.raises(InputError, match=why) as raised:
            each()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("inputs", "why"),
    [
        ({"images": image(4, 3)}, r"does not take the keyword arguments .*its arguments are pixel_values, mask, scale"),
        ({"mask": MASK}, r"does not take the keyword arguments .*missing a required .*'pixel_values'"),
        (
            (image(4, 3), MASK, 1.0, 2),
            "takes 1 inputs but example_inputs has 4; give one each, or a dict of keyword arguments",
        ),
    ],
)
def test_arguments_that_the_forward_does_not_have(inputs: Any, why: str) -> None:
    model, _ = built("keywords")
    with pytest.raises(TraceError, match=why):
        trace_channels(model, inputs)


def test_mapped_keeps_the_structure() -> None:
    pair, options = mapped((Pair(image(1), image(1)), {"a": [image(2), 3]}), lambda x: x + 1)
    assert isinstance(pair, Pair)
    assert options["a"][1] == 3
    torch.testing.assert_close(options["a"][0], image(2) + 1)
