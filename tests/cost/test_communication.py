"""Gradients over the wire."""

import pytest
import torch
from torch import nn

from prunetrain_kernels.cost import gradient_bytes, ring_all_reduce_bytes
from prunetrain_kernels.errors import InputError


def test_trainable_parameters_once_in_their_dtype() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
    model[3].weight = model[2].weight
    assert gradient_bytes(model) == 4 * (15 + 5 + 10 + 25)
    model[0].weight.requires_grad_(False)
    assert gradient_bytes(model) == 4 * (5 + 10 + 25)
    assert gradient_bytes(model.to(torch.bfloat16)) == 2 * (5 + 10 + 25)


def test_ring() -> None:
    # count what each member of a ring sends, chunk by chunk
    for gpus in (1, 2, 4, 128):
        chunk = 1024 / gpus
        sent = sum(chunk for _ in range(gpus - 1)) + sum(chunk for _ in range(gpus - 1))
        assert ring_all_reduce_bytes(1024, gpus) == pytest.approx(sent)
    with pytest.raises(InputError, match="gpus must be at least 1"):
        ring_all_reduce_bytes(1024, 0)
