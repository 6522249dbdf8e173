"""Small networks whose forward passes numbers of channels that their modules hold as attributes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Scales(nn.Module):
    """The block of Res2Net (Gao et al.): equal pieces, each convolved with the sum of what came before."""

    def __init__(self, width: int = 4, scales: int = 3) -> None:
        super().__init__()
        self.width = width
        self.first, self.last = nn.Conv2d(3, width * scales, 1), nn.Conv2d(width * scales, 8, 1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(scales - 1))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(scales - 1))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.split(F.relu(self.first(x)), self.width, 1)
        done = [pieces[-1]]
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            done.append(F.relu(norm(conv(pieces[i] + done[-1]))))
        return self.head(self.last(torch.cat(done, 1)).mean((2, 3)))


class DualPath(nn.Module):
    """The block of DPN (Chen et al.): the first channels are added, the others are kept beside each other."""

    def __init__(self, inputs: int, added: int, more: int) -> None:
        super().__init__()
        self.added, self.more = added, more
        self.project = nn.Conv2d(inputs, added + more, 1) if inputs != added + 2 * more else None
        self.body = nn.Sequential(nn.Conv2d(inputs, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.last = nn.Conv2d(6, added + more, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = x if self.project is None else self.project(x)
        y = self.last(self.body(x))
        return torch.cat([kept[:, : self.added] + y[:, : self.added], kept[:, self.added :], y[:, self.added :]], 1)


class DualPaths(nn.Module):
    """Two blocks, of which the second adds to the first one's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), DualPath(5, 6, 3), DualPath(12, 6, 3))
        self.norm, self.head = nn.BatchNorm2d(15), nn.Linear(15, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.blocks(x))).mean((2, 3)))


class Mixed(nn.Module):
    """Mixed depthwise convolutions (Tan and Le, "MixConv"): pieces of sizes in a list, a kernel for each."""

    def __init__(self) -> None:
        super().__init__()
        self.splits = [5, 4, 3]
        self.first, self.last = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 3, 1)
        self.convs = nn.ModuleList(
            nn.Conv2d(n, n, k, padding=k // 2, groups=n) for n, k in zip(self.splits, (1, 3, 5), strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.split(F.relu(self.first(x)), self.splits, 1)
        return self.last(torch.cat([conv(piece) for conv, piece in zip(self.convs, pieces, strict=True)], 1))


class ByNumber(nn.Module):
    """Slices between two numbers, from the end, and one that a sum of two tells."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.value, self.rest = 4, 4, 6
        self.first, self.last = nn.Conv2d(3, 14, 1), nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        gate, value = x[:, : self.gate], x[:, self.gate : self.gate + self.value]
        return self.last(torch.cat([gate.sigmoid() * value, F.relu(x[:, -self.rest :])], 1))


class Selective(nn.Module):
    """Selective kernels (Li et al.): a product of attributes, a quotient, and a softmax over branches."""

    def __init__(self, width: int = 6, paths: int = 2) -> None:
        super().__init__()
        self.in_channels, self.num_paths = width * paths, paths
        self.first = nn.Conv2d(3, width * paths, 1)
        self.paths = nn.ModuleList(nn.Conv2d(width, width, 2 * i + 1, padding=i) for i in range(paths))
        self.reduce, self.select = nn.Conv2d(width, 5, 1), nn.Conv2d(5, width * paths, 1)
        self.last = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.split(self.first(x), self.in_channels // self.num_paths, 1)
        x = torch.stack([F.relu(path(pieces[i])) for i, path in enumerate(self.paths)], 1)
        weights = self.select(F.relu(self.reduce(x.sum(1).mean((2, 3), keepdim=True))))
        weights = weights.view(x.shape[0], self.num_paths, self.in_channels // self.num_paths, 1, 1)
        return self.last((x * weights.softmax(1)).sum(1))


class Generator(nn.Module):
    """A linear layer whose features become maps, of a number of channels that an attribute tells."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.side = 8, 4
        self.first, self.norm = nn.Linear(10, 8 * 16), nn.BatchNorm2d(8)
        self.last = nn.ConvTranspose2d(8, 3, 2, stride=2)

    def forward(self, z: Tensor) -> Tensor:
        x = self.first(z).view(-1, self.width, self.side, self.side)
        return self.last(F.relu(self.norm(x)))


class Recurrent(nn.Module):
    """A convolutional LSTM (Shi et al.) whose state begins with zeros: an attribute tells their number of channels."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.hidden = hidden
        self.gates, self.last = nn.Conv2d(3 + hidden, 4 * hidden, 3, padding=1), nn.Conv2d(hidden, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], self.hidden, x.shape[2], x.shape[3], dtype=x.dtype, device=x.device)
        c = x.new_zeros(x.shape[0], self.hidden, x.shape[2], x.shape[3])
        for _ in range(2):
            i, f, o, g = torch.split(self.gates(torch.cat([x, h], 1)), self.hidden, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.last(h)


class State(nn.Module):
    """A gated recurrent unit written out, over a sequence."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.hidden_size = hidden
        self.inputs, self.states, self.head = nn.Linear(6, 2 * hidden), nn.Linear(hidden, 2 * hidden), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], self.hidden_size, dtype=x.dtype)
        for t in range(3):
            gates = self.inputs(x[:, t]) + self.states(h)
            gate, new = gates[:, : self.hidden_size], gates[:, self.hidden_size :]
            gate = torch.sigmoid(gate)
            h = gate * h + (1 - gate) * torch.tanh(new)
        return self.head(h)


