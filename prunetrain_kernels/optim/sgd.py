"""SGD with the group lasso inside the update, and its proximal variant.

    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    optimizer.regularize_with(GroupLasso(model, (x,)), coefficient=1e-4)
    ...
    optimizer.step()            # momentum, weight decay and lambda * dR/dW in one pass over the parameters

`PruneTrain` calls `regularize_with` by itself when it is given one of these optimizers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    slice_statistics,
    split_by_layer,
)
from prunetrain_kernels.ops.group_soft_threshold import group_soft_threshold_
from prunetrain_kernels.ops.launch import is_eager
from prunetrain_kernels.ops.sgd import sgd_, sgd_update_
from prunetrain_kernels.ops.tables import channels_of
from prunetrain_kernels.regularizer import GroupLasso


class _Norms:
    """Norms and largest |w| of the weights with a lasso, and which weights, in which state, they are of.

    Multipliers reach the update through the norms that it reads: it pulls by lambda w / n, so norms over multipliers
    make it pull by lambda * multiplier w / n. Kept are the norms themselves.
    """

    def __init__(self, weights: Sequence[Tensor], groups: list[Groups], multipliers: list[float], eps: float) -> None:
        self.weights = weights
        self.groups = groups
        self.multipliers = multipliers
        self.eps = eps
        self.blocks = [g.block for g in groups]
        self.used = [g.used for g in groups]
        self.shapes = [w.shape for w in weights]
        count = sum(w.shape[0] + w.shape[1] // block for w, block in zip(weights, self.blocks, strict=True))
        wide = any(w.dtype == torch.float64 for w in weights)
        self.norms = weights[0].new_empty(count, dtype=torch.float64 if wide else torch.float32)
        self.max_abs = torch.empty_like(self.norms)
        self.factor = None if set(multipliers) == {1.0} else self._beside_norms(multipliers)
        self.state: list[tuple[int, int]] | None = None
        self.asked: Any = None  # parameters and weights when this was made: while they are the same, it serves

    def _beside_norms(self, multipliers: list[float]) -> Tensor:
        """Of each norm, that of its weight."""
        sizes = [sum(channels_of(w, block)) for w, block in zip(self.weights, self.blocks, strict=True)]
        return torch.cat([self.norms.new_full((n,), m) for n, m in zip(sizes, multipliers, strict=True)])

    def fit(self, weights: Sequence[Tensor], groups: list[Groups]) -> bool:
        """Whether these are the same weights, in the same shapes."""
        same = len(weights) == len(self.weights) and all(a is b for a, b in zip(weights, self.weights, strict=True))
        return same and self.groups == groups and self.shapes == [w.shape for w in weights]

    def mark(self) -> None:
        """Says that the norms are those of the weights as they are now."""
        self.state = [(w.data_ptr(), w._version) for w in self.weights]

    def measure(self) -> None:
        """Measures the weights, unless nothing has replaced or written them since their norms were last known."""
        if self.state != [(w.data_ptr(), w._version) for w in self.weights]:
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
        return self.norms if self.factor is None else self.norms / self.factor

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
    """One step of the parameters on one device."""

    params: list[Tensor]
    buffers: list[Tensor]
    group_of: list[int]
    first: list[bool]
    device: torch.device
    lasso: _Norms | None
    grad_scale: Tensor | None
    found_inf: Tensor | None


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

    # What is made anew by itself when parameters change their shape: `prune/optimizers.py` leaves it alone.
    follows_by_itself = ("_lasso", "_coefficient", "_norms", "_rates")
    _step_supports_amp_scaling = True  # read by GradScaler: it then hands over grad_scale and found_inf

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        if differentiable:
            raise InputError(
                "this SGD updates in place and has no derivative; use torch.optim.SGD(differentiable=True)."
            )
        if foreach and fused:
            raise InputError(
                "`foreach` and `fused` cannot be True together; leave one out, here neither changes anything."
            )
        self._lasso: GroupLasso | None = None
        self._coefficient: float | Tensor = 0.0
        self._norms: _Norms | None = None
        self._rates: dict[tuple[int, str], tuple[float, Tensor]] = {}
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, foreach=None, fused=None
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_lasso": self._lasso, "_coefficient": self._coefficient}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, value in (("_lasso", None), ("_coefficient", 0.0), ("_norms", None), ("_rates", {})):
            self.__dict__.setdefault(name, value)

    # -- the lasso ------------------------------------------------------------------------------------------------

    def regularize_with(self, lasso: GroupLasso | None, coefficient: float | Tensor = 0.0) -> None:
        """From the next step on, adds coefficient * dR/dW to every gradient; `None` ends it.

        Args:
            lasso: whose weights this optimizer holds.
            coefficient: lambda, a number, or a scalar tensor on the parameters' device that a CUDA graph may follow.

        Raises:
            InputError: a coefficient below zero or not a number, or a weight that this optimizer does not hold.
        """
        if lasso is not None:
            if not isinstance(coefficient, Tensor) and not 0 <= coefficient < math.inf:
                raise InputError(f"the lasso's coefficient must be 0 or more, not {coefficient}.")
            held = {id(p) for group in self.param_groups for p in group["params"]}
            if any(w.requires_grad and id(w) not in held for w in lasso.weights()[0]):
                raise InputError(
                    "the lasso has weights that the optimizer does not hold; build both from the same model."
                )
        if lasso is not self._lasso:
            self._norms = None
        self._lasso, self._coefficient = lasso, coefficient

    @property
    def lasso(self) -> GroupLasso | None:
        """The lasso inside the update, if any."""
        return self._lasso

    @property
    def lasso_coefficient(self) -> float | Tensor:
        """Its lambda."""
        return self._coefficient

    @torch.no_grad()
    def penalty(self) -> Tensor:
        """R(W) of the present weights that are trained, a scalar tensor; after a step of `SGD` it costs no pass over
        them.

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
        """Largest |w| of the input channels (C,) and output channels (K,) of each weight of the lasso, for the sparse
        test; after a step of `SGD` it costs no pass over the weights.

        Raises:
            InputError: there is no lasso.
        """
        state = self._state()
        if state is None:
            return {}
        state.measure()
        return dict(zip(state.weights, split_by_layer(state.max_abs, state.weights, state.blocks), strict=True))

    def forget_norms(self) -> None:
        """Has the norms measured again before the next step. Needed only after writing into `weight.data`, which
        PyTorch does not record; replaced weights and all other writes are noticed."""
        self._norms = None

    def replayed(self) -> None:
        """To be called whenever a CUDA graph that has captured `step` was replayed: PyTorch does not record that the
        parameters have changed."""
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        buffers = [self.state[p]["momentum_buffer"] for p in held if "momentum_buffer" in self.state.get(p, {})]
        increment_version([*held, *buffers])
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
        """Norms, perhaps not yet measured, of the lasso's weights that are trained, in the order of the parameters;
        None where all layers with a lasso have been removed."""
        held = [id(p) for group in self.param_groups for p in group["params"]]
        weights, groups = self._required().weights()
        asked = (held, [(id(w), w.requires_grad, w.shape) for w in weights])
        if self._norms is not None and self._norms.asked == asked:
            return self._norms
        if not weights:
            return None
        order = {key: i for i, key in enumerate(held)}
        rows = zip(weights, groups, self._required().multipliers(), strict=True)
        trained = [row for row in rows if row[0].requires_grad and id(row[0]) in order]
        trained.sort(key=lambda row: order[id(row[0])])
        if not trained:
            raise InputError("none of the lasso's weights is trained; end the lasso with regularize_with(None).")
        weights, groups, multipliers = map(list, zip(*trained, strict=True))
        if self._norms is None or not self._norms.fit(weights, groups):
            self._norms = _Norms(weights, groups, multipliers, self._eps())
        self._norms.asked = asked
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
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        state = self._state() if self._lasso is not None else None
        if state is not None:
            for weight in state.weights:
                if weight.grad is None:  # the lasso pulls at a weight that the loss did not reach, too
                    weight.grad = torch.zeros_like(weight)
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for device in {p.device for group in self.param_groups for p in group["params"] if p.grad is not None}:
            self._update(
                _Step(
                    *self._gather(device),
                    device,
                    state if state is not None and state.norms.device == device else None,
                    None if grad_scale is None else grad_scale.to(device),
                    None if found_inf is None else found_inf.to(device),
                )
            )
        return loss

    def _check_settings(self) -> None:
        """Raises InputError where a schedule has brought the settings out of range, before anything is changed."""

    def _gather(self, device: torch.device) -> tuple[list[Tensor], list[Tensor], list[int], list[bool]]:
        """Parameters with a gradient, their momentum buffers, groups, and whether the buffer is to be begun."""
        params: list[Tensor] = []
        buffers: list[Tensor] = []
        group_of: list[int] = []
        first: list[bool] = []
        for i, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is None or p.device != device:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError("this SGD takes no sparse gradients; use torch.optim.SGD for embeddings.")
                begins = False
                if group["momentum"] == 0:
                    buffer = p.new_empty(0)
                else:
                    kept = self.state[p].get("momentum_buffer") if p in self.state else None
                    begins = kept is None
                    buffer = torch.empty_like(p, dtype=_momentum_dtype(p, group)) if kept is None else kept
                params.append(p)
                buffers.append(buffer)
                group_of.append(i)
                first.append(begins)
        return params, buffers, group_of, first

    def _update(self, step: "_Step") -> None:
        """One call of the operator; the new momentum buffers become state, unless the step was skipped."""
        self._launch(step, self._lasso_coefficient(step), self._eps() if step.lasso is not None else EPS)
        # Whether gradient scaling skipped the very first step has to be known, and waited for, only then.
        if any(step.first) and not (step.found_inf is not None and float(step.found_inf)):
            for p, buffer, begins in zip(step.params, step.buffers, step.first, strict=True):
                if begins:
                    self.state[p]["momentum_buffer"] = buffer
        if step.lasso is not None:
            step.lasso.mark()

    def _lasso_coefficient(self, step: "_Step") -> Tensor | None:
        """Lambda on the device, with valid norms beside it."""
        if step.lasso is None:
            return None
        step.lasso.measure()
        return coefficient_tensor(self._coefficient, step.lasso.norms)

    def _launch(self, step: "_Step", coefficient: Tensor | None, eps: float) -> None:
        settings = self.param_groups
        dtypes = {t.dtype for p in step.params for t in (p, p.grad) if t is not None}
        wide = torch.float32 if dtypes.isdisjoint((torch.float64, torch.complex128)) else torch.float64
        sides = {} if step.lasso is None else dict(zip(map(id, step.lasso.weights), step.lasso.groups, strict=True))
        empty = torch.empty(0, dtype=wide, device=step.device)
        norms = empty
        if step.lasso is not None:
            norms = step.lasso.norms if coefficient is None else step.lasso.for_update()
        eager = is_eager(step.params[0])
        update = sgd_update_ if eager else sgd_
        update(
            step.params,
            [p.grad for p in step.params],  # type: ignore[misc]
            step.buffers,
            norms,
            empty.clone() if step.lasso is None else step.lasso.max_abs,
            [self._number(i, "lr", group["lr"], wide, step.device) for i, group in enumerate(settings)],
            coefficient,
            step.grad_scale,
            step.found_inf,
            [float(group["momentum"]) for group in settings],
            [float(group["dampening"]) for group in settings],
            [float(group["weight_decay"]) for group in settings],
            [bool(group["nesterov"]) for group in settings],
            [bool(group["maximize"]) for group in settings],
            step.group_of,
            step.first,
            [sides[id(p)].block if id(p) in sides else 1 for p in step.params],
            [sides[id(p)].used if id(p) in sides else 0 for p in step.params],
            eps,
        )
        if eager:  # what the dispatcher does for an operator that writes: autograd then notices, and so do the norms
            increment_version([*step.params, *step.buffers])
        if step.lasso is not None:
            step.lasso.take(norms, step.found_inf)

    def _number(self, group: int, name: str, value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A hyperparameter as a scalar tensor on the device: the user's own tensor, or one that is kept."""
        if isinstance(value, Tensor) and value.device == device and value.dtype == dtype and value.numel() == 1:
            return value
        key = (group, f"{name}/{device}/{dtype}")
        if isinstance(value, Tensor) and value.device.type != "cpu":
            kept = self._rates.get(key, (math.nan, torch.empty((), dtype=dtype, device=device)))[1]
            self._rates[key] = (math.nan, kept.copy_(value))  # on the device, so that a captured graph follows it too
            return kept
        number = float(value)
        if key not in self._rates or self._rates[key][0] != number:
            self._rates[key] = (number, torch.tensor(number, dtype=dtype, device="cpu").to(device))
        return self._rates[key][1]


def _momentum_dtype(param: Tensor, group: dict[str, Any]) -> torch.dtype:
    """That of the first step's gradient with weight decay, which is what the buffer begins with."""
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
    layer's multiplier (`GroupLasso(coefficients=...)`) multiplies its threshold.
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

    def _update(self, step: "_Step") -> None:
        super()._update(step)
        if step.lasso is None:
            return
        where = {id(p): i for p, i in zip(step.params, step.group_of, strict=True)}
        group = [where[id(w)] for w in step.lasso.weights]
        kinds = [(i, 1.0) for i in range(len(self.param_groups))]
        if step.lasso.factor is not None:  # a threshold for each parameter group and multiplier that come together
            pairs = list(zip(group, step.lasso.multipliers, strict=True))
            kinds = list(dict.fromkeys(pairs))
            group = [kinds.index(pair) for pair in pairs]
        coefficient = coefficient_tensor(self._coefficient, step.lasso.norms)
        group_soft_threshold_(
            step.lasso.weights,
            step.lasso.norms,
            [self._threshold(i, m, coefficient) for i, m in kinds],
            step.found_inf,
            group,
            step.lasso.blocks,
            step.lasso.used,
        )  # the norms are now of the weights before the threshold: whoever asks has them measured

    def _norms_after_replay(self) -> None:
        return  # of the weights before the threshold, as after a step

    def _lasso_coefficient(self, step: "_Step") -> Tensor | None:
        return None  # no subgradient

    def _threshold(self, group: int, multiplier: float, coefficient: Tensor) -> Tensor:
        settings = self.param_groups[group]
        momentum = float(settings["momentum"])
        scale = (1 - float(settings["dampening"])) / (1 - momentum) if momentum else 1.0
        scale *= multiplier
        if isinstance(settings["lr"], Tensor) or isinstance(self._coefficient, Tensor):
            rate = self._number(group, "lr", settings["lr"], coefficient.dtype, coefficient.device)
            return rate * coefficient * scale
        value = settings["lr"] * self._coefficient * scale
        return self._number(group, f"threshold of {multiplier}", value, coefficient.dtype, coefficient.device)


def _check_momentum(momentum: float) -> None:
    if not momentum < 1:
        raise InputError(
            f"ProximalSGD needs a momentum below 1, not {momentum}, for its threshold is lr * lambda / (1 - momentum); "
            "choose 0.9, say, or use SGD."
        )
