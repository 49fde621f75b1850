"""Lists, checks and decodes image files. Arrays are uint8 `[H, W, 3]`, RGB.

There is one decoder for training, audit, data sets, evaluation and retouching. Images are upright and in sRGB, except for
retouching, which keeps the photograph as it is stored (`decoded`).
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features

from autoretouch_jax.data.colour import in_mode, srgb
from autoretouch_jax.data.containers import bits_per_channel, is_whole, tail
from autoretouch_jax.errors import BadInput, first_line

AVIF = "avif" in features.modules and bool(features.check_module("avif"))  # Pillow reads it from 11.3 on
# By their ending, and not by content: opening every file of a data set takes minutes.
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".bmp", *((".avif",) if AVIF else ()))
# Only these of Pillow's formats: of these it is known how they state their depth, orientation and end.
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", *(("AVIF",) if AVIF else ()))
MAX_PIXELS = 250_000_000  # telephones make photographs of 201 million pixels, which take 0.8 GB decoded
# Pillow's own limit is lower. It stays at least as high as a program has set it that uses this package.
if Image.MAX_IMAGE_PIXELS is not None:
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, MAX_PIXELS)
FIRST_TURNED = 5  # EXIF's orientations from this one on exchange rows and columns
# Metadata of a PNG that may state an orientation.
LATE_METADATA = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")


@dataclass(frozen=True)
class Header:
    """The size and mode that the first bytes of a file state. Sizes are pixels of the upright image; `mode` is Pillow's."""

    width: int
    height: int
    mode: str


def list_images(folder: Path) -> list[Path]:
    """Returns every image file below `folder`, sorted. Hidden files and folders are left out, links are followed."""
    return sorted(Path(path) for path in _files_below(str(folder), frozenset()) if Path(path).suffix.lower() in SUFFIXES)


def endings(folder: Path) -> list[str]:
    """Returns the endings of all files below `folder`, sorted: it says what is there where no image is."""
    return sorted({Path(path).suffix.lower() for path in _files_below(str(folder), frozenset())} - {""})


