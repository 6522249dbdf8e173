"""What goes with a channel is what Torch-Pruning's dependency groups say, but for differences that the docs explain."""

import pytest
import torch
from torch import nn

from bench.crosscheck import CLASSES, DIFFERENCES, compare
from bench.zoo import ZOO

torch_pruning = pytest.importorskip("torch_pruning")

SLOW = {"timm:rexnet_100"}  # Torch-Pruning takes long there
NAMES = [pytest.param(name, marks=pytest.mark.slow if net.slow else ()) for name, net in ZOO.items()]


@pytest.mark.parametrize("name", NAMES)
def test_differences_are_the_explained_ones(name: str) -> None:
    torch.manual_seed(0)
    found = compare(ZOO[name].for_tests(), ZOO[name].images(2))
    assert set(found) == DIFFERENCES.get(name, set()), {kind: places[:3] for kind, places in found.items()}


def test_every_explanation_is_needed() -> None:
    assert set().union(*DIFFERENCES.values()) == set(CLASSES)
    assert set(DIFFERENCES) <= set(ZOO)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnext50_32x4d", "layer1.0.conv1"),  # groups
        ("timm:fastvit_t8", "stem.0.conv_scale.conv"),  # multiplier
        ("espcn", "body.4"),  # indices: pixel shuffle
        ("timm:cspresnet50", "stages.0.conv_transition_b.conv"),  # indices: concatenated pieces
        ("timm:resnest14d", "layer1.0.conv2.conv"),  # indices: views
    ],
)
def test_where_we_differ_the_other_network_does_not_run(name: str, layer: str) -> None:
    torch.manual_seed(0)
    model, x = ZOO[name].for_tests().eval(), ZOO[name].images(2)
    dependencies = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=x)
    conv = model.get_submodule(layer)
    assert isinstance(conv, nn.Conv2d)
    dependencies.get_pruning_group(conv, torch_pruning.prune_conv_out_channels, [0]).prune()
    with pytest.raises(RuntimeError):
        model(x)
