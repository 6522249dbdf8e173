"""Small re-creations of networks with attention, each written as its authors write it."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RmsNorm(nn.Module):
    """Zhang and Sennrich, as language models write it out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotate_half(x: Tensor) -> Tensor:
    """RoPE's turn by a quarter (Su et al., "RoFormer")."""
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), dim=-1)


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """(N, heads, length, features), each head `times` times in a row."""
    n, heads, length, features = x.shape
    return x[:, :, None, :, :].expand(n, heads, times, length, features).reshape(n, heads * times, length, features)


class GroupedQueries(nn.Module):
    """Attention of Llama: rotary positions, a key and value for several queries (Ainslie et al., "GQA")."""

    def __init__(self, width: int, heads: int, kv_heads: int, *, how: str) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim, self.how = heads, kv_heads, width // heads, how
        self.n_rep = heads // kv_heads
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(width, kv_heads * self.head_dim, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=False)
        angles = torch.arange(16)[:, None] / 100 ** (torch.arange(0, self.head_dim, 2) / self.head_dim)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", torch.cat((angles, angles), -1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat((angles, angles), -1).sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q = self.q_proj(x).view(n, length, self.n_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(n, length, self.n_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(n, length, self.n_kv_heads, self.head_dim).transpose(1, 2)
        cos, sin = self.cos[:length].to(x.dtype), self.sin[:length].to(x.dtype)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        if self.how == "by-function":
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            k, v = (
                (repeat_heads(k, self.n_rep), repeat_heads(v, self.n_rep))
                if self.how == "expanded"
                else (t.repeat_interleave(self.n_rep, dim=1) for t in (k, v))
            )
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(n, length, self.n_heads * self.head_dim))


class Llama(nn.Module):
    """A block of Llama behind a linear stem."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.before, self.after, self.last = RmsNorm(16), RmsNorm(16), RmsNorm(16)
        self.attention = GroupedQueries(16, 4, 2, how=how)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.attention(self.before(x))
        y = self.after(x)
        return self.head(self.last(x + self.down(F.silu(self.gate(y)) * self.up(y))))


class RelativeBias(nn.Module):
    """T5 (Raffel et al.): attention without scaling, with a bias for each head from an embedding of distances."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.n_heads, self.inner_dim = heads, width
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.bias = nn.Embedding(9, heads)
        self.stem, self.norm, self.head = nn.Linear(6, width), RmsNorm(width), nn.Linear(width, 3)
        self.wi, self.wo = nn.Linear(width, 24, bias=False), nn.Linear(24, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, length, _ = x.shape
        places = torch.arange(length, device=x.device)
        bias = self.bias((places[None] - places[:, None] + 4).clamp(0, 8)).permute(2, 0, 1).unsqueeze(0)
        y = self.norm(x)
        q, k, v = (layer(y).view(n, length, self.n_heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = F.softmax(torch.matmul(q, k.transpose(3, 2)) + bias, dim=-1)
        x = x + self.o(torch.matmul(weights, v).transpose(1, 2).contiguous().view(n, -1, self.inner_dim))
        return self.head(x + self.wo(F.relu(self.wi(self.norm(x)))))


class Bert(nn.Module):
    """Devlin et al.: attention with a mask, norms behind the sums."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size = heads, width // heads
        self.all_head_size = width
        self.stem, self.head = nn.Linear(6, width), nn.Linear(width, 3)
        self.query, self.key, self.value, self.dense = (nn.Linear(width, width) for _ in range(4))
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)

    def split(self, x: Tensor) -> Tensor:
        shape = (*x.size()[:-1], self.num_attention_heads, self.attention_head_size)
        return x.view(shape).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        mask = (x[:, :, 0] > 1e9)[:, None, None, :].to(x.dtype) * -1e4
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.attention_head_size) + mask
        context = torch.matmul(F.softmax(scores, dim=-1), v).permute(0, 2, 1, 3).contiguous()
        x = self.first(x + self.dense(context.view((*context.size()[:-2], self.all_head_size))))
        return self.head(self.second(x + self.down(F.gelu(self.up(x)))))


class Conformer(nn.Module):
    """Gulati et al.: half feed-forwards around attention and a gated depthwise convolution."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.h, self.d_k = heads, width // heads
        self.stem, self.head = nn.Linear(6, width), nn.Linear(width, 3)
        self.halves = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 20), nn.SiLU(), nn.Linear(20, width)) for _ in range(2)
        )
        self.norm_mha, self.norm_conv, self.norm = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.linear_q, self.linear_k, self.linear_v, self.linear_out = (nn.Linear(width, width) for _ in range(4))
        self.pointwise1, self.pointwise2 = nn.Conv1d(width, 2 * width, 1), nn.Conv1d(width, width, 1)
        self.depthwise = nn.Conv1d(width, width, 3, padding=1, groups=width)
        self.batch_norm = nn.BatchNorm1d(width)

    def attend(self, x: Tensor) -> Tensor:
        n = x.size(0)
        layers = (self.linear_q, self.linear_k, self.linear_v)
        q, k, v = (layer(x).view(n, -1, self.h, self.d_k).transpose(1, 2) for layer in layers)
        weights = torch.softmax(torch.matmul(q, k.transpose(-2, -1)) * 0.5, dim=-1)
        return self.linear_out(torch.matmul(weights, v).transpose(1, 2).contiguous().view(n, -1, self.h * self.d_k))

    def convolve(self, x: Tensor) -> Tensor:
        x = F.glu(self.pointwise1(x.transpose(1, 2)), dim=1)
        return self.pointwise2(F.silu(self.batch_norm(self.depthwise(x)))).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + 0.5 * self.halves[0](x)
        x = x + self.attend(self.norm_mha(x))
        x = x + self.convolve(self.norm_conv(x))
        return self.head(self.norm(x + 0.5 * self.halves[1](x)))


