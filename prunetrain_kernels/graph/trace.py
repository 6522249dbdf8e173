"""Finds a model's channel spaces by tracing it, with torch.fx or else with torch.export.

Tracing gives programs, the calls that the forward makes in either mode (`programs.py`), which are compared
with the model; `walk.py` follows the channels through them; a trial cut (`trial.py`) shows that the model can do
without the channels that are free then.
"""

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from prunetrain_kernels.compiled import is_compiled_module
from prunetrain_kernels.errors import TraceError
from prunetrain_kernels.graph.keep import ChannelGraph
from prunetrain_kernels.graph.programs import programs_of
from prunetrain_kernels.graph.runs import Runs, buffers_copied, parameters_kept, runs_of
from prunetrain_kernels.graph.traced import distinct
from prunetrain_kernels.graph.tracer import UntraceableError, tracing
from prunetrain_kernels.graph.trial import freeze_what_fails
from prunetrain_kernels.graph.walk import walk
from prunetrain_kernels.inputs import ExampleInputs
from prunetrain_kernels.probe import first_sentence, outside_inference_mode, refuse_sharded, refuse_unusable, unchanged

HOW_TO_TRACE = "Move the part that depends on data into a submodule of its own, whose channels then stay as they are."
MOST_STARTS = 4  # runs of a mode, with different random numbers, that the trial cut repeats


def trace_channels(model: nn.Module, example_inputs: ExampleInputs) -> ChannelGraph:
    """Finds every channel space of `model`.

    The forward is traced in training and in evaluation mode, and several times where it draws random numbers or counts
    its calls; what any of these programs reads, joins or returns counts. Each is run as well as the model and must
    give what the model gives. At last a quarter of the free channels is cut from copies of the model's tensors: spaces
    without which the model fails, or computes something else, stay as they are, and say why.

    A submodule that torch.fx cannot trace (its control flow depends on data, say) is left closed: the channels of what
    goes into it and comes out of it stay as they are, and the graph's `opaque` says why. Then, or where the model's own
    forward cannot be traced or what was traced is not what the model computes, torch.export is tried, and its programs
    are taken if more channels are free in them. The model is run on as few of the examples as it takes, without
    gradients; it is left as it was, and so are the random number generators.

    Layers that the forward never calls (a projector that the training loop calls, a head for later) stay as they are;
    the graph's `uncalled` names them. What they read is not known: let the forward return it, as one of its outputs,
    and its channels stay too.

    While torch.fx traces, `nn.Module.__call__` and `__getattr__` are patched for the whole process. Two threads that
    trace wait for each other, and modules that other threads call meanwhile run as they are. But the model itself is
    put into other modes and onto copies of its buffers, so no other thread may use this model meanwhile.

    Args:
        model: any module.
        example_inputs: a tuple of its positional arguments, or a dict of its keyword arguments. Tensors have the batch
            in dim 0 and channels in dim 1; they may be nested in tuples and dicts, or in lists, which have one entry
            for each example (a detector's images). More than 8 are cut to 8, if the model takes a part of them.

    Raises:
        TraceError: the model's own forward cannot be traced, or fails on the example inputs.
        InputError: the model is no module, TorchScript or an exported program, or has parameters without values or
            spread over processes (FSDP).
    """
    refuse_unusable(model)
    _refuse_wrapped(model)
    refuse_sharded(model)
    with tracing(), outside_inference_mode(), unchanged(model), buffers_copied(model), parameters_kept(model):
        runs = runs_of(model, example_inputs)
        graph, distrusted, failed = None, "", None
        try:
            graph, distrusted = _graph(runs, "torch.fx")
        except UntraceableError as error:
            failed = error
        if graph is None or _is_incomplete(graph):
            try:
                exported, of_exported = _graph(runs, "torch.export")
            except MemoryError:  # says nothing about the model
                raise
            except Exception as error:
                if graph is None:
                    raise TraceError(_why_not(runs, failed, error)) from failed
            else:
                if graph is None or exported.free_channels > graph.free_channels:
                    graph, distrusted = exported, of_exported
    if distrusted and not graph.free_channels:
        raise TraceError(f"none of the channels of {type(model).__name__} can go: {distrusted}. {HOW_TO_TRACE}")
    return graph


def _graph(runs: Runs, tracer: str) -> tuple[ChannelGraph, str]:
    """The graph from the programs of one tracer, with the trial cut behind it, and why a program is not what the model
    computes, if one is not; raises what `programs_of` raises."""
    all_programs = programs_of(runs, tracer)
    programs = distinct(all_programs)
    graph = walk(runs.model, programs, runs.examples)
    graph.tracer = tracer
    distrusted = tuple(dict.fromkeys(each.distrusted for each in all_programs if each.distrusted))
    is_alone = len(programs) == 1 and not distrusted
    modes = [False] if is_alone and False in runs.modes and not runs.written else list(runs.modes)
    starts = [known for mode in modes for known in [k for k in runs.known if k[0] == mode][:MOST_STARTS]]
    graph.doubts = distrusted + freeze_what_fails(graph, runs, starts)
    graph.alike_in_both_modes = runs.alike_in_both_modes
    return graph, next(iter(distrusted), "")


def _is_incomplete(graph: ChannelGraph) -> bool:
    """Whether a graph leaves submodules closed or has doubts, so that another tracer may find more free channels."""
    return bool(graph.opaque or graph.doubts)


def _why_not(runs: Runs, failed: Exception | None, error: Exception) -> str:
    """Why no graph was made, in words: the errors of the model itself, or of torch.fx and torch.export."""
    if False not in runs.modes:
        return f"the model fails on the example inputs: {runs.failed[False]}; pass example_inputs that it accepts."
    if True not in runs.modes:
        return (
            f"the model fails on the example inputs in training mode: {runs.failed[True]}; pass example_inputs that it "
            "accepts in both modes."
        )
    return f"{failed}; torch.export says: {first_sentence(error)}. {HOW_TO_TRACE}"


def _refuse_wrapped(model: nn.Module) -> None:
    """Raises TraceError for a wrapper: names of layers are those in the network itself."""
    name = "_orig_mod" if is_compiled_module(model) else "module" if isinstance(model, DistributedDataParallel) else ""
    if name:
        raise TraceError(
            f"a {type(model).__name__} is a wrapper; pass the network inside, model.{name} (PruneTrain takes both)."
        )
