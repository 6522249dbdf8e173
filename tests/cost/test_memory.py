"""The memory line against bytes counted in real forward passes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetrain_kernels.cost import MemoryModel, measure_step_memory_cuda, step_memory
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.models import build


def bytes_in_a_real_step(model: nn.Module, x: Tensor) -> int:
    """Storages that a real forward keeps alive, told apart by address, and gradients and momentum of a real step."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model.train()(x)
    y.sum().backward()
    optimizer.step()
    momentum = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    for tensor in [x, *model.state_dict().values(), *(p.grad for p in model.parameters()), *momentum]:
        keep(tensor)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("name", ["resnet20", "vgg11", "resnet50"])
def test_prediction_at_another_batch(name: str) -> None:
    model, batch = build(name, 10), 6
    predicted = step_memory(model, (torch.randn(1, 3, 32, 32),)).bytes(batch)
    measured = bytes_in_a_real_step(model, torch.randn(batch, 3, 32, 32))
    assert predicted == pytest.approx(measured, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_prediction_in_channels_last_and_other_dtypes(dtype: torch.dtype) -> None:
    model = build("resnet20", 10).to(dtype, memory_format=torch.channels_last)
    x = torch.randn(5, 3, 32, 32).to(dtype, memory_format=torch.channels_last)
    assert step_memory(model, (x,)).bytes(5) == pytest.approx(bytes_in_a_real_step(model, x), rel=1e-3)


def test_a_linear_layer_by_hand() -> None:
    model = nn.Linear(7, 3)
    memory = step_memory(model, (torch.randn(1, 7),))
    assert memory == MemoryModel(
        fixed=3 * 4 * (21 + 3), per_image=4 * 7
    )  # autograd saves the input, which is counted once
    assert memory.bytes(10) == 3 * 4 * 24 + 280


def test_dropout_saves_its_mask() -> None:
    x = torch.randn(1, 1000)
    plain = step_memory(nn.Linear(1000, 2), (x,)).per_image
    with_dropout = step_memory(nn.Sequential(nn.Dropout(0.5), nn.Linear(1000, 2)), (x,)).per_image
    assert with_dropout - plain >= 4 * 1000  # beside the input: what is left of it, or the mask


def test_fewer_channels_need_less() -> None:
    x = torch.randn(1, 3, 32, 32)
    full = step_memory(nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64)), (x,))
    half = step_memory(nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)), (x,))
    assert half.fixed < full.fixed
    assert half.per_image - 3 * 32 * 32 * 4 == pytest.approx((full.per_image - 3 * 32 * 32 * 4) / 2)


def test_the_optimizers_own_state() -> None:
    model, x = nn.Linear(7, 3), torch.randn(1, 7)
    p = 4 * 24

    def copies(optimizer: torch.optim.Optimizer | None) -> float:
        return step_memory(model, (x,), optimizer).fixed / p - 2

    assert copies(None) == 1
    assert copies(torch.optim.SGD(model.parameters(), lr=0.1)) == 0
    assert copies(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)) == 1
    assert copies(torch.optim.Adam(model.parameters())) == 2
    assert copies(torch.optim.AdamW(model.parameters(), amsgrad=True)) == 3
    adam = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    adam.step()
    actual = sum(t.numel() * t.element_size() for state in adam.state.values() for t in state.values())
    assert actual > 2 * p  # two moments and the step counts
    assert copies(adam) * p == pytest.approx(actual)


@pytest.mark.parametrize("batches", [(1, 4), (4, 4), (4, 2, 8), (0, 8)])
def test_two_different_batches(batches: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="two different batch sizes"):
        step_memory(nn.Linear(3, 2), (torch.randn(1, 3),), batches=batches)
    assert step_memory(nn.Linear(3, 2), (torch.randn(1, 3),), batches=(4, 2)).per_image == 12


# the CUDA measurement: its arithmetic and its manners here, its numbers where there is a GPU


class FakeAllocator:
    """Stands in for torch.cuda's counters: a peak of 1000 bytes plus 70 per image above what was there before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batch = 0
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5_000_000)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5_001_000 + 70 * self.batch)


def test_cuda_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    from prunetrain_kernels.cost import memory

    allocator = FakeAllocator(monkeypatch)
    model = nn.Linear(7, 3)

    def step(model: nn.Module, state: object, inputs: object, batch: int, loss_fn: object) -> None:
        allocator.batch = batch

    monkeypatch.setattr(memory, "_real_step", step)
    monkeypatch.setattr(memory, "_cuda_device", lambda model: torch.device("cpu"))
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices, device_type: torch.no_grad())
    measured = measure_step_memory_cuda(model, (torch.randn(1, 7),), batches=(8, 24))
    # parameters and momentum are there before the step; gradients are in the peak
    assert measured == MemoryModel(fixed=1000 + 2 * 4 * 24, per_image=70)


def test_cuda_measurement_refuses_a_cpu_model() -> None:
    with pytest.raises(InputError, match="one CUDA device, but is on cpu"):
        measure_step_memory_cuda(nn.Linear(3, 2), (torch.randn(1, 3),))


def test_a_real_step_leaves_the_model_alone() -> None:
    from prunetrain_kernels.cost import memory

    model = build("resnet20", 10)
    before = copy.deepcopy(model.state_dict())
    state = dict(model.named_parameters()) | {name: buffer.clone() for name, buffer in model.named_buffers()}
    losses: list[Tensor] = []

    def loss_fn(output: object) -> Tensor:
        assert isinstance(output, Tensor)
        losses.append(F.cross_entropy(output, torch.zeros(4, dtype=torch.long)))
        return losses[-1]

    memory._real_step(model, state, (torch.randn(1, 3, 8, 8),), 4, loss_fn)
    assert len(losses) == 1
    assert not torch.equal(state["bn1.running_mean"], before["bn1.running_mean"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_peak_predicts_another_batch() -> None:
    model = build("resnet20", 10).cuda()
    x = torch.randn(1, 3, 32, 32, device="cuda")
    before = copy.deepcopy(model.state_dict())
    rng = torch.cuda.get_rng_state()
    memory = step_memory(model, (x,), batches=(256, 512))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.cuda.get_rng_state(), rng)
    assert memory.bytes(1024) == pytest.approx(step_memory(model, (x,), batches=(768, 1024)).bytes(1024), rel=0.1)
