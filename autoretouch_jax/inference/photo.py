"""Reads photographs and writes them back with their format, profile, EXIF and alpha. The only writer of photographs."""

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, JpegImagePlugin

from autoretouch_jax.data.images import decoded, split_alpha
from autoretouch_jax.errors import BadInput
from autoretouch_jax.runtime.storage import replacing

MODES = ("RGB", "RGBA", "L", "LA", "P")  # Pillow's modes of 8 bits a channel; a palette (P) is written back as RGB
ORIENTATION = 0x0112  # EXIF's tag of how a camera was held
CARRIED = ("icc_profile", "exif", "dpi")  # Pillow's names of what is copied from the file read to the file written


@dataclass(frozen=True)
class Photo:
    """Pixels uint8 `[H, W, 3]`, the alpha channel `[H, W]` if there is one, and how to write the file back."""

    pixels: np.ndarray
    alpha: np.ndarray | None
    grey: bool
    format: str
    options: dict[str, Any] = field(default_factory=dict)
    orientation: int = 1
    """EXIF's orientation, 1 to 8; 1 is upright."""

    def upright(self) -> np.ndarray:
        """Returns the pixels as a viewer shows them: a face in a photograph that lies on its side would not be found."""
        pixels = self.pixels.swapaxes(0, 1) if self.orientation >= 5 else self.pixels
        return np.ascontiguousarray(_mirrored(pixels, self.orientation))

    def as_stored(self, upright: np.ndarray) -> np.ndarray:
        """Turns pixels back from `upright` to how the file stores them."""
        pixels = _mirrored(upright, self.orientation)
        return np.ascontiguousarray(pixels.swapaxes(0, 1) if self.orientation >= 5 else pixels)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 where there is none or the EXIF is broken."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except (SyntaxError, ValueError, struct.error):
        return 1
    return orientation if orientation in range(1, 9) else 1


def _mirrored(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The mirroring that is part of an orientation; those from 5 on also exchange rows and columns."""
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return pixels[::rows, ::columns]


def read_photo(path: Path) -> Photo:
    """Decodes an 8-bit photograph. Pixels stay as stored, and an EXIF orientation stays in the EXIF.

    Raises BadInput, naming the file, for any other file.
    """
    with decoded(path) as image:
        if image.mode not in MODES:
            raise BadInput(f"{path}: {image.mode} pixels; convert it to 8-bit RGB first")
        # Only the entries that have a value: Pillow would write an empty profile.
        options = {key: image.info[key] for key in CARRIED if image.info.get(key)}
        kind = image.format or "PNG"
        if isinstance(image, JpegImagePlugin.JpegImageFile) and image.mode == "RGB":
            # With the photograph's own tables, areas that were not retouched are encoded as they were before.
            options |= {"qtables": image.quantization, "subsampling": JpegImagePlugin.get_sampling(image)}
        elif kind == "WEBP":
            options["lossless"] = True  # another lossy encoding would change every pixel
        pixels, alpha = split_alpha(image)
        # MPO is a JPEG with a second picture behind it, which the retouched photograph does not keep.
        orientation = _orientation(image)
        return Photo(pixels, alpha, image.mode in ("L", "LA"), "JPEG" if kind == "MPO" else kind, options, orientation)


def write_photo(path: Path, photo: Photo, pixels: np.ndarray) -> None:
    """Writes `pixels` as `photo` was stored: format, colour profile, EXIF, alpha. The file appears whole or not at all."""
    image = Image.fromarray(pixels)
    # The network returns three channels. A grey photograph is written with their luma.
    if photo.grey:
        image = image.convert("L")
    if photo.alpha is not None:
        image.putalpha(Image.fromarray(photo.alpha))
    with replacing(path) as part:
        image.save(part, format=photo.format, **photo.options)
