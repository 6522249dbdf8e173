"""`fuse(model)`: batch norms take over the sum and the ReLU that follow them, in place.

For each module whose own forward calls batch norms, that one forward is traced with torch.fx, its submodules closed.
Where a batch norm is followed by a ReLU, by a sum, or by a sum and a ReLU, and nothing else reads what lies between,
the call is rewritten:

    out = self.relu(self.bn1(self.conv1(x)))        out = self.bn1(self.conv1(x), relu=True)
    out = self.bn2(self.conv2(out))                 out = self.conv2(out)
    out += identity                                 return self.bn2(out, identity, relu=True)
    return self.relu(out)

and bound to the instance as its `forward`. The batch norms become `BatchNormAct2d` by changing their class: parameters,
buffers, names in the state dict and whoever holds the modules stay. The class's own forward still computes the same,
because a fused batch norm that is called plainly is a plain batch norm; it runs

* while torch.fx traces (`trace_channels` sees the network as it was written),
* for a call that the traced program cannot serve: None for an argument that has no default, another value of an
  optional argument, a changed attribute that the forward reads,
* where the model was changed since: a module that the program calls, or whose call it took over, was replaced, removed,
  set to None or parametrized, a container has other members, a class's or an instance's forward, or a class's method or
  attribute that the forward reads, was patched,
* while hooks would miss something: on a fused batch norm, on a ReLU that it took over, or on all modules (PyTorch's
  global hooks). So hooks may be registered before `fuse` (what they watch is left alone) and after it,
* on a model that was pickled and loaded again, until it is fused again.

Each call compares these few things first (a few microseconds for a residual block).

A forward that torch.fx would get wrong without an error is left alone: one with `with` blocks, one that asks for types,
draws random numbers, writes to buffers or attributes. Code outside the model that a forward depends on (a global flag,
say) is not seen. `torch.nn.DataParallel` copies modules in a way that an instance's forward does not survive: fuse and
use DistributedDataParallel, or do not fuse. Call `fuse` before `torch.compile`. `torch.jit.trace` writes PyTorch's own
operations in the place of the fused ones. `torch.jit.script` and `torch.ao.quantization.fuse_modules` read classes and
sources that a fused model no longer has: give them `to_dense(model, example_inputs)`.

Tracing patches `nn.Module` for the whole process, one trace at a time and as short as possible; modules that other
threads call meanwhile run as they are. But the model that is being fused must not run: its mode changes meanwhile.
"""

import operator
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prunetrain_kernels import probe
from prunetrain_kernels.errors import InputError, PruneTrainError
from prunetrain_kernels.graph.functions import ADDITIONS, IN_PLACE
from prunetrain_kernels.inputs import ExampleInputs, batches_in, checked_inputs, first_of, mapped
from prunetrain_kernels.nn.batch_norm import BatchNormAct2d, broadcasts_noted
from prunetrain_kernels.nn.fuse_binding import bind
from prunetrain_kernels.nn.fuse_forward import BatchNormCall, Forward, UnfitError, trace_forward
from prunetrain_kernels.nn.fuse_report import FusedBatchNorm, FuseReport, LeftAlone

RELU_FUNCTIONS = {F.relu, F.relu_, torch.relu, torch.relu_}
RELU_METHODS = {"relu", "relu_"}
# Modules whose outputs are new tensors, to which nobody else writes.
MAKES_ITS_OUTPUT = (nn.modules.conv._ConvNd, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd)


def fuse(model: nn.Module, example_inputs: ExampleInputs | None = None) -> FuseReport:
    """Lets the model's batch norms take over the sums and ReLUs that follow them, in place.

    Only plain `nn.BatchNorm2d`s without hooks are touched. Fusing a fused model changes nothing.

    Args:
        model: any module, on any device, in either mode.
        example_inputs: a tuple of the model's positional arguments, or a dict of its keyword arguments. With them the
            fused model is run and compared with the model before, and a sum that broadcasts is not fused; without them
            such a sum still computes right, unfused (see `BatchNormAct2d`), but the report does not say so.

    Returns:
        The batch norms that were fused, and those that were left alone, with the reasons.

    Raises:
        InputError: the model does not run on the example inputs.
        PruneTrainError: the fused model computes something else; all changes have been undone.
    """
    expected = None if example_inputs is None else _outputs(model, example_inputs)
    apart: set[int] = set()
    while True:
        report, undo = _fuse(model, apart)
        if expected is None or example_inputs is None or not report.fused:
            return report
        try:
            with broadcasts_noted() as broadcast:
                outputs = _outputs(model, example_inputs)
            if not broadcast <= apart:
                undo()
                apart |= broadcast
                continue
            _check_same(expected, outputs)
        except BaseException:
            undo()
            raise
        return report


