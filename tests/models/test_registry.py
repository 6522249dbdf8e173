"""build(): names, import paths, and one clear sentence for everything that can be wrong."""

import sys
import types
from collections.abc import Callable, Iterator

import pytest
from torch import nn

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.models import MODELS, build, missing_operators

# -- the networks of a user --------------------------------------------------------------------------------------------


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

    @staticmethod
    def small(num_classes: int) -> nn.Module:
        return nn.Linear(1, num_classes)

    class Nested(nn.Linear):
        def __init__(self, num_classes: int) -> None:
            super().__init__(3, num_classes)


def needs_depth(depth: int, num_classes: int = 10) -> nn.Module:
    return nn.Linear(depth, num_classes)


def of_nothing() -> nn.Module:
    return nn.Linear(1, 1)


def exits(num_classes: int) -> nn.Module:
    raise SystemExit(3)


def fails_silently(num_classes: int) -> nn.Module:
    raise AssertionError


def fails_at_length(num_classes: int) -> nn.Module:
    raise RuntimeError("word " * 1000)


def gives_a_class(num_classes: int) -> type[nn.Module]:
    return nn.ReLU


def gives_a_pair(num_classes: int) -> tuple[nn.Module, int]:
    return nn.ReLU(), 1


def gives_nothing(num_classes: int) -> None:
    print("building")


def prints(num_classes: int) -> nn.Module:
    print("building")
    return nn.Linear(4, num_classes)


def lazily(name: str) -> object:
    if name == "lazy":
        raise RuntimeError("needs a package\nthat is not there")
    raise AttributeError(name)


USERS = (
    plain, with_channels, like_torchvision, broken, wrong_result, Network, needs_depth, of_nothing, exits,
    fails_silently, fails_at_length, gives_a_class, gives_a_pair, gives_nothing, prints,
)  # fmt: skip


@pytest.fixture
def user_module() -> Iterator[str]:
    """The name of a module that has the networks of a user."""
    module = types.ModuleType("a_users_networks")
    module.__getattr__ = lazily  # type: ignore[method-assign]
    for value in USERS:
        setattr(module, value.__name__, value)
    module.number = 3  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    yield module.__name__
    del sys.modules[module.__name__]


# -- tests -------------------------------------------------------------------------------------------------------------


def test_known_names() -> None:
    papers = {"resnet20", "resnet32", "resnet50", "resnet56", "vgg11", "vgg13", "imagenet_resnet50"}
    assert set(MODELS) == papers | {"vgg7", "resnet50_cifar"}
    model = build("resnet20", 7, in_channels=1)
    assert model.get_submodule("fc").out_features == 7
    assert model.get_submodule("conv1").in_channels == 1


def test_import_paths(user_module: str) -> None:
    assert build(f"{user_module}:plain", 5).out_features == 5
    assert build(f"{user_module}:plain", 5, in_channels=1).out_features == 5
    assert build(f"{user_module}:with_channels", 5, in_channels=2).in_channels == 2
    assert build(f"{user_module}:like_torchvision", 6, in_channels=1).out_features == 6
    assert build(f"{user_module}:Network", 4).out_features == 4
    assert build(f"{user_module}:Network.small", 4).in_features == 1
    assert build(f"{user_module}:Network.Nested", 4).in_features == 3
    assert build(f"{user_module}:prints", 4).out_features == 4


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
        ("os:getcwd", ["getcwd", "TypeError", "name a function that needs no argument but num_classes"]),
        ("{user}:needs_depth", ["TypeError", "'depth'", "name a function that needs no argument but num_classes"]),
        ("{user}:of_nothing", ["TypeError", "num_classes", "name a function that needs no argument but num_classes"]),
        ("{user}:exits", ["exits(num_classes=10) failed with SystemExit: 3"]),
        ("{user}:fails_silently", ["fails_silently(num_classes=10) failed with AssertionError"]),
        ("{user}:fails_at_length", ["word word (and so on)."]),
        ("{user}:gives_a_class", ["returned the class ReLU itself"]),
        ("{user}:gives_a_pair", ["returned tuple"]),
        ("{user}:gives_nothing", ["returned NoneType"]),
        ("{user}:Network.smal", ["'Network' in the module", "no attribute 'smal' (did you mean 'small'?)"]),
        ("{user}:Network.Nested.deep", ["'Nested' in the module", "no attribute 'deep'"]),
        ("{user}:Network..small", ["no attribute ''"]),
        ("{user}:.Network", ["no attribute ''"]),
        ("{user}:lazy", ["cannot give its attribute 'lazy': RuntimeError: needs a package that is not there"]),
        ("{user}.Network", ["did you mean 'a_users_networks:Network'"]),
        ("torchvision.models.resnet18", ["did you mean 'torchvision.models:resnet18'"]),
        (".relative:f", ["Cannot import '.relative'"]),
        ("a b:f", ["Cannot import 'a b'"]),
        ("os.path.join:f", ["Cannot import 'os.path.join'", "not a package"]),
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


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1 / 0\n", "ZeroDivisionError"),
        ("import sys; sys.exit('usage: train.py FILE')\n", "SystemExit: usage: train.py FILE"),
        ("def f(:\n", "SyntaxError"),
        ("import no_such_package_at_all\n", "ModuleNotFoundError"),
        ("raise RuntimeError('operator torchvision::made_up does not exist')\n", "made_up does not exist"),
    ],
)
def test_a_module_that_fails_while_imported(text: str, says: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fails_at_import.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=rf"Cannot import 'fails_at_import'.*{says}"):
        build("fails_at_import:f", 10)


MISSING = "operator torchvision::nms does not exist"


def test_what_torchvision_lacks_is_declared_once_and_only_where_it_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    declared: list[str] = []
    monkeypatch.setattr(missing_operators, "_DECLARED", declared)
    monkeypatch.setattr(missing_operators, "_declare", lambda: declared.append("both"))
    assert missing_operators.with_torchvision(lambda: 1) == 1
    for other in (RuntimeError("operator torchvision::roi_align does not exist"), ImportError("no torchvision")):
        with pytest.raises(type(other), match=str(other)):
            missing_operators.with_torchvision(raising(other))
    assert not declared
    inside = ImportError("a package that needs torchvision")
    inside.__cause__ = RuntimeError(MISSING)
    for first in (RuntimeError(MISSING), inside):
        declared.clear()
        calls: list[int] = []
        assert missing_operators.with_torchvision(raising(first, calls, then=7)) == 7
        assert (declared, len(calls)) == (["both"], 2)
    with pytest.raises(RuntimeError, match="nms"):  # declared already, so that it must be something else
        missing_operators.with_torchvision(raising(RuntimeError(MISSING)))


def raising(error: Exception, calls: list[int] | None = None, then: int | None = None) -> Callable[[], int]:
    """A function that raises, at each call or at the first one only."""

    def call() -> int:
        if calls is not None:
            calls.append(1)
        if calls is None or len(calls) == 1 or then is None:
            raise error
        return then

    return call


@pytest.mark.parametrize("counts", [{"num_classes": 0}, {"num_classes": 10, "in_channels": 0}])
def test_counts_below_one(counts: dict[str, int]) -> None:
    with pytest.raises(InputError, match="at least 1, got 0"):
        build("resnet20", **counts)
