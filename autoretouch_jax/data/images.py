"""Image files: what their headers and trailers tell, and how they are decoded. Arrays are uint8 `[H, W, 3]`, RGB."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from autoretouch_jax.errors import BadInput

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
TAIL = 4096  # bytes looked at for a JPEG's end mark: cameras append padding and previews


@dataclass(frozen=True)
class Header:
    """What the first bytes of a file tell."""

    width: int
    height: int
    mode: str


def list_images(folder: Path) -> list[Path]:
    """Every image file below `folder`, sorted; hidden files and folders are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def read_header(path: Path) -> tuple[Header | None, str]:
    """The header and what is wrong with the file ("" when nothing is), without decoding any pixel."""
    try:
        with Image.open(path) as image:
            header = Header(*image.size, image.mode)
            kind = image.format or ""
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return None, f"not a readable image ({error})"
    if header.mode.startswith(("I", "F")):
        return header, f"{header.mode} pixels (more than 8 bits a channel); convert it to 8 bits"
    return header, "" if _ends_well(path, kind) else "cut short (the file's end is missing)"


def _ends_well(path: Path, kind: str) -> bool:
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


def read_rgb(path: Path | BinaryIO, name: str = "") -> np.ndarray:
    """Decode to uint8 `[H, W, 3]`. An alpha channel of 255 everywhere is dropped; raises BadInput for any other, by name.

    An open file has no name of its own: give one.
    """
    name = name or str(path)
    try:
        with Image.open(path) as image:
            image.load()
            has_alpha = "A" in image.getbands() or "transparency" in image.info
            if has_alpha and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
                raise BadInput(f"{name}: has transparent pixels; flatten it onto the background it is meant for")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise BadInput(f"{name}: cannot be decoded ({error}); replace or remove it") from error
