"""A pruned network leaves as a program: equal outputs, any batch, no trace of this package, never a wrong file."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nets import kill, rest_of, same, snapshot, traced
from torch import Tensor, nn

from prunetrain_kernels import InputError, PruneTrainError, reconfigure
from prunetrain_kernels.models import build
from prunetrain_kernels.nn import fuse
from prunetrain_kernels.prune import program
from prunetrain_kernels.prune.program import FORMATS, export_program

# what runs a file elsewhere: the package and what it is made of are not there
ELSEWHERE = """
import sys
class Blocked:
    def find_spec(self, name, *rest):
        assert not name.startswith("prunetrain_kernels"), name
sys.meta_path.insert(0, Blocked())
import torch
kind, path = sys.argv[1:]
x, expected = torch.load(path + ".expected")
if kind == "torch":
    y = torch.export.load(path).module()(x)
elif kind == "torchscript":
    y = torch.jit.load(path)(x)
else:
    import onnxruntime
    session = onnxruntime.InferenceSession(path)
    y = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
assert y.shape == expected.shape
assert (y - expected).abs().max() <= 1e-5 * expected.abs().max(), (y - expected).abs().max()
assert not any(name.startswith("prunetrain_kernels") for name in sys.modules)
"""


def need(format: str) -> None:
    if format == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name)


def pruned(
    name: str = "resnet20", fused: bool = False, policy: str = "union", dead: bool = True
) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = build(name, 10), torch.randn(4, 3, 16, 16)
    model(x)  # running statistics that matter
    if fused:
        fuse(model, (x,))
    graph = traced(model, x)
    kill(graph, model, share=0.3, partly=0.4)
    if dead:
        rest_of(model, "layer1.1.conv2").zero_()
    reconfigure(model, None, graph.keep(model, policy=policy))
    return model, x


CASES = {
    "plain": (False, "union", False),
    "branch removed": (False, "union", True),
    "gated": (False, "gating", True),
    "fused": (True, "union", True),
    "fused and gated": (True, "gating", True),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_equal_outputs_for_any_batch(case: str, format: str, tmp_path: Path) -> None:
    need(format)
    fused, policy, dead = CASES[case]
    model, x = pruned(fused=fused, policy=policy, dead=dead)
    before = snapshot(model)
    done = export_program(model, (x,), tmp_path / f"net{FORMATS[format]}")
    assert same(before, snapshot(model))
    assert (done.format, done.batches) == (format, (3, 1, 5))
    assert done.max_abs_dy <= 1e-5 * done.scale
    assert done.bytes == done.path.stat().st_size
    assert str(done.path) in str(done)


@pytest.mark.parametrize("format", FORMATS)
def test_the_file_runs_without_the_package(format: str, tmp_path: Path) -> None:
    need(format)
    model, x = pruned(fused=True, policy="gating")
    path = tmp_path / "network"
    export_program(model, (x,), path, format)
    other = torch.randn(7, 3, 16, 16)
    with torch.no_grad():
        torch.save((other, model.eval()(other)), f"{path}.expected")
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, format, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


class Two(nn.Module):
    """Two inputs, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.conv(x + y).mean((2, 3))
        return mean, self.fc(mean)


@pytest.mark.parametrize("format", FORMATS)
def test_several_inputs_and_outputs(format: str, tmp_path: Path) -> None:
    need(format)
    done = export_program(Two(), (torch.randn(1, 2, 5, 5), torch.randn(1, 2, 5, 5)), tmp_path / "two", format)
    assert done.max_abs_dy <= 1e-5 * done.scale


@pytest.mark.parametrize("format", FORMATS)
def test_a_program_that_computes_something_else_is_not_written(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: exporting changes a bias. A file that was there stays."""
    need(format)
    model, x = pruned()

    def wrong(network: nn.Module, inputs: object) -> nn.Module:
        plain = honest(network, inputs)
        plain.fc.bias.data += 1e-3
        return plain

    honest = program.to_dense
    monkeypatch.setattr(program, "to_dense", wrong)
    path = tmp_path / f"net{FORMATS[format]}"
    path.write_bytes(b"before")
    with pytest.raises(PruneTrainError, match=r"differs by .* nothing was written"):
        export_program(model, (x,), path)
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


class Baked(nn.Module):
    """Its output has as many rows as the batch that it was traced with."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum((1, 2, 3)) * torch.ones(len(x.tolist()))


def test_a_batch_that_was_traced_as_a_number_is_refused(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(InputError, match=r"batch of 1"):
        export_program(Baked(), (x,), tmp_path / "net.pt")
    with pytest.raises(InputError, match="cannot be exported as torch"):
        export_program(Baked(), (x,), tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


class Masked(nn.Module):
    """One logit is masked to -inf, or all of them."""

    def __init__(self, masked: int) -> None:
        super().__init__()
        self.fc, self.masked = nn.Linear(3, 4), masked

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x.mean((2, 3)))
        return torch.cat([y[:, self.masked :], torch.full_like(y[:, : self.masked], -torch.inf)], 1)


def test_outputs_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 4, 4)
    done = export_program(Masked(1), (x,), tmp_path / "net.pt2")
    assert done.max_abs_dy <= 1e-5 * done.scale
    assert 0 < done.scale < torch.inf
    with pytest.raises(InputError, match="nothing of Masked's output is finite for a batch of 3"):
        export_program(Masked(4), (x,), tmp_path / "all.pt2")
    assert not (tmp_path / "all.pt2").exists()
    # finite in the program, but not in the model
    monkeypatch.setattr(program, "to_dense", lambda *_: Masked(0))
    with pytest.raises(PruneTrainError, match=r"differs by inf .*; export as onnx or torchscript\.$"):
        export_program(Masked(1), (x,), tmp_path / "other.pt2")


def test_what_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = pruned()
    with pytest.raises(InputError, match=r"does not say the format; let it end in .pt2, .onnx, .pt,"):
        export_program(model, (x,), tmp_path / "net.bin")
    with pytest.raises(InputError, match="format 'tflite' is not known"):
        export_program(model, (x,), tmp_path / "net.pt", "tflite")
    with pytest.raises(InputError, match="there is no folder"):
        export_program(model, (x,), tmp_path / "nowhere" / "net.pt")
    with pytest.raises(InputError, match="there is no tensor in it"):
        export_program(model, (), tmp_path / "net.pt")
    with pytest.raises(InputError, match="at least one example"):
        export_program(model, (x[:0],), tmp_path / "net.pt")
    with pytest.raises(InputError, match="does not run on example_inputs"):
        export_program(model, (x[:, :2],), tmp_path / "net.pt")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match="needs the packages onnx and onnxscript: pip install"):
        export_program(model, (x,), tmp_path / "net.onnx")


def test_onnx_is_checked_without_its_runtime_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    model, x = pruned()
    done = export_program(model, (x,), tmp_path / "net.onnx")
    assert done.checked_with == "onnx's reference evaluator"
    assert done.max_abs_dy <= 1e-5 * done.scale
