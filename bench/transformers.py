"""Networks with layer norms, attention, embeddings and recurrent layers, for the zoo tests and docs/architectures.md.

What goes through a layer norm stays; the hidden features between two layers of a block can go.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.zoo import Architecture, import_torchvision


def _vision_transformer() -> nn.Module:
    make = import_torchvision().models.vision_transformer.VisionTransformer
    model: Any = make(32, 8, 2, 4, 32, 64, num_classes=10)
    nn.init.normal_(model.heads.head.weight)  # its own head begins with zeros
    return model


def _vision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model: nn.Module = getattr(import_torchvision().models, name)(weights=None)
        return model

    return build


def _small_swin() -> nn.Module:
    make = import_torchvision().models.swin_transformer.SwinTransformer
    model: nn.Module = make([2, 2], 16, [2, 2], [2, 4], [2, 2], mlp_ratio=2.0, num_classes=10)
    return model


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import_torchvision()
        import timm

        model: nn.Module = timm.create_model(name, pretrained=False, **options)
        return model

    return build


def _timm_class(home: str, name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import_torchvision()
        model: nn.Module = getattr(importlib.import_module(f"timm.models.{home}"), name)(num_classes=10, **options)
        return model

    return build


# -- our own -----------------------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """Attention with a linear layer each for query, key and value, written out as Hugging Face's encoders do."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), -1, self.num_heads, self.head_dim).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, length, width) to the same."""
        query, key, value = self._split(self.query(x)), self._split(self.key(x)), self._split(self.value(x))
        scores = torch.matmul(query, key.transpose(-1, -2)) / self.head_dim**0.5
        context = torch.matmul(F.softmax(scores, dim=-1), value).permute(0, 2, 1, 3).contiguous()
        return self.output(context.view(context.size(0), -1, self.num_heads * self.head_dim))


class EncoderBlock(nn.Module):
    """A block of BERT: attention and two linear layers, a layer norm behind each sum."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.attention_norm = SelfAttention(width, heads), nn.LayerNorm(width)
        self.intermediate, self.output = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.output_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, length, width) to the same."""
        x = self.attention_norm(self.attention(x) + x)
        return self.output_norm(self.output(F.gelu(self.intermediate(x))) + x)


