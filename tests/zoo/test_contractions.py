"""Networks with einsum, matrix products, rotations of heads and windows shrink twice as their masked twins do."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from twice import inner_reasons, shrink_twice
from zoo_kit import distance, kill, outputs_of, randomise

from prunetrain_kernels import ChannelGraph, reconfigure, trace_channels
from prunetrain_kernels.graph.prunable import prunable

OVER = "is over its channels"


class Experts(nn.Module):
    """Convolutional experts side by side, weighted by a gate and added up."""

    def __init__(self, equation: str = "") -> None:
        super().__init__()
        self.stem, self.gate = nn.Conv2d(3, 12, 3, padding=1), nn.Linear(12, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(12, 8, 1), nn.ReLU(), nn.Conv2d(8, 10, 1)) for _ in range(3)
        )
        self.head, self.equation = nn.Linear(10, 4), equation

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        gate = self.gate(x.mean((2, 3))).softmax(1)
        y = torch.stack([expert(x) for expert in self.experts], 1)
        y = torch.einsum(self.equation, y, gate) if self.equation else (y * gate[:, :, None, None, None]).sum(1)
        return self.head(y.mean((2, 3)))


class DenseGraph(nn.Module):
    """Kipf and Welling, "Semi-Supervised Classification with Graph Convolutional Networks", with a dense graph."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(5, 12), nn.Linear(12, 10), nn.Linear(10, 3)
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        edges = torch.cdist(x, x).neg().softmax(-1)
        y = F.relu(torch.bmm(edges, self.one(x)))
        return self.head(F.relu(edges @ self.two(y))) + self.out(torch.einsum("...ij,...jc->...ic", edges, y))


