"""The suites step, inference, reconfigure and memory on tiny networks: what they write, and what they refuse."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_kit import rows_of, tiny_session
from torch import nn

from bench import profiles, rows, timing
from bench.harness import EAGER, OURS, Session
from bench.suites import inference, memory, reconfigure, step
from prunetrain_kernels.cost import MemoryModel
from prunetrain_kernels.graph import trace_channels
from prunetrain_kernels.models import MODELS, build
from prunetrain_kernels.models.resnet import BasicBlock, CifarResNet
from prunetrain_kernels.optim import SGD

TINY = "resnet14"  # two blocks in each of three stages; no network of the package is as small


@pytest.fixture(autouse=True, scope="module")
def _tiny_network() -> Iterator[None]:
    def resnet14(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
        return CifarResNet(BasicBlock, 2, num_classes, in_channels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, TINY, resnet14)
        yield


def tiny_steps(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(step, "networks", lambda session: [step.Network(TINY, 16, 10, 16)])


def tiny_inference(patch: pytest.MonkeyPatch) -> None:
    pruned = profiles.Profile("40% FLOPs (synthetic)", TINY, 16, 100, target=0.4)
    patch.setattr(inference, "cases", lambda session: [inference.Case(TINY, 16, 100, ((pruned, "resnet32"),))])


def tiny_reconfigurations(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reconfigure, "networks", lambda session: [reconfigure.Network(TINY, 16, 10)])


def tiny_memory(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(memory, "networks", lambda session: [memory.Network(TINY, 16, 10, 64)])


SUITES: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Any]] = {
    "step": (tiny_steps, step),
    "inference": (tiny_inference, inference),
    "reconfigure": (tiny_reconfigurations, reconfigure),
    "memory": (tiny_memory, memory),
}


def ran(name: str, folder: Path) -> tuple[Session, list[dict[str, str]]]:
    session = tiny_session(folder)
    SUITES[name][1].run(session)
    return session, rows_of(folder / f"{name}.csv")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Session, list[dict[str, str]]]]:
    """Session and rows of each suite."""
    by_suite = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, (make_tiny, _) in SUITES.items():
            make_tiny(patch)
            by_suite[name] = ran(name, tmp_path_factory.mktemp(name))
    return by_suite


Results = dict[str, tuple[Session, list[dict[str, str]]]]


@pytest.mark.parametrize("name", SUITES)
def test_rows_are_sound_and_nothing_is_refused(name: str, results: Results) -> None:
    session, written = results[name]
    assert session.refused == []
    assert session.written == len(written) > 0
    for row in written:
        assert rows.faults(row) == []
        assert row["suite"] == name
        assert row["layer"] == TINY
        assert row["dtype"] == "fp32"  # what ran on the CPU, whatever --dtype says
        assert row["mask_profile"]


def values(written: list[dict[str, str]], **wanted: str) -> list[dict[str, str]]:
    return [row for row in written if all(row[key] == value for key, value in wanted.items())]


def test_step_has_every_provider_and_shape(results: Results) -> None:
    written = results["step"][1]
    labels = ("dense", "uniform:0.6 (synthetic)", "uniform:0.6 (synthetic) rounded to 8")
    assert {(row["mask_profile"], row["provider"]) for row in written} == {
        *((label, provider) for label in labels for provider in (EAGER, OURS)),
        ("dense", step.NO_LASSO),
    }
    assert all(row["mode"] == timing.CPU and row["n"] == "16" for row in written)


def test_step_compares_with_the_dense_step_of_the_same_provider(results: Results) -> None:
    written = results["step"][1]
    for row in written:
        dense = values(written, mask_profile="dense", provider=row["provider"])[0]
        assert float(row["time_ratio"]) == pytest.approx(float(row["p50_us"]) / float(dense["p50_us"]), rel=1e-4)
        assert float(row["flops_ratio"]) == pytest.approx(float(row["flops"]) / float(dense["flops"]), rel=1e-4)
        if row["mask_profile"] != "dense":
            assert 0.3 < float(row["flops_ratio"]) < 0.8  # 0.6^2, more where channels are rounded up
            eta = (1 - float(row["time_ratio"])) / (1 - float(row["flops_ratio"]))
            assert float(row["eta"]) == pytest.approx(eta, rel=1e-3, abs=1e-3)


def test_the_floor_of_a_step_is_a_sum(results: Results) -> None:
    for row in results["step"][1]:
        least = float(row["flops"]) / 0.05e6 + float(row["model_bytes"]) / 10e3
        assert float(row["roof_us"]) == pytest.approx(least, rel=1e-4)
        assert float(row["ratio_to_roof"]) == pytest.approx(least / float(row["p50_us"]), rel=1e-4)
        v100 = float(row["flops"]) / 15.7e6 + float(row["model_bytes"]) / 900e3
        assert float(row["v100_projection_us"]) == pytest.approx(v100, rel=1e-4)


def test_full_runs_take_the_papers_shapes(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    session.quick = False
    networks = step.networks(session)
    assert [n.name for n in networks] == ["imagenet_resnet50", "resnet32", "resnet50", "vgg11", "vgg13"]
    labels = [(p.label, r) for p, r in step.shapes(session, networks[0])]
    uniform = [(f"uniform:{share} (synthetic)", r) for share in (0.8, 0.6, 0.4) for r in (1, 8)]
    own = [("paper:0.25 (synthetic)", 1), ("paper:0.25 (synthetic)", 8)]
    assert labels == [("dense", 1), *own, *uniform]  # its own first: a long run may be cut off
    assert len(step.shapes(session, networks[1])) == 7
    ratios = [row for _, row in inference.cases(session)[0].pruned]
    assert ratios == ["paper:0.25", "paper:0.2", "paper:0.1"]
    assert [case.network for case in inference.cases(session)[1:]] == list(inference.CIFAR100_FLOPS)


class WithoutLasso(SGD):
    """What a forgotten lasso looks like."""

    def regularize_with(self, lasso: Any, coefficient: Any = 0.0) -> None:
        pass


def test_a_step_without_its_lasso_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_steps(monkeypatch)
    monkeypatch.setattr(step, "SGD", WithoutLasso)
    shapes = step.shapes
    monkeypatch.setattr(step, "shapes", lambda session, network: shapes(session, network)[:2])  # dense, one pruned
    session, written = ran("step", tmp_path)
    assert session.refused == [f"{TINY} step by ours: wrong result"] * 2
    assert {row["provider"] for row in written} == {EAGER, step.NO_LASSO}


def test_a_shape_that_fails_is_reported_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_steps(monkeypatch)
    calls = []

    def failing(model: nn.Module) -> None:
        calls.append(model)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory for this")

    monkeypatch.setattr(step, "fuse", failing)
    session, written = ran("step", tmp_path)
    assert session.refused == [f"{TINY} uniform:0.6 (synthetic): OutOfMemoryError no memory for this"]
    assert {row["mask_profile"] for row in written} == {"dense", "uniform:0.6 (synthetic) rounded to 8"}


def test_inference_by_batch_and_provider(results: Results) -> None:
    written = results["inference"][1]
    assert {(row["mask_profile"], row["provider"], row["direction"], row["n"]) for row in written} == {
        (label, provider, "inference of 10", "10")
        for label in ("dense", "40% FLOPs (synthetic)")
        for provider in (EAGER, inference.FOLDED)
    }
    for row in values(written, mask_profile="40% FLOPs (synthetic)"):
        assert float(row["flops_ratio"]) == pytest.approx(0.4, abs=0.03)
        dense = values(written, mask_profile="dense", provider=row["provider"])[0]
        assert float(row["time_ratio"]) == pytest.approx(float(row["p50_us"]) / float(dense["p50_us"]), rel=1e-4)


def test_inference_computes_in_bf16_where_it_is_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_inference(monkeypatch)
    seen = set()
    right = inference._provider

    def watched(model: Any, x: torch.Tensor) -> Any:
        seen.update({x.dtype, *(parameter.dtype for parameter in model.parameters())})
        return right(model, x)

    monkeypatch.setattr(inference, "_provider", watched)
    session = tiny_session(tmp_path)
    session.dtype = torch.bfloat16
    inference.run(session)
    assert session.refused == []
    assert seen == {torch.bfloat16}
    assert {row["dtype"] for row in rows_of(tmp_path / "inference.csv")} == {"bf16"}
    session.dtype = torch.float16
    inference.run(session)
    assert session.refused == ["inference: a CPU only emulates fp16; use --dtype bf16 or fp32"]
    assert {row["dtype"] for row in rows_of(tmp_path / "inference.csv")} == {"bf16"}


def test_folding_leaves_no_batch_norm_and_the_same_function() -> None:
    torch.manual_seed(0)
    model = profiles.prune(profiles.Profile("x", TINY, 16, 10, share=0.6)).model
    x = torch.randn(4, 3, 16, 16)
    inference.settle(model, torch.randn(16, 3, 16, 16))
    program = inference.folded(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in program.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())  # a copy was folded
    torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_real_run_with_removed_layers_is_measured(tmp_path: Path) -> None:
    """A run's channels.csv whose second block has lost its branch."""
    names = trace_channels(build(TINY, 10), (torch.zeros(2, 3, 16, 16),)).layers
    model = build(TINY, 10)
    run = {}
    for name in names:
        outputs, inputs = model.get_submodule(name).weight.shape[:2]  # type: ignore[union-attr,index]
        gone = name.startswith("layer1.1.")
        run[name] = (0, 0, True) if gone else (inputs, outputs, False)
    session = tiny_session(tmp_path)
    session.profile = profiles.Profile("a run", TINY, 16, 10, run=run)
    session.only = TINY
    inference.run(session)
    step._measure(session, step.Network(TINY, 16, 10, 16), session.profile, 1, "a run", step.Dense())
    assert session.refused == []
    shares = {row["mask_profile"]: float(row["flops_ratio"]) for row in rows_of(tmp_path / "inference.csv")}
    assert shares["dense"] == 1
    assert 0.8 < shares["a run"] < 0.95  # two of 13 layers are gone


