"""A pruned, gated, fused network leaves as plain PyTorch modules that compute the same, through torch.export."""

import copy

import pytest
import torch
from nets import DYING, NETS, kill, rest_of, same, small_net, traced, warm_up
from torch import Tensor, nn
from torch.optim import SGD

from prunetrain_kernels import InputError, reconfigure, to_dense
from prunetrain_kernels.models import build
from prunetrain_kernels.nn import BatchNormAct2d, GatedConv2d, fuse

PACKAGE = "prunetrain_kernels."
ALLOWED = "prunetrain_kernels.models."  # the networks themselves
CASES = [(name, dying) for name in NETS for dying in (False, True) if not dying or name in DYING]
IDS = [f"{n}-{'branch' if d else 'channels'}" for n, d in CASES]


def pruned(name: str, dying: bool, policy: str) -> tuple[nn.Module, Tensor]:
    model, x = small_net(name)
    if name not in ("1d", "3d", "flattened"):
        fuse(model)
    optimizer = SGD(model.parameters(), lr=0.01)
    warm_up(model, optimizer, x)
    graph = traced(model, x)
    kill(graph, model, share=0.25, partly=0.5)
    if dying:
        rest_of(model, DYING[name]).zero_()
    reconfigure(model, optimizer, graph.keep(model, policy=policy))
    return model, x


def assert_plain(model: nn.Module) -> None:
    for name, module in model.named_modules():
        module_of = type(module).__module__
        assert not module_of.startswith(PACKAGE) or module_of.startswith(ALLOWED), (name, type(module))
        assert "forward" not in vars(module)


@pytest.mark.parametrize("policy", ["union", "gating"])
@pytest.mark.parametrize(("name", "dying"), CASES, ids=IDS)
def test_the_same_function_in_plain_modules(name: str, dying: bool, policy: str) -> None:
    model, x = pruned(name, dying, policy)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    plain = to_dense(model, (x,))
    assert_plain(plain)
    assert same(before, dict(model.state_dict()))
    assert [type(m) for m in model.modules()] == classes
    for training in (False, True):
        twin, dense = (copy.deepcopy(m).train(training) for m in (model, plain))
        for _ in range(2):  # running statistics move alike
            assert torch.allclose(dense(x), twin(x), rtol=1e-9, atol=1e-11)
        assert torch.allclose(dense.eval()(x), twin.eval()(x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("policy", ["union", "gating"])
@pytest.mark.parametrize("name", ["resnet20", "vgg11", "imagenet_resnet50"])
def test_paper_networks_go_through_export(name: str, policy: str) -> None:
    torch.manual_seed(0)
    model, x = build(name, 10), torch.randn(2, 3, 32, 32)
    fuse(model)
    graph = traced(model, x)
    kill(graph, model, share=0.3, partly=0.4)
    if name != "vgg11":
        rest_of(model, "layer1.1.conv2" if name == "resnet20" else "layer1.1.conv3").zero_()
    reconfigure(model, None, graph.keep(model, policy=policy))
    model.eval()
    plain = to_dense(model, (x,))
    assert_plain(plain)
    program = torch.export.export(plain, (x,))
    assert not any("prunetrain" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        expected = model(x)
        assert torch.allclose(program.module()(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_channels_last_stays() -> None:
    model, _ = pruned("in-place-bottleneck", False, "gating")
    model = model.float().to(memory_format=torch.channels_last)
    plain = to_dense(model)
    assert plain.blocks[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)


def test_examples_are_needed_where_branches_were_removed() -> None:
    model, x = pruned("out-of-place", True, "union")
    with pytest.raises(InputError, match="stands in for a removed layer"):
        to_dense(model)
    with pytest.raises(InputError, match="does not run on example_inputs"):
        to_dense(model, (x[:, :1],))
    to_dense(model, (x,))


def test_a_network_built_with_fused_batch_norms_keeps_them() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4))
    plain, x = to_dense(model), torch.randn(2, 3, 4, 4)
    assert torch.equal(plain.eval()(x), model.eval()(x))


def test_trainable_as_before() -> None:
    model, x = pruned("out-of-place", False, "gating")
    assert any(isinstance(m, GatedConv2d) for m in model.modules())
    plain = to_dense(model)
    plain(x).sum().backward()
    assert all(p.grad is not None for p in plain.parameters())
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in model.named_parameters()}