class NonLocal(nn.Module):
    """Wang et al., "Non-local Neural Networks": query and key are summed over, the values' channels can go."""

    def __init__(self, *, fused: bool = False) -> None:
        super().__init__()
        self.stem, self.head, self.fused = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 4, 1), fused
        self.query, self.key, self.value = (nn.Conv2d(12, 6, 1) for _ in range(3))
        self.project = nn.Conv2d(6, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        query, key, value = (part(x).flatten(2).transpose(1, 2) for part in (self.query, self.key, self.value))
        if self.fused:
            y = F.scaled_dot_product_attention(query, key, value)
        else:
            y = torch.matmul(torch.matmul(query, key.mT).softmax(-1), value)
        y = y.transpose(1, 2).reshape(x.size(0), -1, x.size(2), x.size(3))
        return self.head(self.project(y) + x)


class HeadScale(nn.Module):
    """A factor for each head, in a module of its own: one with tensors is no place for a number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.rand(3, 1, 1))

    def forward(self, scores: Tensor) -> Tensor:
        return scores * self.log.clamp(max=4.6).exp()


class Heads(nn.Module):
    """What the forms of attention by heads share."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = 3, 3, 4
        self.q, self.k, self.v = (nn.Linear(5, 12) for _ in range(3))
        self.project = nn.Linear(12, 3)

    def parts(self, x: Tensor) -> list[Tensor]:
        n, length, _ = x.shape
        counts = (self.num_heads, self.num_key_value_heads, self.num_key_value_heads)
        layers = zip((self.q, self.k, self.v), counts, strict=True)
        return [layer(x).view(n, length, count, self.head_dim) for layer, count in layers]


class Linear(Heads):
    """Katharopoulos et al., "Transformers are RNNs": three sums of products over heads."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        memory = torch.einsum("nshd, nshm -> nhmd", k, v)
        scale = 1 / (torch.einsum("nlhd,nhd->nlh", q, k.sum(dim=1)) + 1e-6)
        y = torch.einsum("nlhd,nhmd,nlh->nlhm", [q, memory, scale])
        return self.project(y.reshape(x.size(0), x.size(1), -1))


class Rotary(Heads):
    """Su et al., "RoFormer": halves of each head turned by an angle for each place; a causal mask."""

    def rotated(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1], dtype=x.dtype)
        half = torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)
        return x * angle.cos() + half * angle.sin()

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = (part.transpose(1, 2) for part in self.parts(x))
        scores = torch.matmul(self.rotated(q), self.rotated(k).transpose(2, 3)) / 2
        mask = torch.full((length, length), -1e9, dtype=x.dtype).triu(1)
        y = torch.matmul((scores + mask).softmax(-1), v)
        return self.project(y.transpose(1, 2).reshape(n, length, -1))


class Cosine(Heads):
    """Liu et al., "Swin Transformer V2": normalised queries and keys, and a scale for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = HeadScale()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in self.parts(x))
        scores = self.scale(F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT)
        return self.project((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Windows(nn.Module):
    """Weights for each window's pixels, by unfold; then what each pixel has had in all windows, by fold."""

    def __init__(self, *, modules: bool = False) -> None:
        super().__init__()
        self.stem, self.weights = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 1, 1)
        self.value, self.head = nn.Conv2d(12, 10, 1), nn.Conv2d(10, 4, 1)
        self.unfold: Any = nn.Unfold(3, padding=1) if modules else lambda x: F.unfold(x, 3, padding=1)
        self.fold: Any = nn.Fold((6, 6), 3, padding=1) if modules else lambda x: F.fold(x, (6, 6), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.value(F.relu(self.stem(x)))
        windows = self.unfold(y).view(y.shape[0], y.shape[1], 9, 36)
        mixed = (windows * self.weights(x).flatten(2).unsqueeze(1).sigmoid()).sum(2).view(y.shape[0], y.shape[1], 6, 6)
        return self.head(mixed + self.fold(self.unfold(y)))


class Scaled(nn.Module):
    """A factor for each channel by einsum, with `...` and with letters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
        self.g = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bchw,c->bchw", self.stem(x), self.g)
        return self.head(torch.einsum("...c,c->...c", y.movedim(1, 3), self.g).movedim(3, 1))


MAPS, TOKENS = (3, 6, 6), (7, 5)
# Of each: how to build it, an example's size, and how many channels can go: of gates and scores none.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "experts": (Experts, MAPS, 12 + 3 * 8 + 10),
    "experts-by-einsum": (lambda: Experts("bechw,be->bchw"), MAPS, 12 + 3 * 8 + 10),
    "experts-by-other-letters": (lambda: Experts("aEbcd,aE -> abcd"), MAPS, 12 + 3 * 8 + 10),
    "dense-graph": (DenseGraph, TOKENS, 12 + 10),
    "non-local": (NonLocal, MAPS, 12 + 6),
    "non-local-fused": (lambda: NonLocal(fused=True), MAPS, 12 + 6),
    "linear-attention": (lambda: nn.Sequential(Linear()), TOKENS, 3),
    "rotary": (lambda: nn.Sequential(Rotary()), TOKENS, 3),
    "cosine": (lambda: nn.Sequential(Cosine()), TOKENS, 3),
    "windows": (Windows, MAPS, 12 + 10),
    "windows-by-modules": (lambda: Windows(modules=True), MAPS, 12 + 10),
    "scaled": (Scaled, MAPS, 8),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_shrinks_twice(name: str) -> None:
    build, size, free = NETWORKS[name]
    torch.manual_seed(0)
    model: Any = randomise(build()).double()
    number = list(NETWORKS).index(name)
    optimizer = (SGD(model.parameters(), lr=1e-3, momentum=0.9), AdamW(model.parameters(), lr=1e-4))[number % 2]
    batches = [torch.randn(3, *size, dtype=torch.float64) for _ in range(3)]

    def look(graph: ChannelGraph) -> None:
        assert graph.tracer == "torch.fx"
        assert prunable(graph).channels == free, str(graph)
        assert not graph.doubts

    shrink_twice(model, optimizer, batches, look)
    if free == 3:
        assert model[0].num_heads == model[0].num_key_value_heads == model[0].q.out_features // 4 < 3


class Mixed(nn.Module):
    """An operation between two convolutions and a head."""

    def __init__(self, operation: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1), nn.Linear(6, 2)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.operation(self.a(x), self.b(x)))


SUMMED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "einsum-over-channels": (lambda a, b: torch.einsum("bchw,bchw->bhw", a, b), f"'einsum' {OVER}"),
    "einsum-without-arrow": (lambda a, b: b.mean((2, 3)) + torch.einsum("bchw,bcxw", a, b).sum(), f"'einsum' {OVER}"),
    "matmul-over-channels": (lambda a, b: a.movedim(1, 3) @ b.movedim(1, 2), f"'matmul' {OVER}"),
    "outer-product": (lambda a, b: torch.einsum("bchw,bdhw->bcd", a, b), "'einsum' reads it"),
    "diagonal": (lambda a, b: torch.einsum("bccw->bw", a) + b.mean((1, 2)), "'einsum' reads it"),
    "bmm-of-both": (lambda a, b: torch.bmm(a.flatten(2), b.flatten(2).mT), "'bmm' reads it"),
    "sum-of-a-row": (lambda a, b: a.mean((2, 3)) @ torch.ones(6, 6, dtype=a.dtype), f"'matmul' {OVER}"),
}


@pytest.mark.parametrize("name", SUMMED)
def test_what_is_summed_over_stays_and_says_so(name: str) -> None:
    operation, reason = SUMMED[name]
    torch.manual_seed(0)
    model, x = randomise(Mixed(operation)).double(), torch.randn(3, 3, 6, 6, dtype=torch.float64)
    graph = trace_channels(model, (x,))
    assert reason in str(graph.spaces[graph.layers["a"].output].frozen), inner_reasons(graph)
    kill(graph, model, share=0.4, partly=0.2, seed=0)
    expected = outputs_of(copy.deepcopy(model), x)
    reconfigure(model, None, graph.keep(model, threshold=0))
    assert distance(outputs_of(model, x), expected) <= 1e-9