class Encoder(nn.Module):
    """BERT: words and positions embedded, blocks, a pooler on the first token, a classifier."""

    def __init__(self, width: int = 128, heads: int = 2, blocks: int = 2, vocabulary: int = 1000) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(64, width)
        self.position_ids: Tensor
        self.register_buffer("position_ids", torch.arange(64)[None])
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(blocks))
        self.pooler, self.classifier = nn.Linear(width, width), nn.Linear(width, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, length) to (N, 5)."""
        ids = self.position_ids[:, : tokens.shape[1]]
        x = self.norm(self.words(tokens) + self.positions(ids))
        for block in self.blocks:
            x = block(x)
        return self.classifier(torch.tanh(self.pooler(x[:, 0])))


class GatedBlock(nn.Module):
    """A block of language models: root-mean-square norms in front, causal attention, a gated pair of layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.norm, self.qkv, self.project = nn.RMSNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_norm = nn.RMSNorm(width)
        self.gate, self.up = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, length, width) to the same."""
        n, length, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(n, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(n, length, width))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """A language model with the next token's scores for each token."""

    def __init__(self, width: int = 128, heads: int = 2, blocks: int = 2, vocabulary: int = 1000) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(GatedBlock(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, length) to (N, length, vocabulary)."""
        return self.head(self.norm(self.blocks(self.words(tokens))))


class Recurrent(nn.Module):
    """A recurrent network over words, and a perceptron behind its last state."""

    def __init__(self, kind: Any = nn.LSTM, width: int = 64, vocabulary: int = 1000) -> None:
        super().__init__()
        self.words, self.recurrent = nn.Embedding(vocabulary, width), kind(width, width, batch_first=True)
        self.head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(2 * width, width), nn.ReLU(),
            nn.Linear(width, 5),
        )  # fmt: skip

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, length) to (N, 5)."""
        states, _ = self.recurrent(self.words(tokens))
        return self.head(states[:, -1])


class WordConvolutions(nn.Module):
    """Convolutions of several lengths over embedded words, pooled over the text."""

    def __init__(self, width: int = 64, vocabulary: int = 1000) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.convolutions = nn.ModuleList(nn.Conv1d(width, width, size, padding=size // 2) for size in (1, 3, 5))
        self.head = nn.Linear(3 * width, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, length) to (N, 5)."""
        x = self.words(tokens).transpose(1, 2)
        return self.head(torch.cat([F.relu(convolution(x)).amax(2) for convolution in self.convolutions], 1))


class QueryDetector(nn.Module):
    """Detection by queries: a small convolutional backbone, cross-attention of learnt queries, boxes and classes."""

    def __init__(self, width: int = 64, queries: int = 10) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, 2, 1, bias=False), nn.BatchNorm2d(width // 2), nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        )  # fmt: skip
        self.project = nn.Conv2d(width, width, 1)
        self.queries = nn.Parameter(torch.randn(1, queries, width))
        self.attention, self.norm = nn.MultiheadAttention(width, 4, batch_first=True), nn.LayerNorm(width)
        self.up, self.down, self.last_norm = (
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
            nn.LayerNorm(width),
        )
        self.boxes = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
        )
        self.classes = nn.Linear(width, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) to boxes (N, queries, 4) and classes (N, queries, 6)."""
        memory = self.project(self.backbone(x)).flatten(2).transpose(1, 2)
        queries = self.queries.expand(x.shape[0], -1, -1)
        y = self.norm(queries + self.attention(queries, memory, memory, need_weights=False)[0])
        y = self.last_norm(y + self.down(F.relu(self.up(y))))
        return self.boxes(y), self.classes(y)


def _of_class(make: Callable[..., nn.Module], **options: Any) -> Callable[[], nn.Module]:
    return lambda: make(**options)


# -- the list ----------------------------------------------------------------------------------------------------------

_TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
_WORDS = 50
_SMALL = {"width": 32, "vocabulary": _WORDS}

TRANSFORMERS: dict[str, Architecture] = {
    "vit_b_16": Architecture("torchvision", _vision("vit_b_16"), 32, _vision_transformer),
    "swin_t": Architecture("torchvision", _vision("swin_t"), 16, _small_swin),
    "timm:vit_tiny_patch16_224": Architecture(
        "timm", _timm("vit_tiny_patch16_224"), 32, _timm("vit_tiny_patch16_224", **_TINY_VIT)
    ),
    "timm:deit_tiny_distilled_patch16_224": Architecture(
        "timm",
        _timm("deit_tiny_distilled_patch16_224"),
        32,
        _timm("deit_tiny_distilled_patch16_224", **_TINY_VIT),
    ),
    "timm:swin_tiny_patch4_window7_224": Architecture(
        "timm",
        _timm("swin_tiny_patch4_window7_224"),
        32,
        _timm(
            "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=24, depths=(2, 1), num_heads=(2, 4)
        ),
        slow=True,
    ),
    "timm:mixer_s32_224": Architecture(
        "timm",
        _timm("mixer_s32_224"),
        32,
        _timm_class("mlp_mixer", "MlpMixer", img_size=32, patch_size=8, embed_dim=32, num_blocks=2),
    ),
    "timm:pvt_v2_b0": Architecture(
        "timm", _timm("pvt_v2_b0"), 32, _timm("pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=(16, 32, 40, 64)), slow=True
    ),
    "timm:poolformer_s12": Architecture(
        "timm",
        _timm("poolformer_s12"),
        32,
        _timm_class("metaformer", "MetaFormer", depths=(1, 1, 1, 1), dims=(16, 24, 32, 48), mlp_act=nn.GELU),
    ),
    "timm:xcit_nano_12_p16_224": Architecture(
        "timm", _timm("xcit_nano_12_p16_224"), 32, _timm("xcit_nano_12_p16_224", depth=2, img_size=32), slow=True
    ),
    "timm:mobilevit_xxs": Architecture("timm", _timm("mobilevit_xxs"), 64, page_size=256, slow=True),
    "encoder": Architecture(
        "own", Encoder, 12, _of_class(Encoder, **_SMALL), page_size=64, vocabulary=_WORDS
    ),
    "decoder": Architecture("own", Decoder, 12, _of_class(Decoder, **_SMALL), page_size=64, vocabulary=_WORDS),
    "lstm": Architecture("own", Recurrent, 8, _of_class(Recurrent, **_SMALL), page_size=64, vocabulary=_WORDS),
    "gru": Architecture(
        "own", _of_class(Recurrent, kind=nn.GRU), 8, _of_class(Recurrent, kind=nn.GRU, **_SMALL), page_size=64,
        vocabulary=_WORDS,
    ),
    "word_convolutions": Architecture(
        "own", WordConvolutions, 12, _of_class(WordConvolutions, **_SMALL), page_size=64, vocabulary=_WORDS
    ),
    "query_detector": Architecture("own", QueryDetector, 16, _of_class(QueryDetector, width=32), page_size=64),
}  # fmt: skip