# -- what can be fused -------------------------------------------------------------------------------------------------


def _is_candidate(module: nn.Module) -> bool:
    """Whether a module is a plain batch norm, or one that an earlier `fuse` made of it, without hooks."""
    plain = type(module) is nn.BatchNorm2d or (type(module) is BatchNormAct2d and not module.relu)
    return plain and "forward" not in vars(module) and not _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of its own."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _calls(
    program: fx.Graph, modules: dict[str, nn.Module], apart: set[int]
) -> Iterator[tuple[nn.Module, BatchNormCall]]:
    """The calls of batch norms in a traced forward with what may be fused into each, last call first."""
    fused_sums: set[fx.Node] = set()
    for node in reversed(program.nodes):
        if node.op != "call_module" or not _is_candidate(module := modules[str(node.target)]):
            continue
        call = BatchNormCall(node)
        plain = len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs
        if not plain:
            continue
        user = _only_user(node)
        if user is not None and user.target in ADDITIONS and user.op in ("call_function", "call_method"):
            call.note = _why_not_added(program, modules, node, user, fused_sums) or (
                "the sum broadcasts" if id(module) in apart else ""
            )
            if not call.note:
                call.add = user
                fused_sums.add(user)
                user = _only_user(user)
        if user is not None and (call.add is not None or user.target not in ADDITIONS) and _is_relu(modules, user):
            call.relu = user
        yield module, call


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_relu(modules: dict[str, nn.Module], node: fx.Node) -> bool:
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module) is nn.ReLU and "forward" not in vars(module) and not _has_hooks(module) and not node.kwargs
    if node.op == "call_method":
        return node.target in RELU_METHODS
    return node.op == "call_function" and node.target in RELU_FUNCTIONS


def _why_not_added(
    program: fx.Graph, modules: dict[str, nn.Module], node: fx.Node, add: fx.Node, fused_sums: set[fx.Node]
) -> str:
    """Why a sum cannot be fused into the batch norm that it reads, in words; empty if it can."""
    if add in fused_sums:
        return "the sum is fused with the other batch norm it reads"
    if add.kwargs or len(add.args) != 2 or not all(isinstance(a, fx.Node) for a in add.args):
        return "the sum is not one of two tensors"
    other = add.args[1] if add.args[0] is node else add.args[0]
    if other is node:
        return "the sum is of the same tensor twice"
    if add.target in IN_PLACE and add.target is not operator.add and add.args[0] is not node:
        return "the sum writes into its other side"
    source = node.args[0]
    assert isinstance(source, fx.Node)
    nodes = list(program.nodes)
    between = nodes[nodes.index(node) + 1 : nodes.index(add)]
    is_unshared = (
        source.op == "call_module"
        and isinstance(modules[str(source.target)], MAKES_ITS_OUTPUT)
        and len(source.users) == 1
    )
    if not is_unshared and any(n.op != "get_attr" for n in between):
        return "what it normalises may change before the sum is made"
    return ""


# -- rewriting ---------------------------------------------------------------------------------------------------------


def _fuse(model: nn.Module, apart: set[int]) -> tuple[FuseReport, Callable[[], None]]:
    """Fuses everything but the sums behind the batch norms `apart` (ids); returns a function that undoes it too."""
    _forget_pickled(model)
    forwards, failed = _trace_all(model)
    for forward in forwards:
        modules = dict(forward.module.named_modules())
        for program in forward.programs:
            forward.calls += list(_calls(program, modules, apart))
    names = {id(module): name for name, module in model.named_modules()}
    kinds: dict[int, set[str]] = {}
    for forward in forwards:
        for module, call in forward.calls:
            kinds.setdefault(id(module), set()).add(call.what)

    undo: list[Callable[[], None]] = []
    fused: dict[int, FusedBatchNorm] = {}
    rewritten: list[str] = []
    for forward in forwards:
        is_rewritten = False
        for module, call in forward.calls:
            if len(kinds[id(module)]) > 1:
                call.add, call.relu, call.note = None, None, "its calls are followed by different things"
            what = call.what
            _rewrite(call)
            is_rewritten |= what != "alone"
            if type(module) is nn.BatchNorm2d or what != "alone":
                fused.setdefault(id(module), FusedBatchNorm(names[id(module)], what, forward.path, call.note))
            if type(module) is nn.BatchNorm2d:
                module.__class__ = BatchNormAct2d
                module.__dict__["relu"] = False
                undo.append(lambda module=module: _unfuse(module))  # type: ignore[misc]
        if is_rewritten:
            bind(forward)
            rewritten.append(forward.path)
            undo.append(lambda module=forward.module: _unbind(module))  # type: ignore[misc]

    def undo_all() -> None:
        for step in reversed(undo):
            step()

    left = [
        LeftAlone(name, _why_left(model, name, module, failed))
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and not isinstance(module, BatchNormAct2d) and id(module) not in fused
    ]
    order = {name: i for i, name in enumerate(names.values())}
    in_order = sorted(fused.values(), key=lambda b: order[b.name])
    return FuseReport(type(model).__name__, tuple(in_order), tuple(left), tuple(rewritten)), undo_all


