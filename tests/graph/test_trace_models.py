"""Tracing whole models: by torch.export, with several inputs, with wrong ones, and leaving them as they were."""

import copy

import pytest
import torch
import torch.nn.functional as F
from graph_nets import Net, frozen, images, pool, prune_half_of_everything, simple, space_of
from torch import Tensor, nn

from prunetrain_kernels import TraceError, reconfigure, trace_channels


class SizesDecide(Net):
    """Its flow depends on sizes: torch.fx gives up, torch.export does not."""

    def __init__(self) -> None:
        super().__init__(simple, features=16, n=nn.BatchNorm2d(8), act=nn.PReLU(8), one=nn.PReLU())
        self.grouped, self.up = nn.Conv2d(8, 8, 1, groups=2), nn.ConvTranspose2d(8, 8, 1)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if y.shape[2] > 4:
            y = self.act(self.n(y))
            y += F.interpolate(F.avg_pool2d(y, 2), scale_factor=2)
        y, z = self.one(self.up(y)).mul(2).chunk(2, 1)
        y = self.drop(torch.cat([self.grouped(torch.cat([z, y], 1)), self.b(self.b(self.a(x)))], 1))
        return self.fc(F.adaptive_avg_pool2d(y[:, :, 1:, ::2], 1).view(len(y), -1).unsqueeze(2).squeeze(-1))


def test_what_fx_cannot_trace_is_traced_by_export() -> None:
    model = SizesDecide()
    graph = prune_half_of_everything(model, images())
    assert graph.tracer == "torch.export"
    assert set(graph.layers) == {"a", "b", "grouped", "up", "fc"}
    assert {name: f.kind for name, f in graph.followers.items()} == {"n": "batch_norm", "act": "prelu"}
    assert [space.frozen for space in graph.spaces if space.frozen] == [
        "it is the network's input",
        "it is the network's output",
    ]
    assert graph.layers["grouped"].groups == 2
    assert not graph.opaque
    # sizes are numbers by then, so nobody can tell a count that follows from one that is written out
    model = Net(lambda m, x: m.fc(m.b(m.a(x))[:, :, 0, 0].view(2, m.b(m.a(x)).shape[1])) if x.shape[2] == 6 else x)
    assert "written out" in (frozen(prune_half_of_everything(model, images()), "b") or "")


def test_export_sees_assignments() -> None:
    class Assigns(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y[:, 0] = 0
            return self.fc(pool(self.b(y)))

    graph = prune_half_of_everything(Assigns(simple), images())
    assert graph.tracer == "torch.export"
    assert "picks channels by number" in (frozen(graph, "a") or "")
    assert not frozen(graph, "b")


def test_export_sees_all_that_an_operation_reads() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        limit = m.b(x.new_ones(x.shape[0], 8, 1, 1)) if x.shape[2] > 4 else m.a(x)
        return m.fc(pool(m.a(x).clamp(min=limit)))

    graph = prune_half_of_everything(Net(forward), images())
    assert graph.tracer == "torch.export"
    assert graph.layers["a"].output == graph.layers["b"].output
    assert not frozen(graph, "a")


def test_a_closed_module_is_opened_by_export() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.shape[-1] > 1 else x

    graph = prune_half_of_everything(Net(lambda m, x: m.fc(pool(m.b(m.n(m.a(x))))), n=Sized()), images())
    assert graph.tracer == "torch.export"
    assert not frozen(graph, "n.conv")
    assert not graph.opaque


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.zeros(1, 5, 6, 6),), r"fails on the example inputs at 'a' \(call_module a\)"),
        ((torch.zeros(1, 3, 1),), "fails on the example inputs at 'a'"),
        ((), "must be a tuple of tensors"),
        (None, "must be a tuple of tensors"),
        (("x",), "must be a tuple of tensors"),
        ({"x": 1}, "must be a tuple of tensors"),
    ],
    ids=["channels", "dimensions", "empty", "none", "text", "dict"],
)
def test_wrong_example_inputs(inputs: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        trace_channels(Net(simple), inputs)


# -- inputs and outputs ------------------------------------------------------------------------------------------------


def test_two_inputs_and_a_dict_of_outputs() -> None:
    class Two(Net):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor | tuple[Tensor, ...]]:  # type: ignore[override]
            f = self.b(self.a(x) + self.a(y))
            return {"logits": self.fc(pool(f)), "maps": (f,)}

    model = Two(simple)
    graph = trace_channels(model, (images(), images()))
    assert frozen(graph, "b") == frozen(graph, "fc") == "it is the network's output"
    assert frozen(graph, "a") is None
    assert graph.spaces[space_of(graph, "a", "input")].is_input
    model.a.weight.data[3] = 0
    model.b.weight.data[:, 3] = 0
    before = model(images(), images())["logits"]
    reconfigure(model, None, graph.keep(model))
    assert model.a.out_channels == 7
    assert torch.allclose(model(images(), images())["logits"], before, atol=1e-6)


