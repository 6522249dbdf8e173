"""The sizes that a network was built with, noted on its modules before the first channel goes.

A checkpoint holds them, and a freshly built network is compared with them before anything is loaded. The note is a
plain attribute of each module, so that copies of a network have it, and a layer that the user puts in later has none.
"""

from typing import Any

from torch import nn

NOTE = "_original_shapes"
Shapes = dict[str, list[int]]


def note_original_sizes(model: nn.Module) -> None:
    """Notes the present sizes of every module that has no note yet: to be called before anything is cut."""
    for module in model.modules():
        vars(module).setdefault(NOTE, _present(module))


def pass_on_note(old: nn.Module, new: nn.Module) -> None:
    """Gives a module that takes another one's place that one's note."""
    if NOTE in vars(old):
        vars(new).setdefault(NOTE, vars(old)[NOTE])


def original_sizes(model: nn.Module) -> Shapes:
    """The shapes that the tensors of a network had when it was built, under all their names, removed ones included."""
    shapes: Shapes = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        present = _present(module)
        noted: Any = vars(module).get(NOTE)
        # a note that the present sizes cannot come from is of tensors that someone has replaced since
        source = noted if noted is not None and _fits(present, noted) else present
        shapes |= {f"{prefix}.{name}" if prefix else name: list(shape) for name, shape in source.items()}
    return shapes


def _present(module: nn.Module) -> Shapes:
    gates = bool(getattr(module, "gates_channels", False))  # whose indices came with the pruning
    named = {**dict(module._parameters), **({} if gates else dict(module._buffers))}
    return {name: list(tensor.shape) for name, tensor in named.items() if tensor is not None}


def _fits(present: Shapes, noted: Shapes) -> bool:
    return all(
        name in noted
        and len(shape) == len(noted[name])
        and all(now <= then for now, then in zip(shape, noted[name], strict=True))
        for name, shape in present.items()
    )
