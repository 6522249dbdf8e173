"""torchvision beside a PyTorch of another build, where its compiled operators do not load.

`import torchvision` then fails with "operator torchvision::nms does not exist", because it registers shape functions
for operators that only the compiled part defines. A classifier needs none of them: it is enough to declare them.
"""

import re
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

Value = TypeVar("Value")

_SCHEMAS = {
    name: f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    for name in ("nms", "qnms")  # torchvision registers functions for these without checking that they exist
}
_DECLARED: list[torch.library.Library] = []  # operators live as long as their library does


def with_torchvision(load: Callable[[], Value]) -> Value:
    """The result of `load()`, which may import torchvision; called twice where torchvision lacks its own operators.

    Nothing is declared where torchvision's compiled part loads, nor where torchvision is not imported.

    Raises:
        Exception: whatever `load` raises.
    """
    try:
        return load()
    except Exception as error:
        if _DECLARED or not any(_is_missing_operator(each) for each in _chain(error)):
            raise
    _declare()
    return load()


def _declare() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _DECLARED.append(library)


def _is_missing_operator(error: BaseException) -> bool:
    missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
    return missing is not None and missing[1] in _SCHEMAS


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, and the exceptions that caused it."""
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__ or each.__context__
