"""torchvision's Faster R-CNN, or another of its detectors, trained on generated images while it shrinks.

The detector's own losses train it; PruneTrain is given the part of it that has channels (`detector_parts`): backbone,
feature pyramid and heads. The images hold one square or disc each, drawn by detection.py.
"""

import argparse
import copy
from typing import Any

import torch
from detection import CLASSES, draw
from torch import Tensor, nn

from prunetrain_kernels import PruneTrain, export_program, load_pruned, save_pruned
from prunetrain_kernels.integrations.torchvision import detector_parts
from prunetrain_kernels.optim import ProximalSGD


class Maps(nn.Module):
    """The backbone's maps as a tuple, as a program for inference gives them."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(images).values())


def build(name: str, size: int) -> nn.Module:
    """A detector of torchvision, randomly initialised, for small images."""
    from torchvision.models import detection

    options: dict[str, Any] = {} if name.startswith("ssd") else {"min_size": size, "max_size": size}
    model: nn.Module = getattr(detection, name)(
        weights=None, weights_backbone=None, num_classes=1 + len(CLASSES), **options
    )
    return model


def batch(count: int, size: int, generator: torch.Generator) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images and targets as torchvision's detectors take them."""
    images, kinds, boxes = draw(count, size, generator)
    targets = [
        {"boxes": box[None], "labels": kind[None] + 1} for box, kind in zip(boxes, kinds, strict=True)
    ]  # class 0 is the background
    return list(images), targets


def detection_loss(model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
    """The sum of the detector's losses. It samples regions at random: the same ones for the same seed."""
    losses = model(images, targets)
    return torch.stack(list(losses.values())).sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="fasterrcnn_resnet50_fpn", help="a name in torchvision.models.detection")
    parser.add_argument("--steps", type=int, default=200, help="steps to train")
    parser.add_argument("--every", type=int, default=25, help="steps between reconfigurations")
    parser.add_argument("--batch", type=int, default=4, help="images in a step")
    parser.add_argument("--size", type=int, default=96, help="pixels a side")
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate")
    parser.add_argument("--penalty-ratio", type=float, default=0.997, help="share of the lasso in the first loss")
    parser.add_argument("--out", default="torchvision_detector.pt", help="the checkpoint; a program is beside it")
    args = parser.parse_args()

    try:
        torch.manual_seed(0)
        model = build(args.model, args.size)
        torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError, AttributeError, NotImplementedError) as error:
        print(f"skipped: torchvision's detectors do not run beside this PyTorch: {str(error).splitlines()[0]}")
        return
    generator = torch.Generator().manual_seed(0)
    held_out = batch(8, args.size, generator)
    optimizer = ProximalSGD(model.parameters(), lr=args.lr, momentum=0.9)
    parts = detector_parts(model)
    prunetrain = PruneTrain(
        parts, optimizer, (torch.stack(held_out[0][:2]),), penalty_ratio=args.penalty_ratio, interval=1,
        zeroing_tolerance=0.05,
    )  # fmt: skip

    def evaluate(network: nn.Module) -> float:
        """The loss on held-out images, with the batch norms' running statistics: only the detector itself trains."""
        network.eval().training = True
        for name in ("rpn", "roi_heads"):
            if hasattr(network, name):
                getattr(network, name).training = True
        torch.manual_seed(0)
        with torch.no_grad():
            return float(detection_loss(network, *held_out))

    for step in range(1, args.steps + 1):
        optimizer.zero_grad()
        loss = prunetrain.regularize(detection_loss(model.train(), *batch(args.batch, args.size, generator)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        if step % args.every == 0:
            before, report = evaluate(model), prunetrain.epoch_end()
            print(f"step {step}: loss {loss:.3f}, held out {before:.5f}, pruned {evaluate(model):.5f}", flush=True)
            if report is not None and report.reconfiguration.changed:
                print(f"  {report}", flush=True)

    save_pruned(args.out, parts, optimizer, prunetrain)
    again = build(args.model, args.size)
    load_pruned(args.out, detector_parts(again))
    print(f"loaded: held out {evaluate(again):.5f}, saved {evaluate(model):.5f}")
    with torch.no_grad():
        found = model.eval()(held_out[0])[0]
    print(f"boxes in the first held-out image: {len(found['boxes'])}, the best at {found['boxes'][:1].tolist()}")
    images = torch.stack(held_out[0][:2])
    export_program(Maps(copy.deepcopy(model.get_submodule("backbone"))).eval(), (images,), f"{args.out}2")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"parameters left: {parameters:,} of {sum(p.numel() for p in build(args.model, 96).parameters()):,}")


if __name__ == "__main__":
    main()
