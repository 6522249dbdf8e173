"""Gradients over the wire."""

import pytest
import torch
from torch import nn

from prunetrain_kernels.cost import (
    Cluster,
    gradient_bytes,
    hierarchical_all_reduce_bytes,
    hierarchical_all_reduce_seconds,
    ring_all_reduce_bytes,
)
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


def test_two_levels_send_what_each_level_sends() -> None:
    # 8 GPUs in groups of 4: 3 + 3 messages of a quarter inside, 1 + 1 messages of an eighth between the two groups
    assert hierarchical_all_reduce_bytes(1024, 8, group=4) == pytest.approx(6 * 256 + 2 * 128)
    assert hierarchical_all_reduce_bytes(1024, 1) == 0
    assert hierarchical_all_reduce_bytes(1024, 8, group=8) == ring_all_reduce_bytes(1024, 8)  # one group is a ring
    half = [hierarchical_all_reduce_bytes(512, n) / hierarchical_all_reduce_bytes(1024, n) for n in (16, 128, 256)]
    assert half == pytest.approx([0.5] * 3)
    for gpus in (0, 12):
        with pytest.raises(InputError, match=r"GPUs|gpus"):
            hierarchical_all_reduce_bytes(1024, gpus)


def test_seconds_are_latencies_and_bytes_over_the_links() -> None:
    cluster = Cluster(gpus_per_node=4, node_gb_s=1.0, network_gb_s=0.5, node_latency_us=2.0, network_latency_us=3.0)
    inside, between = 6 * (2e-6 + 256e-9), 2 * (3e-6 + 128e-9 / 0.5)
    assert hierarchical_all_reduce_seconds(1024, 8, cluster) == pytest.approx(inside + between)
    assert hierarchical_all_reduce_seconds(1024, 1, cluster) == 0
