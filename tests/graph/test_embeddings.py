"""Embeddings and tables begin channels: what nobody reads of a word goes, and the words' tensors are cut with it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from prunetrain_kernels import load_pruned, reconfigure, save_pruned, trace_channels

WORDS, WIDTH = 11, 8


class Reader(nn.Module):
    """Words and places added, read by a convolution over the text."""

    def __init__(self, words: nn.Module | None = None) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, padding_idx=0) if words is None else words
        self.places = nn.Embedding(5, WIDTH)
        self.table = nn.Parameter(torch.randn(4, WIDTH))
        self.conv, self.head = nn.Conv1d(WIDTH, 6, 3, padding=1), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        x = x + self.table[tokens % 4]
        return self.head(F.relu(self.conv(x.transpose(1, 2))).mean(2))


def tokens() -> Tensor:
    return torch.randint(WORDS, (4, 5), generator=torch.Generator().manual_seed(0))


def zero_columns(model: Any, columns: list[int]) -> None:
    with torch.no_grad():
        model.conv.weight[:, columns] = 0


def test_words_lose_what_nobody_reads(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = Reader().double()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    model(tokens()).square().mean().backward()
    optimizer.step()
    graph = trace_channels(model, (tokens(),))
    space = graph.spaces[graph.layers["conv"].input]
    assert (space.size, space.frozen, space.is_input) == (WIDTH, None, False)
    assert sorted(space.followers) == ["places", "table", "words"]
    zero_columns(model, [1, 4, 6])
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    reconfigure(model, optimizer, graph.keep(model, 0))
    assert (model.words.embedding_dim, model.places.embedding_dim) == (WIDTH - 3, WIDTH - 3)
    assert model.words.weight.shape == (WORDS, WIDTH - 3)
    assert model.table.shape == (4, WIDTH - 3)
    kept = [0, 2, 3, 5, 7]
    for _ in range(3):
        for network, steps in ((model, optimizer), (twin, twin_optimizer)):
            steps.zero_grad()
            network(tokens()).square().mean().backward()
            steps.step()
        zero_columns(twin, [1, 4, 6])
        torch.testing.assert_close(model(tokens()), twin(tokens()), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.words.weight, twin.words.weight[:, kept], rtol=1e-9, atol=1e-9)
    save_pruned(tmp_path / "pruned.pt", model, optimizer)
    fresh = Reader().double()
    load_pruned(tmp_path / "pruned.pt", fresh, AdamW(fresh.parameters(), lr=1e-3))
    assert fresh.words.embedding_dim == WIDTH - 3
    torch.testing.assert_close(fresh(tokens()), model(tokens()), rtol=0, atol=0)


class Tied(nn.Module):
    """A language model whose last layer has the words' weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.words(tokens) + F.relu(self.hidden(self.words(tokens))))


def picked_by_features(tokens: Tensor) -> nn.Module:
    """An embedding behind the largest feature of another one: its number is not a channel's."""

    class Picked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Embedding(WORDS, WIDTH), nn.Embedding(WIDTH, 6), nn.Linear(6, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.second(self.first(tokens).argmax(-1)))

    return Picked()


@pytest.mark.parametrize(
    ("build", "words", "reason"),
    [
        (lambda: Reader(nn.Embedding(WORDS, WIDTH, max_norm=1.0)), "words", "which is not followed"),
        (Tied, "words", "share a parameter"),
        (lambda: picked_by_features(tokens()), "first", "is over its channels"),
    ],
    ids=["max-norm", "tied", "picked"],
)
def test_words_stay_where_something_else_needs_them(build: Callable[[], nn.Module], words: str, reason: str) -> None:
    model = build()
    graph = trace_channels(model, (tokens(),))
    assert any(space.frozen and reason in space.frozen and space.size == WIDTH for space in graph.spaces), str(graph)
    if words in graph.followers:
        assert graph.spaces[graph.followers[words].space].frozen
