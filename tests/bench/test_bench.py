"""The command `python -m bench`, the rows it writes, and that a wrong provider is refused."""

import dataclasses
import functools
import math
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bench_kit import CPU, rows_of, tiny_session

from bench import counters, harness, launches, profiles, rows, targets, timing
from bench.__main__ import main
from bench.roof import Roof
from bench.roof import measure as measure_roof
from bench.suites import SUITES, bn, comm, conv, fig7, gather, gating, kernels
from prunetrain_kernels import machine
from prunetrain_kernels.cost import count_flops
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.models import build
from prunetrain_kernels.ops import channel_index
from prunetrain_kernels.train.config import TrainConfig
from prunetrain_kernels.train.loop import train

ROOT = Path(__file__).parents[2]


def test_list_names_the_suites(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(SUITES)
    assert {"fig7", "bn", "lasso", "sgd", "gather", "conv", "step", "inference", "reconfigure", "memory", "comm"} < set(
        SUITES
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["kernels", "--arch", "60"], "--arch 60 is no architecture"),
        (["kernels", "--arch", "ninety"], "--arch takes numbers"),
        (["kernels"], "TRITON_INTERPRET=1"),  # as it is set in this process
        (["run", "fig8"], "there is no suite fig8"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch", "0"], "--batch must be at least 1"),
        (["--profile", "half"], "--profile half"),
        (["--out", "/dev/null/results"], "cannot write /dev/null/results"),
    ],
)
def test_settings_that_cannot_be_are_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "bn", "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_missing_gpu_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "bn", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_architectures_are_listed_once() -> None:
    assert kernels.architectures("80,70,80") == [80, 70]


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a rehearsal of bench/gpu.sh, all of its steps; beside it what came back, and what was printed."""
    folder = tmp_path_factory.mktemp("rehearsal")
    environment = os.environ | {"VISIT": str(folder / "visit"), "OUT": str(folder / "out"), "PYTHON": sys.executable}
    environment |= {"OMP_NUM_THREADS": "1", "STEPS": ""}
    run = subprocess.run(
        ["bash", "bench/gpu.sh", "--rehearse"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (folder / "said").write_text(run.stdout)
    return folder / "visit"


def test_the_visit_is_rehearsed_step_by_step_without_a_gpu(visit: Path) -> None:
    lines = [line.split(maxsplit=2) for line in (visit / "visit.txt").read_text().splitlines()]
    results = {name: (result if result != "timed" else "timed out") for name, result, _ in lines}
    assert results.pop("dies") == "died"
    assert results.pop("hangs") == "timed out"
    assert results == dict.fromkeys(
        (
            "compile",
            "smoke",
            "roof",
            "sgd-lasso-bn",
            "step",
            "t2",
            "cuda-graphs",
            "fig7-gating",
            "bn-compile",
            "conv-gather",
        ),
        "done",
    )
    smoke = next((visit / "logs").glob("smoke*.log")).read_text()
    assert f"{len(launches.all_kernels())} kernels\n" in smoke
    assert "FAILED" not in smoke
    assert "shows what only a GPU can" in next((visit / "logs").glob("t2*.log")).read_text()
    assert "REFUSED" not in (visit / "logs/sgd-lasso-bn.log").read_text()
    assert sorted(path.name for path in (visit.parent / "out").iterdir()) == ["visit.tgz", "visit.txt"]
    with tarfile.open(visit.parent / "out/visit.tgz") as archive:
        names = set(archive.getnames())
    assert {"visit/visit.txt", "visit/rows/sgd.csv", "visit/logs/step.log", "visit/logs/environment.log"} <= names


def test_every_suite_of_the_gpu_script_is_one() -> None:
    lines = [line.split() for line in (ROOT / "bench/gpu.sh").read_text().splitlines() if line.startswith("suites ")]
    named = {word for words in lines for word in words[3:] if not word.startswith(("-", '"'))}
    assert {"sgd", "lasso", "bn", "step", "fig7", "gating", "conv", "gather"} == named
    assert named < set(SUITES)


def test_operator_suites_write_rows_that_hold_the_schema(visit: Path) -> None:
    for suite in ("sgd", "lasso", "bn", "gather"):
        written = rows_of(visit / "rows" / f"{suite}.csv")
        assert tuple(written[0]) == rows.COLUMNS
        assert [fault for row in written for fault in rows.faults(row)] == []
        assert {row["suite"] for row in written} == {suite}
        assert {row["size"] for row in written} == {"quick"}
        assert all(float(row["ratio_to_roof"]) > 0 for row in written if row["mode"] == timing.CPU)


def test_bn_measures_every_layer_and_their_sum(visit: Path) -> None:
    every = {(row["layer"], row["provider"], row["direction"], row["mask_profile"], row["mode"]): row
             for row in reversed(rows_of(visit / "rows/bn.csv"))}  # a visit measures them twice  # fmt: skip
    written = [row for row in every.values() if row["mask_profile"] == "dense" and row["mode"] != "model"]
    single = [row for row in written if row["layer"] != bn.ALL]
    assert len({row["layer"] for row in single}) == 16
    # two images of one pixel have two values per channel: their gradients all but cancel, in any implementation
    assert all(0 <= float(row["error"]) < (1e-2 if "1x1" in row["layer"] else 1e-4) for row in single)
    for provider in ("ours", "eager"):
        total = sum(float(r["p50_us"]) * int(r["count"]) for r in single if is_of(r, provider, "forward"))
        whole = next(r for r in written if r["layer"] == bn.ALL and is_of(r, provider, "forward"))
        assert total == pytest.approx(float(whole["p50_us"]), rel=1e-3)


def test_bn_shows_the_papers_three_savings_by_model(visit: Path) -> None:
    model = {row["mask_profile"]: row for row in rows_of(visit / "rows/bn.csv") if row["provider"] == "model"}
    assert list(model) == ["dense", "paper:0.25 (synthetic)", "paper:0.2 (synthetic)", "paper:0.1 (synthetic)"]
    bytes_left = [int(row["model_bytes"]) for row in model.values()]
    assert bytes_left == [bytes_left[0], *sorted(bytes_left[1:])]
    assert bytes_left[0] == 2 * 8 * 11_113_984 * 4  # images, passes, elements, fp32
    assert all("v100_projection_us" in row and float(row["v100_projection_us"]) > 0 for row in model.values())


def test_the_gather_suite_measures_all_widths(visit: Path) -> None:
    written = rows_of(visit / "rows/gather.csv")
    assert len({row["layer"] for row in written}) == 12
    assert {(row["c_full"], row["c_live"]) for row in written} >= {("256", "128"), ("2048", "1024")}


def is_of(row: dict[str, str], provider: str, direction: str) -> bool:
    return row["provider"] == provider and row["direction"] == direction


def test_all_of_resnet50s_batch_norms_are_measured() -> None:
    norms = bn.layers(build("imagenet_resnet50", 1000))
    assert sum(layer.count for layer in norms) == 53
    assert sum(layer.count for layer in norms if layer.follows == "BN+add+ReLU") == 16
    assert sum(layer.count for layer in norms if layer.follows == "BN") == 4
    elements = sum(layer.count * layer.channels * layer.side**2 for layer in norms)
    assert elements == 11_113_984  # per image: what the network's convolutions put out
    # design section 7: 12.0 ms at 4.3 TB/s for batch 256 in fp16
    size = sum(
        layer.count * bn.layer_bytes(256 * layer.channels * layer.side**2, 2, layer.follows, direction)
        for layer in norms
        for direction in ("forward", "backward")
    )
    assert size / 4.3e12 == pytest.approx(12.0e-3, rel=0.05)


def test_a_provider_with_a_wrong_result_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*arguments, relu):  # type: ignore[no-untyped-def]
        y = bn.eager_batch_norm(*arguments, relu=relu)
        return y + F.pad(torch.ones(1, 1, 1, 1), (0, 0, 0, 0, 0, y.shape[1] - 1)).to(y)  # one channel is off

    monkeypatch.setattr(bn, "our_batch_norm", wrong)
    session = tiny_session(tmp_path)
    two = [bn.Layer(256, 8, "BN+add+ReLU", 3, 256), bn.Layer(64, 8, "BN+ReLU", 2, 64)]
    bn.all_of(session, two, "dense", ["eager", "ours"], {})
    assert "BN+add+ReLU 256x8x8 forward by ours: wrong result" in session.refused
    written = rows_of(tmp_path / "bn.csv")
    assert not any(is_of(row, "ours", "forward") for row in written)  # neither layers nor their sum
    assert any(row["layer"] == bn.ALL and is_of(row, "eager", "forward") for row in written)
    assert "ours has no sum" in capsys.readouterr().out
    assert "REFUSED BN+add+ReLU" in targets.verdict(session)


def test_a_piece_that_fails_is_reported_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gather, "channel_gather", failing)
    session = tiny_session(tmp_path)
    gather.run(session)
    assert session.refused == [f"{w} channels: RuntimeError no such kernel" for w in (256, 512, 1024, 2048)]


def test_verdict_says_met_and_missed(tmp_path: Path) -> None:
    session = tiny_session(tmp_path, roof=Roof(1.0, {"fp32": 0.05}, 1.0))
    session.p50 = {
        ("all parameters", "ours", "SGD"): 100.0,
        ("all parameters", "ours", "SGD+lasso"): 104.0,
        ("floor", "model", "SGD"): 80.0,
        ("all parameters", "torch fused", "SGD"): 90.0,
        ("all layers", "ours", "forward"): 1000.0,
        ("all layers", "ours", "backward"): 1000.0,
        ("all layers", "eager", "forward"): 1500.0,
        ("all layers", "eager", "backward"): 1500.0,
        ("bytes", "model", "both"): 1.9e6,  # 0.95 of a copy at 1 GB/s
    }
    assert [" ".join(str(target).split("= ")[-1].split()[1:]) for target in targets.targets(session)] == [
        "met",
        "missed by 4.0%",
        "missed by 5.8%",
        "missed by 10.1%",
        "met",
        "met",
        *["not measured"] * 3,
    ]


def test_a_verdict_without_measurements_is_empty(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    session.quick = False
    assert targets.verdict(session) == ""


# -- convolutions, fig. 7, communication -------------------------------------------------------------------------------


def test_fig7_measures_every_block_both_ways(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    session.only = "layer4"
    fig7.run(session)
    assert session.refused == []
    written = rows_of(tmp_path / "fig7.csv")
    assert [fault for row in written for fault in rows.faults(row)] == []
    assert {row["layer"] for row in written} == {f"layer4.{i}.conv3" for i in range(3)}
    ways = {(row["provider"], row["part"]) for row in written}
    assert ways == {("dense", "conv"), ("union", "conv")} | {
        (way, part) for way in (fig7.NAIVE, fig7.FUSED) for part in ("conv", "reshape", "all")
    }
    for direction in ("forward", "backward"):
        by = {
            (r["provider"], r["part"]): r
            for r in written
            if r["layer"] == "layer4.0.conv3" and r["direction"] == direction
        }
        dense, union, live = by["dense", "conv"], by["union", "conv"], by[fig7.FUSED, "conv"]
        assert int(live["k"]) < int(union["k"]) < int(dense["k"]) == 2048
        assert float(live["flops"]) < float(union["flops"]) < float(dense["flops"])
        assert float(union["flops_ratio"]) == pytest.approx(float(union["flops"]) / float(dense["flops"]), rel=1e-4)
        assert dense["flops_ratio"] == ""


def test_gating_measures_first_and_last_convolutions_in_every_form(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    session.only = "layer4.1"
    gating.run(session)
    assert session.refused == []
    written = rows_of(tmp_path / "gating.csv")
    assert [fault for row in written for fault in rows.faults(row)] == []
    assert {row["layer"] for row in written} == {"layer4.1.conv1", "layer4.1.conv3"}
    for layer, forms in (("layer4.1.conv1", {gating.SELECTED, gating.EXPANDED}), ("layer4.1.conv3", {gating.EXPANDED})):
        whole = {r["provider"]: r for r in written if r["layer"] == layer and r["part"] == "all"}
        assert set(whole) == forms | {gating.DENSE, gating.UNION, gating.UNION_EAGER, gating.NAIVE, gating.AUTO}
        flops = {name: float(row["flops"]) for name, row in whole.items()}
        assert flops[gating.NAIVE] < flops[gating.UNION] < flops[gating.DENSE]
        size = {name: float(row["model_bytes"]) for name, row in whole.items()}
        assert size[gating.EXPANDED] <= size[gating.UNION] < size[gating.NAIVE]
        assert float(whole[gating.UNION]["flops_ratio"]) == pytest.approx(
            flops[gating.UNION] / flops[gating.DENSE], 1e-4
        )
    alone = {(r["layer"], r["provider"]) for r in written if r["part"] == "conv"}
    assert ("layer4.1.conv1", gating.NO_INDEX) in alone
    assert ("layer4.1.conv1", gating.EXPANDED) in alone
    assert "auto / better of union and gating" in targets.verdict(session)


def test_gating_refuses_channels_in_the_wrong_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = gating.batch_norm_act

    def shifted(*arguments: object, **options: object) -> torch.Tensor:
        return true(*arguments, **options).roll(1, 1)  # type: ignore[arg-type]

    monkeypatch.setattr(gating, "batch_norm_act", shifted)
    session = tiny_session(tmp_path)
    session.only = "layer4.2.conv3"
    gating.run(session)
    assert len(session.refused) >= 2
    written = {row["provider"] for row in rows_of(tmp_path / "gating.csv") if row["part"] == "all"}
    assert written == {gating.DENSE, gating.UNION_EAGER, gating.NAIVE}


def test_costs_are_counted_without_running_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gating.csv"
    assert main(["costs", "--batch", "8", "--profile", "uniform:0.5", "--out", str(path)]) == 0
    written = rows_of(path)
    assert [fault for row in written for fault in rows.faults(row)] == []
    assert f"{len(written)} rows" in capsys.readouterr().out
    one = {r["provider"]: r for r in written if r["layer"] == "layer1.1.conv3"}
    # 1x1, 56 x 56 pixels, 8 images: 32 channels in (half of 64), 128 kept and 0.9 of them live out
    live = round(0.9 * 128)
    assert int(one[gating.UNION]["flops"]) == 3 * 2 * 8 * 56 * 56 * 32 * 128
    assert int(one[gating.NAIVE]["flops"]) == 3 * 2 * 8 * 56 * 56 * 32 * live
    pixels = 8 * 56 * 56 * 2
    follows = 5 * 128  # the sum's output, its gradient twice, the residual and its gradient
    assert int(one[gating.UNION]["model_bytes"]) == pixels * (3 * 32 + 8 * 128 + follows)
    assert int(one[gating.EXPANDED]["model_bytes"]) == pixels * (3 * 32 + 8 * live + follows)
    assert int(one[gating.NAIVE]["model_bytes"]) == pixels * (3 * 32 + 5 * live + 9 * 128 + follows)
    assert main(["costs", "--batch", "0", "--out", str(path)]) == 2


def test_fig7_refuses_a_scatter_to_the_wrong_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(y: torch.Tensor, index: object) -> torch.Tensor:
        return channel_index.channel_scatter(y, index).roll(1, 1)  # type: ignore[arg-type]

    monkeypatch.setattr(fig7, "channel_scatter", shifted)
    session = tiny_session(tmp_path)
    session.only = "layer4.2"
    fig7.run(session)
    assert len(session.refused) == 4  # forward and backward, alone and behind the convolution
    written = rows_of(tmp_path / "fig7.csv")
    assert not any(row["provider"] == fig7.FUSED and row["part"] == "all" for row in written)
    assert any(row["provider"] == fig7.NAIVE and row["part"] == "all" for row in written)


def test_fig7_has_a_block_for_each_last_convolution() -> None:
    blocks = fig7.blocks(profiles.parse("uniform:0.5"), 224)
    assert len(blocks) == 16
    assert [block.dense.k for block in blocks] == [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 3
    assert all(block.union.k == block.dense.k // 2 for block in blocks)
    assert all(len(block.outputs) == block.live.k == round(profiles.LIVE_OF_UNION * block.union.k) for block in blocks)
    assert all(
        block.dense.h == side for block, side in zip(blocks, [56] * 3 + [28] * 4 + [14] * 6 + [7] * 3, strict=True)
    )
    with pytest.raises(InputError, match="no residual blocks"):
        fig7.blocks(profiles.Profile("dense", "vgg11", 32, 10, share=1.0), 32)


def test_conv_compares_every_distinct_layer_with_its_dense_self(tmp_path: Path) -> None:
    session = tiny_session(tmp_path, "uniform:0.5")
    session.only = "layer3"
    conv.run(session)
    assert session.refused == []
    written = rows_of(tmp_path / "conv.csv")
    assert [fault for row in written for fault in rows.faults(row)] == []
    assert {row["provider"] for row in written} == {"eager"}
    assert sum(int(r["count"]) for r in written if r["mask_profile"] == "dense" and r["direction"] == "forward") == 19
    halves = [row for row in written if row["mask_profile"] == "uniform:0.5 (synthetic)"]
    assert all(float(row["flops_ratio"]) == pytest.approx(0.25, abs=0.01) for row in halves)
    backward = next(row for row in halves if row["direction"] == "backward")
    shape = [float(backward[column]) for column in ("n", "h", "w", "c_live", "k", "r", "s")]
    assert float(backward["flops"]) == pytest.approx(4 * math.prod(shape), rel=1e-5)


@functools.cache
def paper_network(ratio: str) -> profiles.Pruned:
    """ImageNet ResNet-50 as it is left by a paper profile; nobody changes it."""
    return profiles.prune(profiles.parse(f"paper:{ratio}"))


def test_comm_falls_with_the_gradients_for_every_number_of_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = {profiles.parse(f"paper:{ratio}"): paper_network(ratio) for ratio in profiles.PAPER_INFERENCE_FLOPS}
    monkeypatch.setattr(profiles, "prune", networks.__getitem__)
    session = tiny_session(tmp_path)
    comm.run(session)
    written = rows_of(tmp_path / "comm.csv")
    assert [fault for row in written for fault in rows.faults(row)] == []
    assert {int(row["n"]) for row in written} == set(comm.GPUS)
    sent = {(r["mask_profile"], int(r["n"]), r["provider"]): int(r["model_bytes"]) for r in written}
    shares = {
        sent["paper:0.25 (synthetic)", n, p] / sent["dense", n, p]
        for n in comm.GPUS
        for p in ("ring", comm.HIERARCHICAL)
    }
    assert max(shares) - min(shares) < 1e-6  # the same saving at all scales, as the paper says
    assert 0.4 < min(shares) < 0.6
    assert all(row["p50_us"] == "" and row["mode"] == "model" for row in written)


# -- profiles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "left"), [("0.25", 0.47), ("0.2", 0.56), ("0.1", 0.88)])
def test_a_paper_profile_leaves_the_papers_flops(ratio: str, left: float) -> None:
    pruned = paper_network(ratio)
    example = (torch.zeros(1, 3, 224, 224),)
    share = count_flops(pruned.model, example).inference / count_flops(pruned.dense, example).inference
    assert share == pytest.approx(left, abs=0.01)


def test_rounding_keeps_multiples_and_layers_fit() -> None:
    pruned = profiles.prune(profiles.parse("uniform:0.3"), round_to=8)
    widths = {m.out_channels for m in pruned.model.modules() if isinstance(m, torch.nn.Conv2d)}
    assert all(width % 8 == 0 for width in widths)
    assert pruned.model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)


def test_a_runs_profile_is_what_it_kept(tmp_path: Path) -> None:
    config = TrainConfig(
        out=str(tmp_path / "run"), model="resnet20", data="synthetic:64x16x16", epochs=2, batch=16, interval=1,
        penalty_ratio=0.9, threshold=0.6, relative=True, zeroing_tolerance=float("inf"), threads=1,
    )  # fmt: skip
    train(config, progress=False)
    profile = profiles.parse(str(tmp_path / "run/channels.csv"))
    assert (profile.network, profile.image) == ("resnet20", 32)
    pruned = profiles.prune(profile)
    kept = {row["layer"]: row for row in rows_of(tmp_path / "run/channels.csv") if row["reconfiguration"] == "2"}
    assert any(int(row["out_kept"]) < int(row["out_total"]) for row in kept.values())
    for name, module in pruned.model.named_modules():
        if isinstance(module, torch.nn.Conv2d) and kept[name]["removed"] == "0":
            assert (module.in_channels, module.out_channels) == (
                int(kept[name]["in_kept"]),
                int(kept[name]["out_kept"]),
            )
    with pytest.raises(InputError, match="not of a vgg11"):
        profiles.for_network(profile, "vgg11", 32, 10)
    session = tiny_session(tmp_path / "out")
    session.profile = profile
    comm.run(session)
    assert {row["layer"] for row in rows_of(tmp_path / "out/comm.csv")} == {"epoch 1", "epoch 2"}


@pytest.mark.parametrize("text", ["half", "uniform:0", "uniform:x", "paper:0.3", "README.md", "bench"])
def test_an_unknown_profile_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="profile"):
        profiles.parse(text)


# -- counters ----------------------------------------------------------------------------------------------------------

NCU = """#!/bin/sh
[ -n "$DENIED" ] && { echo "==ERROR== ERR_NVGPUCTRPERM"; exit 1; }
echo '==PROF== Connected'
echo '"ID","Process ID","Metric Name","Metric Unit","Metric Value"'
echo '"0","1","dram__bytes_read.sum","Mbyte","1,000.5"'
echo '"0","1","dram__bytes_write.sum","Kbyte","2"'
echo '"0","1","sm__cycles.sum","cycle","7"'
"""


def test_hardware_bytes_are_read_from_ncu_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ncu = tmp_path / "ncu"
    ncu.write_text(NCU)
    ncu.chmod(0o755)
    monkeypatch.setattr(counters, "tool", lambda: str(ncu))
    assert counters.dram_bytes("bench", ["list"]) == 1_000_502_000
    monkeypatch.setenv("DENIED", "1")
    with pytest.raises(counters.NoCounters, match="denies"):
        counters.dram_bytes("bench", ["list"])
    monkeypatch.setattr(counters, "tool", lambda: None)
    with pytest.raises(counters.NoCounters, match="no ncu"):
        counters.dram_bytes("bench", ["list"])
    with pytest.raises(counters.NoCounters, match="no kernel"):
        counters.parse("==PROF== nothing")


# -- roof, rows, compare -----------------------------------------------------------------------------------------------


def test_the_roof_is_the_larger_of_bytes_and_flops() -> None:
    roof = Roof(100.0, {"fp16": 2.0})
    assert roof.microseconds(1e6, 0, "fp16") == pytest.approx(10.0)
    assert roof.microseconds(1e6, 1e9, "fp16") == pytest.approx(500.0)
    assert roof.microseconds(1e6, 1e9, "bf16") is None  # no peak is known, so there is no roof
    assert roof.microseconds(0, 0, "fp16") is None
    measured = measure_roof(CPU, quick=True)
    assert measured.gb_s > 0.1
    assert measured.tflop_s["fp32"] > 1e-4


def test_a_killed_run_leaves_a_readable_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "run", "gather", "--device", "cpu", "--quick", "--out", str(tmp_path)]
    command = [*command, "--profile", "uniform:0.5"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    path = tmp_path / "gather.csv"
    while process.poll() is None and not path.exists():
        time.sleep(0.002)
    process.kill()  # SIGKILL, just after the first rows appeared: others are on their way
    process.wait()
    assert len(rows.read(path)) >= 2
    assert not [name for name in os.listdir(tmp_path) if name != "gather.csv" and not name.startswith(".")]


def a_row(**values: object) -> dict[str, object]:
    row = {
        "suite": "x", "layer": "a", "count": 1, "provider": "ours", "part": "all", "direction": "forward",
        "dtype": "fp32", "size": "full", "mode": timing.CPU, "p20_us": 90.0, "p50_us": 100.0, "p80_us": 130.0,
        "mask_profile": "dense", **rows.environment(CPU),
    }  # fmt: skip
    return row | values


def test_compare_flags_a_planted_slowdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = tmp_path / "before.csv", tmp_path / "after.csv"
    names = [f"layer{i}" for i in range(5)]
    rows.append(before, [a_row(layer=name, p50_us=500.0, p80_us=500.0) for name in names])  # an older row, not compared
    rows.append(before, [a_row(layer=name) for name in names])
    rows.append(after, [a_row(layer=name) for name in names])
    assert main(["compare", str(before), str(after)]) == 0
    assert "0 slower, 0 faster" in capsys.readouterr().out
    slow = {"p20_us": 108.0, "p50_us": 120.0, "p80_us": 156.0}
    rows.append(after, [a_row(layer="layer3", **slow)])
    assert main(["compare", str(before), str(after)]) == 1
    said = capsys.readouterr().out
    assert "1.20x" in said
    assert "layer3" in said
    assert "layer2" not in said
    assert main(["compare", str(before), str(after), "--tolerance", "0.25"]) == 0
    assert main(["compare", str(after), str(before)]) == 0
    assert "1 faster" in capsys.readouterr().out


def test_compare_refuses_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = tmp_path / "one.csv", tmp_path / "other.csv"
    rows.append(one, [a_row()])
    rows.append(other, [a_row(layer="b", device="another")])
    for arguments, said in (
        ([str(one), str(other)], "no measurement in common"),
        ([str(one), str(tmp_path / "absent.csv")], "cannot read"),
        ([str(one), "README.md"], "no file of results"),
        ([str(one), str(one), "--tolerance", "-1"], "--tolerance must be"),
    ):
        assert main(["compare", *arguments]) == 2
        assert said in capsys.readouterr().err
    one.write_bytes(one.read_bytes()[:-30])
    assert main(["compare", str(one), str(one)]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_the_schema_sees_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows.append(path, [a_row()])
    good = rows_of(path)[0]
    assert rows.faults(good) == []
    for change, said in (
        ({"p50_us": ""}, "timed, but without p50_us"),
        ({"p20_us": "200"}, "not ordered"),
        ({"layer": ""}, "layer is empty"),
        ({"flops": "many"}, "flops is no number"),
        ({"error": "nan"}, "not finite"),
        ({"part": "half"}, "part is half"),
        ({"size": ""}, "size is"),
    ):
        assert any(said in fault for fault in rows.faults(good | change)), change
    del good["device"]
    assert "no device" in rows.faults(good)


def test_rows_are_appended_and_foreign_files_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows.append(path, [{"suite": "x", "p50_us": 1.23456789}])
    rows.append(path, [{"suite": "y"}])
    written = rows_of(path)
    assert [row["suite"] for row in written] == ["x", "y"]
    assert written[0]["p50_us"] == "1.23457"
    with pytest.raises(InputError, match="no column speed"):
        rows.append(path, [{"speed": 1}])
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="other columns"):
        rows.append(path, [{"suite": "z"}])
    assert path.read_text() == "a,b\n1,2\n"


def test_checks_see_rounding_outliers_and_nan() -> None:
    exact = torch.linspace(-1, 1, 4098, dtype=torch.float64)
    rounded = timing.check([exact.half()], [exact])
    assert 0 < rounded.error < 1e-3
    assert rounded.outliers == 0
    off = exact.float()
    off[17] += 1
    assert timing.check([off], [exact]).outliers == pytest.approx(1 / 4098)
    assert not timing.check([off], [exact]).passes(rounded, torch.float16)
    off[17] = float("nan")
    assert not timing.check([off], [exact]).passes(rounded, torch.float16)
    assert rounded.passes(rounded, torch.float16)


def test_slower_is_slower() -> None:
    calls = {"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.004)}
    timings = timing.side_by_side(calls, CPU, milliseconds=8, rounds=3)
    assert timings["long"].p50 > 2 * timings["short"].p50
    assert timings["long"].p50 > 4000
    assert timings["long"].mode == timing.CPU
    assert timings["long"].samples == 3


def test_settings_are_the_commands_options() -> None:
    """The command hands its options over by name."""
    from bench.__main__ import _parser

    options = _parser().parse_args(["run", "bn"])
    assert {f.name for f in dataclasses.fields(harness.Settings)} <= set(vars(options))
    assert _parser().parse_args(["all"]).suites == list(SUITES)


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ("flags\t\t: sse avx2 avx512f avx512_bf16\nmodel name\t: AMD EPYC\n", "avx512-bf16"),
        ("flags\t\t: avx2 avx512f avx512_bf16 amx_bf16\nmodel name\t: AMD EPYC\n", "amx"),
        ("flags\t\t: avx2 avx512f\nmodel name\t: AMD EPYC\n", "avx512"),
        ("flags\t\t: avx avx2 fma\nmodel name\t: AMD EPYC\n", "avx2"),
        ("model name\t: AMD EPYC\n", ""),
    ],
)
def test_cpus_of_one_name_are_told_apart_by_their_instructions(
    info: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path, *_, **__: info)
    assert machine.instructions() == expected
    folder = rows.results_folder(torch.device("cpu"))
    assert folder == Path("bench/results") / "-".join(filter(None, ("amd-epyc", expected)))
    assert rows.device_name(torch.device("cpu")) == ", ".join(filter(None, ("AMD EPYC", expected)))


# -- docs/results.md ---------------------------------------------------------------------------------------------------


def test_the_page_shows_every_device_and_suite(visit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results" / "some-cpu"
    folder.mkdir(parents=True)
    for path in (visit / "rows").glob("*.csv"):
        (folder / path.name).write_bytes(path.read_bytes())
    out = tmp_path / "docs" / "results.md"
    arguments = ["results", "--results", str(tmp_path / "results"), "--out", str(out)]
    assert main([*arguments, "--check"]) == 1
    assert main(arguments) == 0
    assert main([*arguments, "--check"]) == 0
    text = out.read_text()
    for said in ("### sgd", "### bn", "### roof", "Quick sizes", "paper:0.25 (synthetic)", "all parameters", "GB/s"):
        assert said in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) > 40
    assert "## Summary" not in text  # quick rows are nothing to quote
    assert "nan" not in text.lower().replace("nanosecond", "")
    assert main(["results", "--results", str(tmp_path / "absent")]) == 2
