"""A layer whose input nobody understands begins a frozen space, and what lies behind it can go."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetrain_kernels import ChannelGraph, reconfigure, trace_channels

WORDS, WIDTH, HIDDEN = 11, 8, 12


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.words(tokens)


class States(Words):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.recurrent(self.words(tokens))[0]


class Attended(Words):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        return self.attention(x, x, x)[0]


class Unknown(Words):
    def forward(self, tokens: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(self.words(tokens)[..., None] * torch.ones(3), dim=(-1, -2))[..., None].expand(
            -1, -1, WIDTH
        )


class Normed(Words):
    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.words(tokens))


class Perceptron(nn.Module):
    """Two layers behind something; `strange` does to the hidden features what nobody understands."""

    def __init__(self, front: nn.Module, strange: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.front, self.up, self.down = front, nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.last, self.strange = nn.Linear(WIDTH, 3), strange

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.front(tokens)
        hidden = F.gelu(self.up(x))
        if self.strange is not None:
            hidden = self.strange(hidden)
        return self.last(self.down(hidden) + x).mean(1)


def tokens() -> Tensor:
    return torch.randint(WORDS, (4, 5), generator=torch.Generator().manual_seed(0))


def of(graph: ChannelGraph, layer: str) -> tuple[Any, Any]:
    return graph.spaces[graph.layers[layer].input], graph.spaces[graph.layers[layer].output]


def zero_half(model: nn.Module, graph: ChannelGraph) -> None:
    """Zeroes every other channel of each free space, in all layers that have it."""
    with torch.no_grad():
        for layer in graph.layers.values():
            weight: Any = model.get_submodule(layer.name).weight
            for dim, number in zip(layer.dims, (layer.input, layer.output), strict=True):
                space = graph.spaces[number]
                owners = [(number, i) for i in range(space.size)] if space.members is None else space.members.tolist()
                going = [i for i, (n, c) in enumerate(owners) if not graph.spaces[n].frozen and c % 2]
                weight.index_fill_(dim, torch.tensor(going, dtype=torch.int64), 0)


def check_prunes(model: nn.Module, x: Tensor) -> ChannelGraph:
    """Half of what is free goes, and outputs and gradients stay."""
    model = model.double()
    graph = trace_channels(model, (x,))
    zero_half(model, graph)
    twin = copy.deepcopy(model)
    report = reconfigure(model, None, graph.keep(model, 0))
    assert report.changed
    outputs = [m.train()(x) for m in (model, twin)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-9)
    for output in outputs:
        output.square().mean().backward()
    wholes = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.shape == wholes[name].shape:
            torch.testing.assert_close(parameter.grad, wholes[name].grad, rtol=1e-9, atol=1e-9)
    return graph


@pytest.mark.parametrize("front", [States, Attended, Unknown, Normed], ids=lambda f: f.__name__)
def test_hidden_features_go_behind_what_nobody_understands(front: type[Words]) -> None:
    torch.manual_seed(0)
    model = Perceptron(front())
    graph = check_prunes(model, tokens())
    assert of(graph, "up")[0].frozen
    assert of(graph, "up")[0].size == WIDTH
    assert of(graph, "up")[1].frozen is None
    assert of(graph, "up")[1] is of(graph, "down")[0]
    assert (model.up.out_features, model.down.in_features, model.up.in_features) == (HIDDEN // 2, HIDDEN // 2, WIDTH)


@pytest.mark.parametrize(
    "strange",
    [lambda x: x.roll(1, 2), lambda x: x.sort(2)[0], lambda x: x / x.norm(dim=2, keepdim=True), lambda x: x.cumsum(2)],
    ids=["roll", "sort", "norm", "cumsum"],
)
def test_hidden_features_that_something_unknown_reads_stay(strange: Callable[[Tensor], Tensor]) -> None:
    graph = trace_channels(Perceptron(Normed(), strange), (tokens(),))
    assert of(graph, "up")[1].frozen
    assert of(graph, "down")[0].frozen
    assert graph.free_channels == 0


@pytest.mark.parametrize(("norm", "kind"), [(nn.LayerNorm, "LayerNorm"), (nn.RMSNorm, "RMSNorm")])
def test_what_goes_through_a_layer_norm_stays_and_says_so(norm: Callable[[int], nn.Module], kind: str) -> None:
    graph = trace_channels(Perceptron(Normed(norm)), (tokens(),))
    for space in (of(graph, "up")[0], of(graph, "down")[1], of(graph, "last")[0]):
        assert space.frozen is not None
        assert f"'front.norm' ({kind})" in space.frozen


def test_attention_of_pytorch_says_why_no_head_goes() -> None:
    graph = trace_channels(Perceptron(Attended()), (tokens(),))
    assert "'front.attention' (MultiheadAttention)" in str(of(graph, "up")[0].frozen)


def test_unknown_results_get_no_channels_by_guess() -> None:
    """None of the dimensions of a text is a space: not its length, say."""
    graph = trace_channels(Perceptron(States()), (tokens(),))
    assert all(s.size in (WIDTH, HIDDEN, 3) for s in graph.spaces if not s.is_input)


class AcrossPixels(nn.Module):
    """A layer over the width of maps whose channels lie in another dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.across, self.last = nn.Conv2d(3, 6, 1), nn.Linear(4, 8), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.across(self.first(x)).relu())


