"""Single-bit flips of a checkpoint: refused in one sentence, or loaded to the very same bits."""

import random
import tempfile
from pathlib import Path
from typing import Any

from prunetrain_kernels import CheckpointError, load_pruned, save_pruned
from tests.torture.report import Outcomes
from tests.torture.subjects import Patient, built, identities_of, patient, values_of


def saved(path: Path) -> Patient:
    """A pruned training, which the file holds."""
    one = patient()
    one.prunetrain.reconfigure()
    one.step()
    save_pruned(path, one.model, one.optimizer, one.prunetrain, [one.ema], epoch=3)
    return one


def load(path: Path, into: Patient) -> Any:
    return load_pruned(path, into.model, into.optimizer, into.prunetrain, [into.ema])


def is_sentence(error: BaseException) -> bool:
    text = str(error)
    return "\n" not in text and text.endswith(".") and len(text) < 600


def run(count: int = 200, seed: int = 0) -> Outcomes:
    outcomes, chance = Outcomes("bit flips", ("refused", "loaded to the same bits")), random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.pt"
        saved(path)
        content = path.read_bytes()
        fresh = built(seed=5)
        before, objects = values_of(fresh), identities_of(fresh)
        load(path, sound := built(seed=5))
        loaded = values_of(sound)
        for _ in range(count):
            place, bit = chance.randrange(len(content)), chance.randrange(8)
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            what = f"bit {bit} of byte {place} of {len(content)}"
            try:
                load(path, fresh)
            except CheckpointError as error:
                if not is_sentence(error):
                    outcomes.fault(f"{what}: refused with {error}")
                elif values_of(fresh) != before or identities_of(fresh) != objects:
                    outcomes.fault(f"{what}: refused, and changed")
                    fresh = built(seed=5)
                    objects = identities_of(fresh)
                else:
                    outcomes.add("refused")
                continue
            except Exception as error:
                outcomes.fault(f"{what}: {type(error).__name__} {error}")
            else:
                if values_of(fresh) == loaded:
                    outcomes.add("loaded to the same bits")
                else:
                    outcomes.fault(f"{what}: accepted, with other contents")
            fresh = built(seed=5)
            objects = identities_of(fresh)
    return outcomes
