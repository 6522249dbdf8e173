"""PruneTrain as a callback of PyTorch Lightning.

trainer = Trainer(max_epochs=60, callbacks=[PruneTrainCallback(penalty_ratio=0.25, interval=5)])
trainer.fit(module, loader)
trainer.fit(module, loader, ckpt_path="last.ckpt")  # a freshly built module takes the saved, smaller shape
"""

import dataclasses
import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prunetrain_kernels.errors import CheckpointError, InputError
from prunetrain_kernels.inputs import ExampleInputs, checked_inputs, mapped
from prunetrain_kernels.prune.shape import describe_shape, restore_shape
from prunetrain_kernels.prune.slices import set_data
from prunetrain_kernels.train.attach import before_update
from prunetrain_kernels.train.original import OriginalChannels
from prunetrain_kernels.train.prune_report import PruneReport
from prunetrain_kernels.train.prunetrain import PruneTrain

if TYPE_CHECKING:
    Callback = Any
elif "pytorch_lightning" in sys.modules and "lightning" not in sys.modules:
    from pytorch_lightning import Callback
else:
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError as missing:
        try:
            from pytorch_lightning import Callback
        except ModuleNotFoundError:
            raise ImportError("PruneTrainCallback needs PyTorch Lightning: pip install lightning.") from missing

AUTOCAST = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}  # of Trainer(precision=...)
EXAMPLES = 4  # of a batch: enough to trace and to check by
NOT_HERE = {"model": "the LightningModule", "optimizer": "configure_optimizers' one", "batch": "the dataloader's",
            "scheduler": "configure_optimizers' one"}  # fmt: skip


