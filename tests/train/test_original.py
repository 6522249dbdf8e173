"""Channels numbered by the dense network: a value that a reconfiguration replaces and a checkpoint brings back."""

import copy

import torch
from torch import nn

from prunetrain_kernels.graph import trace_channels
from prunetrain_kernels.prune.reconfigure import reconfigure
from prunetrain_kernels.train.original import OriginalChannels


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.Flatten(), nn.Linear(5 * 16, 2))
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0
        model[0].bias[[1, 4]] = 0
        model[2].weight[:, [1, 4]] = 0
    return model


def test_a_reconfiguration_makes_a_new_value_and_leaves_the_old_one() -> None:
    model, x = network(), (torch.randn(2, 3, 8, 8),)
    graph = trace_channels(model, x)
    dense = OriginalChannels.of_graph(graph)
    sizes = dense.slice_sizes(model, graph)["0"]
    before = copy.deepcopy(dense.state_dict())
    pruned = dense.after(reconfigure(model, None, graph.keep(model)))
    assert pruned.kept["0"][1].tolist() == pruned.kept["2"][0].tolist() == [0, 2, 3, 5]
    assert pruned.kept["2"][1].tolist() == [0, 1, 2, 3, 4]
    assert dense.kept["0"][1].tolist() == [0, 1, 2, 3, 4, 5]
    assert before["removed"] == dense.state_dict()["removed"] == []

    graph = trace_channels(model, x)
    row = pruned.table(graph)[0]
    assert (row["layer"], row["in_kept"], row["in_total"], row["out_kept"], row["out_total"]) == ("0", 3, 3, 4, 6)
    left = pruned.slice_sizes(model, graph)["0"]
    assert left.isnan().nonzero().flatten().tolist() == [1, 4]
    assert torch.equal(left[[0, 2, 3, 5]], sizes[[0, 2, 3, 5]])


def test_a_saved_state_is_taken_up_by_the_dense_networks_numbers() -> None:
    model, x = network(), (torch.randn(2, 3, 8, 8),)
    graph = trace_channels(model, x)
    dense = OriginalChannels.of_graph(graph)
    pruned = dense.after(reconfigure(model, None, graph.keep(model)))
    again = OriginalChannels.of_dense({name: list(sizes) for name, sizes in dense.dense_layers.items()})
    loaded = again.loaded(pruned.state_dict())
    assert loaded.dense_layers == dense.dense_layers
    assert loaded.removed == pruned.removed
    assert all(
        torch.equal(a, b) for name in dense.kept for a, b in zip(loaded.kept[name], pruned.kept[name], strict=True)
    )
