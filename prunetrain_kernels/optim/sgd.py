"""SGD with the group lasso inside the update, and its proximal variant.

    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    optimizer.regularize_with(GroupLasso(model, (x,)), coefficient=1e-4)
    ...
    optimizer.step()            # momentum, weight decay and lambda * dR/dW in one pass over the parameters

`PruneTrain` calls `regularize_with` by itself when it is given one of these optimizers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.ops.group_lasso import (
    EPS,
    Groups,
    coefficient_tensor,
    counted,
    pulling,
    slice_statistics,
    split_by_layer,
)
from prunetrain_kernels.ops.group_soft_threshold import group_soft_threshold_
from prunetrain_kernels.ops.launch import is_eager
from prunetrain_kernels.ops.sgd import Hyperparameters, LassoState, Parameters, Scaling, flat, sgd_, sgd_update_
from prunetrain_kernels.optim.gathering import Gathering
from prunetrain_kernels.regularizer import GroupLasso

_DTYPE, _SHAPE, _TRAINED, _VERSION = map(attrgetter, ("dtype", "shape", "requires_grad", "_version"))


class _Norms:
    """Norms and largest |w| of the weights with a lasso, and of which weights, in which state, they were measured.

    Factors reach the update through the norms that it reads. It pulls by lambda w / n, so norms divided by factors make
    it pull by lambda * factor w / n (`pulling`). What is kept here are the norms themselves.
    """

    def __init__(
        self, weights: Sequence[Tensor], groups: list[Groups], factors: list[tuple[Tensor, Tensor]] | None, eps: float
    ) -> None:
        self.weights = weights
        self.groups = groups
        self.eps = eps
        self.blocks = [g.block for g in groups]
        self.used = [g.used for g in groups]
        self.shapes = [w.shape for w in weights]
        count = sum(w.shape[0] + w.shape[1] // block for w, block in zip(weights, self.blocks, strict=True))
        wide = any(w.dtype == torch.float64 for w in weights)
        self.norms = weights[0].new_empty(count, dtype=torch.float64 if wide else torch.float32)
        self.max_abs = torch.empty_like(self.norms)
        flat = None if factors is None else torch.cat([side for pair in factors for side in pair])
        self.factor = None if flat is None else flat.to(self.norms.device, self.norms.dtype)
        self.state: tuple[list[int], list[int]] | None = None
        self.made_for: Any = None  # parameters and weights when this was made: while they are the same, it serves

    def fit(self, weights: Sequence[Tensor], groups: list[Groups]) -> bool:
        """Whether the norms are of these weights and groups, in their present shapes."""
        same = len(weights) == len(self.weights) and all(a is b for a, b in zip(weights, self.weights, strict=True))
        return same and self.groups == groups and self.shapes == [w.shape for w in weights]

    def _now(self) -> tuple[list[int], list[int]]:
        """Where the weights are, and how often PyTorch has seen each written."""
        return list(map(Tensor.data_ptr, self.weights)), list(map(_VERSION, self.weights))

    def mark(self) -> None:
        """Says that the norms are those of the weights as they are now."""
        self.state = self._now()

    def measure(self) -> None:
        """Measures the weights, unless nothing has replaced or written them since their norms were last known."""
        if self.state != self._now():
            norms, max_abs = slice_statistics(self.weights, self.groups, self.eps)
            torch.cat([side for pair in norms for side in pair], out=self.norms)
            torch.cat([side for pair in max_abs for side in pair], out=self.max_abs)
            self.mark()

    def penalty(self, eps: float) -> Tensor:
        """R(W) of the weights measured, with `eps` in the norms."""
        norms = self.norms if self.eps == eps else (self.norms.square() + eps).sqrt_()
        counts = counted(self.weights, self.blocks, self.used, norms)
        return torch.dot(norms, counts if self.factor is None else counts * self.factor)

    def for_update(self) -> Tensor:
        """The norms as the update is to read them; it overwrites them by the new weights' own, to be handed to
        `take`."""
        return pulling(self.norms, self.factor)

    def take(self, norms: Tensor, found_inf: Tensor | None) -> None:
        """Keeps what an update has written, unless it was skipped and wrote nothing; that is decided on the device."""
        if norms is self.norms:
            return
        if found_inf is None:
            self.norms.copy_(norms)  # in place, where a captured graph finds them
        else:
            torch.where(found_inf != 0, self.norms, norms, out=self.norms)


@dataclass
class _Step:
    """One step of the parameters on one device; `lasso` is None where the weights with a lasso are on another."""

    parameters: Parameters
    device: torch.device
    lasso: _Norms | None
    scaling: Scaling

    @property
    def skipped(self) -> bool:
        """Whether gradient scaling skips the step; to know it the host waits for the device."""
        return self.scaling.found_inf is not None and bool(float(self.scaling.found_inf))


class _Scalars:
    """Numbers as scalar tensors on a device, each uploaded again only when it has changed.

    A number is known by its parameter group and name, and kept for each device and dtype that asks for it.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, str, torch.device, torch.dtype], tuple[float, Tensor]] = {}

    def tensor(
        self, group: int, name: str, value: float | Tensor, *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """`value` as a scalar tensor: the user's own tensor if it has this dtype and device, else one that is kept."""
        if isinstance(value, Tensor) and value.device == device and value.dtype == dtype and value.numel() == 1:
            return value
        key = (group, name, device, dtype)
        if isinstance(value, Tensor) and value.device.type != "cpu":
            kept = self._kept.get(key, (math.nan, torch.empty((), dtype=dtype, device=device)))[1]
            self._kept[key] = (math.nan, kept.copy_(value))  # on the device, so that a captured graph follows it too
            return kept
        number = float(value)
        if key not in self._kept or self._kept[key][0] != number:
            self._kept[key] = (number, torch.tensor(number, dtype=dtype, device="cpu").to(device))
        return self._kept[key][1]


class SGD(torch.optim.SGD):
    """`torch.optim.SGD` as one kernel for all parameters, with the gradient of a group lasso inside the update.

    Same arguments, same `state_dict` and, without a lasso, the results of `torch.optim.SGD`:

    * gradients in fp32 or fp64 (complex64, complex128), whatever the parameters' dtype: bit for bit on a CPU;
    * gradients in fp16 or bf16: computed in fp32, or in the parameter's dtype if that is wider, and rounded once, when
      parameter and momentum are stored. PyTorch on a CPU rounds after every operation, so some elements differ from its
      in the last bit, and the mean error against exact arithmetic is not larger than PyTorch's;
    * on a GPU: to rounding, with no more error than PyTorch's.

    The momentum buffer's dtype is PyTorch's: the gradient's (`grad_dtype`), with weight decay the wider of the
    parameter's and the gradient's. A learning rate, a number or a tensor of any dtype, is read in fp64 where parameters
    or gradients are fp64 or complex128, else in fp32.

    On CUDA all parameters of one dtype are updated by one launch, where gradients have their dtype; `foreach` and
    `fused` are accepted and change nothing. `lr` may be a tensor: a captured CUDA graph then follows it. While
    capturing, keep gradients where they are (`zero_grad(set_to_none=False)`).

    The lasso's gradient always pulls towards zero, also under `maximize`, as weight decay does. It is added once per
    step, after all gradients have been accumulated and, in data-parallel training, all-reduced. With a
    `torch.amp.GradScaler` do not unscale for its sake: the update divides the gradients by the scale before adding it;
    a skipped step changes nothing.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, fused: as for `torch.optim.SGD`.
        differentiable: must be False.

    Raises:
        InputError: `differentiable=True`, or `foreach=True` and `fused=True` together, as `torch.optim.SGD` has it.
        ValueError: a learning rate, momentum or weight decay below 0; Nesterov momentum without momentum.
    """

    # Attributes that are made anew when parameters change their shape: `prune/optimizers.py` leaves them alone.
    follows_by_itself = ("_lasso", "_coefficient", "_norms", "_scalars", "_gathered")
    _step_supports_amp_scaling = True  # read by GradScaler: it then hands over grad_scale and found_inf

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,  # noqa: FBT001, FBT002 (the sixth argument of torch.optim.SGD, by position there too)
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        _check_options(differentiable=differentiable, foreach=foreach, fused=fused)
        self._lasso: GroupLasso | None = None
        self._coefficient: float | Tensor = 0.0
        self._norms: _Norms | None = None
        self._scalars, self._waits = _Scalars(), False  # waits: for a step with the lasso that was given
        self._gathered: Gathering | None = None
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, foreach=None, fused=None
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_lasso": self._lasso, "_coefficient": self._coefficient}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        fresh = {"_lasso": None, "_coefficient": 0.0, "_norms": None, "_waits": False, "_scalars": _Scalars()}
        self.__dict__.update(fresh | {"_gathered": None} | self.__dict__)

    # -- the lasso ------------------------------------------------------------------------------------------------

    def regularize_with(self, lasso: GroupLasso | None, coefficient: float | Tensor = 0.0) -> None:
        """From the next step on, adds coefficient * dR/dW to every gradient; `None` ends it.

        Args:
            lasso: a lasso of weights that this optimizer holds.
            coefficient: lambda, a number, or a scalar tensor on the parameters' device that a CUDA graph may follow.

        Raises:
            InputError: a coefficient below 0, a weight that is not held here, or a second lasso for the next step.
        """
        if lasso is not None:
            _check_lasso(lasso, coefficient, self.param_groups, self._lasso if self._waits else None)
        if lasso is not self._lasso:
            self._norms = None
        self._waits = lasso is not None
        self._lasso, self._coefficient = lasso, coefficient

    @property
    def lasso(self) -> GroupLasso | None:
        """The lasso inside the update, if any."""
        return self._lasso

    @property
    def lasso_coefficient(self) -> float | Tensor:
        """The lambda of the lasso inside the update."""
        return self._coefficient

    @torch.no_grad()
    def penalty(self) -> Tensor:
        """R(W) of the present weights that are trained, a scalar tensor.

        After a step of `SGD` it costs no pass over the weights.

        Raises:
            InputError: there is no lasso.
        """
        state = self._state()
        if state is None:
            return self._required().penalty()
        state.measure()
        return state.penalty(self._required().eps)

    @torch.no_grad()
    def slice_max_abs(self) -> dict[Tensor, tuple[Tensor, Tensor]]:
        """Largest |w| of the input channels (C,) and output channels (K,) of each weight of the lasso.

        It decides what is sparse. After a step of `SGD` it costs no pass over the weights.

        Raises:
            InputError: there is no lasso.
        """
        state = self._state()
        if state is None:
            return {}
        state.measure()
        return dict(zip(state.weights, split_by_layer(state.max_abs, state.weights, state.blocks), strict=True))

    def forget_norms(self) -> None:
        """Has the norms measured again before the next step.

        This is needed only after writing into `weight.data`, which PyTorch does not record; replaced weights and all
        other writes are noticed.
        """
        self._norms = None

    def lacks_buffers(self) -> bool:
        """Whether the next step would begin a momentum buffer. Under gradient scaling it then waits for the device, to
        know whether it is skipped; it cannot be captured."""
        groups = [group for group in self.param_groups if group["momentum"] != 0]
        trained = [p for group in groups for p in group["params"] if p.grad is not None]
        return any(self.state.get(p, {}).get("momentum_buffer") is None for p in trained)

    def replayed(self) -> None:
        """Records that a CUDA graph which has captured `step` was replayed; to be called after every replay, because
        PyTorch does not record that the parameters have changed."""
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        buffers = [self.state[p]["momentum_buffer"] for p in params if "momentum_buffer" in self.state.get(p, {})]
        increment_version([*params, *buffers])
        self.replays = getattr(self, "replays", 0) + 1  # counted for forecasts
        self._norms_after_replay()

    def _norms_after_replay(self) -> None:
        if self._norms is not None:
            self._norms.mark()  # the update has written those of the new weights

    def _required(self) -> GroupLasso:
        if self._lasso is None:
            raise InputError("this optimizer has no lasso; give it one with regularize_with(lasso, coefficient).")
        return self._lasso

    def _eps(self) -> float:
        return self._required().eps

    def _state(self) -> _Norms | None:
        """The norms, perhaps not yet measured, of the lasso's weights that are trained, in the order of the parameters;
        None where all layers with a lasso have been removed."""
        params = [p for group in self.param_groups for p in group["params"]]
        lasso = self._required()
        present, _ = lasso.weights()
        # a weight is cut under the same identity
        reads: Any = ((id, params), (id, present), (_TRAINED, present), (_SHAPE, present))
        now = [list(map(read, some)) for read, some in reads]
        if self._norms is not None and self._norms.made_for == now:
            return self._norms
        if not present:
            return None
        weights, groups, factors = _trained(lasso, params)
        if self._norms is None or not self._norms.fit(weights, groups):
            self._norms = _Norms(weights, groups, factors, self._eps())
        self._norms.made_for = now
        return self._norms

    # -- the step -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates all parameters that have a gradient.

        Args:
            closure: computes the loss anew and returns it, as for every PyTorch optimizer.

        Raises:
            RuntimeError: a sparse gradient.
        """
        self._check_settings()
        self._waits, loss = False, None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        state = self._state() if self._lasso is not None else None
        if state is not None:
            for weight in state.weights:
                if weight.grad is None:  # the lasso pulls at a weight that the loss did not reach, too
                    weight.grad = torch.zeros_like(weight)
        scaling = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for device, parameters in _gather(self, state).items():
            lasso = state if state is not None and state.norms.device == device else None
            on_device = Scaling(*(None if value is None else value.to(device) for value in scaling))
            self._update(_Step(parameters, device, lasso, on_device))
        return loss

    def _check_settings(self) -> None:
        """Raises InputError where a schedule has brought the settings out of range, before anything is changed."""

    def _update(self, step: _Step) -> None:
        """One call of the operator; the new momentum buffers become state, unless the step was skipped."""
        self._launch(step, self._lasso_coefficient(step), self._eps() if step.lasso is not None else EPS)
        params, _, buffers, _, first, *_ = step.parameters
        # Whether gradient scaling skipped the very first step has to be known, and waited for, only then.
        if any(first) and not step.skipped:
            for p, buffer, begins in zip(params, buffers, first, strict=True):
                if begins:
                    self.state[p]["momentum_buffer"] = buffer
        if step.lasso is not None:
            step.lasso.mark()

    def _lasso_coefficient(self, step: _Step) -> Tensor | None:
        """Lambda as a scalar tensor on the device of the norms, which are measured if they are not known."""
        if step.lasso is None:
            return None
        step.lasso.measure()
        return coefficient_tensor(self._coefficient, step.lasso.norms)

    def _launch(self, step: _Step, coefficient: Tensor | None, eps: float) -> None:
        dtype = _dtype_of_rates(step.parameters)
        norms, max_abs = (torch.empty(0, dtype=dtype, device=step.device) for _ in range(2))
        if step.lasso is not None:
            norms, max_abs = step.lasso.norms if coefficient is None else step.lasso.for_update(), step.lasso.max_abs
        rates = [
            self._scalars.tensor(i, "lr", group["lr"], dtype=dtype, device=step.device)
            for i, group in enumerate(self.param_groups)
        ]
        hyperparameters = [_hyperparameters(group) for group in self.param_groups]
        _call_operator(step, LassoState(norms, max_abs, coefficient, eps), rates, hyperparameters)
        if step.lasso is not None:
            step.lasso.take(norms, step.scaling.found_inf)


def _gather(optimizer: SGD, lasso: _Norms | None) -> dict[torch.device, Parameters]:
    """What a step updates on each device: as in the step before, unless something has changed."""
    groups, state = optimizer.param_groups, optimizer.state
    rows = None if optimizer._gathered is None else optimizer._gathered.rows(groups, state, lasso)
    if rows is None:
        devices = {p.device for group in groups for p in group["params"] if p.grad is not None}
        rows = {device: _parameters_on(device, groups, state, lasso) for device in devices}
        begin = any(any(of.first) for of in rows.values())
        optimizer._gathered = None if begin else Gathering(groups, state, lasso, rows)
    return rows


def _call_operator(
    step: _Step, lasso: LassoState, learning_rates: list[Tensor], hyperparameters: list[Hyperparameters]
) -> None:
    """The update, through PyTorch's dispatcher only where somebody traces, transforms or watches the call."""
    arguments = step.parameters, lasso, learning_rates, hyperparameters, step.scaling
    if is_eager(step.parameters.params[0]):
        sgd_update_(*arguments)
        # what the dispatcher does for an operator that writes: autograd then notices, and so do the norms
        increment_version([*step.parameters.params, *step.parameters.buffers])
    else:
        sgd_(*flat(*arguments))


def _check_options(*, differentiable: bool, foreach: bool | None, fused: bool | None) -> None:
    """Raises InputError for options of `torch.optim.SGD` that this optimizer refuses."""
    if differentiable:
        raise InputError("this SGD updates in place and has no derivative; use torch.optim.SGD(differentiable=True).")
    if foreach and fused:
        raise InputError("`foreach` and `fused` cannot be True together; leave one out, here neither changes anything.")


def _check_lasso(
    lasso: GroupLasso,
    coefficient: float | Tensor,
    param_groups: Sequence[Mapping[str, Any]],
    waiting: GroupLasso | None,
) -> None:
    """Raises InputError unless the update of these parameters can hold this lasso; and where another one, of different
    weights, waits for the same update, which would add this one only."""
    if not isinstance(coefficient, Tensor) and not 0 <= coefficient < math.inf:
        raise InputError(f"the lasso's coefficient must be 0 or more, not {coefficient}.")
    params = {id(p) for group in param_groups for p in group["params"]}
    weights, others = lasso.weights()[0], [] if waiting is None else waiting.weights()[0]
    if any(w.requires_grad and id(w) not in params for w in weights):
        raise InputError("the lasso has weights that the optimizer does not hold; build both from the same model.")
    if weights and others and {id(w) for w in others}.isdisjoint(map(id, weights)):
        raise InputError(
            "this optimizer adds one lasso inside its update, and was given two of different weights for one step: "
            "prune the parts of a network by one PruneTrain, over a module that holds them all (docs/integrations.md, "
            "'A part of a network'), or use an optimizer of torch.optim."
        )


def _trained(
    lasso: GroupLasso, params: Sequence[Tensor]
) -> tuple[list[Tensor], list[Groups], list[tuple[Tensor, Tensor]] | None]:
    """The lasso's weights that are trained, their groups and factors, in the order of the parameters.

    Raises:
        InputError: there is none.
    """
    order = {id(p): i for i, p in enumerate(params)}
    factors = lasso.factors()
    weights, groups = lasso.weights()
    rows = zip(weights, groups, [None] * len(weights) if factors is None else factors, strict=True)
    trained = [row for row in rows if row[0].requires_grad and id(row[0]) in order]
    if not trained:
        raise InputError("none of the lasso's weights is trained; end the lasso with regularize_with(None).")
    trained.sort(key=lambda row: order[id(row[0])])
    of_trained = [pair for _, _, pair in trained if pair is not None]
    return [w for w, _, _ in trained], [g for _, g, _ in trained], None if factors is None else of_trained


def _parameters_on(
    device: torch.device,
    param_groups: Sequence[Mapping[str, Any]],
    state: Mapping[Tensor, Mapping[str, Any]],
    lasso: _Norms | None,
) -> Parameters:
    """The parameters on a device that have a gradient, for one call of the operator; `lasso` is that of some of them.

    A parameter without a momentum buffer in `state` gets one that the update is to initialise.
    """
    groups = {} if lasso is None else dict(zip(map(id, lasso.weights), lasso.groups, strict=True))
    rows = []
    for i, group in enumerate(param_groups):
        for p in group["params"]:
            if p.grad is None or p.device != device:
                continue
            if p.grad.is_sparse:
                raise RuntimeError("this SGD takes no sparse gradients; use torch.optim.SGD for embeddings.")
            begins = False
            if group["momentum"] == 0:
                buffer = p.new_empty(0)
            else:
                kept = state[p].get("momentum_buffer") if p in state else None
                begins = kept is None
                buffer = torch.empty_like(p, dtype=_momentum_dtype(p, group)) if kept is None else kept
            sides = groups.get(id(p))
            block, used = (1, 0) if sides is None else (sides.block, sides.used)
            rows.append((p, p.grad, buffer, i, begins, block, used))
    return Parameters(*map(list, zip(*rows, strict=True)))


def _hyperparameters(group: Mapping[str, Any]) -> Hyperparameters:
    """Those of a parameter group, as numbers and flags of Python's own."""
    return Hyperparameters(
        momentum=float(group["momentum"]),
        dampening=float(group["dampening"]),
        weight_decay=float(group["weight_decay"]),
        nesterov=bool(group["nesterov"]),
        maximize=bool(group["maximize"]),
    )


def _dtype_of_rates(parameters: Parameters) -> torch.dtype:
    """The dtype in which learning rates are read: fp64 where a parameter or gradient is fp64 or complex128."""
    dtypes = {*map(_DTYPE, parameters.params), *map(_DTYPE, parameters.grads)}
    return torch.float32 if dtypes.isdisjoint((torch.float64, torch.complex128)) else torch.float64


def _momentum_dtype(param: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    """The dtype of a new momentum buffer: that of the first step's gradient with weight decay, which it begins with."""
    assert param.grad is not None
    dtype = param.grad.dtype
    return torch.promote_types(dtype, param.dtype) if group["weight_decay"] else dtype


class ProximalSGD(SGD):
    """SGD whose lasso acts by a proximal step: after the update every channel slice is shrunk by a soft-threshold.

    An extension beyond the paper. The subgradient of a norm pulls at a dying slice with full force until it is within
    1e-4 of zero, so at a high learning rate the slice hops around zero and is not found sparse before the rate decays.
    The soft-threshold ends at zero exactly, so channels go earlier, and each channel that goes makes the rest of the
    training cheaper.

    The threshold is lr * lambda * (1 - dampening) / (1 - momentum), the length that the subgradient moves a slice per
    step once momentum has built up, so the same lambda means the same strength; dampening counts with momentum only. A
    layer's multiplier (`GroupLasso(coefficients=...)`) multiplies its threshold, and what is spared has none.
    Weight decay and momentum are those of SGD; the lasso is in neither. What is exact and what is approximate where a
    weight lies in an input and an output group: see `ops/group_soft_threshold.py`.

    Raises:
        InputError: as `SGD`; or a momentum of 1 or more, also one that a schedule sets (then when `step` is called):
            under it a constant pull grows without a bound, and no threshold is as strong.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_momentum(param_group.get("momentum", self.defaults["momentum"]))
        super().add_param_group(param_group)

    def _check_settings(self) -> None:
        for group in self.param_groups:  # schedules may write it
            _check_momentum(group["momentum"])

    def _eps(self) -> float:
        return 0.0  # bare norms: the threshold is compared with them

    def _update(self, step: _Step) -> None:
        super()._update(step)
        if step.lasso is None:
            return
        group_of = {id(p): i for p, i in zip(step.parameters.params, step.parameters.group, strict=True)}
        group = [group_of[id(w)] for w in step.lasso.weights]
        coefficient = coefficient_tensor(self._coefficient, step.lasso.norms)
        group_soft_threshold_(
            step.lasso.weights,
            step.lasso.for_update(),
            [self._threshold(i, coefficient) for i in range(len(self.param_groups))],
            step.scaling.found_inf,
            group,
            step.lasso.blocks,
            step.lasso.used,
        )  # the norms are now of the weights before the threshold: whoever asks has them measured

    def _norms_after_replay(self) -> None:
        return  # of the weights before the threshold, as after a step

    def _lasso_coefficient(self, step: _Step) -> Tensor | None:
        return None  # no subgradient

    def _threshold(self, group: int, coefficient: Tensor) -> Tensor:
        settings = self.param_groups[group]
        momentum = float(settings["momentum"])
        scale = (1 - float(settings["dampening"])) / (1 - momentum) if momentum else 1.0
        tensor = partial(self._scalars.tensor, dtype=coefficient.dtype, device=coefficient.device)
        if isinstance(settings["lr"], Tensor) or isinstance(self._coefficient, Tensor):
            return tensor(group, "lr", settings["lr"]) * coefficient * scale
        return tensor(group, "threshold", settings["lr"] * self._coefficient * scale)


def _check_momentum(momentum: float) -> None:
    if not momentum < 1:
        raise InputError(
            f"ProximalSGD needs a momentum below 1, not {momentum}, for its threshold is lr * lambda / (1 - momentum); "
            "choose 0.9, say, or use SGD."
        )
