"""Networks with layer norms, attention, embeddings, recurrent layers: what lies between two layers shrinks."""

from pathlib import Path

import pytest
from shrinking import OPTIMIZERS, check_shrinks

from bench.transformers import TRANSFORMERS

NAMES = [pytest.param(name, marks=pytest.mark.slow if n.slow else ()) for name, n in TRANSFORMERS.items()]
# Least share of the FLOPs, and of the channels between input and output, that can go.
LEAST = {"lstm": (0.05, 0.6), "gru": (0.05, 0.6)}


@pytest.mark.parametrize("name", NAMES)
def test_shrinks_and_trains_on(name: str, tmp_path: Path) -> None:
    number = list(TRANSFORMERS).index(name)
    check_shrinks(
        TRANSFORMERS[name], OPTIMIZERS["sgd" if number % 2 else "adamw"], LEAST.get(name, (0.3, 0.2)), tmp_path
    )
