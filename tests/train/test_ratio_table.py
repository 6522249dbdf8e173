"""`prunetrain info --forecast` and `--run`: where a lasso leads, before a training and while it runs."""

import csv
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from prunetrain_kernels.cli import main
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.models import build
from prunetrain_kernels.regularizer import GroupLasso
from prunetrain_kernels.train.config import TrainConfig
from prunetrain_kernels.train.ratio_table import ratio_table

X = torch.zeros(2, 3, 32, 32)


def test_lambda_and_reach_by_hand() -> None:
    model = build("resnet20", 10)
    config = TrainConfig(out="", epochs=20, lr=0.2, momentum=0.8, decay_at=(0.5,), batch=100)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (row,) = ratio_table(model, (X,), config, classes=10, images=1050, ratios=(0.4,))
    penalty = float(GroupLasso(model, (X,)).penalty().detach())
    assert row.coefficient == pytest.approx(0.4 / 0.6 * math.log(10) / penalty, rel=1e-5)
    reach = 10 * (10 * 0.2 + 10 * 0.02) / (1 - 0.8)  # 10 steps an epoch, 10 epochs at each rate
    assert row.ahead.moves == pytest.approx(row.coefficient * reach, rel=1e-5)
    assert not row.ahead.measured
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_larger_ratio_moves_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", "vgg11", "--forecast", "--epochs", "30"]) == 0
    rows = re.findall(r"^(0\.\d+) +(\S+) +(\S+) +(\S+)$", capsys.readouterr().out, re.MULTILINE)
    assert len(rows) > 4
    for column in (1, 2, 3):
        values = [float(row[column]) for row in rows]
        assert values == sorted(values)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--forecast", "--images", "5"], "--images 5"),
        (["--forecast", "--epochs", "0"], "--epochs"),
        (["--forecast", "--classes", "1"], "one class"),
        (["--forecast", "--lr", "-1"], "--lr"),
    ],
)
def test_what_cannot_be_forecast(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", *options]) == 2
    assert words in capsys.readouterr().err


def test_where_a_run_is_going(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common: dict[str, Any] = {"--data": "synthetic:40x8x8", "--epochs": "2", "--batch": "8", "--interval": "1"}
    words = ["train", *(word for pair in common.items() for word in pair), "--threads", "1", "--quiet"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["info", "--run", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    with (tmp_path / "run/log.csv").open(newline="") as file:
        row = list(csv.DictReader(file))[-1]
    assert f"lambda {float(row['lambda']):.2g}" in said
    assert f"{float(row['expected_inference']):.1%} of the inference FLOPs" in said
    assert main([*words, "--dense", "--out", str(tmp_path / "dense")]) == 0
    assert main(["info", "--run", str(tmp_path / "dense")]) == 2
    assert "no forecast" in capsys.readouterr().err


def test_fewer_images_than_a_batch() -> None:
    with pytest.raises(InputError, match="--images"):
        ratio_table(build("resnet20", 10), (X,), TrainConfig(out=""), classes=10, images=100)
