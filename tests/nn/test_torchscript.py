"""torch.jit and torch.ao.quantization on models that hold the package's modules: a program of PyTorch's own operations,
or one sentence that says what to script instead."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from prunetrain_kernels import InputError, to_dense
from prunetrain_kernels.models.resnet import resnet20
from prunetrain_kernels.nn import BatchNormAct2d, ChannelGather, ChannelScatter, GatedConv2d, fuse


def fused() -> nn.Module:
    model = resnet20(num_classes=5)
    assert fuse(model).fused
    return model


def act() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), BatchNormAct2d(6))


def gathered() -> nn.Module:
    live = torch.tensor([0, 2, 5])
    return nn.Sequential(nn.Conv2d(3, 6, 3), ChannelGather(live, 6), ChannelScatter(live, 6))


def gated() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), GatedConv2d(6, 5, 3, input_index=[4, 0, 2], output_index=[1, 3]))


MODELS: dict[str, Callable[[], nn.Module]] = {"fused": fused, "act": act, "gathered": gathered, "gated": gated}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_a_traced_program_holds_pytorch_operations_only(name: str, training: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().train(training)
    twin = copy.deepcopy(model)
    x, other = torch.randn(4, 3, 12, 12), torch.randn(7, 3, 12, 12)
    program = torch.jit.trace(twin, x, check_trace=not training)  # a check runs, so that it counts batches too
    assert "prunetrain_kernels::" not in str(program.inlined_graph)
    assert "prunetrain_kernels_cpu::" not in str(program.inlined_graph)
    assert "_Eager" not in str(program.inlined_graph)
    torch.jit.save(program, tmp_path / "program.pt")
    loaded = torch.jit.load(tmp_path / "program.pt")
    if training:
        model(x)  # tracing ran once
    torch.testing.assert_close(loaded(other), model(other), rtol=1e-4, atol=1e-5)
    state = loaded.state_dict()
    for name in [name for name in model.state_dict() if "running" in name]:
        torch.testing.assert_close(state[name], model.state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["fused", "act", "gated"])
def test_scripting_says_what_to_script(name: str) -> None:
    model = MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError, match="script to_dense"):
        torch.jit.script(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if name == "act":  # the network was built with it, and keeps it
        return
    x = torch.randn(2, 3, 12, 12)
    model.eval()
    torch.testing.assert_close(torch.jit.script(to_dense(model, (x,)))(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_fused_model_made_dense_can_be_fused_for_quantisation() -> None:
    model = fused().eval()
    x = torch.randn(2, 3, 12, 12)
    dense = to_dense(model, (x,)).eval()
    merged = torch.ao.quantization.fuse_modules(dense, [["conv1", "bn1"]])
    torch.testing.assert_close(merged(x), model(x), rtol=1e-4, atol=1e-4)
