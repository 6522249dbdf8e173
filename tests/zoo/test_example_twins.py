"""The examples' detector and segmentation networks, trained on by the examples' own losses after a pruning: step by
step the losses are those of a masked twin, in float64. torchvision's Faster R-CNN too, by its parts."""

import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo_kit import check_attributes, check_optimizer, forget_momentum, hold_masks, kill, randomise

from bench.zoo import import_torchvision
from prunetrain_kernels import reconfigure, trace_channels
from prunetrain_kernels.graph.prunable import prunable

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses_of(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: list[Callable[[nn.Module], Tensor]],
    masks: dict[str, Tensor] | None = None,
) -> list[float]:
    """A step for each of the losses; `masks` hold weights at zero."""
    model.train()
    weights = {name: model.get_submodule(name).weight for name in masks or {}}
    values = []
    for number, loss_of in enumerate(losses):
        torch.manual_seed(number)
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        for name, weight in weights.items():
            if weight.grad is not None:
                weight.grad.mul_(masks[name])  # type: ignore[index]
        optimizer.step()
        values.append(loss.item())
    return values


def check_beside_twin(
    model: nn.Module, parts: dict[str, Any], losses: list[Callable[[nn.Module], Tensor]], least: float
) -> None:
    """Kills channels of each of the parts (by name; "" is the model itself), prunes them by their example inputs, and
    trains the model on; at least a share `least` of the channels is free."""
    randomise(model).double()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    losses_of(model, optimizer, losses[:1])
    graphs = {name: trace_channels(model.get_submodule(name), inputs) for name, inputs in parts.items()}
    for name, graph in graphs.items():
        free = prunable(graph)
        assert free.channels >= least * free.all_channels, str(graph)
        kill(graph, model.get_submodule(name), share=0.4, partly=0.1, seed=0)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    before, masks = sum(p.numel() for p in model.parameters()), {}
    for name, graph in graphs.items():
        part, twin_part = model.get_submodule(name), twin.get_submodule(name)
        keep = graph.keep(part, threshold=0)
        prefix = f"{name}." if name else ""
        masks |= {prefix + layer: mask for layer, mask in hold_masks(graph, keep, twin_part).items()}
        forget_momentum(graph, keep, twin_part, twin_optimizer)
        assert reconfigure(part, optimizer, keep).changed
    assert sum(p.numel() for p in model.parameters()) < 0.9 * before
    check_attributes(model)
    check_optimizer(model, optimizer)
    assert losses_of(model, optimizer, losses) == pytest.approx(
        losses_of(twin, twin_optimizer, losses, masks), rel=1e-8
    )


def test_the_detector_of_the_example() -> None:
    detection = example("detection")
    size = 32
    torch.manual_seed(0)
    drawn = [detection.draw(4, size, torch.Generator().manual_seed(i)) for i in range(3)]

    def loss(images: Tensor, kinds: Tensor, boxes: Tensor) -> Callable[[nn.Module], Tensor]:
        return lambda model: detection.detection_loss(model(images.double()), kinds, boxes.double(), size)

    losses = [loss(*each) for each in drawn]
    check_beside_twin(detection.Detector(4), {"": (drawn[0][0].double(),)}, losses, 0.8)


def need_torchvision() -> None:
    try:
        import_torchvision()
    except ImportError:
        pytest.skip("torchvision is not installed")


@pytest.mark.slow  # torchvision's import and a network of 3 million weights: 10 s
def test_the_segmentation_network_of_the_example() -> None:
    need_torchvision()
    segmentation = example("segmentation")
    torch.manual_seed(0)
    drawn = [segmentation.draw(4, 32, torch.Generator().manual_seed(i)) for i in range(2)]
    losses = [
        lambda model, images=images, labels=labels: segmentation.segmentation_loss(model(images.double()), labels)
        for images, labels in drawn
    ]
    check_beside_twin(segmentation.build("lraspp_mobilenet_v3_large"), {"": (drawn[0][0].double(),)}, losses, 0.8)


def plain_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """torchvision's `nms` in Python, for a torchvision without its compiled operators."""
    from torchvision.ops import box_iou

    order, kept = scores.argsort(descending=True).tolist(), []
    overlaps = box_iou(boxes, boxes) > iou_threshold
    while order:
        kept.append(order[0])
        order = [i for i in order[1:] if not overlaps[kept[-1], i]]
    return torch.tensor(kept, dtype=torch.int64)


@pytest.mark.slow  # torchvision's import and its smallest Faster R-CNN: 20 s
def test_faster_rcnn_by_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its backbone with the pyramid, and its box head; the losses are those of the whole detector."""
    need_torchvision()
    monkeypatch.setattr("torchvision.ops.boxes.nms", plain_nms)
    models = sys.modules["torchvision"].models.detection
    torch.manual_seed(0)
    few = {f"rpn_{when}_nms_top_n_{mode}": 20 for when in ("pre", "post") for mode in ("train", "test")}
    model = models.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64, **few
    )
    images = [torch.rand(3, 64, 64, dtype=torch.float64) for _ in range(2)]
    box = torch.tensor([[8.0, 8.0, 40.0, 40.0]], dtype=torch.float64)
    targets = [{"boxes": box, "labels": torch.tensor([1 + i])} for i in range(2)]
    losses = [lambda model: sum(model(images, targets).values())] * 2  # type: ignore[arg-type, return-value]
    parts = {"backbone": (torch.stack(images),), "roi_heads.box_head": (torch.rand(2, 256, 7, 7).double(),)}
    check_beside_twin(model, parts, losses, 0.4)