def _files_below(folder: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Every file that is not hidden. `above` identifies the folders that were entered to get here."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link leads back to a folder above it
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            # `os.path.isdir` is also right for a link to itself, which remains in the list as a file that cannot be read.
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                yield from _files_below(entry.path, above | {here})
            else:
                yield entry.path


def read_header(path: Path | BinaryIO) -> tuple[Header | None, str]:
    """Returns the header, and what is wrong with the file ("" when nothing is), without decoding a pixel."""
    try:
        with _opened(path) as file, Image.open(file, formats=FORMATS) as image:
            fault = _fault(image, file)
            if not fault:
                read_late_metadata(image, file)
            turned = orientation_of(image) >= FIRST_TURNED
            header = Header(*(image.size[::-1] if turned else image.size), image.mode)
            return header, fault or ("" if is_whole(image, file) else "cut short (the file's end is missing)")
    except Exception as error:  # each of Pillow's decoders has its own exceptions, and a damaged file may cause any of them
        return None, f"not a readable image ({_reason(error)})"


def _opened(path: Path | BinaryIO) -> contextlib.AbstractContextManager[BinaryIO]:
    return path.open("rb") if isinstance(path, Path) else contextlib.nullcontext(path)


def read_late_metadata(image: Image.Image, file: BinaryIO) -> None:
    """Reads metadata that follow the pixels of an opened PNG, so that `orientation_of` knows them."""
    # Pillow reads metadata that follow the pixels of a PNG together with them. Few files have such metadata.
    if image.format == "PNG" and any(name in tail(file) for name in LATE_METADATA):
        image.load()


def _fault(image: Image.Image, file: BinaryIO) -> str:
    """What speaks against decoding an opened image, "" if nothing does."""
    if image.width * image.height > MAX_PIXELS:
        return f"{image.width}×{image.height} pixels, more than the {MAX_PIXELS // 10**6} million that are read; scale it down"
    # Converting such files to 8 bits silently would lose the precision that they were made for.
    if image.mode.startswith(("I", "F")) or bits_per_channel(image, file) > 8:
        return "more than 8 bits a channel; convert it to 8 bits"
    return ""


def _reason(error: Exception) -> str:
    # Pillow's own message shows the file object.
    kinds = f"damaged, or of a kind that is not read; {' '.join(FORMATS)} are"
    return kinds if isinstance(error, UnidentifiedImageError) else first_line(error)


@contextlib.contextmanager
def decoded(path: Path | BinaryIO, name: str = "") -> Iterator[Image.Image]:
    """Opens an image and decodes its pixels, as they are stored.

    An open file has no name of its own: `name` is for the messages. Raises BadInput, naming the image, when it cannot be
    decoded, has more than 8 bits a channel or too many pixels.
    """
    name = name or str(path)
    with contextlib.ExitStack() as files:
        try:
            file = files.enter_context(_opened(path))
            image = files.enter_context(Image.open(file, formats=FORMATS))
            if not (fault := _fault(image, file)):
                image.load()
        except Exception as error:  # as in `read_header`
            raise BadInput(f"{name}: cannot be decoded ({_reason(error)}); replace or remove it") from error
        if fault:
            raise BadInput(f"{name}: {fault}")
        yield image


def split_alpha(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns a decoded image as RGB, uint8 `[H, W, 3]`, and its alpha channel, uint8 `[H, W]`, or None without one."""
    # Pillow drops the alpha channel in this conversion, and does not blend.
    return np.asarray(in_mode(image, "RGB")), _alpha(image)


def _alpha(image: Image.Image) -> np.ndarray | None:
    has_alpha = "A" in image.getbands() or "transparency" in image.info
    return np.asarray(image.convert("RGBA").getchannel("A")) if has_alpha else None


def read_rgb(path: Path | BinaryIO, name: str = "") -> np.ndarray:
    """Decodes an image to uint8 `[H, W, 3]`, upright and in sRGB. An alpha channel of 255 everywhere is dropped.

    Raises BadInput, naming it, for a file that cannot be decoded or that has transparent pixels. `name` as in `decoded`.
    """
    with decoded(path, name) as image:
        pixels, alpha, orientation = np.asarray(srgb(image)), _alpha(image), orientation_of(image)
    if alpha is not None and (alpha != 255).any():
        raise BadInput(f"{name or path}: has transparent pixels; flatten it onto the background it is meant for")
    return upright(pixels, orientation)


def is_plain(file: BinaryIO) -> bool:
    """Whether an open image file, one that `read_rgb` can read, stores its pixels upright and in sRGB."""
    with Image.open(file, formats=FORMATS) as image:
        read_late_metadata(image, file)
        return orientation_of(image) == 1 and srgb(image) is image


# ---- EXIF's orientation -----------------------------------------------------------------------------------------------------


def orientation_of(image: Image.Image) -> int:
    """Returns how an opened image is turned, from 1 (upright) to 8; 1 where its metadata are broken."""
    if image.format == "TIFF":  # Pillow turns these itself
        return 1
    try:
        # Not `image.getexif`: that of a PNG without EXIF decodes the pixels, because EXIF might follow them.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF may cause any exception, and the pixels are sound
        return 1
    return orientation if orientation in range(1, 9) else 1


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns pixels as they are stored, `[h, w, …]`, to how a viewer shows them, `[H, W, …]`."""
    return np.ascontiguousarray(upright_view(pixels, orientation))


def upright_view(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Returns what `upright` does, without a copy: what is written to it is written to the pixels."""
    return _mirrored(pixels.swapaxes(0, 1) if orientation >= FIRST_TURNED else pixels, orientation)


def as_stored(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns upright pixels back to how they are stored."""
    pixels = _mirrored(pixels, orientation)
    return np.ascontiguousarray(pixels.swapaxes(0, 1) if orientation >= FIRST_TURNED else pixels)


def _mirrored(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The mirroring that is part of an orientation."""
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return pixels[::rows, ::columns]