def test_a_wrong_fold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_inference(monkeypatch)
    right = inference.folded

    def wrong(model: nn.Module) -> nn.Module:
        program = right(model)
        with torch.no_grad():
            program.get_submodule("conv1").bias.add_(0.1)  # type: ignore[operator,union-attr]
        return program

    monkeypatch.setattr(inference, "folded", wrong)
    session, written = ran("inference", tmp_path)
    assert session.refused == [f"{TINY} inference of 10 by {inference.FOLDED}: wrong result"] * 2
    assert {row["provider"] for row in written} == {EAGER}


def test_the_papers_speedups_are_those_of_its_cells() -> None:
    for by_batch in inference.TAB2.values():
        for before, after, speedup in by_batch.values():
            assert after is None or after / before == pytest.approx(speedup, abs=0.02)


def test_reconfigurations_are_timed_one_by_one(results: Results) -> None:
    written = results["reconfigure"][1]
    providers = [row["provider"] for row in written]
    assert providers[:3] == [OURS, reconfigure.WHOLE, reconfigure.REBUILT]
    assert set(providers[3:]) <= {reconfigure.TORCH_PRUNING}
    for row in written:
        assert row["mode"] == timing.CALLS
        assert int(row["samples"]) == reconfigure.QUICK_CALLS
        assert float(row["error"]) < 1e-12


