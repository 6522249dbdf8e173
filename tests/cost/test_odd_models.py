"""Costs of models that are unlike a classifier of images: right where they can be counted, unknown where not."""

import math
from typing import Any

import pytest
import torch
from odd_models import INFERENCE, ODD, RECOMPUTED, TRAINING, UNCOUNTED, Two, images
from torch import Tensor, nn

from prunetrain_kernels.cost import (
    Flops,
    Unknown,
    batch_norm_bytes,
    count_flops,
    count_flops_by_layer,
    flop_table,
    or_unknown,
    reasons,
    share,
    share_text,
    step_memory,
)
from prunetrain_kernels.errors import InputError


@pytest.mark.parametrize("name", ODD)
def test_flops_by_hand(name: str) -> None:
    kind, inputs = ODD[name]
    assert count_flops(kind(), inputs()) == Flops(TRAINING + RECOMPUTED.get(name, 0), INFERENCE)


@pytest.mark.parametrize("name", ODD)
def test_by_layer_adds_up(name: str) -> None:
    kind, inputs = ODD[name]
    by_layer = count_flops_by_layer(kind(), inputs())
    assert sum(by_layer.values()) == INFERENCE
    assert by_layer["a"] == 2 * 16 * 3 * 9 * 36


@pytest.mark.parametrize("name", ODD)
def test_the_table_says_what_is_counted_or_is_none(name: str) -> None:
    kind, inputs = ODD[name]
    model, x = kind(), inputs()
    counted, table = flop_table(model, x)
    assert counted == count_flops(model, x)
    assert table is None or table.flops(model) == counted


@pytest.mark.parametrize("name", ODD)
def test_batch_norm_bytes_by_hand(name: str) -> None:
    kind, inputs = ODD[name]
    layers = 2 if name == "a view made without gradients" else 1
    assert batch_norm_bytes(kind(), inputs()) == layers * 8 * 4 * 16 * 36


@pytest.mark.parametrize("name", ODD)
def test_memory_of_the_given_inputs_and_of_twice_as_many(name: str) -> None:
    kind, inputs = ODD[name]
    model, x = kind(), inputs()
    memory = step_memory(model, x)
    trained = sum(p.numel() for p in model.parameters())
    assert memory.bytes(len(x[0])) >= 3 * 4 * trained  # weights, gradients, momentum
    # the images, and what both convolutions, the batch norm and the ReLU save, but inside of a checkpoint
    saved = 3 * 64 + (16 * 36 if name in RECOMPUTED else 2 * 16 * 36)
    assert memory.per_image >= 4 * saved
    assert memory.bytes(4 * len(x[0])) == pytest.approx(
        step_memory(model, x, batches=(2 * len(x[0]), 4 * len(x[0]))).bytes(4 * len(x[0])), rel=1e-6
    )


def test_one_image_that_batch_norm_refuses_is_given_twice() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4))
    assert count_flops(model, images(1)) == Flops(2 * 2 * 4 * 3 * 64, 2 * 4 * 3 * 64)
    assert batch_norm_bytes(model, images(1)) == 8 * 4 * 4
    assert step_memory(model, images(1)).per_image > 0


