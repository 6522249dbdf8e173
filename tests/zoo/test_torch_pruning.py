"""Channels go together as in Torch-Pruning's dependency groups, but for differences that the docs explain."""

import pytest
import torch
from torch import Tensor, nn

from bench.crosscheck import CLASSES, DIFFERENCES, channels_of, compare, our_places
from bench.zoo import ZOO
from prunetrain_kernels import trace_channels

torch_pruning = pytest.importorskip("torch_pruning")

NAMES = [pytest.param(name, marks=pytest.mark.slow if net.slow else ()) for name, net in ZOO.items()]


@pytest.mark.parametrize("name", NAMES)
def test_differences_are_the_explained_ones(name: str) -> None:
    torch.manual_seed(0)
    differences = compare(ZOO[name].for_tests(), ZOO[name].images(2))
    assert set(differences) == DIFFERENCES.get(name, set()), {kind: places[:3] for kind, places in differences.items()}


def test_every_explanation_is_needed() -> None:
    assert set().union(*DIFFERENCES.values()) == set(CLASSES)
    assert set(DIFFERENCES) <= set(ZOO)


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
@pytest.mark.parametrize(
    ("name", "layer", "training"),
    [
        ("resnext50_32x4d", "layer1.0.conv1", False),  # groups
        ("timm:fastvit_t8", "stem.0.conv_scale.conv", False),  # multiplier
        ("espcn", "body.4", False),  # indices: pixel shuffle
        ("detector", "stem.2.first.0", False),  # indices: concatenated pieces
        ("timm:cspresnet50", "stages.0.conv_transition_b.conv", False),  # indices: concatenated pieces
        ("timm:resnest14d", "layer1.0.conv2.conv", False),  # indices: views
        ("googlenet", "inception4a.branch1.conv", True),  # training only
    ],
)
def test_where_we_differ_the_other_network_does_not_run(name: str, layer: str, training: bool) -> None:
    torch.manual_seed(0)
    model, x = ZOO[name].for_tests().eval(), ZOO[name].images(2)
    dependencies = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=x)
    conv = model.get_submodule(layer)
    assert isinstance(conv, nn.Conv2d)
    dependencies.get_pruning_group(conv, torch_pruning.prune_conv_out_channels, [0]).prune()
    with pytest.raises(RuntimeError):
        model.train(training)(x)


def test_where_we_differ_the_other_network_computes_something_else() -> None:
    """SKNet weighs two paths by a softmax over a view: the channel's weights are 0 and 64 of a layer, not 0 and 1."""
    torch.manual_seed(0)
    model, x = ZOO["timm:skresnet18"].for_tests().eval(), ZOO["timm:skresnet18"].images(2)
    graph = trace_channels(model, (x,))
    layer = graph.layers["layer1.0.conv1.paths.0.conv"]
    for place in our_places(graph)[channels_of(graph, layer.output)[0]]:
        if place.side != "follow":
            weight = model.get_submodule(place.layer).weight
            assert isinstance(weight, Tensor)
            weight.detach().select(0 if place.side == "out" else 1, place.channel).zero_()
    before = model(x).detach()
    dependencies = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=x)
    conv = model.get_submodule(layer.name)
    dependencies.get_pruning_group(conv, torch_pruning.prune_conv_out_channels, [0]).prune()
    assert float((model(x).detach() - before).abs().max()) > 1e-4 * float(before.abs().max())
