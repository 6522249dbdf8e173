"""Models that are unlike a classifier of images, each beside the inputs that it takes."""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Two(nn.Module):
    """Convolution, batch norm, ReLU, convolution, head; `forward` is overridden below."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b, self.fc = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3), nn.Linear(8, 3)

    def features(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.n(self.a(x)))).mean((2, 3))

    def forward(self, x: Tensor, *others: Tensor) -> Any:
        return self.fc(self.features(x))


# of 8 x 8 pixels: 6 x 6 behind the first convolution, 4 x 4 behind the second
A, B, FC = 2 * 16 * 3 * 9 * 36, 2 * 8 * 16 * 9 * 16, 2 * 8 * 3
INFERENCE = A + B + FC
TRAINING = 2 * A + 3 * B + 3 * FC

ODD: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {}


def images(count: int = 8) -> tuple[Tensor, ...]:
    return (torch.randn(count, 3, 8, 8),)


def odd(name: str, inputs: Callable[[], tuple[Tensor, ...]] = images) -> Callable[[type], type]:
    def add(kind: type) -> type:
        ODD[name] = (kind, inputs)
        return kind

    return add


class Position(nn.Module):
    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.p, self.whole = nn.Parameter(torch.zeros(1, 16, 1, 1)), whole

    def forward(self, x: Tensor) -> Tensor:
        return self.p if self.whole else self.p.expand(len(x), -1, -1, -1)


@odd("a view of a parameter")
class WithPosition(Two):
    whole = False

    def __init__(self) -> None:
        super().__init__()
        self.position = Position(self.whole)

    def forward(self, x: Tensor, *others: Tensor) -> Any:
        return self.fc(self.b(F.relu(self.n(self.a(x)) + self.position(x))).mean((2, 3)))


@odd("a parameter itself")
class WithWholePosition(WithPosition):
    whole = True


@odd("a view made without gradients")
class WithoutGradients(Two):
    def __init__(self) -> None:
        super().__init__()
        self.side = nn.BatchNorm2d(16)
        self.side.forward = self._constant  # type: ignore[method-assign]

    def _constant(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.side.bias.view(1, -1, 1, 1)

    def forward(self, x: Tensor, *others: Tensor) -> Any:
        y = self.a(x)
        return self.fc(self.b(F.relu(self.n(y) + self.side(y))).mean((2, 3)))


@odd("a batch of frames", lambda: images(6))
class Frames(Two):
    def forward(self, x: Tensor, *others: Tensor) -> Any:
        return self.fc(self.features(x).view(-1, 6, 8)).mean(1)


@odd("pairs", lambda: images(6))
class Pairs(Two):
    def forward(self, x: Tensor, *others: Tensor) -> Any:
        a, b = self.fc(self.features(x)).chunk(2, 0)
        return (a - b).pow(2).sum(1)


@odd("prototypes", lambda: images(7))
class Prototypes(Two):
    def forward(self, x: Tensor, *others: Tensor) -> Any:
        logits = self.fc(self.features(x))
        return (logits[5:, None] - logits[:5]).pow(2).sum(-1)


@odd("a number as second input", lambda: (*images(), torch.tensor(0.5)))
class Scaled(Two):
    def forward(self, x: Tensor, *others: Tensor) -> Any:
        return self.fc(self.features(x)) * others[0]


@odd("a table as second input", lambda: (*images(), torch.randn(5, 3)))
class Compared(Two):
    def forward(self, x: Tensor, *others: Tensor) -> Any:
        return (self.fc(self.features(x))[:, None] - others[0]).abs().sum(-1)


@odd("TorchScript")
class Scripted(Two):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.b = torch.jit.script(self.b)


class Detected:
    __slots__ = ("boxes", "scores")

    def __init__(self, boxes: Tensor, scores: Tensor) -> None:
        self.boxes, self.scores = boxes, scores


@odd("an object as output")
class Objects(Two):
    def forward(self, x: Tensor, *others: Tensor) -> Any:
        y = self.fc(self.features(x))
        return Detected(y, y.argmax(1))


@dataclass
class Output:
    logits: Tensor
    names: list[str]
    loss: Tensor | None = None


@odd("a dataclass in training, a dict in evaluation")
class Dataclasses(Two):
    def forward(self, x: Tensor, *others: Tensor) -> Any:
        y = self.fc(self.features(x))
        return Output(y, ["a"]) if self.training else {"logits": y, "mask": y > 0, "none": None}


@odd("complex numbers")
class Spectrum(Two):
    def forward(self, x: Tensor, *others: Tensor) -> Any:
        return torch.fft.fft(self.fc(self.features(x)))


@odd("a value of the data decides")
class Decides(Two):
    def forward(self, x: Tensor, *others: Tensor) -> Any:
        y = self.fc(self.features(x))
        return y * 2 if float(y.abs().sum()) > 0 else y


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * 2)  # not of this world

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * 2


@odd("a Function of NumPy")
class Numpy(Two):
    def forward(self, x: Tensor, *others: Tensor) -> Any:
        return Doubled.apply(self.fc(self.features(x)))


@odd("attributes written and grown")
class Remembers(Two):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.scale = torch.ones(1, requires_grad=True)
        self.hidden = [torch.ones(1, requires_grad=True)]
        self.count = torch.zeros(())

    def forward(self, x: Tensor, *others: Tensor) -> Any:
        self.last = self.fc(self.features(x))
        self.seen.append(self.last)
        self.count.add_(1)
        return self.last * self.scale * self.hidden[0]


@odd("in-place operations on parameters")
class InPlace(Two):
    def forward(self, x: Tensor, *others: Tensor) -> Any:
        with torch.no_grad():
            self.a.weight.clamp_(-1, 1)
            self.b.weight[0].mul_(1.0)
        return self.fc(self.features(x))


@odd("the same tensor twice, and a parameter in a list")
class Tied(Two):
    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Linear(8, 3)
        self.twin.weight = self.fc.weight
        self.listed = [self.fc.bias]

    def forward(self, x: Tensor, *others: Tensor) -> Any:
        with contextlib.suppress(ZeroDivisionError):
            raise ZeroDivisionError
        y = self.features(x)
        return [F.linear(y, self.fc.weight, self.listed[0]), (self.fc.bias, self.listed[0])]


def _reentrant(how: bool | None) -> type[Two]:
    class Checkpointed(Two):
        def stem(self, y: Tensor) -> Tensor:
            return self.b(F.relu(self.n(y))).mean((2, 3))

        def forward(self, x: Tensor, *others: Tensor) -> Any:
            how_to = {} if how is None else {"use_reentrant": how}
            return self.fc(checkpoint(self.stem, self.a(x), **how_to))

    return Checkpointed


# What is computed anew in the backward pass, beside `TRAINING`. The other form stops as soon as it has what the
# backward pass needs, which is the second convolution's input, not its output.
RECOMPUTED = {"checkpoint, reentrant": B, "checkpoint, by default": B, "checkpoint, not reentrant": 0}
ODD |= {
    "checkpoint, reentrant": (_reentrant(True), images),
    "checkpoint, by default": (_reentrant(None), images),
    "checkpoint, not reentrant": (_reentrant(False), images),
}

# -- what cannot be counted, or not all of it --------------------------------------------------------------------------


class ReturnsNothing(Two):
    """Does the backward pass itself."""

    def forward(self, x: Tensor, *others: Tensor) -> Any:
        loss = self.fc(self.features(x)).sum()
        if not self.training:
            return loss
        loss.backward()
        return None


class NeedsHardware(Two):
    """Fails in training, whatever it is given."""

    def forward(self, x: Tensor, *others: Tensor) -> Any:
        if self.training:
            raise RuntimeError("\n\nthe accelerator is on fire\nsecond line")
        return self.fc(self.features(x))


class FailsBackwards(Two):
    def forward(self, x: Tensor, *others: Tensor) -> Any:
        return _NoWayBack.apply(self.fc(self.features(x)))


class _NoWayBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError("there is no way back")


class Text(Two):
    def forward(self, x: Tensor, *others: Tensor) -> Any:
        self.fc(self.features(x))
        return "a bird", None


UNCOUNTED: dict[str, tuple[type[Two], str, bool]] = {  # class, why, whether inference is known
    "returns nothing": (ReturnsNothing, "no floating-point tensor", True),
    "fails in training": (NeedsHardware, "RuntimeError: the accelerator is on fire", True),
    "fails backwards": (FailsBackwards, "there is no way back", True),
    "returns text": (Text, "no floating-point tensor", True),
}
