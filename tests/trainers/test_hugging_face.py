"""The Trainer of transformers, by the callback of docs/integrations.md: a model shrinks, is saved, and is loaded."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prunetrain_kernels import PruneTrain, apply_shape, pruned_shape

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # which the Trainer needs


class Images(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(1)
        self.images = torch.randn(16, 3, 16, 16, generator=draw)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[number], "labels": torch.tensor(number % 4)}


class Shrinking(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """The callback of docs/integrations.md; at the end of an epoch one channel more is dead."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        example = {"pixel_values": torch.randn(2, 3, 16, 16)}
        self.prunetrain = PruneTrain(model, optimizer, example, interval=1)
        self.prunetrain.attach(first_loss=math.log(model.config.num_labels))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        layers = [m for m in model.resnet.encoder.stages[1].modules() if isinstance(m, torch.nn.Conv2d)]
        first, second = layers[1:3]  # behind the shortcut: the two of the block's branch
        with torch.no_grad():
            first.weight[0] = 0
            second.weight[:, 0] = 0
        self.prunetrain.epoch_end()
        model.config.pruned_shape = pruned_shape(model)


def build(config: Any = None) -> Any:
    config = config or transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 8, 8], depths=[1, 1, 1, 1], layer_type="basic", num_labels=4
    )
    return transformers.ResNetForImageClassification(config)


def test_the_trainer_shrinks_a_model_that_is_loaded_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, num_train_epochs=2, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, max_grad_norm=0.1, learning_rate=1e-3, report_to="none", save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    model, callback = build(), Shrinking()
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Images(), callbacks=[callback])
    trainer.train()
    assert len(callback.prunetrain.history) == 2
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters()} == held
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in build().parameters())

    model.eval().save_pretrained(tmp_path / "saved")
    config = transformers.ResNetConfig.from_pretrained(tmp_path / "saved")
    again = build(config).eval()
    apply_shape(again, config.pruned_shape)
    again.load_state_dict(transformers.modeling_utils.load_state_dict(tmp_path / "saved" / "model.safetensors"))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again(images).logits, model(images).logits)
