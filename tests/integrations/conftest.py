"""Lightning (by torchmetrics) and timm import torchvision, which needs help beside a CPU-only torch."""

import contextlib

from bench.zoo import import_torchvision

with contextlib.suppress(ImportError):
    import_torchvision()
