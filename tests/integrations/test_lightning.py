"""The Lightning callback trains as a loop written by hand does, bitwise, and its checkpoints bring the shape back."""

import copy
import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from prunetrain_kernels import CheckpointError, InputError, PruneTrain, optim
from prunetrain_kernels.nn import GatedConv2d

L = pytest.importorskip("lightning.pytorch")
from prunetrain_kernels.integrations.lightning import PruneTrainCallback, restore_lightning_shape  # noqa: E402

HERE = Path(__file__).parent
# of processes that tests start: this folder's modules, and those of the repository
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parents[1])))}
STEPS, BATCH, CLASSES = 4, 6, 3


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="(lightning|pytorch_lightning)")
        yield


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.bn(self.conv(x)))).mean((2, 3)))


Make = Callable[[Any], torch.optim.Optimizer]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


def our_sgd(parameters: Any) -> torch.optim.Optimizer:
    return optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


class Hooks:
    """What users write: a scheduler, logged losses."""

    def __init__(self, make: Make = sgd, net: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.make = net or Net().double(), make

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    log: Callable[..., None]
    parameters: Callable[[], Any]
    __call__: Callable[[Tensor], Tensor]

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Any:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


class PlainModule(Hooks, L.LightningModule):  # type: ignore[misc, name-defined]
    """Knows nothing of the callback."""


class Module(PlainModule):
    """Can be loaded without the callback."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        restore_lightning_shape(self, checkpoint)


@torch.no_grad()
def kill(net: nn.Module, epoch: int) -> None:
    """Channels everywhere after the first epoch; others in one layer only, and a branch, after the second."""
    blocks = [net.get_submodule(f"blocks.{i}") for i in (0, 1)]
    if epoch == 0:
        for block in blocks:
            block.conv1.weight[:3] = 0
            block.conv2.weight[:, :3] = 0
    if epoch == 1:
        blocks[0].conv1.weight[:, 2:5] = 0
        blocks[0].conv2.weight[4:] = 0
        blocks[1].conv2.weight.zero_()


class Kill(L.Callback):  # type: ignore[misc, name-defined]
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        kill(pl_module.net, trainer.current_epoch)


def data(dtype: torch.dtype = torch.float64) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * BATCH, 2, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    return DataLoader(TensorDataset(x, torch.arange(len(x)) % CLASSES), batch_size=BATCH)


def trainer_of(*callbacks: Any, epochs: int = 3, kind: Any = None, **options: Any) -> Any:
    defaults = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    if not any(type(one).__name__ == "ModelCheckpoint" for one in callbacks):
        defaults["enable_checkpointing"] = False
    return (kind or L.Trainer)(max_epochs=epochs, callbacks=list(callbacks), **{**defaults, **options})


def checkpoints(folder: Path, **options: Any) -> Any:
    return L.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, **options)


def same_tensors(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


OPTIONS: dict[str, Any] = {"penalty_ratio": 0.3, "interval": 1}


def by_hand(make: Make, clip: float = 0.0, accumulate: int = 1, epochs: int = 3, **options: Any) -> PruneTrain:
    """The loop that a user of the callback would have written."""
    net, loader = PlainModule(make).net, data()
    optimizer = make(net.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    prunetrain = PruneTrain(net, optimizer, (next(iter(loader))[0][:4],), **OPTIONS, **options)
    first = None
    for epoch in range(epochs):
        net.train()
        optimizer.zero_grad()
        for step, (x, y) in enumerate(loader):
            loss = F.cross_entropy(net(x), y)
            first = loss.detach() if first is None else first
            (loss / accumulate).backward()
            if (step + 1) % accumulate == 0:
                if clip:
                    nn.utils.clip_grad_norm_(net.parameters(), clip)
                prunetrain.add_gradient_(first)
                optimizer.step()
                optimizer.zero_grad()
        kill(net, epoch)
        prunetrain.epoch_end()
        scheduler.step()
    return prunetrain


@pytest.mark.parametrize("make", [sgd, our_sgd], ids=["torch", "ours"])
@pytest.mark.parametrize(("clip", "accumulate"), [(0.0, 1), (0.1, 1), (0.1, 2)])
def test_as_a_loop_by_hand(make: Make, clip: float, accumulate: int) -> None:
    expected = by_hand(make, clip, accumulate)
    callback, module = PruneTrainCallback(**OPTIONS), PlainModule(make)
    trainer = trainer_of(
        Kill(), callback, gradient_clip_val=clip or None, accumulate_grad_batches=accumulate, num_sanity_val_steps=0
    )
    trainer.fit(module, data(), data())
    assert same_tensors(module.net, expected.model)
    assert callback.state_dict()["prunetrain"]["coefficient"] == expected.coefficient
    assert [r.reconfiguration.changed for r in callback.reports] == [True, True, False]
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.005)
    logged = trainer.callback_metrics
    assert {"loss", "val_loss"} <= logged.keys()
    assert float(logged["prunetrain/training_flops"]) == pytest.approx(callback.reports[-1].training_ratio)
    assert float(logged["prunetrain/inference_flops"]) == pytest.approx(callback.reports[-1].inference_ratio)
    assert float(logged["prunetrain/penalty"]) > 0


class Gradients(L.Callback):  # type: ignore[misc, name-defined]
    """The update of the first step, by what it did to the weights: SGD without momentum moves them by lr * gradient."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = [p.detach().clone() for p in pl_module.net.parameters()]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.moves = [old - p.detach() for old, p in zip(self.before, pl_module.net.parameters(), strict=True)]


def first_move(penalty_ratio: float, **options: Any) -> tuple[list[Tensor], Any]:
    gradients, callback = Gradients(), PruneTrainCallback(penalty_ratio=penalty_ratio, interval=1)
    module = PlainModule(lambda parameters: torch.optim.SGD(parameters, lr=1.0), net=_float_net())
    trainer_of(gradients, callback, epochs=1, limit_train_batches=1, **options).fit(module, data(torch.float32))
    return gradients.moves, callback


def _float_net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def scaling() -> list[Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # type: ignore[attr-defined]
    return [L.plugins.precision.MixedPrecision("16-mixed", "cpu", scaler=scaler)]


@pytest.mark.parametrize("how", ["fp32", "bf16", "fp16 with a scaler"])
def test_the_lasso_comes_after_clipping_and_unscaling(how: str) -> None:
    """What the lasso adds to a clipped step is lambda * dR/dW to rounding, whatever the precision."""

    def options() -> dict[str, Any]:
        kinds = {"fp32": {}, "bf16": {"precision": "bf16-mixed"}, "fp16 with a scaler": {"plugins": scaling()}}
        return {"gradient_clip_val": 1e-3, **kinds[how]}

    with_lasso, callback = first_move(0.3, **options())
    without, _ = first_move(0.0, **options())
    norm = torch.stack([m.square().sum() for m in without]).sum().sqrt()
    assert float(norm) == pytest.approx(1e-3, rel=1e-2)  # clipped, in true units
    net = _float_net()
    coefficient = callback.state_dict()["prunetrain"]["coefficient"]
    loader = data(torch.float32)
    lasso = PruneTrain(net, sgd(net.parameters()), (next(iter(loader))[0][:4],), **OPTIONS).lasso
    first = F.cross_entropy(net(next(iter(loader))[0]), next(iter(loader))[1]).item()
    assert coefficient == pytest.approx(0.3 / 0.7 * first / lasso.penalty().item(), rel=2e-2)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    lasso.add_gradient_(coefficient)
    for a, b, p in zip(with_lasso, without, net.parameters(), strict=True):
        assert p.grad is not None
        assert torch.allclose(a - b, p.grad, atol=1e-6, rtol=1e-4)


RESUMED = {
    "union": {},
    "gating": {"policy": "gating"},
    "fused": {"fuse": True},
    "fused and gated": {"fuse": True, "policy": "gating"},
}


@pytest.mark.parametrize("make", [sgd, our_sgd], ids=["torch", "ours"])
@pytest.mark.parametrize("name", RESUMED)
def test_fit_goes_on_from_a_checkpoint_of_a_shrunk_model(name: str, make: Make, tmp_path: Path) -> None:
    """As an undisturbed run, from every epoch's checkpoint, in a freshly built module that knows nothing."""
    options = OPTIONS | RESUMED[name]
    whole, callback = PlainModule(make), PruneTrainCallback(**options)
    trainer = trainer_of(Kill(), callback, checkpoints(tmp_path), epochs=4)
    trainer.fit(whole, data())
    if "gating" in options.get("policy", ""):
        assert any(isinstance(m, GatedConv2d) for m in whole.modules())
    assert callback.reports[1].reconfiguration.branches == 1
    for epoch in (0, 1, 2):
        module, again = PlainModule(make), PruneTrainCallback(**options)
        second = trainer_of(Kill(), again, epochs=4)
        second.fit(module, data(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        close(module.net, whole.net, exact=options.get("policy") != "gating" or not options.get("fuse"))
        restored, saved = again.state_dict(), callback.state_dict()
        assert restored["shape"]["stand_ins"] == saved["shape"]["stand_ins"]
        for key in ("coefficient", "epochs", "removed"):
            assert restored["prunetrain"][key] == saved["prunetrain"][key]
        assert restored["dense_flops"] == saved["dense_flops"]
        assert len(restored["prunetrain"]["history"]) == 4
        state = [dict(s) for s in second.optimizers[0].state.values()]
        expected = [dict(s) for s in trainer.optimizers[0].state.values()]
        assert len(state) == len(expected)
        for a, b in zip(state, expected, strict=True):
            assert torch.allclose(a["momentum_buffer"], b["momentum_buffer"], rtol=1e-9, atol=1e-12)


def close(a: nn.Module, b: nn.Module, exact: bool) -> None:
    if exact:
        assert same_tensors(a, b)
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.allclose(left[n].double(), right[n].double(), rtol=1e-9, atol=1e-12) for n in left)


def test_a_checkpoint_from_validation_counts_its_epoch(tmp_path: Path) -> None:
    """ModelCheckpoint may save when the last validation of an epoch ends, before the epoch's reconfiguration."""
    callback = PruneTrainCallback(**OPTIONS)
    saved = checkpoints(tmp_path, save_on_train_epoch_end=False)
    trainer_of(Kill(), callback, saved, epochs=3).fit(PlainModule(), data(), data())
    module, again = PlainModule(), PruneTrainCallback(**OPTIONS)
    trainer_of(Kill(), again, epochs=3).fit(module, data(), data(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert again.state_dict()["prunetrain"]["epochs"] == 3


@pytest.mark.parametrize("kind", [PlainModule, Module])
def test_earlier_and_later_shapes_are_evaluated(kind: type[PlainModule], tmp_path: Path) -> None:
    """`test(ckpt_path=)` of a larger, earlier network works in the pruned module, and back again."""
    module, callback = kind(), PruneTrainCallback(**OPTIONS, policy="gating")
    trainer = trainer_of(Kill(), callback, checkpoints(tmp_path))
    trainer.fit(module, data())
    last = copy.deepcopy(module.net)
    x = next(iter(data()))[0]
    for epoch in (0, 2, 1):
        path = tmp_path / f"epoch={epoch}.ckpt"
        trainer.test(module, data(), ckpt_path=path, verbose=False)
        loaded = Module.load_from_checkpoint(path)  # without a callback
        assert same_tensors(loaded.net, module.net)
        assert torch.equal(loaded.eval()(x), module.eval()(x))
        assert (loaded.net.state_dict().keys() == last.state_dict().keys()) == (epoch > 0)
    trainer.test(module, data(), ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False)
    assert torch.equal(module.net(x), last.eval()(x))


def test_a_second_fit_goes_on_and_another_module_starts_anew() -> None:
    callback, module = PruneTrainCallback(**OPTIONS), PlainModule()
    trainer = trainer_of(Kill(), callback, epochs=2)
    trainer.fit(module, data())
    coefficient = callback.state_dict()["prunetrain"]["coefficient"]
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, data())
    state = callback.state_dict()["prunetrain"]
    assert (state["coefficient"], state["epochs"], len(state["history"])) == (coefficient, 3, 3)
    trainer_of(callback, epochs=2).fit(module, data())  # another Trainer, which counts from 0
    assert callback.state_dict()["prunetrain"]["epochs"] == 5
    assert len(callback.reports) == 2
    other = PlainModule()
    trainer_of(callback, epochs=1).fit(other, data())
    assert callback.state_dict()["prunetrain"]["epochs"] == 1
    assert other.net.conv.weight.shape[0] == 8


class Stop(L.Callback):  # type: ignore[misc, name-defined]
    def on_train_batch_end(self, *_: Any) -> None:
        raise RuntimeError("stop")


def test_a_fit_that_failed_leaves_nothing_behind(tmp_path: Path) -> None:
    callback, module = PruneTrainCallback(**OPTIONS), PlainModule()
    with pytest.raises(RuntimeError, match="stop"):
        trainer_of(callback, Stop()).fit(module, data())
    module.load_state_dict(PlainModule().state_dict())
    trainer_of(Kill(), callback, num_sanity_val_steps=0).fit(module, data(), data())
    assert "on_load_checkpoint" not in vars(module)
    net = by_hand(sgd).model
    assert [p.shape for p in module.net.parameters()] == [p.shape for p in net.parameters()]
    assert same_tensors(module.net, net)


def test_without_lightning_the_import_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "prunetrain_kernels.integrations.lightning")
    with pytest.raises(ImportError, match="needs PyTorch Lightning: pip install lightning"):
        importlib.import_module("prunetrain_kernels.integrations.lightning")


def test_a_checkpoint_without_its_shape_is_refused(tmp_path: Path) -> None:
    saved = checkpoints(tmp_path, save_weights_only=True)
    trainer_of(Kill(), PruneTrainCallback(**OPTIONS), saved, epochs=2).fit(PlainModule(), data())
    with pytest.raises(CheckpointError, match="not its shape"):
        trainer_of(PruneTrainCallback(**OPTIONS)).test(PlainModule(), data(), ckpt_path=tmp_path / "epoch=1.ckpt")


def test_another_network_is_refused_and_untouched(tmp_path: Path) -> None:
    trainer = trainer_of(Kill(), PruneTrainCallback(**OPTIONS), checkpoints(tmp_path), epochs=2)
    trainer.fit(PlainModule(), data())
    path = tmp_path / "epoch=1.ckpt"
    other = PlainModule(net=nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, CLASSES)).double())
    before = copy.deepcopy(other)
    with pytest.raises(CheckpointError, match="of another network"):
        trainer_of(PruneTrainCallback(**OPTIONS)).fit(other, data(), ckpt_path=path)
    assert same_tensors(other, before)


def test_options_that_cannot_be_used() -> None:
    with pytest.raises(InputError, match="takes no 'intervall': PruneTrain has no such argument"):
        PruneTrainCallback(intervall=3)
    with pytest.raises(InputError, match="takes no 'batch': it is the dataloader's"):
        PruneTrainCallback(batch=32)

    named = DataLoader([{"image": torch.zeros(2, 6, 6)}])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="does not begin with the network's input"):
        trainer_of(PruneTrainCallback(**OPTIONS)).fit(PlainModule(), named)
    fused = PlainModule(lambda p: torch.optim.SGD(p, lr=0.1, fused=True), net=_float_net())
    with pytest.raises(InputError, match="unscales gradients inside its step"):
        trainer_of(PruneTrainCallback(**OPTIONS), plugins=scaling()).fit(fused, data(torch.float32))