def test_channels_beside_a_layer_over_another_dimension_stay() -> None:
    graph = trace_channels(AcrossPixels(), (torch.randn(2, 3, 4, 4),))
    assert of(graph, "first")[1].frozen
    assert of(graph, "last")[0].frozen


def test_normalising_other_dimensions_holds_no_channel() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.LayerNorm([4, 4]), nn.ReLU(), nn.Conv2d(8, 2, 1))
    graph = check_prunes(model, torch.randn(2, 3, 4, 4, dtype=torch.float64))
    assert of(graph, "0")[1].frozen is None


# -- heads -------------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Attention with a fused layer; `width_of`: how the forward says how wide its result is."""

    def __init__(self, width_of: str = "attribute", *, mask: bool = False, attribute: str = "num_heads") -> None:
        super().__init__()
        setattr(self, attribute, 4)
        self.attribute, self.head_dim, self.width_of, self.attn_dim = attribute, 3, width_of, 12
        self.qkv, self.project = nn.Linear(WIDTH, 36), nn.Linear(12, WIDTH)
        if mask:
            self.mask = nn.Parameter(torch.randn(4, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        heads = getattr(self, self.attribute)
        q, k, v = self.qkv(x).reshape(n, length, 3, heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, self.mask if hasattr(self, "mask") else None).transpose(1, 2)
        sizes = {"attribute": self.attn_dim, "heads": heads * self.head_dim, "open": -1, "input": width // 2 * 3}
        return self.project(y.reshape(n, length, sizes[self.width_of]))


class WrittenOut(Heads):
    """The same with products written out, in a way of its own for each of query, key and value."""

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        qkv = self.qkv(x).view(n, -1, 3, self.num_heads, self.head_dim)
        q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
        attention = ((q * self.head_dim**-0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.project(torch.matmul(attention, v).transpose(1, 2).flatten(2))


def attending(heads: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Embedding(WORDS, WIDTH), heads, nn.Flatten(), nn.Linear(5 * WIDTH, 3))


@pytest.mark.parametrize(
    "heads",
    [Heads(), Heads("heads"), Heads("open"), Heads(attribute="num_attention_heads"), WrittenOut()],
    ids=["attribute", "product", "open", "other-name", "written-out"],
)
def test_whole_heads_go_and_the_attribute_tells(heads: Heads) -> None:
    model = attending(heads)
    graph = check_prunes(model, tokens())
    assert of(graph, "1.qkv")[1].frozen is None
    assert getattr(heads, heads.attribute) == 2
    assert (heads.qkv.out_features, heads.project.in_features) == (18, 6)
    assert trace_channels(model, (tokens(),)).layers.keys() == graph.layers.keys()


class OwnNumber(Heads):
    """The forward has the number of heads from elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, 4, 3).permute(2, 0, 3, 1, 4).unbind(0)
        return self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "heads", [Heads("input"), Heads(mask=True), OwnNumber()], ids=["width-of-input", "mask-per-head", "own-number"]
)
def test_heads_stay_where_the_forward_would_not_follow(heads: Heads) -> None:
    graph = trace_channels(attending(heads), (tokens(),))
    assert of(graph, "1.qkv")[1].frozen
    assert graph.free_channels == 0 or of(graph, "1.project")[0].frozen