def tiny_training() -> reconfigure.Training:
    profile = profiles.Profile("x", TINY, 16, 10, share=0.6)
    return reconfigure.training(reconfigure.Network(TINY, 16, 10), profile)


def test_rebuilding_and_ours_agree() -> None:
    before = tiny_training()
    ours, rebuilt = reconfigure.by_ours(before.copied()), reconfigure.by_rebuilding(before.copied())
    for a, b in ((ours.model.state_dict(), rebuilt.model.state_dict()), (ours.momentum(), rebuilt.momentum())):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    count = sum(p.numel() for p in ours.model.parameters())
    assert count < 0.45 * sum(p.numel() for p in before.model.parameters())
    held = {id(p) for group in rebuilt.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in rebuilt.model.parameters()}


def test_copies_share_nothing() -> None:
    before = tiny_training()
    kept = {name: t.clone() for name, t in [*before.model.state_dict().items(), *before.momentum().items()]}
    reconfigure.by_ours(before.copied())
    now = dict([*before.model.state_dict().items(), *before.momentum().items()])
    assert all(torch.equal(kept[name], now[name]) for name in kept)


@pytest.mark.parametrize("what", ["momentum", "statistics"])
def test_a_wrong_rebuild_is_refused(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_reconfigurations(monkeypatch)
    monkeypatch.setattr(reconfigure, "QUICK_CALLS", 1)
    right = reconfigure.by_rebuilding

    def wrong(job: reconfigure.Training) -> reconfigure.Training:
        done = right(job)
        if what == "momentum":
            done.momentum()["layer1.0.conv1.weight"].zero_()
        else:
            done.model.get_buffer("layer1.0.bn1.running_mean").zero_()
        return done

    monkeypatch.setattr(reconfigure, "by_rebuilding", wrong)
    session, written = ran("reconfigure", tmp_path)
    assert session.refused == [f"{TINY} reconfigure by rebuild: wrong result"]
    assert reconfigure.REBUILT not in {row["provider"] for row in written}
    assert OURS in {row["provider"] for row in written}


def test_memory_shrinks_and_makes_room(results: Results) -> None:
    written = results["memory"][1]
    assert {row["mode"] for row in written} == {"model"}
    assert {row["provider"] for row in written} == {memory.MODEL}
    steps = {row["mask_profile"]: row for row in values(written, direction=memory.STEP)}
    assert list(steps) == ["dense", "uniform:0.6 (synthetic)"]
    dense, pruned = (float(row["peak_memory"]) for row in steps.values())
    assert 0.5 < pruned / dense < 0.75  # activations shrink with the channels, not with their square
    assert 0.3 < float(steps["uniform:0.6 (synthetic)"]["flops_ratio"]) < 0.5
    fits = values(written, direction=memory.FITS_DENSE)
    assert [row["n"] for row in fits] == ["64", "96"]
    assert all(float(row["peak_memory"]) <= dense for row in fits)
    assert all(float(row["peak_memory"]) <= memory.CARD for row in values(written, direction=memory.FITS_CARD))


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    model = MemoryModel(fixed=1000, per_image=10.0)
    assert memory.largest_batch(model, 1000 + 10 * 64) == 64
    assert memory.largest_batch(model, 1000 + 10 * 64 - 1) == 32
    assert memory.largest_batch(model, 1000 + 10 * 31) == 0
    assert memory.largest_batch(model, 10) == 0
