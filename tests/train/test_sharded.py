"""Networks whose parameters are spread over processes (FSDP2) are refused, with the way out."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from prunetrain_kernels import InputError, PruneTrain, reconfigure, trace_channels

fsdp = pytest.importorskip("torch.distributed.fsdp")


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_fully_sharded_networks_are_refused() -> None:
    x = (torch.randn(2, 6),)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    keep = trace_channels(model, x).keep(model)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    fsdp.fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for attempt in (
        lambda: PruneTrain(model, optimizer, x),
        lambda: trace_channels(model, x),
        lambda: reconfigure(model, optimizer, keep),
    ):
        with pytest.raises(InputError, match=r"'0.weight' is sharded over processes"):
            attempt()
