"""Smaller PNG files: a figure has few colours, so a palette holds it in a third of the bytes.

    python -m plots.shrink docs/cifar10-cpu/*.png

rewrites files that other programs drew, `prunetrain report` for one; `python -m plots` does it to its own figures.
"""

import io
import sys
from collections.abc import Sequence
from pathlib import Path

from prunetrain_kernels.errors import InputError
from prunetrain_kernels.files import reason, write_atomically

COLOURS = 256  # chosen for coverage, so that the rare colours of a heat map's ends stay: off by 6 of 255 at most


def palette(png: bytes) -> bytes:
    """The image with at most COLOURS colours, its resolution and no other metadata.

    The bytes come back as they were where a palette makes them no fewer.

    Raises:
        InputError: Pillow is missing, or the bytes are no image.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise InputError(f"smaller figures need Pillow ({error}): pip install 'prunetrain-kernels[demo]'") from error
    try:
        image = Image.open(io.BytesIO(png)).convert("RGB")
    except UnidentifiedImageError as error:
        raise InputError("this is no image that Pillow can read") from error
    resolution = {"dpi": image.info["dpi"]} if "dpi" in image.info else {}
    data = io.BytesIO()
    few = image.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(data, "png", optimize=True, **resolution)
    return min(png, data.getvalue(), key=len)


def main(names: Sequence[str]) -> int:
    """Rewrites the named files; returns the exit code: 0, or 2 where one cannot be read or written."""
    if not names:
        print(__doc__)
        return 2
    for name in names:
        path = Path(name)
        try:
            before = path.read_bytes()
            after = palette(before)
            if len(after) < len(before):
                write_atomically(path, after)
        except (OSError, InputError) as error:
            what = reason(error) if isinstance(error, OSError) else error
            print(f"plots.shrink: error: {path}: {what}", file=sys.stderr)
            return 2
        print(f"{path}: {len(before):,} -> {len(after):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
