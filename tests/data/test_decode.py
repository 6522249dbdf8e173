"""The cache of decoded images: used again, never trusted blindly, never half written."""

from __future__ import annotations

import io
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prunetrain_kernels.data import decode
from prunetrain_kernels.data.decode import Encoded, decode_cached, default_cache, in_groups
from prunetrain_kernels.errors import InputError

SHAPE = (5, 7)


def png(pixels: np.ndarray, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


class Pictures:
    """Some PNGs, and how often they were asked for."""

    def __init__(self, count: int = 6, shape: tuple[int, int] = SHAPE) -> None:
        self.pixels = np.random.default_rng(0).integers(0, 256, (count, *shape, 3), dtype=np.uint8)
        self.items = [Encoded(f"picture {i}", png(p)) for i, p in enumerate(self.pixels)]
        self.asked = 0

    def groups(self) -> Iterator[list[Encoded]]:
        for group in in_groups(self.items, 4):
            self.asked += len(group)
            yield group

    def decode(self, cache: Path, image_size: int | None = SHAPE[0], key: object = "k") -> torch.Tensor:
        return decode_cached(self.groups, len(self.items), image_size, cache=cache, label="a/b", key=key)


def crop(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels[:, :, 1:6].transpose(0, 3, 1, 2).copy())  # 5x7: the centre square is 5x5


def test_png_pixels_survive_and_the_cache_is_used_again(tmp_path: Path) -> None:
    pictures = Pictures()
    assert torch.equal(pictures.decode(tmp_path), crop(pictures.pixels))
    assert pictures.asked == 6
    assert torch.equal(pictures.decode(tmp_path), crop(pictures.pixels))
    assert pictures.asked == 6
    pictures.decode(tmp_path, key="another")
    assert pictures.asked == 12
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    np.testing.assert_array_equal(np.load(files[0]), crop(pictures.pixels))  # any numpy program can read it


def test_images_of_one_size_are_kept_as_they_are(tmp_path: Path) -> None:
    pictures = Pictures()
    images = pictures.decode(tmp_path, image_size=None)
    assert torch.equal(images, torch.from_numpy(pictures.pixels.transpose(0, 3, 1, 2).copy()))


def test_writing_to_the_result_does_not_change_the_cache(tmp_path: Path) -> None:
    pictures = Pictures()
    pictures.decode(tmp_path).zero_()
    assert torch.equal(pictures.decode(tmp_path), crop(pictures.pixels))
    assert pictures.asked == 6  # the file was still good, not mended


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-1],
        lambda b: b[: len(b) // 2],
        lambda b: b"",
        lambda b: b + b"x",
        lambda b: b[:200] + bytes([b[200] ^ 1]) + b[201:],  # one bit of one pixel
        lambda b: b[:-4] + b"\0\0\0\0",
        lambda b: b"garbage!" + b[8:],
        lambda b: bytes(len(b)),
    ],
)
def test_a_damaged_cache_is_rebuilt(tmp_path: Path, damage: object) -> None:
    pictures = Pictures()
    pictures.decode(tmp_path)
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    file.write_bytes(damage(good))  # type: ignore[operator]
    assert torch.equal(pictures.decode(tmp_path), crop(pictures.pixels))
    assert pictures.asked == 12
    assert [f.read_bytes() for f in tmp_path.iterdir()] == [good]


def test_a_large_cache_is_checked_by_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_CHECKED_BLOCK", 16)
    monkeypatch.setattr(decode, "_CHECKED_BLOCKS", 20)
    pictures = Pictures(count=4)
    pictures.decode(tmp_path)
    assert torch.equal(pictures.decode(tmp_path), crop(pictures.pixels))
    assert pictures.asked == 4
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:128] + bytes(len(content) - 132) + content[-4:])  # pages that never reached the disk
    assert torch.equal(pictures.decode(tmp_path), crop(pictures.pixels))


def test_resizing_is_shorter_side_then_centre_crop(tmp_path: Path) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (20, 60, 3), dtype=np.uint8)
    pictures = Pictures(count=1)
    pictures.items = [Encoded("wide", png(pixels)), Encoded("tall", png(pixels.transpose(1, 0, 2)))]
    whole = np.asarray(Image.fromarray(pixels).resize((30, 10), Image.Resampling.BILINEAR)).astype(int)
    expected = torch.from_numpy(whole[:, 10:20].transpose(2, 0, 1).copy())
    images = pictures.decode(tmp_path, image_size=10)
    assert images.shape == (2, 3, 10, 10)
    assert (images[0] - expected).abs().max() <= 1
    assert (images[1] - expected.transpose(1, 2)).abs().max() <= 1
    assert pictures.decode(tmp_path, image_size=40).shape == (2, 3, 40, 40)  # small ones are enlarged


def test_large_images_are_decoded_in_order_by_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_SMALL", 0)
    pictures = Pictures(count=50)
    assert torch.equal(pictures.decode(tmp_path), crop(pictures.pixels))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(np.full((4, 4, 3), 255, np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    pictures = Pictures(count=1)
    pictures.items = [Encoded("white", buffer.getvalue())]
    assert torch.equal(pictures.decode(tmp_path, None), torch.full((1, 3, 4, 4), 255, dtype=torch.uint8))


JPEG = png(np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8), "JPEG")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (JPEG[: len(JPEG) // 2], "bad one is a damaged image"),
        (png(np.zeros((40, 40, 3), np.uint8))[:60], "bad one is a damaged image"),
        (b"hello", "bad one is not an image"),
        (b"", "bad one is not an image"),
        (png(np.zeros((4, 4), np.uint16)), "bad one has more than 8 bits per pixel"),
        (png(np.zeros((6, 7, 3), np.uint8)), "bad one is 6x7, but the first image is 5x7; give --image-size"),
    ],
)
def test_a_bad_image_is_named_and_nothing_is_left_behind(tmp_path: Path, content: bytes, message: str) -> None:
    pictures = Pictures()
    pictures.items[4] = Encoded("bad one", content)
    with pytest.raises(InputError, match=message):
        pictures.decode(tmp_path, image_size=None)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    pictures = Pictures(count=1)
    pictures.items = [Encoded("gone.png", tmp_path / "gone.png")]
    with pytest.raises(InputError, match=r"gone.png cannot be read \(No such file"):
        pictures.decode(tmp_path)


def test_a_disk_that_fills_up_while_writing(tmp_path: Path) -> None:
    pictures = Pictures(count=40)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError, match=r"cannot be written into .*cache.* --cache"):
            pictures.decode(tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "cache").iterdir()) == []
    assert torch.equal(pictures.decode(tmp_path / "cache"), crop(pictures.pixels))


def test_a_full_disk_is_noticed_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = Pictures()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 100, 100))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"No space left on device.*--cache"):
        pictures.decode(tmp_path)
    assert pictures.asked == 0


def test_a_cache_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written into .*file.*--cache"):
        Pictures().decode(tmp_path / "file")


def test_default_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache() == Path("/somewhere/prunetrain_kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_cache() == Path("/home/someone/.cache/prunetrain_kernels")


def test_a_missing_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(InputError, match=r"needs PIL.*pip install 'prunetrain-kernels\[data\]'"):
        Pictures.decode(SAVED, tmp_path)


SAVED = Pictures(count=1)  # made while Pillow can be imported


def test_the_progress_bar_stays_silent_for_short_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Pictures().decode(tmp_path)
    assert capsys.readouterr().err == ""


def test_the_file_is_written_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        (aside,) = tmp_path.iterdir()
        assert aside.suffix == ".tmp"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Pictures().decode(tmp_path)
    assert list(tmp_path.iterdir()) == []
