"""Lists, checks and decodes image files. Arrays are uint8 `[H, W, 3]`, RGB."""

import contextlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from autoretouch_jax.errors import BadInput

# By their ending, and not by content: opening every file of a data set takes minutes.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
TAIL = 4096  # last bytes of a file, in which its end mark is looked for: cameras append padding and previews
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for files it cannot read


@dataclass(frozen=True)
class Header:
    """The size and mode that the first bytes of a file state. Sizes are pixels; `mode` is Pillow's."""

    width: int
    height: int
    mode: str


def list_images(folder: Path) -> list[Path]:
    """Returns every image file below `folder`, sorted. Hidden files and folders are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def read_header(path: Path) -> tuple[Header | None, str]:
    """Returns the header, and what is wrong with the file ("" when nothing is), without decoding a pixel."""
    try:
        with Image.open(path) as image:
            header = Header(*image.size, image.mode)
            kind = image.format or ""
    except UNREADABLE as error:
        return None, f"not a readable image ({error})"
    # Converting such files to 8 bits silently would lose the precision that they were made for.
    if header.mode.startswith(("I", "F")):
        return header, f"{header.mode} pixels (more than 8 bits a channel); convert it to 8 bits"
    return header, "" if _ends_well(path, kind) else "cut short (the file's end is missing)"


def _ends_well(path: Path, kind: str) -> bool:
    """Whether the file has the end mark or the length of its format. A download that was cut short has an intact header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if kind == "WEBP":
            return size >= struct.unpack("<I", file.read(8)[4:])[0] + 8
        file.seek(max(0, size - TAIL))
        tail = file.read()
    if kind == "PNG":
        return b"IEND\xaeB`\x82" in tail
    if kind in ("JPEG", "MPO"):
        return b"\xff\xd9" in tail
    return True


@contextlib.contextmanager
def decoded(path: Path | BinaryIO, name: str = "") -> Iterator[Image.Image]:
    """Opens an image and decodes its pixels. An open file has no name of its own: give one for the messages.

    Raises BadInput, naming the image, when it cannot be decoded.
    """
    name = name or str(path)
    try:
        with Image.open(path) as image:
            image.load()
            yield image
    except UNREADABLE as error:
        raise BadInput(f"{name}: cannot be decoded ({error}); replace or remove it") from error


def split_alpha(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns a decoded image as RGB, uint8 `[H, W, 3]`, and its alpha channel, uint8 `[H, W]`, or None without one."""
    has_alpha = "A" in image.getbands() or "transparency" in image.info
    alpha = np.asarray(image.convert("RGBA").getchannel("A")) if has_alpha else None
    # Pillow drops the alpha channel in this conversion, and does not blend.
    return np.asarray(image.convert("RGB")), alpha


def read_rgb(path: Path | BinaryIO, name: str = "") -> np.ndarray:
    """Decodes an image to uint8 `[H, W, 3]`. An alpha channel of 255 everywhere is dropped.

    Raises BadInput, naming it, for a file that cannot be decoded or that has transparent pixels. `name` as in `decoded`.
    """
    with decoded(path, name) as image:
        pixels, alpha = split_alpha(image)
    if alpha is not None and (alpha != 255).any():
        raise BadInput(f"{name or path}: has transparent pixels; flatten it onto the background it is meant for")
    return pixels