class FunctionalDepthwise(nn.Module):
    """A depthwise convolution by its function, with the number of groups from an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = 8
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)
        self.blur = Blur(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blur(F.relu(self.first(x))))


class Blur(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.randn(channels, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1, groups=self.channels)


class Shuffled(nn.Module):
    """A channel shuffle of which both sizes are attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.groups, self.each = 2, 5
        self.first, self.second, self.last = nn.Conv2d(3, 10, 1), nn.Conv2d(10, 10, 1), nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        n, _, h, w = x.shape
        x = x.view(n, self.groups, self.each, h, w).transpose(1, 2).reshape(n, self.groups * self.each, h, w)
        return self.last(F.relu(self.second(x)))


class Levit(nn.Module):
    """Attention of LeViT (Graham et al.): pieces of each head by attributes; features of the values may go."""

    def __init__(self, width: int = 12, heads: int = 2, key: int = 3, value: int = 6) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.val_dim, self.val_attn_dim = heads, key, value, heads * value
        self.stem, self.qkv = nn.Linear(6, width), nn.Linear(width, heads * (2 * key + value))
        self.biases = nn.Parameter(torch.randn(heads, 5, 5))
        self.project, self.head = nn.Linear(heads * value, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, length, _ = x.shape
        sizes = [self.key_dim, self.key_dim, self.val_dim]
        q, k, v = self.qkv(x).view(n, length, self.num_heads, -1).split(sizes, dim=3)
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
        weights = (q @ k * 0.5 + self.biases).softmax(-1)
        y = (weights @ v).transpose(1, 2).reshape(n, length, self.val_attn_dim)
        return self.head((x + self.project(F.hardswish(y))).mean(1))


MAPS, TOKENS = (3, 6, 6), (5, 6)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "scales": (Scales, MAPS),
    "dual-paths": (DualPaths, MAPS),
    "mixed": (Mixed, MAPS),
    "by-number": (ByNumber, MAPS),
    "selective": (Selective, MAPS),
    "generator": (Generator, (10,)),
    "recurrent": (Recurrent, MAPS),
    "state": (State, TOKENS),
    "functional-depthwise": (FunctionalDepthwise, MAPS),
    "shuffled": (Shuffled, MAPS),
    "levit": (Levit, TOKENS),
}