def to_windows(x: Tensor, size: int) -> Tensor:
    """(N, H, W, C) to (windows, size * size, C)."""
    n, h, w, c = x.shape
    x = x.view(n, h // size, size, w // size, size, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size * size, c)


def from_windows(x: Tensor, size: int, h: int, w: int) -> Tensor:
    """The other way round."""
    c = x.shape[-1]
    x = x.view(-1, h // size, w // size, size, size, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, h, w, c)


class CosineAttention(nn.Module):
    """Swin v2 (Liu et al.): normalised queries and keys, a learnt scale for each head, biases from a perceptron."""

    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.num_heads, self.size = heads, size
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), 2.0))
        self.cpb = nn.Sequential(nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, heads, bias=False))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        steps = torch.arange(1 - size, size, dtype=torch.float64)
        self.table: Tensor
        self.places: Tensor
        self.register_buffer("table", torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).view(-1, 2))
        at = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
        off = at[:, :, None] - at[:, None] + size - 1
        self.register_buffer("places", off[0] * (2 * size - 1) + off[1])

    def forward(self, x: Tensor) -> Tensor:
        n, length, c = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        weights = weights * torch.clamp(self.logit_scale, max=4.0).exp()
        bias = self.cpb(self.table)[self.places.view(-1)].view(length, length, -1).permute(2, 0, 1).contiguous()
        weights = (weights + 16 * torch.sigmoid(bias).unsqueeze(0)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, length, c))


