"""Networks without attention heads, hidden features, groups and frozen statistics that were cut: as plain modules, as
programs, from a checkpoint, and by their shape alone, they compute what the pruned network does."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nets import randomise
from torch import Tensor, nn

from prunetrain_kernels import (
    apply_shape,
    export_program,
    load_pruned,
    pruned_shape,
    reconfigure,
    save_pruned,
    to_dense,
    trace_channels,
)
from prunetrain_kernels.nn import fuse


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(n, length, -1))


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm1, self.norm2 = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention, self.up, self.down = Attention(), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.attention(self.norm1(x))
        return self.head((x + self.down(F.gelu(self.up(self.norm2(x))))).mean(1))


class Grouped(nn.Module):
    """Groups with and without a scale of their own, and an instance norm that has no tensor at all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12)
        self.b, self.m = nn.Conv2d(12, 15, 3), nn.GroupNorm(5, 15, affine=False)
        self.c, self.i, self.head = nn.Conv2d(15, 8, 1), nn.InstanceNorm2d(8), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.m(self.b(F.relu(self.n(self.a(x))))))
        return self.head(F.relu(self.i(self.c(x))))


class FrozenNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.reshape(1, -1, 1, 1) + (self.bias - self.running_mean * scale).reshape(1, -1, 1, 1)


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 8, 3, bias=False), FrozenNorm(8)
        self.b, self.m, self.head = nn.Conv2d(8, 8, 3, padding=1, bias=False), FrozenNorm(8), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.n(self.a(x)))
        return self.head(F.relu(self.m(self.b(x)) + x))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"heads": Vit, "groups": Grouped, "frozen": Frozen}
X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def pruned(name: str) -> tuple[nn.Module, nn.Module]:
    """A pruned network, and its twin with zeros in place of what was cut."""
    torch.manual_seed(0)
    model = randomise(NETWORKS[name]()).double().eval()
    graph = trace_channels(model, (X,))
    with torch.no_grad():
        if isinstance(model, Vit):
            model.attention.qkv.weight.view(3, 4, 4, 16)[:, 1:3] = 0
            model.attention.proj.weight.view(16, 4, 4)[:, 1:3] = 0
            model.up.weight[::3] = 0
            model.down.weight[:, ::3] = 0
        elif isinstance(model, Grouped):
            for conv, reader, size in ((model.a, model.b, 3), (model.b, model.c, 3), (model.c, model.head, 1)):
                conv.weight[size : 3 * size] = 0
                reader.weight[:, size : 3 * size] = 0
        else:
            model.a.weight[[1, 4, 6]] = model.b.weight[[1, 4, 6]] = 0
            model.b.weight[:, [1, 4, 6]] = 0
            model.head.weight[:, [1, 4, 6]] = 0
    twin = copy.deepcopy(model)
    assert reconfigure(model, None, graph.keep(model, threshold=0)).changed
    return model, twin


def assert_computes(model: nn.Module, twin: nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(X), twin.eval()(X), rtol=1e-9, atol=1e-9)


def check_sizes(model: nn.Module) -> None:
    if isinstance(model, Vit):
        assert (model.attention.num_heads, model.attention.qkv.out_features, model.up.out_features) == (2, 24, 16)
    elif isinstance(model, Grouped):
        assert (model.n.num_groups, model.n.num_channels, len(model.n.weight)) == (2, 6, 6)
        assert (model.m.num_groups, model.m.num_channels, model.i.num_features) == (3, 9, 6)
    else:
        assert isinstance(model, Frozen)
        assert [len(b) for b in model.buffers()] == [5] * 8


@pytest.mark.parametrize("name", NETWORKS)
def test_as_plain_modules_and_from_checkpoints(name: str, tmp_path: Path) -> None:
    model, twin = pruned(name)
    check_sizes(model)
    assert_computes(model, twin)
    assert_computes(to_dense(model, (X,)), twin)
    fused = copy.deepcopy(model)
    fuse(fused, (X,))
    assert_computes(fused, twin)
    save_pruned(tmp_path / "a.pt", model)
    loaded = NETWORKS[name]().double()
    load_pruned(tmp_path / "a.pt", loaded)
    shaped = NETWORKS[name]().double()
    apply_shape(shaped, json.loads(json.dumps(pruned_shape(model))))
    shaped.load_state_dict(model.state_dict())
    for other in (loaded, shaped):
        check_sizes(other)
        assert_computes(other, twin)
        reconfigure(other, None, trace_channels(other, (X,)).keep(other, threshold=0))  # may go on shrinking
        assert_computes(other, twin)


@pytest.mark.parametrize("ending", ["pt2", "pt", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NETWORKS)
def test_as_programs(name: str, ending: str, tmp_path: Path) -> None:
    if ending == "onnx":  # its exporter alone takes 10 s
        pytest.importorskip("onnxscript")
    model, twin = pruned(name)
    model, twin = model.float(), twin.float()
    x = X.float()
    done = export_program(model, (x,), tmp_path / f"a.{ending}")
    assert done.max_abs_dy <= 1e-5 * done.scale
    if ending == "pt2":
        program = torch.export.load(tmp_path / "a.pt2").module()
        torch.testing.assert_close(program(x), twin(x), rtol=1e-4, atol=1e-5)
