"""build(): names, import paths, and one clear sentence for everything that can be wrong."""

import sys
import types
from collections.abc import Iterator

import pytest
from torch import nn

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.models import MODELS, build


@pytest.fixture
def user_module() -> Iterator[str]:
    module = types.ModuleType("a_users_networks")

    def plain(num_classes: int = 1000) -> nn.Module:
        return nn.Linear(4, num_classes)

    def with_channels(num_classes: int, in_channels: int = 3) -> nn.Module:
        return nn.Conv2d(in_channels, num_classes, 1)

    def like_torchvision(*, weights: None = None, **kwargs: int) -> nn.Module:
        assert set(kwargs) == {"num_classes"}
        return nn.Linear(4, kwargs["num_classes"])

    def broken(num_classes: int) -> nn.Module:
        raise ValueError("no such\nwidth.")

    def wrong_result(num_classes: int) -> int:
        return num_classes

    class Network(nn.Linear):
        def __init__(self, num_classes: int) -> None:
            super().__init__(2, num_classes)

    for value in (plain, with_channels, like_torchvision, broken, wrong_result, Network):
        setattr(module, value.__name__, value)
    module.number = 3  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    yield module.__name__
    del sys.modules[module.__name__]


def test_known_names() -> None:
    assert set(MODELS) >= {"resnet20", "resnet32", "resnet50", "resnet56", "vgg11", "vgg13", "imagenet_resnet50"}
    model = build("resnet20", 7, in_channels=1)
    assert model.get_submodule("fc").out_features == 7
    assert model.get_submodule("conv1").in_channels == 1


def test_import_paths(user_module: str) -> None:
    assert build(f"{user_module}:plain", 5).out_features == 5
    assert build(f"{user_module}:plain", 5, in_channels=1).out_features == 5
    assert build(f"{user_module}:with_channels", 5, in_channels=2).in_channels == 2
    assert build(f"{user_module}:like_torchvision", 6, in_channels=1).out_features == 6
    assert build(f"{user_module}:Network", 4).out_features == 4


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("resnet-20", ["'resnet-20'", "did you mean 'resnet20'", *MODELS]),
        ("zzz", ["'zzz'", "package.module:function", *MODELS]),
        ("", ["There is no model ''"]),
        (":f", ["':f'", "package.module:function"]),
        ("os:", ["'os:'", "package.module:function"]),
        ("no_such_package_at_all.x:f", ["no_such_package_at_all", "ModuleNotFoundError"]),
        ("{user}:plan", ["no attribute 'plan'", "did you mean 'plain'"]),
        ("{user}:number", ["must be a function or a class", "int"]),
        ("{user}:broken", ["broken(num_classes=10)", "ValueError: no such width"]),
        ("{user}:wrong_result", ["torch.nn.Module", "but returned int"]),
        ("os:getcwd", ["getcwd", "TypeError"]),
    ],
)
def test_errors_are_one_clear_sentence(user_module: str, path: str, says: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        build(path.format(user=user_module), 10)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert not message.endswith("..")
    for part in says:
        assert part in message


def test_a_module_that_fails_while_imported(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fails_at_import.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"Cannot import 'fails_at_import'.*ZeroDivisionError"):
        build("fails_at_import:f", 10)


@pytest.mark.parametrize("counts", [{"num_classes": 0}, {"num_classes": 10, "in_channels": 0}])
def test_counts_below_one(counts: dict[str, int]) -> None:
    with pytest.raises(InputError, match="at least 1, got 0"):
        build("resnet20", **counts)
