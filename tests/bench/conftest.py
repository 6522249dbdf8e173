"""Every test of `bench` runs on one thread: timings of tiny tensors on several are noise."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.set_flush_denormal(False)  # PruneTrain's constructor switches it on, in a module's fixtures too
