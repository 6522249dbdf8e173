"""Re-creations of networks with operations of their own shrink twice, and come back from a checkpoint."""

from pathlib import Path

import pytest
import torch
from own_networks import NETWORKS
from torch.optim import SGD, AdamW
from twice import inner_reasons, shrink_twice
from zoo_kit import distance, outputs_of, randomise

from prunetrain_kernels import ChannelGraph, load_pruned, save_pruned
from prunetrain_kernels.graph.prunable import prunable

# Why some channels stay; of the other networks all may go but the input's and the output's.
STAY = {
    "normaliser-free": ("is computed from all of its input channels",),
    "spatial-transformer": ("affine_grid", "written out"),
    **dict.fromkeys(("translator", "translator-norm-first"), ("(LayerNorm) div", "holds query, key", "not computed")),
    "heads-by-size": ("(LayerNorm) divides", "not computed from"),
}
EXPORTED = ("heads-by-size",)  # traced by torch.export
# Free channels of those that have frozen ones: hidden features of two blocks; heads, and hidden features.
FREE = {"translator": 2 * 24, "translator-norm-first": 2 * 24, "heads-by-size": 4 + 24}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in EXPORTED else ()) for name in NETWORKS]
)
def test_shrinks_twice_and_is_saved(name: str, tmp_path: Path) -> None:
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = randomise(build()).double()
    number = list(NETWORKS).index(name)
    optimizer = (SGD(model.parameters(), lr=1e-3, momentum=0.9), AdamW(model.parameters(), lr=1e-4))[number % 2]
    batches = [torch.randn(3, *shape, dtype=torch.float64) for _ in range(3)]

    def look(graph: ChannelGraph) -> None:
        assert graph.tracer == ("torch.export" if name in EXPORTED else "torch.fx")
        assert name not in FREE or prunable(graph).channels == FREE[name]
        reasons = inner_reasons(graph)
        assert all(any(known in reason for known in STAY.get(name, ())) for reason in reasons), str(graph)
        assert bool(reasons) == (name in STAY)

    shrink_twice(model, optimizer, batches, look)
    if name == "heads-by-size":
        assert model.attention.num_attention_heads == model.attention.q_proj.out_features // 4 < 4
    save_pruned(tmp_path / "pruned.pt", model, optimizer)
    fresh = build().double()
    load_pruned(tmp_path / "pruned.pt", fresh)
    for module in fresh.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eps = 0.01  # as in `randomise`
    assert distance(outputs_of(fresh.eval(), batches[0]), outputs_of(model.eval(), batches[0])) == 0