def test_flops_of_the_batch_as_it_is_given_per_image_of_the_first_input() -> None:
    class Support(nn.Module):
        """Five examples that all others are compared with."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return y[5:] @ y[:5].t()

    # (5 + 15) images through the layer, then 15 x 5 products of 6
    assert count_flops(Support(), (torch.randn(20, 4),)).inference == (20 * 2 * 24 + 15 * 5 * 2 * 6) // 20
    with pytest.raises(InputError, match="first example input must have the batch as dimension 0"):
        count_flops(Support(), (torch.tensor(1.0), torch.randn(20, 4)))


# -- unknown -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNCOUNTED)
def test_what_cannot_be_counted_is_unknown_and_says_why(name: str) -> None:
    kind, why, inference = UNCOUNTED[name]
    flops, table = flop_table(kind(), images())
    assert math.isnan(flops.training)
    assert (flops.inference == INFERENCE) == inference
    assert why in flops.unknown
    assert "\n" not in flops.unknown
    assert table is None
    with pytest.raises(InputError, match=why):
        count_flops(kind(), images())


def test_both_unknown_for_one_reason_say_it_once() -> None:
    flops, _ = flop_table(Two(), (torch.randn(4, 5, 8, 8),))
    assert math.isnan(flops.training)
    assert math.isnan(flops.inference)
    assert flops.unknown.count("training mode") == flops.unknown.count("evaluation mode") == 1
    assert all(map(math.isnan, flops.of(Flops(1, 1))))
    assert all(map(math.isnan, Flops(1, 1).of(flops)))


def test_unknown_is_a_value() -> None:
    def fails(error: Exception) -> None:
        raise error

    assert or_unknown(lambda: 3) == 3
    assert or_unknown(fails, RuntimeError("first\nsecond")) == Unknown("first")
    assert or_unknown(fails, KeyError()) == Unknown("KeyError")
    assert "memory" in str(or_unknown(fails, torch.OutOfMemoryError("CUDA out of memory")))
    assert str(Unknown("why")) == "unknown: why"
    assert share(1, 4) == 0.25
    assert share(0, 0) == 1
    assert math.isnan(share(math.nan, 4))
    assert math.isnan(share(1, math.nan))
    assert (share_text(0.25), share_text(math.nan)) == ("25.0%", "unknown")
    assert reasons({"FLOPs": "x.", "memory": "x", "BN bytes": "", "d": "y"}) == "FLOPs, memory: x; d: y"


def test_batch_norm_inside_torchscript_is_not_counted_as_none() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), torch.jit.script(nn.BatchNorm2d(4)))
    with pytest.raises(InputError, match=r"torch\.jit\.script made of '1'"):
        batch_norm_bytes(model, images())


# -- mixed precision ---------------------------------------------------------------------------------------------------


def saved_in_a_real_forward(model: nn.Module, x: Tensor, amp: torch.dtype | None) -> int:
    """Bytes of the input and of what autograd saves, each storage once, but parameters and buffers."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    keep(x)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=amp or torch.bfloat16, enabled=amp is not None),
    ):
        y = model.train()(x)
    assert y.requires_grad
    there = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in there)


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
def test_memory_under_autocast_is_that_of_a_real_forward(amp: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model, count = Two(), 12
    expected = saved_in_a_real_forward(model, *images(count), amp)
    resident = sum(t.nbytes for t in model.buffers()) + 3 * sum(p.nbytes for p in model.parameters())
    assert step_memory(model, images(), amp=amp).bytes(count) == pytest.approx(resident + expected, rel=2e-3)


def test_convolutions_save_half_under_autocast() -> None:
    """The image stays as it is given; what follows is half."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
    image = 4 * 3 * 64
    wide, narrow = step_memory(model, images()), step_memory(model, images(), amp=torch.bfloat16)
    assert narrow.per_image - image - image // 2 == pytest.approx((wide.per_image - image) / 2)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_batch_norm_moves_half_under_autocast(amp: torch.dtype) -> None:
    assert batch_norm_bytes(Two(), images(), amp=amp) * 2 == batch_norm_bytes(Two(), images())
    assert count_flops(Two(), images(), amp=amp) == count_flops(Two(), images())


@pytest.mark.parametrize("cost", [step_memory, batch_norm_bytes])
def test_the_autocast_around_the_call_does_not_matter(cost: Any) -> None:
    model = Two()
    expected, narrow = cost(model, images()), cost(model, images(), amp=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cost(model, images()) == expected
        assert cost(model, images(), amp=torch.bfloat16) == narrow
    assert expected != narrow


def test_a_device_without_autocast_says_so() -> None:
    with torch.device("meta"):
        model, x = Two(), torch.randn(4, 3, 8, 8)
    with pytest.raises(InputError, match="no automatic mixed precision on the device 'meta'"):
        batch_norm_bytes(model, (x,), amp=torch.bfloat16)
