"""Reads photographs and writes them back with their format, profile, EXIF and alpha. The only writer of photographs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, JpegImagePlugin

from autoretouch_jax.data import images
from autoretouch_jax.errors import BadInput
from autoretouch_jax.runtime.storage import replacing

MODES = ("RGB", "RGBA", "L", "LA", "P")  # Pillow's modes of 8 bits a channel; a palette (P) is written back as RGB
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
        return images.upright(self.pixels, self.orientation)

    def as_stored(self, upright: np.ndarray) -> np.ndarray:
        """Turns pixels back from `upright` to how the file stores them."""
        return images.as_stored(upright, self.orientation)

    @property
    def profile(self) -> bytes:
        """The ICC profile that describes the pixels. A grey photograph's describes greys, and its pixels are taken for sRGB."""
        return b"" if self.grey else self.options.get("icc_profile", b"")


def read_photo(path: Path) -> Photo:
    """Decodes an 8-bit photograph. Pixels stay as stored, in their own colours, and an EXIF orientation stays in the EXIF.

    Raises BadInput, naming the file, for any other file. CMYK is one of them: writing it back would change every pixel.
    """
    with images.decoded(path) as image:
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
        elif kind == "AVIF":
            options |= {"quality": 100, "subsampling": "4:4:4"}  # Pillow cannot write it without losses; this errs by 2 levels
        pixels, alpha = images.split_alpha(image)
        # MPO is a JPEG with a second picture behind it, which the retouched photograph does not keep.
        orientation = images.orientation_of(image)
        if orientation != 1 and "exif" not in options:  # stated in other metadata, which are not copied
            options["exif"] = image.getexif().tobytes()
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
