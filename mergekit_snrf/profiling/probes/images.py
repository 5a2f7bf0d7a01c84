"""The images of a data set: where they may lie, how large they may be, and their pixels."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_snrf.errors import SnrfError, first_line
from mergekit_snrf.files.reading import read_bytes
from mergekit_snrf.profiling.probes.source import RowError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BYTES = 100_000_000
"""A larger image file is an error."""

MAX_PIXELS = 80_000_000
"""An image of more pixels is an error: it would take gigabytes to decode and millions of tokens to read."""


def image_folders(data: Path | None) -> tuple[Path, ...]:
    """Return the folders that image files may lie in: that of a local data set, else the caches of the hub.

    A data set comes from strangers: its paths must not make the profiler read other files, or devices.
    """
    if data is not None:
        return (data,)
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    return (Path(HF_HUB_CACHE), Path(datasets.config.HF_CACHE_HOME), Path(datasets.config.HF_DATASETS_CACHE))


def read_image(entry: Any, folders: Sequence[Path]) -> bytes:
    """Return the bytes of an image file from what a data set holds: bytes, a path, or both in a mapping.

    Image files must lie in one of the folders; relative paths begin in the first one.
    """
    if isinstance(entry, Mapping):
        entry = entry.get("bytes") if entry.get("bytes") is not None else entry.get("path")
    if isinstance(entry, (bytes, bytearray, memoryview)):
        return bytes(entry)
    if not isinstance(entry, str) or not entry:
        found = f"is {type(entry).__name__}, not a path or bytes" if entry else "is missing"
        raise RowError(None, f"an image {found}")
    # Not resolved: whoever puts a link into the folder of the data wants it to be followed.
    path = Path(os.path.normpath(folders[0] / entry))
    if not any(path.is_relative_to(os.path.normpath(folder.absolute())) for folder in folders):
        raise RowError(None, f"image {entry!r} lies outside the folder of the data set")
    try:
        return read_bytes(path, MAX_BYTES)
    except SnrfError as error:
        raise RowError(None, f"image {entry!r} {error.what}") from None


def decode(content: bytes) -> Image:
    """Return the pixels of an image file: upright by its EXIF orientation, RGB."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        what = "probes with images need the package 'pillow'"
        raise SnrfError(None, what, "pip install 'mergekit-snrf[profile]'") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Damaged files that can be read all the same.
            with Image.open(io.BytesIO(content)) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    size = f"{opened.width} x {opened.height} pixels"
                    raise RowError(None, f"an image of {size} is larger than {MAX_PIXELS // 10**6} megapixels")
                return ImageOps.exif_transpose(opened).convert("RGB")
    except RowError:
        raise
    except Exception as error:  # Plugins raise all kinds of errors on damaged files.
        raise RowError(None, f"an image of {len(content)} bytes cannot be decoded ({first_line(error)})") from None
