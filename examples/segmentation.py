"""torchvision's LR-ASPP or FCN, trained on generated images while it shrinks: a class for every pixel."""

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import segmentation

from prunetrain_kernels import PruneTrain, export_program, load_pruned, save_pruned
from prunetrain_kernels.optim import ProximalSGD

CLASSES = ("ground", "square", "disc")


class Logits(nn.Module):
    """The network's main output alone, as a program for inference should give it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)["out"]


def draw(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (N, 3, size, size) of one square and one disc each on noise, and the classes of the pixels."""
    pixel = torch.arange(size) + 0.5
    images = torch.randn(count, 3, size, size, generator=generator) * 0.3
    labels = torch.zeros(count, size, size, dtype=torch.int64)
    for kind in (1, 2):
        radius = size * (0.1 + 0.2 * torch.rand(count, 1, 1, generator=generator))
        centre = size * torch.rand(2, count, 1, generator=generator)
        dx, dy = (pixel - centre[0]).abs()[:, None, :], (pixel - centre[1]).abs()[:, :, None]
        inside = torch.maximum(dx, dy) < radius if kind == 1 else dx**2 + dy**2 < radius**2
        images = images + inside[:, None] * (0.5 + torch.rand(count, 3, 1, 1, generator=generator))
        labels = torch.where(inside, kind, labels)
    return images, labels


def segmentation_loss(outputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Cross entropy of the main output, and of an FCN's auxiliary one at 0.4."""
    loss = F.cross_entropy(outputs["out"], labels)
    return loss + 0.4 * F.cross_entropy(outputs["aux"], labels) if "aux" in outputs else loss


def build(name: str) -> nn.Module:
    options = {"aux_loss": True} if name.startswith("fcn") else {}
    return segmentation.__dict__[name](weights=None, weights_backbone=None, num_classes=len(CLASSES), **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="lraspp_mobilenet_v3_large", help="or fcn_resnet50, fcn_resnet101")
    parser.add_argument("--steps", type=int, default=300, help="steps to train")
    parser.add_argument("--every", type=int, default=50, help="steps between reconfigurations")
    parser.add_argument("--batch", type=int, default=8, help="images in a step")
    parser.add_argument("--size", type=int, default=96, help="pixels a side")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
    parser.add_argument("--penalty-ratio", type=float, default=0.6, help="share of the lasso in the first loss")
    parser.add_argument(
        "--out", default="segmentation.pt", help="the checkpoint to write; a program is written beside it"
    )
    args = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    held_out = draw(16, args.size, generator)
    model = build(args.model)
    optimizer = ProximalSGD(model.parameters(), lr=args.lr, momentum=0.9)
    prunetrain = PruneTrain(
        model, optimizer, (held_out[0][:4],), penalty_ratio=args.penalty_ratio, interval=1, zeroing_tolerance=0.05
    )

    def evaluate(network: nn.Module) -> tuple[float, float]:
        with torch.no_grad():
            outputs = network.eval()(held_out[0])
            right = (outputs["out"].argmax(1) == held_out[1]).float().mean()
            return float(segmentation_loss(outputs, held_out[1])), float(right)

    for step in range(1, args.steps + 1):
        images, labels = draw(args.batch, args.size, generator)
        optimizer.zero_grad()
        loss = prunetrain.regularize(segmentation_loss(model.train()(images), labels))
        loss.backward()
        optimizer.step()
        if step % args.every == 0:
            before, report = evaluate(model)[0], prunetrain.epoch_end()
            after, right = evaluate(model)
            print(f"step {step}: loss {loss:.3f}, held out {before:.5f}, pruned {after:.5f}, {right:.1%}", flush=True)
            if report is not None and report.reconfiguration.changed:
                print(f"  {report}", flush=True)

    save_pruned(args.out, model, optimizer, prunetrain)
    again = build(args.model)
    load_pruned(args.out, again)
    print(f"loaded: held out {evaluate(again)[0]:.5f}, saved {evaluate(model)[0]:.5f}")
    export_program(Logits(copy.deepcopy(model)), (held_out[0][:4],), f"{args.out}2")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"parameters left: {parameters:,} of {sum(p.numel() for p in build(args.model).parameters()):,}")


if __name__ == "__main__":
    main()
