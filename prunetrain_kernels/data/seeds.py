"""Random numbers that depend on names and numbers alone."""

from __future__ import annotations

import hashlib

import torch


def seeded_generator(stream: str, *numbers: int) -> torch.Generator:
    """A CPU generator that depends only on a name and integers; another name or integer gives an unrelated stream."""
    # a hash, because seed + epoch would make (seed 1, epoch 0) the same as (seed 0, epoch 1)
    digest = hashlib.blake2b(repr((stream, *map(int, numbers))).encode(), digest_size=7).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little"))