def _unfuse(module: nn.Module) -> None:
    """Makes a fused batch norm an `nn.BatchNorm2d` again."""
    del module.__dict__["relu"]
    module.__class__ = nn.BatchNorm2d


def _unbind(module: nn.Module) -> None:
    """Takes a rewritten forward off its module."""
    module.__dict__.pop("forward", None)
    for part in module.modules():
        part.__dict__.pop("_fused_part", None)


def _trace_all(model: nn.Module) -> tuple[list[Forward], dict[str, str]]:
    """The forwards of all modules that may call batch norms, and why some could not be traced."""
    forwards: list[Forward] = []
    failed: dict[str, str] = {}
    with probe.unchanged(model):
        for path, module in model.named_modules():
            if not _may_call_batch_norms(module):
                continue
            instance_forward = vars(module).get("forward")
            if instance_forward is not None:
                if not getattr(instance_forward, "computes_the_same", False):
                    failed[path] = "its forward was replaced on this instance"
                continue
            try:
                forwards.append(trace_forward(path, module))
            except UnfitError as why:
                failed[path] = str(why)
    return forwards, failed


def _forget_pickled(model: nn.Module) -> None:
    """Takes off the forward of the class, bound to the instance: unpickling makes this of a rewritten forward."""
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.__dict__["forward"]


def _may_call_batch_norms(module: nn.Module) -> bool:
    """Whether a module has batch norms inside and a forward that is neither torch's nor TorchScript."""
    of_torch = type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential)
    if of_torch or isinstance(module, torch.jit.ScriptModule):
        return False
    return any(isinstance(m, nn.BatchNorm2d) for m in module.modules() if m is not module)


def _why_left(model: nn.Module, name: str, module: nn.Module, failed: dict[str, str]) -> str:
    """Why a batch norm was left alone, in words."""
    if type(module) is not nn.BatchNorm2d:
        return f"it is a {type(module).__name__}"
    if _has_hooks(module):
        return "it has hooks"
    if "forward" in vars(module):
        return "its forward was replaced on this instance"
    parent = name
    while parent:
        parent = parent.rpartition(".")[0]
        if parent in failed:
            return f"in {parent or type(model).__name__}: {failed[parent]}"
    return "no forward that was traced calls it with one tensor"


def _rewrite(call: BatchNormCall) -> None:
    """Puts one call of the batch norm in place of it, the sum and the ReLU, in the traced program."""
    if call.what == "alone":
        return
    graph, node = call.node.graph, call.node
    call.watched = {str(n.target) for n in (node, call.relu) if n is not None and n.op == "call_module"}
    arguments = [node.args[0]]
    if call.add is not None:
        arguments.append(call.add.args[1] if call.add.args[0] is node else call.add.args[0])
    with graph.inserting_before(call.add or node):  # at the sum its other side exists
        new = graph.call_module(str(node.target), tuple(arguments), {"relu": call.relu is not None})
    last = call.relu or call.add
    assert last is not None
    last.replace_all_uses_with(new)
    for old in (call.relu, call.add, node):
        if old is not None:
            graph.erase_node(old)


# -- checking ----------------------------------------------------------------------------------------------------------


def _outputs(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, Tensor]:
    """The model's outputs on the first examples in evaluation mode; the model is not changed."""
    inputs = checked_inputs(example_inputs)
    one_batch = len(batches_in(inputs)) == 1
    try:
        return probe.outputs_of(model, first_of(inputs, 2) if one_batch else mapped(inputs, Tensor.clone))
    except Exception as error:
        why = probe.first_line(error)
        raise InputError(f"{type(model).__name__} does not run on example_inputs: {why}.") from error


def _check_same(expected: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
    difference = probe.difference(expected, outputs)
    if not difference.is_rounding:
        raise PruneTrainError(
            f"the fused model computes something else on the example inputs (output '{difference.where}' moved by "
            f"{difference.largest:.2g} at a scale of {difference.scale:.2g}), so fusing was undone; its forward "
            "depends on something outside of the model that tracing did not see. Make that an attribute or an "
            "argument, or call fuse on the parts of the model without it."
        )