def test_several_optimizers() -> None:
    """With manual optimization: each step adds the lasso's gradient to what that optimizer holds, once."""

    class Two(PlainModule):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [sgd(self.net.conv.parameters()), sgd(p for n, p in self.net.named_parameters() if "conv." not in n)]

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:  # type: ignore[override]
            loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
            optimizers = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in optimizers:
                optimizer.step()

    class One(PlainModule):
        def configure_optimizers(self) -> Any:
            return sgd(self.parameters())

    module, twin = Two(), One()
    for one in (module, twin):
        trainer_of(PruneTrainCallback(**OPTIONS)).fit(one, data())
    assert same_tensors(module, twin)


def test_example_inputs_may_be_given_either_way() -> None:
    x = next(iter(data()))[0]
    module = PlainModule()
    module.example_input_array = x[:3]
    for callback, expected in (
        (PruneTrainCallback(**OPTIONS), 3),
        (PruneTrainCallback(example_inputs=(x[:2],), **OPTIONS), 2),
    ):
        spy = Spy(callback)
        trainer_of(callback, spy, epochs=1).fit(module, data())
        assert spy.examples == expected


class Spy(L.Callback):  # type: ignore[misc, name-defined]
    """Notes how many examples PruneTrain was given."""

    def __init__(self, callback: PruneTrainCallback) -> None:
        self.callback = callback

    def on_train_batch_end(self, *_: Any) -> None:
        assert self.callback.prunetrain is not None
        self.examples = len(self.callback.prunetrain.graph.example_inputs[0])


