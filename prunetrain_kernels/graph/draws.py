"""Random numbers that two runs of one model have in common, whatever either of them draws in between.

A traced program draws at tracing what the forward's Python draws, and later what its operations draw; the model draws
both as it goes. So that the two can be compared, a random number here depends on what asks for it and how often that
has asked, not on the order. Where several numbers are drawn at once they are all equal, as if there were no noise: a
network with fewer channels draws the same.
"""

import random
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result is nothing but the numbers drawn.
DRAWN = {
    "rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "uniform_", "normal_", "exponential_",
    "cauchy_", "log_normal_", "geometric_", "random_",
}  # fmt: skip


class Draws(TorchDispatchMode):
    """PyTorch's random numbers inside `drawing`.

    Attributes:
        seed: another seed gives other numbers.
        drawn: how many operators have asked for random numbers since it was last set to 0.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.drawn = 0
        self.asked: Counter[str] = Counter()
        self.generators: dict[torch.Generator, Tensor] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: PyTorch would else import its compiler, which takes seconds, only to keep it away from this class."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        self.drawn += 1
        name = func.overloadpacket.__name__
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if name == "bernoulli_" and not isinstance(args[1] if len(args) > 1 else 0.5, Tensor) and args[0].numel() > 1:
            return args[0].fill_(args[1] if len(args) > 1 else 0.5)
        self._seed(name, kwargs.get("generator"))
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.numel() == 1:
            self.asked[name] += 1
        elif isinstance(result, Tensor) and name in DRAWN:
            result.fill_(result.flatten()[0])
        return result

    def _seed(self, name: str, generator: torch.Generator | None) -> None:
        number = zlib.crc32(f"{self.seed} {name} {self.asked[name]}".encode())
        if generator is None:
            torch.manual_seed(number)
        else:
            self.generators.setdefault(generator, generator.get_state())
            generator.manual_seed(number)


@contextmanager
def drawing(model: nn.Module, seed: int) -> Iterator[Draws]:
    """Inside, random numbers of PyTorch, Python, NumPy, and of generators that the model's modules hold depend on
    `seed` alone. Those generators are afterwards as they were; for the global ones this is inside `probe.unchanged`."""
    draws = Draws(seed)
    undo = [_seed_generator(generator, seed) for generator in generators_of(model)]
    seed_global(seed)
    try:
        with draws:
            yield draws
    finally:
        for put_back in undo:
            put_back()
        for generator, state in draws.generators.items():
            generator.set_state(state)


def seed_global(seed: int) -> None:
    """Seeds Python's and NumPy's generators; PyTorch's are seeded at every draw."""
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)


def generators_of(model: nn.Module) -> list[Any]:
    """Generators of random numbers in the attributes of the model's modules."""
    numpy = sys.modules.get("numpy")
    kinds: tuple[type, ...] = (random.Random, torch.Generator)
    if numpy is not None:
        kinds = (*kinds, numpy.random.Generator, numpy.random.RandomState)
    generators = [
        generator for module in model.modules() for generator in vars(module).values() if isinstance(generator, kinds)
    ]
    return list({id(generator): generator for generator in generators}.values())


def _seed_generator(generator: Any, seed: int) -> Callable[[], None]:
    """Seeds a generator of any of the kinds in `generators_of`; returns a function that restores its state."""
    if isinstance(generator, random.Random):
        python_state = generator.getstate()
        generator.seed(seed)
        return lambda: generator.setstate(python_state)
    if isinstance(generator, torch.Generator):
        torch_state = generator.get_state()
        generator.manual_seed(seed)
        return lambda: (generator.set_state(torch_state), None)[1]
    if hasattr(generator, "bit_generator"):
        bits = generator.bit_generator
        bits_state = bits.state
        bits.state = type(bits)(seed).state
        return lambda: setattr(bits, "state", bits_state)
    numpy_state = generator.get_state()
    generator.seed(seed)
    return lambda: generator.set_state(numpy_state)
