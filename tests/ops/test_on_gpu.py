"""What only a GPU can show (tier T2): the same bits every time, CUDA graphs, tensors past 2^31 elements.

The tests called `sanitized` are small, and also meant to be run under `compute-sanitizer`.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fences import fenced, layout
from torch import Tensor, nn

from prunetrain_kernels.ops.batch_norm_act import batch_norm_act
from prunetrain_kernels.ops.channel_index import ChannelIndex, channel_gather, channel_scatter, channel_scatter_add
from prunetrain_kernels.ops.group_lasso import Groups, add_group_lasso_gradient_, group_lasso, slice_statistics
from prunetrain_kernels.optim import SGD, ProximalSGD
from prunetrain_kernels.regularizer import GroupLasso

pytestmark = pytest.mark.t0

RUNS = 20
LARGE = 2**31 + 2**20  # elements


@pytest.fixture(autouse=True)
def _needs_a_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("shows what only a GPU can: run with PRUNETRAIN_TEST_DEVICE=cuda")


def activation(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, stored: str = "channels_last"
) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator, device=device).to(dtype)
    return fenced(layout(x, stored))


def batch_norm(
    x: Tensor, dy: Tensor, residual: Tensor | None = None, scatter: ChannelIndex | None = None
) -> list[Tensor]:
    """Output, gradients and running statistics of a training batch norm with ReLU."""
    width = x.shape[1]
    mean, var = torch.zeros(width, device=x.device), torch.ones(width, device=x.device)
    weight = torch.linspace(0.5, 1.5, width, device=x.device, requires_grad=True)
    bias = torch.linspace(-1, 1, width, device=x.device, requires_grad=True)
    inputs = [x.detach().requires_grad_(), weight, bias]
    if residual is not None:
        inputs.append(residual.detach().requires_grad_())
    y = batch_norm_act(
        inputs[0], mean, var, weight, bias, training=True, residual=None if residual is None else inputs[3], relu=True,
        scatter=scatter,
    )  # fmt: skip
    return [y.detach(), mean, var, *torch.autograd.grad(y, inputs, dy)]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 37, 3, padding=1)
        self.bn = nn.BatchNorm2d(37)
        self.conv2 = nn.Conv2d(37, 130, 3, padding=1)
        self.fc = nn.Linear(130 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.conv2(self.bn(self.conv1(x))), 1))


def regularized(
    optimizer_class: type[SGD], device: torch.device, lr: float | Tensor = 0.1
) -> tuple[list[nn.Parameter], SGD]:
    """A small network's parameters with gradients, and an optimizer with the lasso inside."""
    torch.manual_seed(0)
    model = Network()
    lasso = GroupLasso(model, (torch.zeros(1, 3, 2, 2),))
    model.to(device)
    parameters = list(model.parameters())
    for p in parameters:
        p.grad = torch.randn(p.shape).to(device)
    optimizer = optimizer_class(parameters, lr, momentum=0.9, weight_decay=1e-4)
    optimizer.regularize_with(lasso, 1e-2)
    return parameters, optimizer


