"""A network by name, or by the import path of anybody's function."""

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable

from torch import nn

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.models.missing_operators import with_torchvision
from prunetrain_kernels.models.resnet import imagenet_resnet50, resnet20, resnet32, resnet50, resnet56
from prunetrain_kernels.models.vgg import vgg7, vgg11, vgg13

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet50_cifar": resnet50,
    "resnet56": resnet56,
    "vgg7": vgg7,
    "vgg11": vgg11,
    "vgg13": vgg13,
    "imagenet_resnet50": imagenet_resnet50,
    "resnet50": resnet50,
}
# Kept for runs that were made with it: the plain name makes one think of ImageNet's network.
OLD_NAMES = {"resnet50": "resnet50_cifar"}
NAMES = tuple(name for name in MODELS if name not in OLD_NAMES)
_LONGEST = 300  # characters of another library's message that are quoted


def build(name_or_path: str, num_classes: int, in_channels: int = 3) -> nn.Module:
    """The network called `name_or_path`, freshly initialised.

    Args:
        name_or_path: a name in `MODELS`, or `package.module:function` (say `torchvision.models:resnet18`): any callable
            that takes `num_classes=` and returns an `nn.Module`; it may be nested (`module:Class.method`). It gets
            `in_channels=` only if it has a parameter of that name. torchvision may be of another build than PyTorch, so
            that its compiled operators do not load.
        num_classes: logits per image.
        in_channels: channels of the input images.

    Raises:
        InputError: an unknown name, a module that cannot be imported, an attribute that is not there, a call that
            fails, a result that is no `nn.Module`, or a count below 1.
    """
    for name, count in (("num_classes", num_classes), ("in_channels", in_channels)):
        if count < 1:
            raise InputError(f"{name} must be at least 1, got {count}.")
    if name_or_path in MODELS:
        return MODELS[name_or_path](num_classes=num_classes, in_channels=in_channels)
    if ":" not in name_or_path:
        raise InputError(_unknown_name(name_or_path))
    factory = _load(name_or_path)
    arguments = {"num_classes": num_classes}
    if _has_parameter(factory, "in_channels"):
        arguments["in_channels"] = in_channels
    call = f"{name_or_path}({', '.join(f'{name}={value}' for name, value in arguments.items())})"
    try:
        model = with_torchvision(lambda: factory(**arguments))
    except (Exception, SystemExit) as error:
        hint = "" if _takes(factory, arguments) else "; name a function that needs no argument but num_classes"
        raise InputError(f"The call {call} failed with {_one_line(error)}{hint}.") from error
    if not isinstance(model, nn.Module):
        returned = f"the class {model.__name__} itself" if isinstance(model, type) else type(model).__name__
        raise InputError(f"The call {call} must return a torch.nn.Module, but returned {returned}.")
    return model


def _unknown_name(name: str) -> str:
    nearest = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
    module, dot, function = name.rpartition(".")
    if dot and module and function:
        nearest = [f"{module}:{function}"]
    guess = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    known = ", ".join(NAMES)
    return f"There is no model {name!r}{guess}: give one of {known}, or an import path such as package.module:function."


def _load(path: str) -> Callable[..., object]:
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise InputError(f"The import path {path!r} must have the form package.module:function.")
    try:
        module = with_torchvision(lambda: importlib.import_module(module_name))
    except (Exception, SystemExit) as error:  # a module may raise anything while it is imported
        raise InputError(f"Cannot import {module_name!r} for the model {path!r}: {_one_line(error)}.") from error
    factory: object = module
    called = f"The module {module_name!r}"
    for part in attribute.split("."):
        factory = _attribute(factory, part, called)
        called = f"{part!r} in the module {module_name!r}"
    if not callable(factory):
        raise InputError(f"The model {path!r} must be a function or a class, but is a {type(factory).__name__}.")
    return factory


def _attribute(holder: object, name: str, called: str) -> object:
    try:
        return with_torchvision(functools.partial(getattr, holder, name))
    except AttributeError:
        nearest = difflib.get_close_matches(name, dir(holder), n=1)
        guess = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        raise InputError(f"{called} has no attribute {name!r}{guess}.") from None
    except (Exception, SystemExit) as error:  # a module may load what it holds when it is asked for it
        raise InputError(f"{called} cannot give its attribute {name!r}: {_one_line(error)}.") from error


def _takes(factory: Callable[..., object], arguments: dict[str, int]) -> bool:
    """Whether a function can be called with these arguments, as far as its signature tells."""
    try:
        inspect.signature(factory).bind(**arguments)
    except ValueError:  # it has none that can be read
        return True
    except TypeError:
        return False
    return True


def _has_parameter(factory: Callable[..., object], name: str) -> bool:
    # a bare **kwargs does not count: torchvision's functions hand theirs on to a constructor that knows no in_channels
    try:
        return name in inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return False


def _one_line(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".: ")
    return text if len(text) <= _LONGEST else text[:_LONGEST].rpartition(" ")[0] + " (and so on)"
