"""Photographs as files: read with everything that belongs to them, written back with it. The only writer of photos."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, JpegImagePlugin

from autoretouch_jax.errors import BadInput

MODES = ("RGB", "RGBA", "L", "LA", "P")
CARRIED = ("icc_profile", "exif", "dpi")  # what Pillow can hand from the read file to the written one


@dataclass(frozen=True)
class Photo:
    """Pixels uint8 `[H, W, 3]`, the alpha channel `[H, W]` if there is one, and how to write the file back."""

    pixels: np.ndarray
    alpha: np.ndarray | None
    grey: bool
    format: str
    options: dict[str, Any] = field(default_factory=dict)


def read_photo(path: Path) -> Photo:
    """Decode an 8-bit photo. Pixels stay as stored; an EXIF orientation stays in the EXIF. Raises BadInput, naming the file."""
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode not in MODES:
                raise BadInput(f"{path}: {image.mode} pixels; convert it to 8-bit RGB first")
            options = {key: image.info[key] for key in CARRIED if image.info.get(key)}
            kind = image.format or "PNG"
            if isinstance(image, JpegImagePlugin.JpegImageFile) and image.mode == "RGB":
                # The original's own tables: what was not retouched is encoded as it was before.
                options |= {"qtables": image.quantization, "subsampling": JpegImagePlugin.get_sampling(image)}
            elif kind == "WEBP":
                options["lossless"] = True
            grey = image.mode in ("L", "LA")
            has_alpha = "A" in image.getbands() or "transparency" in image.info
            alpha = np.asarray(image.convert("RGBA").getchannel("A")) if has_alpha else None
            return Photo(np.asarray(image.convert("RGB")), alpha, grey, "JPEG" if kind == "MPO" else kind, options)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"{path}: cannot be decoded ({error})") from error


def write_photo(path: Path, photo: Photo, pixels: np.ndarray) -> None:
    """Write `pixels` as `photo` was stored: format, colour profile, EXIF, alpha. The file appears whole or not at all."""
    image = Image.fromarray(pixels)
    if photo.grey:
        image = image.convert("L")
    if photo.alpha is not None:
        image.putalpha(Image.fromarray(photo.alpha))
    part = path.with_name(path.name + ".part")
    try:
        image.save(part, format=photo.format, **photo.options)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