def test_manual_optimization() -> None:
    class Manual(PlainModule):
        automatic_optimization = False

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:  # type: ignore[override]
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

        def on_train_epoch_end(self) -> None:
            self.lr_schedulers().step()

    module, callback = Manual(), PruneTrainCallback(**OPTIONS)
    trainer_of(Kill(), callback).fit(module, data())
    assert same_tensors(module.net, by_hand(sgd).model)


def test_the_older_package_takes_it_too() -> None:
    older = pytest.importorskip("pytorch_lightning")

    class Older(Hooks, older.LightningModule):  # type: ignore[misc, name-defined]
        pass

    script = """
import sys
import conftest
import pytorch_lightning
sys.modules["lightning"] = None
from prunetrain_kernels.integrations.lightning import PruneTrainCallback
assert issubclass(PruneTrainCallback, pytorch_lightning.Callback)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    module, callback = Older(), PruneTrainCallback(**OPTIONS)
    trainer_of(callback, kind=older.Trainer, epochs=1).fit(module, data())
    assert len(callback.reports) == 1


DISTRIBUTED = """
import sys
import conftest
import test_lightning as t
module, callback = t.PlainModule(), t.PruneTrainCallback(**t.OPTIONS)
trainer = t.trainer_of(t.Kill(), callback, t.checkpoints(sys.argv[1]), devices=2, strategy="ddp")
trainer.fit(module, t.data())
again = t.PlainModule()
second = t.trainer_of(t.Kill(), t.PruneTrainCallback(**t.OPTIONS), devices=2, strategy="ddp")
second.fit(again, t.data(), ckpt_path=sys.argv[1] + "/epoch=1.ckpt")
assert t.same_tensors(module, again)
t.torch.save(module.net.state_dict(), f"{sys.argv[1]}/rank{trainer.global_rank}.pt")
t.torch.distributed.destroy_process_group()  # otherwise its threads may still run when the process ends
"""


def test_two_processes(tmp_path: Path) -> None:
    """Lightning's DDP: equal, smaller networks on both ranks, and from a checkpoint again."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = tmp_path / "distributed.py"
    script.write_text(DISTRIBUTED)
    done = subprocess.run(
        [*torchrun, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert first["blocks.0.conv1.weight"].shape == (5, 8, 3, 3)
    for name, tensor in first.items():
        if "running" not in name:  # every rank has statistics of its own
            assert torch.equal(tensor, second[name])
