"""Small trainings that are tortured, and all that must stay as it was of them."""

import io
import random
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from prunetrain_kernels import MiniBatch, PruneTrain
from prunetrain_kernels.optim import SGD

NEITHER = ("seconds", "compile_seconds", "compilations")  # of entries in the history: measured times


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c1, self.c2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.n1, self.n2 = (nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.n2(self.c2(F.relu(self.n1(self.c1(x))))))


class Subject(nn.Module):
    """Two residual blocks, with dropout."""

    def __init__(self, width: int = 8, classes: int = 3, channels: int = 3) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.a, self.b = Block(width), Block(width)
        self.drop, self.fc = nn.Dropout(0.1), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(F.relu(self.norm(self.stem(x)))))
        return self.fc(self.drop(x.mean((2, 3))))


@dataclass
class Patient:
    """A training in the middle of its life, about to lose channels and a branch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    prunetrain: PruneTrain
    ema: AveragedModel
    scheduler: Any
    x: Tensor
    y: Tensor
    losses: list[float] = field(default_factory=list)

    def step(self) -> float:
        self.optimizer.zero_grad()
        loss = self.prunetrain.regularize(F.cross_entropy(self.model(self.x), self.y))
        loss.backward()
        self.optimizer.step()
        self.ema.update_parameters(self.model)
        return float(loss.detach())


WAYS = ("plain", "gated", "inside")


def built(way: str = "plain", seed: int = 0) -> Patient:
    """A training as it begins.

    Args:
        way: "plain", Adam and a batch that grows; "gated", fused batch norms and gating; "inside", the lasso inside the
            optimizer's update.
    """
    torch.manual_seed(seed)
    model = Subject()
    if way == "plain":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    elif way == "gated":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    else:
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    ema = AveragedModel(model, use_buffers=True)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5])
    x, y = torch.randn(6, 3, 6, 6), torch.randint(3, (6,))
    prunetrain = PruneTrain(
        model,
        optimizer,
        (x[:2],),
        interval=1,
        also=[ema],
        scheduler=scheduler,
        batch=MiniBatch(8, granularity=1) if way == "plain" else None,
        policy="gating" if way == "gated" else "union",
        fuse=way == "gated",
        zeroing_tolerance=1.0,
    )
    return Patient(model, optimizer, prunetrain, ema, scheduler, x, y)


def patient(way: str = "plain") -> Patient:
    """A training of a step that is about to lose channels and, but for gating, a branch."""
    one = built(way)
    one.step()
    wither(one, way)
    return one


@torch.no_grad()
def wither(one: Patient, way: str) -> None:
    for network in (one.model, one.ema.module):
        a, b = network.a, network.b
        for dead, block in ((slice(0, 3), a), (slice(2, 4), b)):
            block.c1.weight[dead] = 0
            block.c2.weight[:, dead] = 0
        a.c1.weight[3] = 1e-6
        if way != "gated":
            b.c2.weight.zero_()


# -- what must stay as it was ------------------------------------------------------------------------------------------


def values_of(one: Patient) -> dict[str, Any]:
    """All values of a training, by which "before" and "after" are told apart; no objects, no measured times."""
    prunetrain = one.prunetrain
    batch, optimizer = prunetrain.batch, one.optimizer
    networks = {"model": one.model, "average": one.ema}
    return {
        **{f"tensors of the {name}": _tensors(network) for name, network in networks.items()},
        **{f"modules of the {name}": _modules(network) for name, network in networks.items()},
        "optimizer": _plain(optimizer.state_dict()),
        "scheduler": _plain(one.scheduler.state_dict()),
        "mini-batch": None if batch is None else _plain({**batch.state_dict(), "memory": repr(batch.memory)}),
        "PruneTrain": _plain({k: v for k, v in prunetrain.state_dict().items() if k not in ("history", "batch")}),
        "history": [{k: v for k, v in entry.items() if k not in NEITHER} for entry in prunetrain.history],
        "graph": [(s.size, s.frozen is None) for s in prunetrain.graph.spaces],
        "lasso": sorted(prunetrain.lasso.coefficients.items()),
        "FLOPs": repr(prunetrain.flops),
        **surroundings(),
    }


def surroundings() -> dict[str, Any]:
    """What is the whole process's, or thread's."""
    return {
        "gradient mode": torch.is_grad_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), str(torch.get_autocast_dtype("cpu"))),
        "modes": (torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()),
        "patches": (id(nn.Module.__call__), id(nn.Module.__getattr__)),
        "random numbers": (torch.get_rng_state().numpy().tobytes(), random.getstate()[1][:5]),
    }


def identities_of(one: Patient) -> list[int]:
    """The objects that a change which is undone must leave in place."""
    things = [*one.model.parameters(), *one.ema.parameters(), *one.model.modules(), *one.optimizer.param_groups]
    prunetrain = one.prunetrain
    return [*map(id, things), id(prunetrain.present), id(prunetrain.history), id(prunetrain.optimizers)]


def _tensors(model: nn.Module) -> list[Any]:
    tensors = (*model.named_parameters(), *model.named_buffers())
    return [(n, t.dtype, t.stride(), _bytes(t), None if t.grad is None else _bytes(t.grad)) for n, t in tensors]


def _bytes(tensor: Tensor) -> tuple[Any, bytes]:
    return tuple(tensor.shape), tensor.detach().contiguous().numpy().tobytes()


COUNTED = ("_fused_part",)  # numbers that go on counting through the whole process


def _modules(model: nn.Module) -> list[Any]:
    return [
        (
            name,
            type(module).__name__,
            sorted((k, v) for k, v in vars(module).items() if isinstance(v, int) and k not in COUNTED),
            sorted(vars(module)),
            [len(v) for k, v in sorted(vars(module).items()) if k.endswith("_hooks")],
        )
        for name, module in model.named_modules()
    ]


def _plain(value: Any) -> Any:
    """A value with bytes in place of tensors, to be compared by `==`."""
    if isinstance(value, Tensor):
        return _bytes(value)
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float | int | str | bool | None):
        return repr(value)
    return str(value)


def difference(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The names of the parts that differ."""
    return [name for name in a if a[name] != b[name]]


def bytes_of(payload: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return buffer.getvalue()
