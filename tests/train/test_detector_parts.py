"""A detector is pruned by its parts, and trained by its own losses: as its masked twin, on one process and on two."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rank_processes import OnRanks, on_ranks  # noqa: F401  (fixture)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prunetrain_kernels import InputError, PruneTrain, load_pruned, reconfigure, save_pruned, trace_channels
from prunetrain_kernels.graph.prunable import prunable
from prunetrain_kernels.integrations.torchvision import detector_parts
from prunetrain_kernels.optim import ProximalSGD
from prunetrain_kernels.train.transaction import ranks_in


class Backbone(nn.Module):
    """Two maps of the same width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, eps=0.01)
        self.down = nn.Conv2d(8, 12, 3, 2, 1)
        self.lateral = nn.ModuleList(nn.Conv2d(c, 8, 1) for c in (8, 12))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = F.relu(self.norm(self.stem(x)))
        coarse = F.relu(self.down(fine))
        return {"0": self.lateral[0](fine), "pool": self.lateral[1](coarse)}


class ProposalHead(nn.Module):
    """Scores of all maps, by one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.score = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [self.score(F.relu(self.conv(x))) for x in maps]


class BoxHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc6, self.fc7 = nn.Linear(8 * 4, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc7(F.relu(self.fc6(x.flatten(1)))))


class Pool(nn.Module):
    """Cuts boxes out of a map, and pools them: what only Python can follow."""

    output_size, featmap_names = (2, 2), ("0",)

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        regions = []
        for image, (left, top, right, bottom) in enumerate(box.int().tolist() for box in boxes):
            cut = maps["0"][image : image + 1, :, top:bottom, left:right]
            regions.append(F.adaptive_max_pool2d(cut, self.output_size))
        return torch.cat(regions)


class Detector(nn.Module):
    """Made as torchvision's R-CNNs are: lists of images and targets in, a dict of losses out."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone: Any = Backbone()
        self.rpn: Any = nn.Module()
        self.roi_heads: Any = nn.Module()
        self.rpn.head = ProposalHead()
        self.roi_heads.box_roi_pool, self.roi_heads.box_head = Pool(), BoxHead()
        self.roi_heads.box_predictor = nn.Linear(6, 3)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        maps = self.backbone(torch.stack(images))
        regions = self.roi_heads.box_roi_pool(maps, [target["boxes"] for target in targets])
        logits = self.roi_heads.box_predictor(self.roi_heads.box_head(regions))
        labels = torch.stack([target["label"] for target in targets])
        proposals = sum(scores.square().mean() for scores in self.rpn.head(list(maps.values())))
        return {"classes": F.cross_entropy(logits, labels), "proposals": proposals}  # type: ignore[dict-item]


def batch(seed: int, count: int = 3) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    draw = torch.Generator().manual_seed(seed)
    images = list(torch.randn(count, 3, 8, 8, generator=draw, dtype=torch.float64))
    return images, [{"boxes": torch.tensor([1.0, 2, 6, 7]), "label": torch.tensor(i % 3)} for i in range(count)]


def losses_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range, masks: dict[str, Tensor] | None = None
) -> list[float]:
    """A step for each seed; `masks` hold weights at zero."""
    losses = []
    for seed in seeds:
        optimizer.zero_grad()
        loss = torch.stack(list(model.train()(*batch(seed)).values())).sum()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, mask in (masks or {}).items():
                model.get_parameter(name).mul_(mask)
        losses.append(loss.item())
    return losses


def kill(model: Detector, channel: int) -> None:
    """Zeroes one channel of each space in all layers that write or read it."""
    backbone, rpn, heads = model.backbone, model.rpn, model.roi_heads
    lateral = list(backbone.lateral)
    with torch.no_grad():
        for writers, readers in (
            ([backbone.stem], [backbone.down, lateral[0]]),
            ([backbone.down], [lateral[1]]),
            ([*lateral], [rpn.head.conv]),
            ([rpn.head.conv], [rpn.head.score]),
            ([heads.box_head.fc6], [heads.box_head.fc7]),
        ):
            for layer in writers:
                layer.weight[channel] = 0
            for layer in readers:
                layer.weight[:, channel] = 0
        heads.box_head.fc6.weight[:, 4 * channel : 4 * channel + 4] = 0  # the four pixels of a region


