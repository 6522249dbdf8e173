"""GatedConv2d: the live channels of a convolution, found by index, and the batch norm that places them."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from prunetrain_kernels import InputError
from prunetrain_kernels.nn import BatchNormAct2d, GatedConv2d, pair, unpair
from prunetrain_kernels.ops import ChannelIndex

INPUTS = [[0, 2, 3, 6], [1, 2, 3, 4], [5], None]
OUTPUTS = [[1, 4, 9], [0, 1, 2, 3, 4], [9], None]


def zeroed(inputs: list[int] | None, outputs: list[int] | None, **options: object) -> nn.Conv2d:
    """A convolution of 7 to 10 channels of which only the given ones are not zero."""
    torch.manual_seed(0)
    conv = nn.Conv2d(7, 10, 3, **{"padding": 1, "bias": False, **options}).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for dim, live in ((1, inputs), (0, outputs)):
            if live is not None:
                dead = [c for c in range(conv.weight.shape[dim]) if c not in live]
                conv.weight.index_fill_(dim, torch.tensor(dead), 0)
    return conv


def images() -> Tensor:
    return torch.randn(3, 7, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", [None, "expanded", "naive"])
@pytest.mark.parametrize("outputs", OUTPUTS, ids=str)
@pytest.mark.parametrize("inputs", INPUTS, ids=str)
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 0}, {"dilation": 2, "padding": "same"}], ids=str)
def test_computes_what_the_zeroed_convolution_does(
    inputs: list[int] | None, outputs: list[int] | None, backend: str | None, options: dict[str, object]
) -> None:
    conv = zeroed(inputs, outputs, **options)
    gated = GatedConv2d.of(conv, inputs, outputs, backend)
    assert gated.weight.shape[:2] == (len(outputs or range(10)), len(inputs or range(7)))
    assert (gated.live_out, gated.live_in) == gated.weight.shape[:2]
    assert (gated.in_channels, gated.out_channels) == (7, 10)
    x = images().requires_grad_()
    y, expected = gated(x), conv(x)
    assert torch.allclose(y, expected, rtol=1e-12, atol=1e-13)
    dy = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, [x, gated.weight], dy)
    expected_dx, expected_dw = torch.autograd.grad(expected, [x, conv.weight], dy)
    assert torch.allclose(dx, expected_dx, rtol=1e-12, atol=1e-13)
    expected_dw = expected_dw[outputs or slice(None)][:, inputs or slice(None)]
    assert torch.allclose(dw, expected_dw, rtol=1e-12, atol=1e-12)


def test_a_bias_is_added_to_every_channel() -> None:
    conv = zeroed([0, 2], None, bias=True)
    gated = GatedConv2d.of(conv, [0, 2])
    assert torch.allclose(gated(images()), conv(images()), rtol=1e-12, atol=1e-13)
    with pytest.raises(InputError, match="a bias gives no zeros to leave out"):
        GatedConv2d.of(conv, [0, 2], [1, 2])


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("outputs", [o for o in OUTPUTS if o], ids=str)
def test_paired_with_its_batch_norm(outputs: list[int], training: bool, residual: bool, relu: bool) -> None:
    """The batch norm places the live channels, and adds what it makes of zeros to the others."""
    conv = zeroed(None, outputs)
    gated, norm, plain = GatedConv2d.of(conv, None, outputs), BatchNormAct2d(10).double(), nn.BatchNorm2d(10).double()
    with torch.no_grad():
        for name, low, high in (("weight", 0.5, 2), ("bias", -1, 1), ("running_mean", -1, 1), ("running_var", 0.5, 2)):
            getattr(norm, name).uniform_(low, high)
    plain.load_state_dict(norm.state_dict())
    pair(gated, norm)
    assert norm.places_of is gated
    assert "conv" not in dict(norm.named_modules())
    assert len(list(norm.modules())) == 1  # it holds the convolution, which is no submodule of its
    r = torch.randn(3, 10, 6, 5, dtype=torch.float64) if residual else None
    for m in (gated, norm, plain, conv):
        m.train(training)
    compact = gated(images())
    assert compact.shape[1] == len(outputs)
    y = norm(compact, r, relu=relu)
    expected = plain(conv(images()))
    expected = expected if r is None else expected + r
    expected = torch.relu(expected) if relu else expected
    assert torch.allclose(y, expected, rtol=1e-10, atol=1e-12)
    dy = torch.randn_like(y)
    mine = torch.autograd.grad(y, [gated.weight, norm.weight, norm.bias], dy)
    theirs = torch.autograd.grad(expected, [conv.weight, plain.weight, plain.bias], dy)
    assert torch.allclose(mine[0], theirs[0][outputs], rtol=1e-9, atol=1e-11)
    for a, b in zip(mine[1:], theirs[1:], strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.allclose(getattr(norm, name), getattr(plain, name), rtol=1e-12)
    unpair(norm)
    assert norm.places_of is None
    assert gated(images()).shape[1] == 10


def test_copies_and_pickles_keep_the_pair_to_themselves() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = GatedConv2d.of(zeroed([0, 1], [2, 3, 4]), [0, 1], [2, 3, 4])
            self.norm = BatchNormAct2d(10).double()
            pair(self.conv, self.norm)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x))

    globals()["Two"] = Two
    Two.__qualname__ = "Two"
    model = Two()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.norm.places_of is other.conv
        assert torch.equal(other.eval()(images()), model.eval()(images()))
        assert list(other.state_dict()) == list(model.state_dict())


def test_the_index_is_part_of_the_state() -> None:
    gated = GatedConv2d.of(zeroed([0, 2, 3], [1, 4]), [0, 2, 3], [1, 4])
    other = GatedConv2d.of(zeroed([4, 5, 6], [0, 9]), [4, 5, 6], [0, 9])
    assert "input_index" in gated.state_dict()
    assert "input_inverse" not in gated.state_dict()
    other.load_state_dict(gated.state_dict())
    assert torch.equal(other(images()), gated(images()))
    assert other.maps("input") is not None
    run = GatedConv2d.of(zeroed([4, 5, 6], [0, 9]), [4, 5, 6], [0, 9])
    assert run.maps("input").first == 4  # type: ignore[union-attr]
    run.load_state_dict(gated.state_dict())
    assert run.maps("input").first is None  # type: ignore[union-attr]
    broken = gated.state_dict() | {"input_index": torch.tensor([0, 0, 1], dtype=torch.int32)}
    with pytest.raises(RuntimeError, match="'input_index' cannot be loaded: channel 0 is listed twice"):
        other.load_state_dict(broken)
    with pytest.raises(RuntimeError, match="size mismatch for input_index"):
        other.load_state_dict(gated.state_dict() | {"input_index": torch.tensor([0], dtype=torch.int32)})


def test_moves_converts_and_compiles() -> None:
    gated = GatedConv2d.of(zeroed([0, 2, 3], [1, 4]), [0, 2, 3], [1, 4])
    x = images().float()
    gated.float()
    assert gated.input_index is not None
    assert gated.input_index.dtype == torch.int32
    compiled = torch.compile(gated, fullgraph=True)
    assert torch.allclose(compiled(x), gated(x), atol=1e-5)
    last = gated.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert gated(x).dtype == torch.bfloat16
    assert gated.to("meta").output_inverse.is_meta  # type: ignore[union-attr]
    assert "live=3->2" in repr(gated)


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "it has groups"),
        (nn.Conv2d(4, 4, 3, padding_mode="reflect"), "its padding is 'reflect'"),
        (nn.Conv2d(4, 4, 2, padding="same"), "not the same on both sides"),
        (nn.LazyConv2d(4, 3), "it is a LazyConv2d"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_cannot_be_gated_is_said(conv: nn.Conv2d, message: str) -> None:
    with pytest.raises(InputError, match=message):
        GatedConv2d.of(conv, [0])


def test_bad_arguments_are_one_clear_sentence() -> None:
    conv = zeroed(None, None)
    for options, message in (
        ({"input_index": [7]}, "channel 7 is out of range"),
        ({"output_index": []}, "computes at least one channel"),
        ({"output_index": ChannelIndex([0], 9)}, "the index is into 9 channels, the convolution has 10"),
        ({"backend": "fast"}, "backend 'fast' is not known"),
    ):
        with pytest.raises(InputError, match=message):
            GatedConv2d.of(conv, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="nothing to place"):
        pair(GatedConv2d.of(conv, [0, 1]), BatchNormAct2d(10))
    with pytest.raises(InputError, match="has 9 channels, the convolution 10"):
        pair(GatedConv2d.of(conv, None, [0, 1]), BatchNormAct2d(9))
    paired = BatchNormAct2d(10).double()
    gated = GatedConv2d.of(conv, None, [0, 1])
    pair(gated, paired)
    with pytest.raises(InputError, match="places a gated convolution's channels already"):
        paired(gated(images()), torch.zeros(3, 10, 6, 5), scatter=ChannelIndex([0, 1], 10))