class SwinV2(nn.Module):
    """A pair of blocks, the second in shifted windows; patch merging between stages."""

    def __init__(self, width: int = 8, heads: int = 2, size: int = 2) -> None:
        super().__init__()
        self.size = size
        self.embed, self.norm0 = nn.Conv2d(3, width, 1), nn.LayerNorm(width)
        self.attentions = nn.ModuleList(CosineAttention(width, heads, size) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.ups = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(2))
        self.reduction, self.last = nn.Linear(4 * width, 2 * width, bias=False), nn.LayerNorm(2 * width)
        self.head = nn.Linear(2 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(self.embed(x).permute(0, 2, 3, 1))
        h, w = x.shape[1:3]
        for i, shift in enumerate((0, 1)):
            y = torch.roll(x, (-shift, -shift), (1, 2)) if shift else x
            y = from_windows(self.attentions[i](to_windows(y, self.size)), self.size, h, w)
            y = torch.roll(y, (shift, shift), (1, 2)) if shift else y
            x = x + self.norms[2 * i](y)
            x = x + self.norms[2 * i + 1](self.downs[i](F.gelu(self.ups[i](x))))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.head(self.last(self.reduction(x)).mean((1, 2)))


class Attention(nn.Module):
    """Attention with a relative bias in a table of parameters, which a buffer indexes."""

    def __init__(self, width: int, head_dim: int, size: int) -> None:
        super().__init__()
        self.num_heads, self.scale = width // head_dim, head_dim**-0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn((2 * size - 1) ** 2, self.num_heads))
        at = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
        off = at[:, :, None] - at[:, None] + size - 1
        self.places: Tensor
        self.register_buffer("places", off[0] * (2 * size - 1) + off[1], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        qkv = self.qkv(x).view(n, length, self.num_heads, -1).transpose(1, 2).chunk(3, dim=3)
        q, k, v = qkv[0], qkv[1], qkv[2]
        bias = self.table[self.places.view(-1)].view(length, length, -1).permute(2, 0, 1).unsqueeze(0)
        weights = ((q * self.scale) @ k.transpose(-2, -1) + bias).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, length, -1))


class MaxVit(nn.Module):
    """Tu et al.: an inverted bottleneck with squeeze and excitation, attention in blocks and in a grid."""

    def __init__(self, width: int = 8, size: int = 2) -> None:
        super().__init__()
        self.size = size
        self.stem, self.norm0, self.expand = (
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.Conv2d(width, 24, 1),
        )
        self.norm1, self.depthwise = nn.BatchNorm2d(24), nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.reduce, self.excite, self.shrink = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1), nn.Conv2d(24, width, 1)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.attentions = nn.ModuleList(Attention(width, 4, size) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 20), nn.GELU(), nn.Linear(20, width)) for _ in range(2)
        )
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.silu(self.depthwise(F.silu(self.norm1(self.expand(self.norm0(x))))))
        y = y * self.excite(F.silu(self.reduce(y.mean((2, 3), keepdim=True)))).sigmoid()
        x = (x + self.shrink(y)).permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        s = self.size
        blocks = x.view(n, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
        blocks = self._block(0, blocks).view(n, h // s, w // s, s, s, c)
        x = blocks.permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        grid = x.view(n, s, h // s, s, w // s, c).permute(0, 2, 4, 1, 3, 5).reshape(-1, s * s, c)
        grid = self._block(1, grid).view(n, h // s, w // s, s, s, c).permute(0, 3, 1, 4, 2, 5)
        return self.head(grid.reshape(n, h, w, c).mean((1, 2)))

    def _block(self, i: int, x: Tensor) -> Tensor:
        x = x + self.attentions[i](self.norms[2 * i](x))
        return x + self.mlps[i](self.norms[2 * i + 1](x))


class EfficientFormer(nn.Module):
    """Li et al.: pooling as a mixer of maps, layer scales, then attention over tokens."""

    def __init__(self, width: int = 8, heads: int = 2, key: int = 3) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.val_dim, self.val_attn_dim = heads, key, 4, 4 * heads
        self.key_attn_dim = key * heads
        self.stem, self.norm0 = nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width)
        self.scale1, self.scale2 = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))
        self.fc1, self.norm1, self.fc2 = nn.Conv2d(width, 20, 1), nn.BatchNorm2d(20), nn.Conv2d(20, width, 1)
        self.norm2, self.last_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, heads * (2 * key + 4)), nn.Linear(4 * heads, width)
        self.attention_biases = nn.Parameter(torch.randn(heads, 9))
        self.up, self.down, self.head = nn.Linear(width, 20), nn.Linear(20, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm0(self.stem(x)))
        pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x
        x = x + self.scale1.view(-1, 1, 1) * pooled
        x = x + self.scale2.view(-1, 1, 1) * self.fc2(F.gelu(self.norm1(self.fc1(x))))
        x = x.flatten(2).transpose(1, 2)
        y = self.norm2(x)
        n, length, _ = y.shape
        qkv = self.qkv(y).reshape(n, length, self.num_heads, -1).permute(0, 2, 1, 3)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.val_dim], dim=-1)
        weights = (q @ k.transpose(-2, -1)) * 0.5 + self.attention_biases[:, None, :length]
        x = x + self.proj((weights.softmax(-1) @ v).transpose(1, 2).reshape(n, length, self.val_attn_dim))
        return self.head(self.last_norm(x + self.down(F.gelu(self.up(x)))).mean(1))