class PruneTrainCallback(Callback):  # type: ignore[misc]
    """Group lasso in every step, a reconfiguration every `interval` epochs, both in Lightning's checkpoints.

    The network is the LightningModule itself, by its `forward`; its `configure_optimizers` must return an optimizer
    over its own parameters, or several (then with manual optimization). The lasso's gradient comes after gradient
    clipping, once for each update, whatever `accumulate_grad_batches` is, and after unscaling under
    `precision="16-mixed"`.

    Checkpoints, but those with `save_weights_only`, hold the shape too: `Trainer.fit`, `validate`, `test` and `predict`
    with `ckpt_path` bring the module to it before Lightning loads the weights, be it smaller or larger than now.
    `load_from_checkpoint` knows no callbacks: there, call `restore_lightning_shape` in your module's
    `on_load_checkpoint`.

    Args:
        example_inputs: of `forward`, a few examples: a tuple of its positional arguments, or a dict of its keyword
            arguments; by default the module's `example_input_array`, or else the first
            element of the first training batch.
        options: as of `PruneTrain`: penalty_ratio, interval, threshold, policy, round_to, fuse, ...

    Attributes:
        prunetrain: the `PruneTrain`, from the first training step on.
        reports: what each reconfiguration of this `fit` changed.

    Raises:
        InputError: an option that `PruneTrain` does not have, or that is Lightning's to say; when training starts, a
            module without an optimizer, or a batch that is no tensor and does not begin with one.
        CheckpointError: a checkpoint of another network, or one that does not tell the shape.
    """

    def __init__(self, example_inputs: ExampleInputs | None = None, **options: Any) -> None:
        known = inspect.signature(PruneTrain).parameters
        for name in options:
            if name not in known or name in NOT_HERE:
                why = f"it is {NOT_HERE[name]}" if name in NOT_HERE else "PruneTrain has no such argument"
                raise InputError(f"PruneTrainCallback takes no '{name}': {why}.")
        self.example_inputs = example_inputs
        self.options = options
        self.prunetrain: PruneTrain | None = None
        self.reports: list[PruneReport] = []
        self._saved: dict[str, Any] | None = None
        self._built: tuple[nn.Module, dict[str, nn.Module]] | None = None
        self._first_loss: Tensor | None = None
        self._hooks: list[Any] = []
        self._epochs_before = 0.0

    # -- training -------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.prunetrain is None:
            self.prunetrain = self._begin(trainer, pl_module, batch)

    def _begin(self, trainer: Any, module: Any, batch: Any) -> PruneTrain:
        """PruneTrain on the module as it is now, with what a checkpoint or an earlier `fit` said."""
        optimizers, saved = list(trainer.optimizers), self._saved
        if not optimizers:
            raise InputError("PruneTrainCallback needs an optimizer, and the module's configure_optimizers gives none.")
        wrapped = trainer.strategy.model
        model = wrapped if isinstance(wrapped, DistributedDataParallel) else module
        if trainer.world_size > 1 and model is module:
            raise InputError('PruneTrainCallback can follow several processes with Trainer(strategy="ddp") only.')
        options = {"amp": AUTOCAST.get(trainer.precision), **self.options}
        optimizer = optimizers if len(optimizers) > 1 else optimizers[0]
        prunetrain = PruneTrain(model, optimizer, self._examples(module, batch), **options)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        unscales = [o for o in optimizers if scaler is not None and getattr(o, "_step_supports_amp_scaling", False)]
        if unscales and not prunetrain.lasso_inside:
            raise InputError(
                f"this {type(unscales[0]).__name__} unscales gradients inside its step, where the lasso's cannot be "
                "added; build it without fused=True, or use prunetrain_kernels.optim.SGD."
            )
        if saved is not None:  # the model has its smaller shape by now
            prunetrain.original = OriginalChannels.of_dense(saved["dense_layers"])
            prunetrain.dense_flops = type(prunetrain.flops)(**saved["dense_flops"])
            prunetrain.load_state_dict(saved["prunetrain"])
        # counted with another Trainer; this one begins at 0
        self._epochs_before = max(0.0, prunetrain.epochs - trainer.current_epoch)
        self._hooks = [optimizer.register_step_pre_hook(before_update(self._add_lasso)) for optimizer in optimizers]
        return prunetrain

    def _examples(self, module: Any, batch: Any) -> ExampleInputs:
        inputs = self.example_inputs if self.example_inputs is not None else module.example_input_array
        if inputs is None:
            inputs = batch[0] if isinstance(batch, list | tuple) and len(batch) else batch
            if not isinstance(inputs, Tensor):
                raise InputError(
                    f"a batch of type {type(batch).__name__} does not begin with the network's input; pass "
                    "PruneTrainCallback(example_inputs=(x,)) or set the module's example_input_array."
                )
            inputs = inputs[:EXAMPLES]
        on_device: ExampleInputs = mapped(checked_inputs(inputs), lambda x: x.detach().to(module.device))
        return on_device

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Notes the very first loss, which sets lambda: as it was before accumulation and scaling divided it."""
        if self._first_loss is None:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            scale = 1.0 if scaler is None else scaler.get_scale()
            wide = torch.promote_types(loss.dtype, torch.float32)
            self._first_loss = loss.detach().to(wide) * (trainer.accumulate_grad_batches / scale)

    def _add_lasso(self, optimizer: Any) -> None:
        """Lightning runs backward and clips inside the closure that it gives to the step, but with a gradient scaler
        before the step; both ways the lasso comes last."""
        if self.prunetrain is not None and self._first_loss is not None:
            several = len(self.prunetrain.optimizers) > 1
            self.prunetrain.add_gradient_(self._first_loss, optimizer if several else None)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Reconfigures where it is due; before ModelCheckpoint's turn, which comes last."""
        prunetrain = self.prunetrain
        if prunetrain is None:
            return
        report = prunetrain.advance(max(0.0, self._epochs_before + trainer.current_epoch + 1 - prunetrain.epochs))
        if report is not None:
            self.reports.append(report)
            self._empty_removed(pl_module)
        now, dense = prunetrain.flops, prunetrain.dense_flops
        training, inference = now.of(dense)
        pl_module.log("prunetrain/training_flops", training)
        pl_module.log("prunetrain/inference_flops", inference)
        if prunetrain.last_penalty is not None:
            pl_module.log("prunetrain/penalty", prunetrain.last_penalty)

    def _empty_removed(self, module: nn.Module) -> None:
        """Removed layers are kept, for a checkpoint from before, but not their weights."""
        living = {id(p) for p in module.parameters()}
        for old in self._built[1].values() if self._built is not None else ():
            for parameter in old.parameters(recurse=False):
                if id(parameter) not in living:
                    set_data(parameter, parameter.data[:0])

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._end()  # of a fit that an exception ended
        if self._built is None or self._built[0] is not pl_module:  # another module starts anew
            self._saved = None
            self._built = (pl_module, dict(pl_module.named_modules()))
        self.reports, self._first_loss = [], None
        load, modules = pl_module.on_load_checkpoint, self._built[1]

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            restore_lightning_shape(pl_module, checkpoint, self.state_key, modules)
            load(checkpoint)

        pl_module.on_load_checkpoint = on_load_checkpoint  # a callback's own comes only after the weights

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._end()

    def _end(self) -> None:
        if self._built is not None:
            vars(self._built[0]).pop("on_load_checkpoint", None)
        if self.prunetrain is not None:
            self._saved = self.state_dict()
            for hook in self._hooks:
                hook.remove()
            self.prunetrain = None

    def state_dict(self) -> dict[str, Any]:
        prunetrain = self.prunetrain
        if prunetrain is None:
            return self._saved or {}
        return {
            "shape": describe_shape(prunetrain.model),
            "prunetrain": prunetrain.state_dict(),
            "dense_layers": {name: list(sizes) for name, sizes in prunetrain.dense_layers.items()},
            "dense_flops": dataclasses.asdict(prunetrain.dense_flops),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict


def restore_lightning_shape(
    module: nn.Module,
    checkpoint: dict[str, Any],
    state_key: str = PruneTrainCallback.__qualname__,
    built: dict[str, nn.Module] | None = None,
) -> None:
    """Brings a LightningModule, in place, to the shape that it has in a checkpoint; its weights are not loaded yet.

    For `load_from_checkpoint`, in your module:

        def on_load_checkpoint(self, checkpoint):
            restore_lightning_shape(self, checkpoint)

    Args:
        module: of the class that was saved.
        checkpoint: as Lightning's `on_load_checkpoint` is given it.
        state_key, built: the callback's own matter.

    Raises:
        CheckpointError: a checkpoint of another network, or of a pruned one with its weights only.
    """
    state, callbacks = checkpoint["state_dict"], checkpoint.get("callbacks")
    if callbacks is None and state.keys() != module.state_dict().keys():
        raise CheckpointError(
            "the checkpoint has the weights of a pruned network but not its shape; save it without save_weights_only."
        )
    restore_shape(module, (callbacks or {}).get(state_key, {}).get("shape"), state, built)
