"""The lasso's maths in float64, written from the formulas alone, and how errors are judged."""

import torch
from torch import Tensor

EPS = 1e-8


def sides(weight: Tensor, block: int = 1, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Norms of the input and of the output groups."""
    w = weight.detach().double().cpu().reshape(weight.shape[0], weight.shape[1] // block, -1)
    return (w.pow(2).sum((0, 2)) + eps).sqrt(), (w.pow(2).sum((1, 2)) + eps).sqrt()


def largest(weight: Tensor, block: int = 1) -> tuple[Tensor, Tensor]:
    w = weight.detach().double().cpu().reshape(weight.shape[0], weight.shape[1] // block, -1).abs()
    return w.amax((0, 2)), w.amax((1, 2))


def gradient(weight: Tensor, block: int, inputs: bool, outputs: bool, eps: float = EPS) -> Tensor:
    w = weight.detach().double().cpu()
    n_in, n_out = sides(weight, block, eps)
    cube = w.reshape(w.shape[0], w.shape[1] // block, -1)
    factor = torch.zeros(cube.shape[:2], dtype=torch.float64)
    factor += (1 / n_in)[None, :] * inputs
    factor += (1 / n_out)[:, None] * outputs
    return (cube * factor[:, :, None]).reshape(w.shape)


def error(value: Tensor, exact: Tensor) -> float:
    """Largest error, relative to the largest exact value."""
    scale = exact.abs().max().clamp_min(1e-30)
    return float((value.detach().double().cpu() - exact.double().cpu()).abs().max() / scale)


def assert_as_exact(value: Tensor, torchs: Tensor, exact: Tensor, floor: float = 0.0) -> None:
    """At most twice as far from the exact result as PyTorch's own operators in the same dtype; `floor` where those
    happen to be exact."""
    mine, theirs = error(value, exact), error(torchs, exact)
    assert mine <= 2 * theirs + floor, f"error {mine:.2e}, PyTorch's own {theirs:.2e}"
