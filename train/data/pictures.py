"""One reader for every way in which a picture comes: the same pixels by name, in bytes, in memory or in a stream.

The standard is transformers' `load_image`: upright by EXIF orientation, first frame, RGB, transparency dropped. Where
that would make another picture of one without a word (16 bits clipped to white), it is scaled or refused.
"""

import base64
import binascii
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from skipit.router import InputError
from skipit.router.paths import missing, nearest

_WIDE = ("I;16", "I;16L", "I;16B", "I;16N")


class BesideData(str):
    """A file's name from a data file; one that is not found from here is looked for in that file's folder."""

    folder: Path

    def __new__(cls, name: str, folder: Path) -> "BesideData":
        """The name, with the folder."""
        made = super().__new__(cls, name)
        made.folder = folder
        return made

    def __reduce__(self) -> Any:
        """Keep the folder in copies."""
        return BesideData, (str(self), self.folder)


def read_picture(given: Any) -> Any:
    """A picture as RGB: of a file's name, bytes, a data URL, an image of PIL or `datasets`, or an array of pixels.

    Raises:
        InputError: it cannot be read; the message says why.
    """
    from PIL import Image, ImageOps

    if isinstance(given, Mapping):
        given = given["bytes"] if given.get("bytes") is not None else given.get("path")
    if given is None:
        raise InputError("it is missing (None).")
    if isinstance(given, str | Path):
        given = _data_url(str(given)) if str(given).startswith("data:") else find_file(given)
    if isinstance(given, bytes | bytearray | memoryview):
        if len(given) == 0:
            raise InputError("it is empty (0 bytes).")
        given = io.BytesIO(given)
    try:
        if isinstance(given, Path | io.BytesIO):
            with Image.open(given) as file:
                return _rgb(ImageOps.exif_transpose(file))
        if isinstance(given, Image.Image):
            return _rgb(ImageOps.exif_transpose(given))
    except InputError:
        raise
    except Exception as error:  # a decoder of damaged or hostile bytes fails in any way, a bomb in one of its own
        size = f"{given} has " if isinstance(given, Path) else ""
        empty = isinstance(given, Path) and given.stat().st_size == 0
        raise InputError(f"{size}0 bytes." if empty else f"{error}") from error
    return _of_pixels(np.asarray(given)) if hasattr(given, "__array__") else given


def _rgb(image: Any) -> Any:
    if image.mode in _WIDE:
        # Full scale is white; a conversion would make white of all but the darkest of 256 parts.
        return _of_pixels(np.asarray(image).astype(np.uint16))
    if image.mode in ("I", "F"):
        raise InputError(
            f"its pixels are {'32 bit numbers' if image.mode == 'I' else 'fractions'} (mode {image.mode}), of which "
            "nothing says which is white. Save it with 8 bits per channel."
        )
    return image if image.mode == "RGB" else image.convert("RGB")


def _of_pixels(pixels: Any) -> Any:
    """Whole numbers of 8 or 16 bits, [height, width] or with channels last or first, of which 1, 3 or 4."""
    from PIL import Image

    if pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4) and pixels.shape[0] in (1, 3, 4):
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    fits = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] in (3, 4))
    if not fits or pixels.dtype not in (np.uint8, np.uint16) or pixels.size == 0:
        raise InputError(
            f"an array {list(pixels.shape)} of {pixels.dtype}; expected uint8 or uint16, [height, width] or "
            "[height, width, channels] with 1, 3 or 4 channels."
        )
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")


def _data_url(text: str) -> bytes:
    head, _, body = text.partition(",")
    try:
        return base64.b64decode(body if head.endswith(";base64") else "?", validate=True)
    except binascii.Error as error:
        raise InputError(f"a data URL of {len(text)} characters is not base64: {error}") from error


def find_file(name: str | Path) -> Path:
    """The file of a name: from here, or else beside the data that names it.

    Raises:
        InputError: there is none; the message says where it was looked for, and what is there.
    """
    text = str(name)
    if "://" in text[:20] and not text.startswith("file://"):
        raise InputError(f"{_short(text)} is a URL, and only files are read. Download it, and give the file's name.")
    text = text.removeprefix("file://")
    folder = getattr(name, "folder", None)
    tried = [Path(text), *([folder / text] if folder is not None and not Path(text).is_absolute() else [])]
    for path in tried:
        if _is_file(path):
            return path
    there = [path for path in tried if not missing(path)]
    if there:
        raise InputError(f"{_short(str(there[0]))} is no file.")
    both = " nor ".join(_short(str(path)) for path in tried)
    raise InputError(f"No such file: {'neither ' if len(tried) > 1 else ''}{both}.{nearest(tried[-1])}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()  # not a pipe or a device, which would be waited for
    except (OSError, ValueError):  # a name that is too long, or holds a null
        return False


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:80]} ... {text[-80:]} ({len(text)} characters)"
