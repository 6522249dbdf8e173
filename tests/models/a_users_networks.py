"""A module of a user's: functions and classes that build networks, and others that fail in every way they can."""

from torch import nn

number = 3


def plain(num_classes: int = 1000) -> nn.Module:
    return nn.Linear(4, num_classes)


def with_channels(num_classes: int, in_channels: int = 3) -> nn.Module:
    return nn.Conv2d(in_channels, num_classes, 1)


def like_torchvision(*, weights: None = None, **kwargs: int) -> nn.Module:
    assert set(kwargs) == {"num_classes"}
    return nn.Linear(4, kwargs["num_classes"])


def broken(num_classes: int) -> nn.Module:
    raise ValueError("no such\nwidth.")


def wrong_result(num_classes: int) -> int:
    return num_classes


class Network(nn.Linear):
    def __init__(self, num_classes: int) -> None:
        super().__init__(2, num_classes)

    @staticmethod
    def small(num_classes: int) -> nn.Module:
        return nn.Linear(1, num_classes)

    class Nested(nn.Linear):
        def __init__(self, num_classes: int) -> None:
            super().__init__(3, num_classes)


def needs_depth(depth: int, num_classes: int = 10) -> nn.Module:
    return nn.Linear(depth, num_classes)


def of_nothing() -> nn.Module:
    return nn.Linear(1, 1)


def exits(num_classes: int) -> nn.Module:
    raise SystemExit(3)


def fails_silently(num_classes: int) -> nn.Module:
    raise AssertionError


def fails_at_length(num_classes: int) -> nn.Module:
    raise RuntimeError("word " * 1000)


def gives_a_class(num_classes: int) -> type[nn.Module]:
    return nn.ReLU


def gives_a_pair(num_classes: int) -> tuple[nn.Module, int]:
    return nn.ReLU(), 1


def gives_nothing(num_classes: int) -> None:
    print("building")


def prints(num_classes: int) -> nn.Module:
    print("building")
    return nn.Linear(4, num_classes)


def __getattr__(name: str) -> object:
    if name == "lazy":
        raise RuntimeError("needs a package\nthat is not there")
    raise AttributeError(name)
