"""A small detector without anchors, of the kind that ultralytics builds, trained on generated images while it shrinks.

The images hold one square or disc each; the detector tells its class and box in every cell of two maps. Whatever is
in it is pruned: blocks that split their channels and concatenate all stages (C2f), pooling in a pyramid (SPPF), heads.
torchvision's own detectors, which take lists of images and boxes, are in torchvision_detector.py.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetrain_kernels import PruneTrain, export_program, load_pruned, save_pruned
from prunetrain_kernels.optim import ProximalSGD

CLASSES = ("square", "disc")
STRIDES = (4, 8)


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()
    )


class C2f(nn.Module):
    """Half of the channels go through bottlenecks; what each of them gives is concatenated."""

    def __init__(self, inputs: int, outputs: int, blocks: int) -> None:
        super().__init__()
        width = outputs // 2
        self.first, self.last = conv(inputs, outputs, 1), conv((2 + blocks) * width, outputs, 1)
        self.blocks = nn.ModuleList(nn.Sequential(conv(width, width), conv(width, width)) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        stages = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            stages.append(stages[-1] + block(stages[-1]))
        return self.last(torch.cat(stages, 1))


class Sppf(nn.Module):
    """Maxima over larger and larger windows, concatenated."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.last = conv(channels, channels // 2, 1), conv(channels * 2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.first(x)]
        for _ in range(3):
            maps.append(F.max_pool2d(maps[-1], 5, 1, 2))
        return self.last(torch.cat(maps, 1))


class Detector(nn.Module):
    """(N, 3, H, W) to (N, classes + 4, cells): a logit for each class, and the distances from a cell's centre to the
    four sides of the box, in cells. The cells of the finer map come first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        w1, w2, w3 = width, 2 * width, 4 * width
        self.stem = nn.Sequential(conv(3, w1, 3, 2), conv(w1, w2, 3, 2))
        self.fine, self.coarse = C2f(w2, w2, 1), nn.Sequential(conv(w2, w3, 3, 2), C2f(w3, w3, 2), Sppf(w3))
        self.merge = C2f(w2 + w3, w2, 1)
        self.heads = nn.ModuleList(nn.Sequential(conv(w, w), nn.Conv2d(w, len(CLASSES) + 4, 1)) for w in (w2, w3))

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(self.stem(images))
        coarse = self.coarse(fine)
        fine = self.merge(torch.cat([fine, F.interpolate(coarse, scale_factor=2)], 1))
        return torch.cat([head(x).flatten(2) for head, x in zip(self.heads, (fine, coarse), strict=True)], 2)


def draw(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, 3, size, size) of one shape each on noise, classes (N,) and boxes (N, 4): left, top, right, bottom."""
    half = torch.randint(size // 10, size // 5, (count,), generator=generator).float()
    centre = half[:, None] + torch.rand(count, 2, generator=generator) * (size - 2 * half[:, None])
    kinds = torch.randint(len(CLASSES), (count,), generator=generator)
    pixel = torch.arange(size) + 0.5
    dx, dy = (pixel[None, None, :] - centre[:, :1, None]).abs(), (pixel[None, :, None] - centre[:, 1:, None]).abs()
    radius = half[:, None, None]
    inside = torch.where(kinds[:, None, None] == 0, torch.maximum(dx, dy) < radius, dx**2 + dy**2 < radius**2)
    colour = 1 + torch.rand(count, 3, 1, 1, generator=generator)
    images = torch.randn(count, 3, size, size, generator=generator) * 0.3 + inside[:, None] * colour
    return images, kinds, torch.cat([centre - half[:, None], centre + half[:, None]], 1)


def centres(size: int) -> tuple[Tensor, Tensor]:
    """The centres of all cells (cells, 2) as x, y, and their strides (cells,)."""
    grids, strides = [], []
    for stride in STRIDES:
        place = (torch.arange(size // stride) + 0.5) * stride
        y, x = torch.meshgrid(place, place, indexing="ij")
        grids.append(torch.stack([x, y], 2).flatten(0, 1))
        strides.append(torch.full((len(grids[-1]),), float(stride)))
    return torch.cat(grids), torch.cat(strides)


def detection_loss(outputs: Tensor, kinds: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cross entropy of all cells, and the distance of the boxes in cells whose centre lies well inside a shape."""
    places, strides = centres(size)
    middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    inside = ((places[None] - middle[:, None]).abs() < half[:, None] * 0.6).all(2)
    wanted = F.one_hot(kinds, len(CLASSES))[:, :, None] * inside[:, None]
    logits, sides = outputs[:, : len(CLASSES)], F.softplus(outputs[:, len(CLASSES) :])
    truth = torch.cat([places[None] - boxes[:, None, :2], boxes[:, None, 2:] - places[None]], 2) / strides[:, None]
    error = (sides.transpose(1, 2) - truth).abs().mean(2)
    classes = F.binary_cross_entropy_with_logits(logits, wanted.float(), reduction="sum") / inside.sum().clamp(min=1)
    return classes + (error * inside).sum() / inside.sum().clamp(min=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="steps to train")
    parser.add_argument("--every", type=int, default=50, help="steps between reconfigurations")
    parser.add_argument("--batch", type=int, default=16, help="images in a step")
    parser.add_argument("--size", type=int, default=64, help="pixels a side, a multiple of 8")
    parser.add_argument("--width", type=int, default=16, help="channels of the first layer")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
    parser.add_argument("--penalty-ratio", type=float, default=0.6, help="share of the lasso in the first loss")
    parser.add_argument("--out", default="detector.pt", help="the checkpoint; a program is written beside it")
    args = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    held_out = draw(32, args.size, generator)
    model = Detector(args.width)
    optimizer = ProximalSGD(model.parameters(), lr=args.lr, momentum=0.9)
    prunetrain = PruneTrain(
        model, optimizer, (held_out[0][:4],), penalty_ratio=args.penalty_ratio, interval=1, zeroing_tolerance=0.05
    )

    def evaluate(network: nn.Module) -> float:
        with torch.no_grad():
            return float(detection_loss(network.eval()(held_out[0]), *held_out[1:], args.size))

    for step in range(1, args.steps + 1):
        images, kinds, boxes = draw(args.batch, args.size, generator)
        optimizer.zero_grad()
        loss = prunetrain.regularize(detection_loss(model.train()(images), kinds, boxes, args.size))
        loss.backward()
        optimizer.step()
        if step % args.every == 0:
            before, report = evaluate(model), prunetrain.epoch_end()
            print(f"step {step}: loss {loss:.3f}, held out {before:.5f}, pruned {evaluate(model):.5f}", flush=True)
            if report is not None and report.reconfiguration.changed:
                print(f"  {report}", flush=True)

    save_pruned(args.out, model, optimizer, prunetrain)
    again = Detector(args.width)
    load_pruned(args.out, again)
    print(f"loaded: held out {evaluate(again):.5f}, saved {evaluate(model):.5f}")
    export_program(copy.deepcopy(model), (held_out[0][:4],), f"{args.out}2")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"parameters left: {parameters:,} of {sum(p.numel() for p in Detector(args.width).parameters()):,}")


if __name__ == "__main__":
    main()