def test_ends_are_found_through_operations_that_are_not_followed() -> None:
    class Ends(Net):
        def __init__(self) -> None:
            super().__init__(simple)
            self.register_buffer("mean", torch.rand(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.log_softmax(super().forward((x - self.mean) * 2), 1)

    graph = trace_channels(Ends(), (images(),))
    assert graph.spaces[space_of(graph, "a", "input")].is_input
    assert graph.spaces[space_of(graph, "fc")].is_output
    inner = graph.spaces[space_of(graph, "a")]
    assert not inner.is_input
    assert not inner.is_output
    assert not inner.frozen


def test_a_scalar_loss_from_the_forward() -> None:
    class Loss(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return F.cross_entropy(super().forward(x), y)

    graph = trace_channels(Loss(simple), (images(), torch.tensor([1, 2])))
    assert graph.spaces[space_of(graph, "fc")].is_output
    assert frozen(graph, "fc")
    assert not frozen(graph, "b")


def test_variable_arguments() -> None:
    class Variable(Net):
        def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
            return super().forward(x)

    assert frozen(trace_channels(Variable(simple), (images(),)), "a") is None


# -- the model stays as it was -----------------------------------------------------------------------------------------


def test_leaves_the_model_as_it_was() -> None:
    class Busy(Net):
        def __init__(self) -> None:
            super().__init__(simple, bn=nn.BatchNorm2d(8), drop=nn.Dropout(0.5))
            self.register_buffer("calls", torch.zeros(1))
            self.register_buffer("running", torch.zeros(8))
            self.register_buffer("variance", torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            y = self.drop(self.bn(self.a(x))) * torch.rand(())
            F.batch_norm(y, self.running, self.variance, training=True)
            return self.fc(pool(F.dropout(self.b(y))))

    model = Busy()
    model.bn.eval()
    x = images()
    loss = model(x).sum()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    state, versions = torch.get_rng_state(), [b._version for b in model.bn.buffers()]
    graph = trace_channels(model, (x,))
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert versions == [b._version for b in model.bn.buffers()]
    loss.backward()  # nothing that autograd saved was written to
    x.fill_(float("nan"))  # nor does the graph hold on to the caller's batch
    assert graph.example_inputs[0].isfinite().all()
    assert all(p.requires_grad for p in model.parameters())


def test_a_failure_leaves_modes_as_they_were() -> None:
    model = Net(simple).eval()
    model.b.train()
    with pytest.raises(TraceError):
        trace_channels(model, (torch.zeros(1, 4, 4, 4),))
    assert [m.training for m in (model, model.a, model.b)] == [False, False, True]


class Picky(nn.Module):
    """It decides by values, which torch.fx cannot follow: it is left closed, and the model traced again."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e9 else x + 1


class Caches(Net):
    """In evaluation it keeps what it has computed, in a table that the next trace finds (LeViT's attention biases)."""

    def __init__(self) -> None:
        super().__init__(simple, picky=Picky())
        self.shift = nn.Parameter(torch.randn(8, 1, 1))
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> "Caches":
        self.cache = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        shift = self.shift * 2
        if not self.training:
            shift = self.cache.setdefault("shift", shift)
        return self.fc(pool(self.b(self.a(x) + shift) + self.picky(x).mean()))


def test_what_a_forward_caches_is_not_passed_from_trace_to_trace() -> None:
    model = Caches()
    graph = prune_half_of_everything(model, images())
    assert graph.tracer == "torch.fx"
    assert set(graph.opaque) == {"picky"}
    assert not frozen(graph, "a")
    assert not model.cache
