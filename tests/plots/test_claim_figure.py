"""README's figure: accuracy against the training FLOPs spent, from the runs' own logs."""

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("pandas")

from plots_kit import drawn, write

from plots import __main__ as command
from plots import claim
from prunetrain_kernels.errors import InputError


def claimed(folder: Path, networks: tuple[str, ...] = ("resnet20",)) -> Path:
    """A folder with claim.csv and the logs of its runs: 4 epochs, dense and to a target, which halves from epoch 3."""
    rows = []
    for network in networks:
        for method, target, accuracy in (("dense", "", 90.0), ("target", 0.5, 89.0), ("proximal-target", 0.35, 88.0)):
            name = f"{network}-{method}"
            rows.append(
                {
                    "scale": "medium", "run": f"cifar10/{name}", "network": network, "dataset": "cifar10",
                    "method": method, "seed": 0, "device": "Some CPU", "date": "2026-11-24T10:00:00Z", "ratio": "",
                    "target": target, "epochs": 4, "accuracy": accuracy,
                    "train_flops_ratio": 0.75 if target else 1, "inference_flops_ratio": target or 1,
                }
            )  # fmt: skip
            shares = [1, 1, target or 1, target or 1]
            log = [
                {"epoch": e + 1, "val_accuracy": 0.5 + e / 10, "train_flops": 3e9 * share, "steps": 10,
                 "train_flops_per_image": 3e6 * share, "inference_flops": 1e6 * share}
                for e, share in enumerate(shares)
            ]  # fmt: skip
            write(folder / name / "log.csv", log)
    write(folder / "claim.csv", rows)
    return folder


def test_points_are_the_flops_spent_and_the_accuracy(tmp_path: Path) -> None:
    figure, caption = drawn(claim, claimed(tmp_path / "medium"))
    left, right = figure.axes
    lines = {line.get_label(): line for line in figure.legends[0].get_lines()}
    assert list(lines) == ["dense", "asked for 50 % of the FLOPs", "asked for 35 % of the FLOPs, proximal step"]
    curves = [line for line in left.lines if len(line.get_xdata()) == 4]
    assert list(curves[0].get_xdata()) == pytest.approx([25, 50, 75, 100])
    assert list(curves[1].get_xdata()) == pytest.approx([25, 50, 62.5, 75])
    assert list(curves[1].get_ydata()) == pytest.approx([50, 60, 70, 80])
    assert list(right.lines[1].get_ydata()) == pytest.approx([100, 100, 50, 50])
    assert "89.0 % with 75 % of the training and 50 % of the inference FLOPs" in caption.replace("\u00a0", " ")


def test_a_network_without_a_dense_run_is_left_out(tmp_path: Path) -> None:
    folder = claimed(tmp_path / "medium", ("resnet20", "vgg11"))
    text = (folder / "claim.csv").read_text().splitlines()
    (folder / "claim.csv").write_text("\n".join(line for line in text if "vgg11-dense" not in line) + "\n")
    figure, caption = drawn(claim, folder)
    assert len(figure.axes) == 2
    assert "VGG" not in caption
    (folder / "claim.csv").write_text("\n".join(line for line in text if "-dense" not in line) + "\n")
    assert claim.figures(folder)[0].drawn is None


def test_a_log_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = claimed(tmp_path / "medium")
    (folder / "resnet20-target" / "log.csv").unlink()
    with pytest.raises(InputError, match=r"cannot read .*resnet20-target.log\.csv"):
        claim.figures(folder)


def test_the_command_draws_it_as_one_file(tmp_path: Path) -> None:
    claimed(tmp_path / "results/paper/medium", ("resnet20", "vgg11"))
    assert command.main(["claim", "--results", str(tmp_path / "results"), "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["claim.png"]