def all_operators(device: torch.device, dtype: torch.dtype, batch: int, side: int, stored: str) -> list[Tensor]:
    """One result list of every operator, forward and backward, at awkward channel counts."""
    x, dy = (activation((batch, 37, side, side), device, dtype, stored) for _ in range(2))
    index = ChannelIndex([*range(0, 36, 2), 35], 65, device)
    full, dy_full = (activation((batch, 65, side, side), device, dtype, stored) for _ in range(2))
    part = activation((batch, index.live, side, side), device, dtype, stored)
    results = [*batch_norm(x, dy), *batch_norm(x, dy, activation(tuple(x.shape), device, dtype, stored) + 1)]
    results += batch_norm(part, dy_full, full, index)
    full.requires_grad_()
    part.requires_grad_()
    for out in (channel_gather(full, index), channel_scatter(part, index), channel_scatter_add(full, part, index)):
        results += [out.detach(), *torch.autograd.grad(out.float().square().sum(), [full, part], allow_unused=True)]
    results = [r for r in results if r is not None]

    generator = torch.Generator(device).manual_seed(0)
    weights = [torch.randn(s, generator=generator, device=device) for s in ((130, 37, 3, 3), (7, 12), (64, 64, 1, 1))]
    weights = [fenced(w.to(dtype)).requires_grad_() for w in weights]
    groups = [Groups(), Groups(block=4, inputs=False), Groups(outputs=False)]
    for pair in zip(*slice_statistics(weights, groups), strict=True):
        results += [part for side_pair in pair for part in side_pair]
    penalty = group_lasso(weights, groups)
    results += [penalty.detach(), *torch.autograd.grad(penalty, weights)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    results.append(add_group_lasso_gradient_(weights, groups, 0.3))
    results += [weight.grad for weight in weights if weight.grad is not None]
    for optimizer_class in (SGD, ProximalSGD):
        parameters, optimizer = regularized(optimizer_class, device)
        for _ in range(2):
            optimizer.step()
        results += [p.detach().clone() for p in parameters]
        results.append(optimizer.penalty())
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("stored", ["contiguous", "channels_last"])
def test_sanitized_operators_stay_inside_their_tensors(device: torch.device, dtype: torch.dtype, stored: str) -> None:
    """Under compute-sanitizer this finds reads and writes outside; without, what they would bring in: NaN."""
    for result in all_operators(device, dtype, 2, 5, stored):
        assert result.isfinite().all()


@pytest.mark.parametrize("stored", ["contiguous", "channels_last"])
def test_the_same_bits_every_time(device: torch.device, stored: str) -> None:
    first = all_operators(device, torch.float16, 24, 28, stored)
    for _ in range(RUNS - 1):
        for a, b in zip(first, all_operators(device, torch.float16, 24, 28, stored), strict=True):
            assert torch.equal(a, b)


def replayed(run: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
    """A captured graph of `run`, and the tensors that each replay writes."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = run()
    return graph.replay, outputs


def test_batch_norm_in_a_cuda_graph(device: torch.device) -> None:
    torch.use_deterministic_algorithms(False)  # which would fill memory inside the capture
    shape = (8, 37, 9, 9)
    x, dy, residual = (activation(shape, device, torch.float16) for _ in range(3))
    replay, outputs = replayed(lambda: batch_norm(x, dy, residual))
    for seed in range(3):
        torch.manual_seed(seed)
        for tensor in (x, dy, residual):
            tensor.copy_(torch.randn(shape, device=device))
        replay()
        torch.cuda.synchronize()
        # running statistics begin anew inside the graph, as they do in `batch_norm`
        for a, b in zip(outputs, batch_norm(x, dy, residual), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("optimizer_class", [SGD, ProximalSGD])
def test_a_captured_step_follows_gradients_and_learning_rate(device: torch.device, optimizer_class: type[SGD]) -> None:
    lr, lr_twin = (torch.tensor(0.1, device=device) for _ in range(2))
    parameters, optimizer = regularized(optimizer_class, device, lr)
    twins, twin = regularized(optimizer_class, device, lr_twin)

    def step() -> list[Tensor]:
        optimizer.step()
        return []

    replay, _ = replayed(step)
    for _ in range(2):  # what the capture's warm-up did; capturing itself changes nothing
        twin.step()
    for i in range(3):
        lr.fill_(0.1 / (i + 1))
        lr_twin.fill_(0.1 / (i + 1))
        for p, t in zip(parameters, twins, strict=True):
            assert p.grad is not None
            assert t.grad is not None
            p.grad.copy_(torch.randn_like(p))
            t.grad.copy_(p.grad)
        replay()
        twin.step()
        torch.cuda.synchronize()
        for p, t in zip(parameters, twins, strict=True):
            assert torch.equal(p, t)


def needs_memory(device: torch.device, tensors: int) -> None:
    needed = tensors * 2 * LARGE
    free = torch.cuda.mem_get_info(device)[0]
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory, there are {free / 2**30:.0f}")
    torch.use_deterministic_algorithms(False)  # filling these tensors with NaN would take longer than the test


@pytest.mark.parametrize("stored", ["contiguous", "channels_last"])
def test_batch_norm_past_2_31_elements(device: torch.device, stored: str) -> None:
    """A batch of equal images: its statistics are those of one, and so is every image of the result."""
    needs_memory(device, 8)
    channels, side = 64, 64
    batch = LARGE // (channels * side * side)
    one, one_dy, one_residual = (activation((1, channels, side, side), device, torch.float16, stored) for _ in range(3))
    memory_format = torch.channels_last if stored == "channels_last" else torch.contiguous_format
    x, dy, residual = (
        t.expand(batch, -1, -1, -1).contiguous(memory_format=memory_format) for t in (one, one_dy, one_residual)
    )
    y, mean, _, dx, dweight, dbias, dresidual = batch_norm(x, dy, residual)
    small = batch_norm(one, one_dy, one_residual)
    assert torch.allclose(mean, small[1], atol=1e-5)
    assert torch.allclose(dweight, batch * small[4], rtol=1e-3, atol=1e-3 * batch)
    assert torch.allclose(dbias, batch * small[5], rtol=1e-3, atol=1e-3 * batch)
    for large, expected in ((y, small[0]), (dx, small[3]), (dresidual, small[6])):
        for image in (0, batch // 2, batch - 1):
            assert torch.allclose(large[image].float(), expected[0].float(), rtol=1e-2, atol=1e-2)
        for image in range(1, batch):
            assert torch.equal(large[image], large[0])


def test_channel_operators_past_2_31_elements(device: torch.device) -> None:
    needs_memory(device, 4)
    channels, side = 64, 64
    batch = LARGE // (channels * side * side)
    one = activation((1, channels, side, side), device, torch.float16)
    x = one.expand(batch, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    index = ChannelIndex(range(channels - 1), channels, device)  # just below all: both sides are past 2^31
    out = channel_scatter_add(x, channel_gather(x, index), index)
    expected = one[0] + F.pad(one[0, : channels - 1], (0, 0, 0, 0, 0, 1))
    for image in range(batch):
        assert torch.equal(out[image], expected)


def test_sgd_past_2_31_elements(device: torch.device) -> None:
    needs_memory(device, 5)
    parameter = nn.Parameter(torch.ones(LARGE, device=device, dtype=torch.float16))
    parameter.grad = torch.ones_like(parameter)
    SGD([parameter], 0.5, momentum=0.9).step()
    assert bool((parameter == 0.5).all())


def test_lasso_past_2_31_elements(device: torch.device) -> None:
    needs_memory(device, 4)
    rows, columns = 2**10, LARGE // 2**10
    weight = torch.full((rows, columns), 2.0**-10, device=device, dtype=torch.float16, requires_grad=True)
    ((norms, max_abs),) = zip(*slice_statistics([weight], [Groups()], 0.0), strict=True)
    assert torch.allclose(norms[0], torch.tensor(rows**0.5 * 2.0**-10, device=device), rtol=1e-5)
    assert torch.allclose(norms[1], torch.tensor(columns**0.5 * 2.0**-10, device=device), rtol=1e-4)
    assert all(bool((side == 2.0**-10).all()) for side in max_abs)
    (gradient,) = torch.autograd.grad(group_lasso([weight], [Groups()]), weight)
    expected = 2.0**-10 * (1 / norms[0][0] + 1 / norms[1][0])
    assert torch.allclose(gradient[:, ::4099].float(), expected.expand(1), rtol=2e-3)
    assert torch.equal(gradient[0], gradient[-1])


def test_addresses_uploaded_on_one_stream_are_there_on_another(device: torch.device) -> None:
    """The first stream is kept busy, so that its copy comes late; the second one uses the cached addresses at once."""
    first, second = torch.cuda.Stream(device), torch.cuda.Stream(device)
    weights = [torch.randn(64, 32, 3, 3, device=device) for _ in range(20)]
    expected = [w.double().square().sum((1, 2, 3)).sqrt().float() for w in weights]
    torch.cuda.synchronize(device)
    with torch.cuda.stream(first):
        torch.cuda._sleep(200_000_000)
        slice_statistics(weights, [Groups()] * len(weights))
    with torch.cuda.stream(second):
        norms, _ = slice_statistics(weights, [Groups()] * len(weights))
    torch.cuda.synchronize(device)
    for (_, outputs), right in zip(norms, expected, strict=True):
        torch.testing.assert_close(outputs, right, rtol=1e-4, atol=1e-4)
