"""Image files: finding them below a folder, and decoding one to pixels."""

from __future__ import annotations

import os
import struct
import zlib
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
Background = Literal["white", "black"]

# What PIL raises for broken files, from an unknown format to a broken chunk.
DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def find_images(root: str) -> list[str]:
    """Paths of all image files below ``root``, relative to it, in an order that depends on the names alone.

    Only regular files with one of ``EXTENSIONS`` (in any case) count; hidden files and folders (``._photo.jpg``) do
    not. A link to a folder is followed if that folder lies elsewhere, and each folder is read once, so that a circle
    of links ends.
    """
    found: list[str] = []
    top = os.path.realpath(root)
    visited = {top}
    folders = [""]
    while folders:
        folder = folders.pop()
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = os.path.join(folder, entry.name)
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    if _is_new_folder(entry, top, visited):
                        folders.append(path)
                elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():  # not a FIFO, not a dangling link
                    found.append(path)
    return sorted(found, key=lambda path: path.split(os.sep))


def _is_new_folder(entry: os.DirEntry[str], top: str, visited: set[str]) -> bool:
    real = os.path.realpath(entry.path)
    if real in visited:
        return False
    if entry.is_symlink() and os.path.commonpath([real, top]) == top:
        return False  # found without the link, under its own name
    visited.add(real)
    return True


def shown(path: str) -> str:
    """``path`` as printable text, also if its name is not UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def decode_image(path: str, image_size: int | None, channels: int = 3, background: Background = "white") -> Tensor:
    """Decode one image file and, if a size is given, bring it to a square.

    It is turned as its EXIF orientation says; the first frame of an animation counts; 16 bits are rescaled to 8 and
    not clipped; what is transparent shows ``background``. Then its shorter side is scaled to ``image_size``
    (bilinear, antialiased) and the centre is kept.

    Args:
        path: Path of the file.
        image_size: Height and width in pixels; None leaves the image as it is.
        channels: 3 for RGB, 1 for grey.
        background: What shows through transparent pixels.

    Returns:
        uint8, ``(C, H, W)``.

    Raises:
        ValueError: If the file cannot be read, or holds values whose range is not known.
    """
    try:
        with Image.open(path) as image:
            image = flatten_alpha(to_8_bit(ImageOps.exif_transpose(image)), background)
            image = image.convert("RGB" if channels == 3 else "L")
            if image_size is not None:
                image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
            pixels = np.array(image).reshape(image.height, image.width, channels)
    except DECODING_ERRORS as error:
        raise ValueError(
            f"decode_image: cannot read {shown(path)} ({type(error).__name__}: {error}). Remove or replace the file."
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def to_8_bit(image: Image.Image) -> Image.Image:
    """Bring grey values of 16 or 32 bits to 8; other images stay as they are.

    Raises:
        ValueError: If a value lies outside the range of its kind.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.float64)
    top = 1.0 if image.mode == "F" else 65535.0
    if not (values.min() >= 0 and values.max() <= top):
        raise ValueError(f"values must lie in [0, {top:g}], got {values.min():g} to {values.max():g}")
    return Image.fromarray((values * (255 / top)).round().astype(np.uint8))


def flatten_alpha(image: Image.Image, background: Background) -> Image.Image:
    """Lay an image that is transparent in places on a ground of one colour."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image)