def test_a_detector_trains_on_as_its_masked_twin(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Detector().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    losses_of(model, optimizer, range(1))
    for channel in (2, 0):
        graph = trace_channels(detector_parts(model, regions=2), (torch.stack(batch(0)[0]),))
        free = prunable(graph)
        assert (graph.tracer, free.channels) == ("torch.fx", free.all_channels)
        kill(model, channel)
        twin, twin_optimizer = copy.deepcopy((model, optimizer))
        masks = {name: p.detach() != 0 for name, p in twin.named_parameters() if p.dim() > 1}
        keep = graph.keep(model, threshold=0)  # the names are the detector's
        assert reconfigure(detector_parts(model), optimizer, keep).changed
        assert all(p.dim() == 1 or bool((p != 0).all()) for p in model.parameters())
        pruned = losses_of(model, optimizer, range(1, 4))
        assert pruned == pytest.approx(losses_of(twin, twin_optimizer, range(1, 4), masks), rel=1e-9)
    save_pruned(tmp_path / "parts.pt", detector_parts(model), optimizer)
    fresh = Detector().double()
    load_pruned(tmp_path / "parts.pt", detector_parts(fresh))
    for tensor, saved in zip(fresh.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(tensor, saved)


@pytest.mark.parametrize("kind", ["no backbone", "no head"])
def test_other_networks_are_refused(kind: str) -> None:
    model = nn.Module()
    if kind == "no head":
        model.backbone = Backbone()
    with pytest.raises(InputError, match="detector_parts takes a detector of torchvision"):
        detector_parts(model)
    with pytest.raises(InputError, match="regions must be 1 or more"):
        detector_parts(Detector(), regions=0)


def test_two_lassos_for_one_update_are_refused() -> None:
    """The update would add the second one only; one after the other is fine, as is a new one of the same weights."""
    body, head = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)) for _ in range(2))
    optimizer = ProximalSGD([*body.parameters(), *head.parameters()], lr=0.01)
    x = torch.randn(2, 3, 4, 4)
    first, second = (PruneTrain(part, optimizer, (x,), coefficient=0.1) for part in (body, head))
    loss = head(body(x)).square().mean()
    first.regularize(loss)
    with pytest.raises(InputError, match="two of different weights for one step"):
        second.regularize(loss)
    PruneTrain(body, optimizer, (x,), coefficient=0.2).regularize(loss)
    optimizer.step()
    second.regularize(loss)


def _train_in_ddp(rank: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    ddp = DistributedDataParallel(Detector().double())
    optimizer = ProximalSGD(ddp.parameters(), lr=0.05, momentum=0.9)
    prunetrain = PruneTrain(detector_parts(ddp), optimizer, (torch.stack(batch(0)[0]),), coefficient=0.02, interval=1)
    assert prunetrain.ranks.world == 2
    for epoch in range(2):
        for step in range(2):
            optimizer.zero_grad()
            loss = torch.stack(list(ddp(*batch(10 * epoch + 2 * step + rank)).values())).sum()
            prunetrain.regularize(loss).backward()
            optimizer.step()
        with torch.no_grad():
            ddp.module.backbone.down.weight[epoch] = 0
            ddp.module.backbone.lateral[1].weight[:, epoch] = 0
        prunetrain.epoch_end()
    return {name: tensor.clone() for name, tensor in ddp.module.state_dict().items()}


def test_a_detector_in_ddp_on_two_ranks(on_ranks: OnRanks) -> None:  # noqa: F811
    first, second = on_ranks(2, _train_in_ddp)
    assert first["backbone.down.weight"].shape[0] < 12
    for name, tensor in first.items():
        if "running" not in name:  # every rank has statistics of its own
            assert torch.equal(tensor, second[name]), name


def test_a_users_own_wrapper_is_not_called() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 2))
    model.wrapper = lambda: pytest.fail("called")  # type: ignore[assignment]
    assert ranks_in(model)[0] is None
