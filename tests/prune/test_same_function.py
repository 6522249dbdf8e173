"""A reconfigured network computes what the zeroed one did, and has lost exactly the channels that were dead."""

import copy

import pytest
import torch
from nets import DYING, NETS, kill, randomise, rest_of, small_net, traced, train, warm_up
from torch import Tensor, nn

from prunetrain_kernels import Keep, reconfigure
from prunetrain_kernels.cost.flops import count_flops
from prunetrain_kernels.graph import expand
from prunetrain_kernels.models import build

PAPER = {
    "resnet20": (16, 4),
    "resnet32": (16, 4),
    "resnet50": (8, 4),
    "vgg7": (16, 4),
    "vgg11": (32, 3),
    "vgg13": (32, 3),
    "imagenet_resnet50": (64, 2),
}


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference as a share of the scale."""
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max())


def pixels_of(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Output pixels of every convolution and linear layer."""
    pixels: dict[str, int] = {}
    hooks = [
        module.register_forward_hook(lambda m, i, out, name=name: pixels.__setitem__(name, out[0, 0].numel()))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return pixels


def flops_of(keep: Keep, reference: nn.Module, pixels: dict[str, int]) -> int:
    """FLOPs of the pruned network, from the kept channels alone."""
    flops = 0
    for layer in keep.graph.layers.values():
        ins, outs = (len(keep.channels[s]) for s in (layer.input, layer.output))
        taps = reference.get_submodule(layer.name).weight[0, 0].numel()
        flops += 2 * ins * outs * taps * pixels[layer.name]
    return flops


def check_cut(keep: Keep, model: nn.Module, reference: nn.Module) -> None:
    """Weights are those of the kept channels, and the attributes of modules tell their sizes."""
    for layer in keep.graph.layers.values():
        module, ins, outs = model.get_submodule(layer.name), keep.channels[layer.input], keep.channels[layer.output]
        assert module.weight.grad is None or module.weight.shape == rest_of(reference, layer.name).shape
        assert tuple(module.weight.shape[:2]) == (len(outs), len(ins))
        sizes = (
            (module.out_channels, module.in_channels)
            if isinstance(module, nn.Conv2d)
            else (module.out_features, module.in_features)
        )
        assert sizes == (len(outs), len(ins))
        assert torch.equal(module.weight, rest_of(reference, layer.name)[outs][:, ins])
    for follower in keep.graph.followers.values():
        module, kept = model.get_submodule(follower.name), keep.channels[follower.space]
        assert module.num_features == len(module.weight) == len(module.running_mean) == len(kept)


@pytest.mark.parametrize("name", PAPER)
def test_paper_networks(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    size, batch = PAPER[name]
    torch.manual_seed(1)
    model, x = randomise(build(name, 10)), torch.randn(batch, 3, size, size)
    if name in ("resnet50", "imagenet_resnet50"):
        # With a few pixels per statistic, 50 and more layers in fp32 are 3e-5 off their own float64 result in training
        # mode, on some processors; weaker branches are better conditioned, so that 1e-5 can tell pruning from rounding.
        for block in (m for m in model.modules() if hasattr(m, "bn3")):
            block.bn3.weight.data *= 0.5
    graph = traced(model, x)
    dead = kill(graph, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    train(model, optimizer, [x])  # lr 0: gives momentum and leaves weights at zero
    reference = copy.deepcopy(model)
    buffers = copy.deepcopy(optimizer.state_dict()["state"])
    identity = [(n, id(p)) for n, p in model.named_parameters()]
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).eval()  # modes differ from module to module
    modes = {n: m.training for n, m in model.named_modules()}
    pixels, random_state = pixels_of(copy.deepcopy(reference), x), torch.get_rng_state()

    keep = graph.keep(model)
    for space, kept, gone in zip(graph.spaces, keep.channels, dead, strict=True):
        assert set(kept.tolist()) == set(range(space.size)) - gone  # live anywhere: never cut; dead everywhere: cut
    report = reconfigure(model, optimizer, keep, keep_momentum=True)  # all of it is compared below
    with capsys.disabled():
        print(f"\n  {name}: reconfigured in {report.seconds:.2f} s, max|dy| {report.max_abs_dy:.1e}", end=" ")

    assert torch.equal(torch.get_rng_state(), random_state)
    assert {n: m.training for n, m in model.named_modules()} == modes
    for training in (False, True):
        with torch.no_grad():
            a, b = model.train(training)(x), reference.train(training)(x)
        assert distance(a, b) <= 1e-5
    assert report.max_abs_dy <= 1e-5 * report.scale

    after = count_flops(model, (x,)).inference
    assert after == flops_of(keep, reference, pixels)
    assert after < 0.5 * count_flops(reference, (x,)).inference

    # same objects, optimizer in step, truthful attributes, momentum rows those of before
    assert [(n, id(p)) for n, p in model.named_parameters()] == identity
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [i for _, i in identity]
    check_cut(keep, model, reference)
    index = {n: i for i, (n, _) in enumerate(identity)}
    for layer in graph.layers.values():
        ins, outs = keep.channels[layer.input], keep.channels[layer.output]
        momentum = optimizer.state[model.get_submodule(layer.name).weight]["momentum_buffer"]
        old = buffers[index[f"{layer.name}.weight"]]["momentum_buffer"]
        assert torch.equal(momentum, old[outs][:, ins])


CASES = [(name, dying) for name in NETS for dying in (False, True) if not dying or name in DYING]


@pytest.mark.parametrize(("name", "dying"), CASES, ids=[f"{n}-{'branch' if d else 'channels'}" for n, d in CASES])
def test_small_networks(name: str, dying: bool) -> None:
    model, x = small_net(name)
    graph = traced(model, x)
    kill(graph, model)
    if dying:
        rest_of(model, DYING[name]).zero_()
    reference = copy.deepcopy(model)
    keep = graph.keep(model)
    report = reconfigure(model, None, keep)
    assert report.branches == int(dying)
    assert report.changed
    for training in (False, True, True, False):  # twice in training mode, so that running statistics have moved
        a, b = model.train(training)(x), reference.train(training)(x)
        assert distance(a, b) <= 1e-11
    for follower in graph.followers.values():
        module = model.get_submodule(follower.name)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.num_features == len(keep.channels[follower.space]) * follower.block
        elif isinstance(module, nn.Conv2d):
            assert module.groups == module.in_channels == module.out_channels == len(keep.channels[follower.space])
    if not dying:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                assert int(module.num_batches_tracked) == 9


@pytest.mark.parametrize("name", ["out-of-place", "in-place-bottleneck", "flattened"])
@pytest.mark.parametrize("round_to", [1, 4])
def test_shrinks_again_and_again(name: str, round_to: int) -> None:
    model, x = small_net(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for turn in range(3):
        warm_up(model, optimizer, x)
        graph = traced(model, x)
        kill(graph, model, share=0.3, seed=turn)
        if turn == 1 and name in DYING:
            rest_of(model, DYING[name]).zero_()
        keep = graph.keep(model, round_to=round_to)
        for layer in graph.layers.values():  # zeros that a rounded count kept have moved a little since
            weight, sparse = model.get_submodule(layer.name).weight.data, keep.sparse[layer.name]
            for dim, mask, block in zip(layer.dims, (sparse.inputs, sparse.outputs), (layer.block, 1), strict=True):
                weight.index_fill_(dim, expand(mask.nonzero().flatten(), block), 0)
        reference = copy.deepcopy(model)
        reconfigure(model, optimizer, keep)
        for training in (False, True):
            assert distance(model.train(training)(x), reference.train(training)(x)) <= 1e-11
        assert {id(p) for p in model.parameters()} == {id(p) for g in optimizer.param_groups for p in g["params"]}
        optimizer.load_state_dict(optimizer.state_dict())


def test_first_convolution_dead_but_not_the_last_stays_and_is_exact() -> None:
    model, x = small_net("out-of-place")
    rest_of(model, "blocks.0.conv1").zero_()
    reference = copy.deepcopy(model)
    report = reconfigure(model, None, traced(model, x).keep(model))
    assert report.removed == ()
    for training in (False, True):
        assert distance(model.train(training)(x), reference.train(training)(x)) <= 1e-12


@pytest.mark.parametrize("dims", [2, 3])
def test_channels_last_weights_stay_so(dims: int) -> None:
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}[dims]
    model, x = small_net({2: "out-of-place", 3: "3d"}[dims])
    model = model.to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    warm_up(model, optimizer, x.to(memory_format=layout))
    graph = traced(model, x)
    kill(graph, model)
    reconfigure(model, optimizer, graph.keep(model))
    weight = model.blocks[0].conv1.weight
    assert weight.shape[0] < 8
    for tensor in (weight, optimizer.state[weight]["momentum_buffer"]):
        assert tensor.is_contiguous(memory_format=layout)
        assert not tensor.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_models(dtype: torch.dtype) -> None:
    model, x = small_net("in-place-bottleneck", dtype)
    graph = traced(model, x)
    kill(graph, model)
    rest_of(model, "blocks.0.conv3").zero_()
    reference = copy.deepcopy(model)
    report = reconfigure(model, None, graph.keep(model))
    assert report.branches == 1
    assert {p.dtype for p in model.parameters()} == {dtype}
    for training in (False, True):
        a, b = model.train(training)(x), reference.train(training)(x)
        assert a.dtype == b.dtype == dtype
        assert distance(a, b) < {torch.float16: 0.01, torch.bfloat16: 0.05}[dtype]


def test_frozen_backbone_shrinks_too() -> None:
    model, x = small_net("out-of-place")
    for parameter in model.stem.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    warm_up(model, optimizer, x)
    graph = traced(model, x)
    kill(graph, model)
    reference = copy.deepcopy(model)
    reconfigure(model, optimizer, graph.keep(model))
    assert not model.stem[0].weight.requires_grad
    assert distance(model(x), reference(x)) < 1e-12
    warm_up(model, optimizer, x)


def test_gradients_are_cleared_where_shapes_change_and_buffers_elsewhere_stay() -> None:
    model, x = small_net("out-of-place")
    model.register_buffer("elsewhere", torch.arange(3.0))
    graph = traced(model, x)
    kill(graph, model)
    model(x).sum().backward()
    before = {n: p.shape for n, p in model.named_parameters()}
    reconfigure(model, None, graph.keep(model))
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (parameter.shape != before[name])
    assert torch.equal(model.elsewhere, torch.arange(3.0))


def test_nothing_to_prune_changes_nothing() -> None:
    model, x = small_net("out-of-place")
    before = copy.deepcopy(model.state_dict())
    report = reconfigure(model, None, traced(model, x).keep(model))
    assert not report.changed
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("batch", [1, 20])
def test_number_of_example_images_does_not_matter(batch: int) -> None:
    model, x = small_net("in-place-bottleneck")
    graph = traced(model.eval(), x[:1].expand(batch, -1, -1, -1))
    kill(graph, model)
    rest_of(model, "blocks.0.conv3").zero_()
    reference = copy.deepcopy(model)
    reconfigure(model, None, graph.keep(model))
    assert not any(m.training for m in model.modules())
    assert distance(model.train()(x), reference.train()(x)) < 1e-12


def test_report_says_what_changed() -> None:
    model, x = small_net("out-of-place")
    graph = traced(model, x)
    kill(graph, model, partly=0)
    rest_of(model, "blocks.1.conv2").zero_()
    before = sum(p.numel() for p in model.parameters())
    keep = graph.keep(model)
    report = reconfigure(model, None, keep)
    assert (report.parameters_before, report.parameters_after) == (before, sum(p.numel() for p in model.parameters()))
    assert report.removed == ("blocks.1.conv1", "blocks.1.bn1", "blocks.1.conv2")
    assert "blocks.1.conv2: removed" in str(report)
    assert "branch removed: blocks.1.conv1, blocks.1.bn1, blocks.1.conv2" in str(keep)
    by_name = {change.name: change for change in report.layers}
    change = by_name["blocks.0.conv1"]
    assert (change.out_before, change.out_after) == (8, 5)
    assert change.kept_out.tolist() == keep.channels[graph.layers["blocks.0.conv1"].output].tolist()
    assert by_name["blocks.1.conv1"].removed
    assert by_name["blocks.1.conv1"].out_after == 0
