"""Language models, Conformer, Swin v2, MaxViT, EfficientFormer, a diffusion U-Net: each prunes or names what stays."""

import copy
from pathlib import Path

import pytest
import torch
from block_networks import NETWORKS, Llama
from torch import nn
from torch.optim import SGD, AdamW
from twice import inner_reasons, shrink_twice
from zoo_kit import distance, outputs_of, randomise

from prunetrain_kernels import ChannelGraph, load_pruned, reconfigure, save_pruned, trace_channels
from prunetrain_kernels.graph.prunable import prunable

SUMMED = "is over its channels"
# Why channels stay, and how many are free: hidden features; whole heads, or features of the values of all heads.
INPUT = "not computed from anything"
FOUND: dict[str, tuple[int, tuple[str, ...]]] = {
    **dict.fromkeys(("llama-expanded", "llama-interleaved", "llama-by-function"), (24 + 2, (SUMMED, INPUT))),
    "t5": (24 + 4, (SUMMED, INPUT)),
    "bert": (24 + 4, ("by number", INPUT)),
    "conformer": (20 + 20 + 12 + 3, ("(LayerNorm) divides", INPUT)),
    "swin-v2": (52, ("(LayerNorm) divides", "not computed", "not followed")),
    "maxvit": (70, ("(LayerNorm) divides", SUMMED)),
    "efficientformer": (44, ("(LayerNorm) divides", SUMMED)),
    "diffusion": (52, ("(HeadsInBatch)", SUMMED)),
}
EXPORTED = ("bert",)
TOLD = {
    "t5": lambda model: (model.n_heads, model.bias.embedding_dim),
    "conformer": lambda model: (model.h, model.linear_q.out_features // model.d_k),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in EXPORTED else ()) for n in NETWORKS])
def test_shrinks_twice_and_is_saved(name: str, tmp_path: Path) -> None:
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = randomise(build()).double()
    number = list(NETWORKS).index(name)
    optimizer = (SGD(model.parameters(), lr=1e-3, momentum=0.9), AdamW(model.parameters(), lr=1e-4))[number % 2]
    batches = [torch.randn(3, *shape, dtype=torch.float64) for _ in range(3)]

    def look(graph: ChannelGraph) -> None:
        free, why = FOUND[name]
        assert graph.tracer == ("torch.export" if name in EXPORTED else "torch.fx")
        assert prunable(graph).channels == free, str(graph)
        assert all(any(known in reason for known in why) for reason in inner_reasons(graph)), str(graph)

    shrink_twice(model, optimizer, batches, look)
    if name in TOLD:
        before, after = TOLD[name](build()), TOLD[name](model)
        assert all(now < then for now, then in zip(after, before, strict=True))
    save_pruned(tmp_path / "pruned.pt", model, optimizer)
    fresh = build().double()
    load_pruned(tmp_path / "pruned.pt", fresh)
    for module in fresh.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps = 0.01  # as in `randomise`
    assert distance(outputs_of(fresh.eval(), batches[0]), outputs_of(model.eval(), batches[0])) == 0


@pytest.mark.parametrize("how", ["expanded", "interleaved", "by-function"])
def test_a_key_goes_with_all_its_queries(how: str) -> None:
    torch.manual_seed(0)
    model = randomise(Llama(how)).double()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    graph = trace_channels(model, (x,))
    attention = model.attention
    with torch.no_grad():
        for layer, rows in ((attention.q_proj, 8), (attention.k_proj, 4), (attention.v_proj, 4)):
            layer.weight[:rows] = 0  # the first key, and the two queries it is for
        attention.o_proj.weight[:, :8] = 0
    twin = copy.deepcopy(model)
    reconfigure(model, None, graph.keep(model, 0))
    assert (attention.n_heads, attention.n_kv_heads, attention.n_rep, attention.head_dim) == (2, 1, 2, 4)
    assert (attention.q_proj.out_features, attention.k_proj.out_features, attention.o_proj.in_features) == (8, 4, 8)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-9, atol=1e-9)
