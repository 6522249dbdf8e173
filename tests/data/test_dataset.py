"""Augmentation, order and subsets: against a loop over images, and for what they may depend on."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from prunetrain_kernels.data import ImageData, balanced_subset, batch, epoch_order, normalize_and_augment
from prunetrain_kernels.data.dataset import channel_statistics, stratified_split
from prunetrain_kernels.errors import InputError


def make_data(n: int = 40, shape: tuple[int, int, int] = (3, 6, 9), **changes: object) -> ImageData:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, *shape), generator=generator, dtype=torch.uint8)
    labels = torch.arange(n) % 4
    data = ImageData(
        name="noise",
        train_images=images,
        train_labels=labels,
        val_images=images[:10].flip(0),
        val_labels=labels[:10].flip(0),
        classes=4,
        class_names=("a", "b", "c", "d"),
        mean=(0.4, 0.5, 0.6)[: shape[0]],
        std=(0.2, 0.25, 0.3)[: shape[0]],
        padding=2,
        flip=True,
    )
    return dataclasses.replace(data, **changes)  # type: ignore[arg-type]


def normalised(images: np.ndarray, data: ImageData) -> np.ndarray:
    mean, std = (np.array(v).reshape(-1, 1, 1) for v in (data.mean, data.std))
    return (images / 255.0 - mean) / std


def find_window(image: np.ndarray, result: np.ndarray, data: ImageData) -> tuple[int, int, bool]:
    """The one place and orientation at which `result` was cut from `image`, by trying them all."""
    p = data.padding
    padded = normalised(np.pad(image, ((0, 0), (p, p), (p, p))), data)
    height, width = result.shape[1:]
    windows = [
        (top, left, flipped)
        for top in range(padded.shape[1] - height + 1)
        for left in range(padded.shape[2] - width + 1)
        for flipped, cut in ((False, result), (True, result[..., ::-1]))
        if np.allclose(padded[:, top : top + height, left : left + width], cut, atol=1e-5)
    ]
    assert len(windows) == 1
    return windows[0]


@pytest.mark.parametrize("crop", [None, 5])
def test_training_images_are_windows_of_the_padded_image_at_every_offset(crop: int | None) -> None:
    data = make_data(n=256, crop=crop)
    result = normalize_and_augment(data.train_images, data, torch.Generator().manual_seed(3), train=True)
    assert result.dtype == torch.float32
    assert tuple(result.shape[1:]) == data.image_shape
    places = [
        find_window(image, cut, data)
        for image, cut in zip(data.train_images.numpy(), result.double().numpy(), strict=True)
    ]
    height, width = data.image_shape[1:]
    assert {top for top, _, _ in places} == set(range(6 + 4 - height + 1))
    assert {left for _, left, _ in places} == set(range(9 + 4 - width + 1))
    assert 90 < sum(flipped for _, _, flipped in places) < 166  # 128 of 256; five standard deviations wide
    assert len({(top, left, flipped) for top, left, flipped in places}) > 40  # drawn apart, not one from another


def test_no_flip_and_no_padding_leave_the_image_alone() -> None:
    data = make_data(flip=False, padding=0)
    result = normalize_and_augment(data.train_images, data, None, train=True)
    np.testing.assert_allclose(result, normalised(data.train_images.numpy(), data), atol=1e-5)


def test_validation_images_are_only_normalised() -> None:
    data = make_data()
    result = normalize_and_augment(data.val_images, data, None, train=False)
    np.testing.assert_allclose(result, normalised(data.val_images.numpy(), data), atol=1e-5)


def test_validation_images_are_cut_from_the_centre() -> None:
    data = make_data(shape=(1, 8, 8), crop=4)
    result = normalize_and_augment(data.val_images, data, None, train=False)
    np.testing.assert_allclose(result, normalised(data.val_images[:, :, 2:6, 2:6].numpy(), data), atol=1e-5)


def test_the_border_is_black() -> None:
    data = make_data(n=1, shape=(1, 4, 4), padding=50, crop=4, flip=False)
    results = [normalize_and_augment(data.train_images, data, None, train=True) for _ in range(40)]
    assert any(torch.allclose(r, torch.full_like(r, -0.4 / 0.2)) for r in results)


@pytest.mark.parametrize("change", [{"seed": 3}, {"epoch": 3}, {"step": 3}, {"seed": 2, "epoch": 1}])
def test_augmentation_depends_on_seed_epoch_and_step_and_nothing_else(change: dict[str, int]) -> None:
    data, rows = make_data(), torch.arange(20)
    at = {"seed": 1, "epoch": 2, "step": 0}
    first, labels = batch(data, rows, **at, device="cpu", train=True)
    torch.rand(7)  # the global generator moves on, as it does between a run and its continuation
    again, _ = batch(data, rows, **at, device="cpu", train=True)
    other, _ = batch(data, rows, **{**at, **change}, device="cpu", train=True)
    assert torch.equal(first, again)
    assert torch.equal(labels, data.train_labels[rows])
    assert not torch.equal(first, other)


def test_a_batch_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    batch(make_data(), torch.arange(5), seed=0, epoch=0, step=0, device="cpu", train=True)
    epoch_order(10, 0, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_validation_batches_come_from_the_validation_split() -> None:
    data, rows = make_data(), torch.tensor([7, 2])
    images, labels = batch(data, rows, seed=0, epoch=0, step=0, device="cpu", train=False)
    assert torch.equal(labels, data.val_labels[rows])
    np.testing.assert_allclose(images, normalised(data.val_images[rows].numpy(), data), atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_sees_the_same_batches() -> None:
    data, rows, at = make_data(), torch.arange(20), {"seed": 5, "epoch": 2, "step": 9}
    expected, labels = batch(data, rows, **at, device="cpu", train=True)
    for held in (data, data.to("cuda")):
        images, there = batch(held, rows, **at, device="cuda", train=True)
        assert images.is_cuda
        torch.testing.assert_close(images.cpu(), expected)
        assert torch.equal(there.cpu(), labels)


def test_epoch_order_is_a_permutation_of_seed_and_epoch() -> None:
    order = epoch_order(100, seed=0, epoch=1)
    assert order.dtype == torch.int64
    assert order.sort().values.tolist() == list(range(100))
    assert torch.equal(order, epoch_order(100, seed=0, epoch=1))
    assert not torch.equal(order, epoch_order(100, seed=1, epoch=0))  # neighbours in seed + epoch are not the same
    assert not torch.equal(order, epoch_order(100, seed=0, epoch=2))
    assert len(epoch_order(3, seed=-7, epoch=0)) == 3


def test_subset_takes_the_same_number_of_every_class() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 40)
    rows = balanced_subset(labels, 30, seed=0)
    assert labels[rows].bincount().tolist() == [10, 10, 10]
    assert torch.equal(rows, rows.unique())  # ascending, and none twice
    assert torch.equal(rows, balanced_subset(labels, 30, seed=0))
    assert not torch.equal(rows, balanced_subset(labels, 30, seed=1))
    assert set(balanced_subset(labels, 12, seed=0).tolist()) < set(rows.tolist())


def test_subset_fills_up_from_other_classes_when_one_is_empty() -> None:
    labels = torch.tensor([0] * 50 + [3] * 2 + [4] * 50)
    assert labels[balanced_subset(labels, 20, seed=0)].bincount().tolist() == [9, 0, 0, 2, 9]
    uneven = {tuple(labels[balanced_subset(labels, 3, seed=s)].tolist()) for s in range(5)}
    assert uneven == {(0, 3, 4)}
    assert len({tuple(labels[balanced_subset(labels, 1, seed=s)].tolist()) for s in range(20)}) == 3  # favours none


def test_subset_of_everything_is_everything() -> None:
    labels = torch.tensor([0, 1, 0])
    for limit in (None, 3, 99):
        assert balanced_subset(labels, limit, seed=0).tolist() == [0, 1, 2]
    with pytest.raises(InputError, match="at least 1, not 0"):
        balanced_subset(labels, 0, seed=0)


def test_stratified_split_holds_out_one_in_every_of_each_class() -> None:
    labels = torch.tensor([0] * 100 + [1] * 53)[torch.randperm(153)]
    train, val = stratified_split(labels, every=10, seed=0)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(153))
    assert labels[val].bincount().tolist() == [10, 5]
    assert all(len(part) == 1 for part in stratified_split(torch.tensor([0, 0]), every=10, seed=0))


def test_statistics_are_those_of_numpy() -> None:
    images = make_data(n=37).train_images
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, images.numpy().mean((0, 2, 3)) / 255, rtol=1e-12)
    np.testing.assert_allclose(std, images.numpy().std((0, 2, 3)) / 255, rtol=1e-12)


def test_a_constant_channel_can_be_normalised() -> None:
    images = torch.full((4, 1, 3, 3), 7, dtype=torch.uint8)
    mean, std = channel_statistics(images)
    data = make_data(shape=(1, 3, 3), mean=mean, std=std)
    assert normalize_and_augment(images, data, None, train=False).abs().max() < 1e-4


def test_statistics_of_many_images_use_a_sample_from_all_over(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.zeros(1000, 1, 4, 4, dtype=torch.uint8)
    images[500:] = 255
    monkeypatch.setattr("prunetrain_kernels.data.dataset._STATISTICS_BYTES", 100 * 16)
    mean, std = channel_statistics(images)
    assert mean == pytest.approx((0.5,))
    assert std == pytest.approx((0.5,))


@pytest.mark.parametrize(("changes", "message"), [({"crop": 7}, "crop 7 does not fit"), ({"padding": -1}, "padding")])
def test_impossible_crops_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_data(**changes)
