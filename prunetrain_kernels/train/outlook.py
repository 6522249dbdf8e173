"""What a training can hope to prune: a line in the log at its start, and warnings where little or nothing will go."""

import logging
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from prunetrain_kernels.compiled import eagerly
from prunetrain_kernels.cost import Unknown, count_flops_by_layer, or_unknown
from prunetrain_kernels.errors import PruneTrainWarning
from prunetrain_kernels.graph.prunable import prunable
from prunetrain_kernels.train.forecast import DIVERGED
from prunetrain_kernels.train.present import Present
from prunetrain_kernels.train.state import PruningState

LOG = logging.getLogger("prunetrain_kernels")
LITTLE = 0.2  # of the channels: below this share a user is warned
MOST_STEPS = 1e6  # twice those of 90 epochs of ImageNet in batches of 256
HOW_TO_SET = "Give coefficient= (--coefficient), a lambda of your choice, such as 1e-4"


def look_ahead(model: nn.Module, present: Present, *, wants_lasso: bool) -> bool:
    """Logs how much of a network can go; warns where that is little, and of parts that nobody looks into.

    Args:
        wants_lasso: whether there is to be a lasso.

    Returns:
        Whether there is one: a network of which nothing can go trains on without.
    """
    what = prunable(present.graph, _flops_by_layer(model, present))
    LOG.info("%s: %s", type(model).__name__, what)
    _warn_of_hidden_parts(model)
    _warn_of_uncalled_parts(model, present)
    if wants_lasso and present.lasso.is_empty:
        warnings.warn(
            f"nothing of {type(model).__name__} can be pruned, so it is trained as it is, without a lasso: "
            f"{what.reasons()}.",
            PruneTrainWarning,
            stacklevel=4,
        )
    elif wants_lasso and what.share < LITTLE:
        warnings.warn(f"little of {type(model).__name__} can be pruned: {what}", PruneTrainWarning, stacklevel=4)
    return wants_lasso and not present.lasso.is_empty


def _flops_by_layer(model: nn.Module, present: Present) -> Any:
    """FLOPs of one inference by module; None where they are unknown."""
    if present.flop_table is not None:
        each = present.flop_table.inference
        return {name: count * _weights_of(model, name) for name, count in each.items()}
    with eagerly(model):
        counted = or_unknown(count_flops_by_layer, model, present.example_inputs)
    return None if isinstance(counted, Unknown) else counted


def _weights_of(model: nn.Module, name: str) -> int:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.numel()


def _warn_of_hidden_parts(model: nn.Module) -> None:
    """Warns of parts in `DataParallel`, inside which no channels are followed."""
    hidden = [name for name, module in model.named_modules() if name and isinstance(module, nn.DataParallel)]
    if hidden:
        warnings.warn(
            f"'{hidden[0]}' is a DataParallel, inside which no channels are followed, so nothing in it is pruned; put "
            "the module inside in its place, and DistributedDataParallel around the whole network.",
            PruneTrainWarning,
            stacklevel=5,
        )


def _warn_of_uncalled_parts(model: nn.Module, present: Present) -> None:
    """Warns of modules that the forward never calls, and that something else may call: what they read inside the
    network is not known, and may go."""
    named = present.graph.uncalled
    trained = [name for name in named if any(p.requires_grad for p in model.get_submodule(name).parameters())]
    if trained and not present.limits.exclude:
        more = f" and {len(trained) - 1} more" if len(trained) > 1 else ""
        warnings.warn(
            f"the forward of {type(model).__name__} never calls '{trained[0]}'{more} on the example inputs. It stays "
            "as it is, but the channels that it reads inside the network may be pruned. If your loop calls it, or the "
            "forward will later, have the forward return what it reads, or name the layers before it in exclude=[...].",
            PruneTrainWarning,
            stacklevel=4,
        )


# -- in training -------------------------------------------------------------------------------------------------------


def warn_if_lambda_is_tiny(state: PruningState) -> None:
    """Warns, when lambda has just been set from the first loss, if no slice could vanish in `MOST_STEPS` steps."""
    course = state.course
    if course is None or state.steering is not None or not state.ranks.first or not course.has_momentum:
        return
    move = course.hop(state.now(), highest=True)
    smallest = _smallest(state)
    if smallest is not None and 0 < move * MOST_STEPS < smallest:
        warnings.warn(
            f"lambda is {state.coefficient:.1e}, set from the first loss, and the lasso needs about "
            f"{smallest / move:.0e} steps to bring the smallest slice to zero, so nothing will be pruned. The first "
            f"loss of a network that was trained before is no guide. {HOW_TO_SET}.",
            PruneTrainWarning,
            stacklevel=5,
        )
        course.warned = True


def warn_if_out_of_reach(state: PruningState) -> None:
    """Warns, at the end of the first epoch, if no slice can vanish until the last one, even if nothing resists."""
    course = state.course
    if course is None or course.warned or not course.begun or state.steering is not None or not state.ranks.first:
        return
    if not course.has_momentum or course.epochs is None or not course.steps_per_epoch or not state.active:
        return
    now = state.now()
    move = now.coefficient * course.reach(now, max(0.0, course.epochs - now.passed))
    smallest = _smallest(state)
    if smallest is not None and move < smallest:
        course.warned = True
        warnings.warn(
            f"the lasso can move a slice by {move:.1e} until epoch {course.epochs:g}, and the smallest one has a norm "
            f"of {smallest:.1e}: nothing is expected to be pruned. {HOW_TO_SET}, or train longer or at a higher "
            "learning rate (docs/choosing.md).",
            PruneTrainWarning,
            stacklevel=5,
        )


def warn_if_never_regularized(state: PruningState) -> None:
    """Warns, when the first reconfiguration is due, if no step had a lasso."""
    course = state.course
    if course is None or course.begun or not state.active or state.history or not state.ranks.first:
        return
    warnings.warn(
        "no step has had a lasso so far, so no slice was pulled to zero: add it by loss = prunetrain.regularize(loss), "
        "or by prunetrain.attach(first_loss).",
        PruneTrainWarning,
        stacklevel=5,
    )


def warn_if_diverged(state: PruningState) -> None:
    """Warns, at the first epoch's end at which weights are not finite: such a training prunes nothing any more."""
    course = state.course
    if course is None or course.diverged or not state.ranks.first or not state.now().has_diverged():
        return
    course.diverged = True
    warnings.warn(
        f"weights are NaN or infinite after epoch {state.epochs:g}, so nothing will be pruned any more; {DIVERGED}.",
        PruneTrainWarning,
        stacklevel=5,
    )


def _smallest(state: PruningState) -> float | None:
    """How far the lasso would have to move, at a reach of 1 and lambda of 1, the slice that is nearest to zero."""
    nearest = [float(side.min()) for side in _distances(state) if len(side)]
    return min(nearest) if nearest else None


def _distances(state: PruningState) -> Iterable[Tensor]:
    for norms in state.lasso.slice_norms().values():
        for side, pulled in ((norms.inputs, norms.inputs_pulled), (norms.outputs, norms.outputs_pulled)):
            if pulled and norms.multiplier:
                yield (side - state.threshold).clamp(min=0) / (2 * norms.multiplier)  # two sides pull at each weight
