"""Small re-creations of networks that people train: normalisers of their own, gates, generators, detectors."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]


class FrozenBatchNorm(nn.Module):
    """DETR's and detectron2's: a batch norm of four buffers (Carion et al., "DETR", models/backbone.py)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        variance, mean = self.running_var.reshape(1, -1, 1, 1), self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (variance + 1e-5).rsqrt()
        return x * scale + (b - mean * scale)


class Bottleneck(nn.Module):
    """A residual block of three convolutions with any normaliser."""

    def __init__(self, inputs: int, width: int, norm: Norm, stride: int = 1) -> None:
        super().__init__()
        self.one, self.n1 = nn.Conv2d(inputs, width, 1, bias=False), norm(width)
        self.two, self.n2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), norm(width)
        self.three, self.n3 = nn.Conv2d(width, 2 * width, 1, bias=False), norm(2 * width)
        self.down = nn.Sequential(nn.Conv2d(inputs, 2 * width, 1, stride, bias=False), norm(2 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.n2(self.two(F.relu(self.n1(self.one(x))))))
        return F.relu(self.n3(self.three(y)) + self.down(x))


def residual(norm: Norm) -> nn.Module:
    """A ResNet of two bottlenecks."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU(), Bottleneck(8, 8, norm), Bottleneck(16, 12, norm, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip


class StandardisedConv(nn.Conv2d):
    """Qiao et al., "Weight Standardization", with a gain for each output as in NF-ResNets (Brock et al.)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(outputs, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / torch.sqrt(variance + 1e-4) * self.gain
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class NormaliserFree(nn.Module):
    """An NF-ResNet's blocks: standardised weights, scalar gains, squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 12, 3, padding=1), StandardisedConv(12, 16), nn.Conv2d(16, 12, 1)
        self.alpha = nn.Parameter(torch.tensor(0.2))
        self.squeeze, self.excite = nn.Linear(12, 8), nn.Linear(8, 12)
        self.last, self.head = StandardisedConv(12, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x)) * 1.7
        y = self.two(F.silu(self.one(x)) * 1.7)
        gate = self.excite(F.relu(self.squeeze(y.mean((2, 3))))).sigmoid()
        x = x + y * gate[:, :, None, None] * 2 * self.alpha
        return self.head(F.silu(self.last(x)).mean((2, 3)))


class NafBlock(nn.Module):
    """Chen et al., "NAFNet": simple gates, simple channel attention, beta and gamma (without its LayerNorm)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.grow, self.deep = nn.Conv2d(channels, 2 * channels, 1), nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.attend, self.back = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.wide, self.narrow = nn.Conv2d(channels, 2 * channels, 1), nn.Conv2d(channels, channels, 1)
        self.beta = nn.Parameter(torch.rand(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.rand(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.deep(self.grow(x)).chunk(2, dim=1)
        y = one * two
        y = x + self.back(y * self.attend(F.adaptive_avg_pool2d(y, 1))) * self.beta
        one, two = self.wide(y).chunk(2, dim=1)
        return y + self.narrow(one * two) * self.gamma


class LayerScales(nn.Module):
    """Two layer scales of one block in one module (Touvron et al., "CaiT"), as (C,) beside a map of all pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.rand(8, 1, 1)), nn.Parameter(torch.rand(8))
        self.place = nn.Parameter(torch.rand(1, 8, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.place
        x = x + self.gamma_1 * self.one(x)
        y = self.down(F.gelu(self.up(x.permute(0, 2, 3, 1)))) * self.gamma_2
        return self.head((x + y.permute(0, 3, 1, 2)).mean((2, 3)))


class ReIdentification(nn.Module):
    """A backbone with GeM pooling (Radenovic et al.) and BNNeck, whose features are an output beside the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1)
        )
        self.p = nn.Parameter(torch.tensor([3.0]))
        self.embed, self.neck, self.head = nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.body(x).clamp(min=1e-3).pow(self.p)
        y = F.avg_pool2d(y, (y.size(-2), y.size(-1))).pow(1.0 / self.p).flatten(1)
        return {"classes": self.head(self.neck(self.embed(y)))}


class Generator(nn.Module):
    """DCGAN's generator that begins with a linear layer (Radford et al.)."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.project, self.norm = nn.Linear(10, width * 16), nn.BatchNorm2d(width)
        self.up1, self.n1 = nn.ConvTranspose2d(width, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.up2 = nn.ConvTranspose2d(8, 3, 4, 2, 1)

    def forward(self, z: Tensor) -> Tensor:
        x = F.relu(self.norm(self.project(z).view(z.shape[0], -1, 4, 4)))
        return torch.tanh(self.up2(F.relu(self.n1(self.up1(x)))))


class EqualisedConv(nn.Module):
    """Karras et al., "ProGAN": weights drawn at scale 1 and scaled in the forward, with noise for each channel."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.bias, self.strength = nn.Parameter(torch.rand(outputs)), nn.Parameter(torch.rand(outputs))
        self.scale = (inputs * 9) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight * self.scale, padding=1)
        noise = x.new_ones(x.shape[0], 1, x.shape[2], x.shape[3])  # a random map in StyleGAN
        x = x + noise * self.strength.view(1, -1, 1, 1)
        return F.leaky_relu(x + self.bias[None, :, None, None], 0.2)


class Equalised(nn.Module):
    """StyleGAN's synthesis without its styles: pixel norm stays away, for it mixes channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.rgb = EqualisedConv(3, 8), EqualisedConv(8, 12), EqualisedConv(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.rgb(F.interpolate(self.second(self.first(x)), scale_factor=2, mode="bilinear", align_corners=False))


class GatedConvolutions(nn.Module):
    """Dauphin et al., "Gated convolutional networks": GLUs, and a residual of the same width."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(3, 16, 3, padding=1), nn.Conv1d(8, 16, 3, padding=1)
        self.norm, self.gate, self.head = nn.BatchNorm1d(8), nn.GLU(dim=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.one(x.flatten(2)), dim=1)
        return self.head((self.norm(x) + self.gate(self.two(x))).mean(2))


class SegNet(nn.Module):
    """Badrinarayanan et al., "SegNet": the decoder puts values back where pooling took them from."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.up2, self.up1 = nn.Conv2d(12, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        one = F.relu(self.down1(x))
        x, places1 = self.pool(one)
        two = F.relu(self.down2(x))
        x, places2 = self.pool(two)
        x = self.up2(self.unpool(x, places2, output_size=two.size()))
        return self.up1(self.unpool(F.relu(x), places1, output_size=one.size()))


class SpatialTransformer(nn.Module):
    """Jaderberg et al., "Spatial transformer networks", on a map of features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8)
        self.look, self.theta = nn.Conv2d(8, 6, 3, padding=1), nn.Linear(6, 6)
        self.after, self.head = nn.Conv2d(8, 12, 3, padding=1), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        theta = self.theta(F.relu(self.look(x)).mean((2, 3))).view(-1, 2, 3)
        x = F.grid_sample(x, F.affine_grid(theta, x.size(), align_corners=False), align_corners=False)
        return self.head(F.relu(self.after(x)).mean((2, 3)))


class UNet(nn.Module):
    """A U-Net that resizes to the size of what it concatenates with, arguments by name, and masks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 12, 1)
        self.up, self.last = nn.Conv2d(20, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = F.relu(self.a(x))
        two = F.relu(self.b(F.max_pool2d(input=one, kernel_size=2, ceil_mode=True)))
        two = torch.where(self.c(two) > 0, two, two.masked_fill(two < 0.1, 0.5))
        two = F.interpolate(input=two, size=one.shape[2:], mode="bilinear", align_corners=False)
        return self.last(F.relu(self.up(torch.cat(tensors=[one, two], dim=1))))


class C2f(nn.Module):
    """The block of small ultralytics detectors: one half goes through bottlenecks, and all stages are concatenated."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.width = outputs // 2
        self.first, self.last = nn.Conv2d(inputs, outputs, 1), nn.Conv2d(3 * self.width, outputs, 1)
        self.one, self.two = (nn.Conv2d(self.width, self.width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.first(x).chunk(2, 1))
        y.append(y[-1] + self.two(F.silu(self.one(y[-1]))))
        return F.silu(self.last(torch.cat(y, 1)))


class Detector(nn.Module):
    """A detector without anchors: C2f, SPPF, two maps, boxes and classes; its maps go in and out as lists."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.down = nn.Conv2d(3, 8, 3, 2, 1), C2f(8, 12), nn.Conv2d(12, 16, 3, 2, 1)
        self.before, self.after = nn.Conv2d(16, 8, 1), nn.Conv2d(32, 16, 1)
        self.boxes = nn.ModuleList(nn.Conv2d(c, 4, 1) for c in (12, 16))
        self.classes = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 1)) for c in (12, 16)
        )

    def _pyramid(self, image: Tensor) -> list[Tensor]:
        fine = self.block(F.silu(self.stem(image)))
        maps = [F.silu(self.before(F.silu(self.down(fine))))]
        for _ in range(3):
            maps.append(F.max_pool2d(maps[-1], 3, 1, 1))
        return [fine, self.after(torch.cat(maps, 1))]

    def forward(self, image: Tensor) -> list[dict[str, Tensor]]:
        maps = {"fine": self._pyramid(image)[0], "coarse": self._pyramid(image)[1]}
        return [
            {"boxes": box(x).exp().flatten(2), "classes": kind(x).flatten(2)}
            for box, kind, x in zip(self.boxes, self.classes, maps.values(), strict=True)
        ]


class Translator(nn.Module):
    """PyTorch's own transformer, over tokens of 6 features; its decoder reads learnt queries, as DETR's does."""

    def __init__(self, *, norm_first: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.transformer = nn.Transformer(16, 4, 1, 1, 24, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.queries = nn.Parameter(torch.randn(1, 4, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.transformer(self.embed(x), self.queries.expand(x.shape[0], -1, -1)))


class HeadsBySize(nn.Module):
    """Attention of Hugging Face's encoders: heads are split by the size of each; torch.fx cannot follow the forward."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.num_attention_heads, self.head_dim = heads, width // heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.o_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 64:
            raise ValueError("too long")
        sizes = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (layer(x).view(sizes).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        mask = torch.ones(x.shape[0], 1, x.shape[1], x.shape[1], dtype=torch.bool)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mixed = mixed.reshape(x.shape[0], -1, x.shape[1], self.head_dim)
        return self.o_proj(mixed.transpose(1, 2).reshape(*x.shape[:-1], -1).contiguous())


class FacesEncoder(nn.Module):
    """A block of Hugging Face's vision transformers behind an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.attention, self.before, self.after = HeadsBySize(), nn.LayerNorm(16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(self.before(x))
        return self.head((x + self.down(F.gelu(self.up(self.after(x))))).mean(1))


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(channels // 4, channels)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "resnet-frozen-batch-norm": (lambda: residual(FrozenBatchNorm), (3, 8, 8)),
    "resnet-group-norm": (lambda: residual(group_norm), (3, 8, 8)),
    "resnet-instance-norm": (lambda: residual(lambda c: nn.GroupNorm(c, c)), (3, 8, 8)),
    "normaliser-free": (NormaliserFree, (3, 8, 8)),
    "nafnet": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), NafBlock(8), NafBlock(8), nn.Conv2d(8, 3, 1)), (3, 8, 8)),
    "layer-scales": (LayerScales, (3, 8, 8)),
    "re-identification": (ReIdentification, (3, 8, 8)),
    "generator": (Generator, (10,)),
    "equalised": (Equalised, (3, 6, 6)),
    "gated-convolutions": (GatedConvolutions, (3, 4, 4)),
    "segnet": (SegNet, (3, 8, 8)),
    "spatial-transformer": (SpatialTransformer, (3, 8, 8)),
    "unet": (UNet, (3, 7, 7)),
    "detector": (Detector, (3, 8, 8)),
    "translator": (lambda: Translator(norm_first=False), (5, 6)),
    "translator-norm-first": (lambda: Translator(norm_first=True), (5, 6)),
    "heads-by-size": (FacesEncoder, (5, 6)),
}