class ResBlock(nn.Module):
    """A block of diffusion models: group norms, and a scale and shift from the embedded time."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, 2 * outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(F.silu(time))[:, :, None, None].chunk(2, dim=1)
        return self.skip(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))


class HeadsInBatch(nn.Module):
    """Attention of guided diffusion (Dhariwal and Nichol): heads go into the batch, products by einsum."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.norm, self.qkv, self.proj_out = (
            nn.GroupNorm(4, width),
            nn.Conv1d(width, 3 * width, 1),
            nn.Conv1d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        n, c, *spatial = x.shape
        x = x.reshape(n, c, -1)
        qkv = self.qkv(self.norm(x))
        n, width, length = qkv.shape
        features = width // (3 * self.num_heads)
        q, k, v = qkv.reshape(n * self.num_heads, features * 3, length).split(features, dim=1)
        scale = 1 / math.sqrt(math.sqrt(2))
        weights = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), dim=-1)
        mixed = torch.einsum("bts,bcs->bct", weights, v).reshape(n, -1, length)
        return (x + self.proj_out(mixed)).reshape(n, c, *spatial)


class Diffusion(nn.Module):
    """A U-Net for diffusion, of one level; the time is the mean of the image here."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16))
        self.first, self.down = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 16, 3, 2, 1)
        self.one, self.two, self.three = ResBlock(width, width, 16), ResBlock(16, 16, 16), ResBlock(24, width, 16)
        self.attention = HeadsInBatch(16, 2)
        self.up = nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.last = nn.GroupNorm(4, width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.exp(-math.log(100) * torch.arange(4, device=x.device, dtype=x.dtype) / 4)
        angles = x.mean((1, 2, 3))[:, None] * steps[None]
        time = self.time(torch.cat([angles.cos(), angles.sin()], -1))
        fine = self.one(self.first(x), time)
        coarse = self.attention(self.two(self.down(fine), time))
        coarse = self.up(F.interpolate(coarse, scale_factor=2, mode="nearest"))
        x = self.three(torch.cat([coarse, fine], 1), time)
        return self.last(F.silu(self.norm(x)))


MAPS, TOKENS = (3, 6, 6), (5, 6)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "llama-expanded": (lambda: Llama("expanded"), TOKENS),
    "llama-interleaved": (lambda: Llama("interleaved"), TOKENS),
    "llama-by-function": (lambda: Llama("by-function"), TOKENS),
    "t5": (RelativeBias, TOKENS),
    "bert": (Bert, TOKENS),
    "conformer": (Conformer, TOKENS),
    "swin-v2": (SwinV2, (3, 4, 4)),
    "maxvit": (MaxVit, (3, 4, 4)),
    "efficientformer": (EfficientFormer, MAPS),
    "diffusion": (Diffusion, MAPS),
}
