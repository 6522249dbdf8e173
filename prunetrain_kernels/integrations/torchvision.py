"""torchvision's detectors: the part of them that has channels, as one network of images.

    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(...)
    optimizer = ProximalSGD(model.parameters(), lr=0.005, momentum=0.9)
    parts = detector_parts(model)
    prunetrain = PruneTrain(parts, optimizer, (torch.rand(2, 3, 320, 320),), target=0.5, epochs=26)
    ...
    losses = model(images, targets)  # the training is the detector's own
    prunetrain.regularize(sum(losses.values())).backward()

A detector as a whole takes lists of images and boxes and proposes regions one by one, which nothing traces. Between
these steps stand networks whose channels can be followed: backbone and pyramid, and the heads that read its maps.
torchvision need not be importable for this file.
"""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prunetrain_kernels.errors import InputError

HEADS = ("box", "mask", "keypoint")  # of R-CNN's regions: roi_heads.box_roi_pool, box_head, box_predictor, ...


def detector_parts(detector: nn.Module, *, regions: int = 1) -> "DetectorParts":
    """The backbone and the heads of a torchvision detector, in one network that PruneTrain can follow.

    Its modules are the detector's own, under the same names: what is pruned in the one is pruned in the other, and an
    optimizer over the detector's parameters is the one to give to PruneTrain.

    Args:
        detector: a Faster, Mask or Keypoint R-CNN, RetinaNet, FCOS, SSD or SSDLite of torchvision, or another network
            that is made of the same parts: `backbone`, which gives one map (N, C, H, W) or a dict of maps, and either
            `head`, which reads the list of maps, or `rpn.head` and `roi_heads`. Plain, or wrapped in
            `DistributedDataParallel`, which is then rebuilt after each pruning.
        regions: how many regions of an image the box head reads where FLOPs are counted, for R-CNNs: torchvision's
            take 512 in training and up to 1000 in evaluation. More of them cost time when PruneTrain looks at the
            network.

    Raises:
        InputError: the network has no such parts.
    """
    return DetectorParts(detector, regions=regions)


class DetectorParts(nn.Module):
    """See `detector_parts`. It is for PruneTrain, checkpoints and FLOPs; what it computes is of no use by itself: it
    reads regions by average pooling of whole maps, where the detector aligns boxes. Both treat each channel alone."""

    def __init__(self, detector: nn.Module, *, regions: int = 1) -> None:
        super().__init__()
        self.backbone: Any
        self.rpn: Any
        self.roi_heads: Any
        self.head: Any
        wrapper = detector if isinstance(detector, DistributedDataParallel) else None
        network = detector if wrapper is None else wrapper.module
        is_rcnn = _holds(network, "rpn", "head") and isinstance(getattr(network, "roi_heads", None), nn.Module)
        if not isinstance(getattr(network, "backbone", None), nn.Module) or not (is_rcnn or _holds(network, "head")):
            raise InputError(
                "detector_parts takes a detector of torchvision, or one of the same parts: a backbone, and a head or "
                f"rpn.head and roi_heads; {type(network).__name__} has not got them. Write a module of your own that "
                "holds your network's parts, and calls them one after another on images (docs/integrations.md)."
            )
        if regions < 1:
            raise InputError(f"regions must be 1 or more, not {regions}.")
        self.regions = regions
        self.wrapper: Callable[[], DistributedDataParallel | None] | None
        self.wrapper = None if wrapper is None else weakref.ref(wrapper)
        for name in ("backbone", "rpn", "roi_heads") if is_rcnn else ("backbone", "head"):
            self.add_module(name, getattr(network, name))

    def forward(self, images: Tensor) -> list[Any]:
        """(N, 3, H, W), normalised or not, to what the heads give."""
        maps: Any = self.backbone(images)
        maps = {"0": maps} if isinstance(maps, Tensor) or not hasattr(maps, "values") else maps
        if not hasattr(self, "rpn"):
            return [self.head(list(maps.values()))]
        outputs = [self.rpn.head(list(maps.values()))]
        for kind in HEADS:
            pool, head, predictor = (
                getattr(self.roi_heads, f"{kind}_{part}", None) for part in ("roi_pool", "head", "predictor")
            )
            if pool is not None and head is not None and predictor is not None:
                outputs.append(_predicted(predictor, head(_regions(maps, pool, self.regions))))
        return outputs


def _holds(network: Any, *path: str) -> bool:
    """Whether there is a module at the path."""
    for name in path:
        network = getattr(network, name, None)
    return isinstance(network, nn.Module)


def _regions(maps: Mapping[str, Tensor], pool: Any, count: int) -> Tensor:
    """(N * count, C, h, w): maps pooled to the size of a region, all that the pool reads added up."""
    size = getattr(pool, "output_size", 7)
    names = [name for name in getattr(pool, "featmap_names", ()) if name in maps] or list(maps)
    pooled = [F.adaptive_avg_pool2d(maps[name], size) for name in names]
    region = sum(pooled[1:], pooled[0])
    return region if count == 1 else region.repeat_interleave(count, 0)


def _predicted(predictor: nn.Module, features: Tensor) -> Any:
    """What a predictor makes of the features; of torchvision's for boxes both layers, without its check of the shape,
    which torch.fx cannot follow."""
    scores, boxes = getattr(predictor, "cls_score", None), getattr(predictor, "bbox_pred", None)
    if type(predictor).__name__ == "FastRCNNPredictor" and scores is not None and boxes is not None:
        return scores(features.flatten(1)), boxes(features.flatten(1))
    return predictor(features)
