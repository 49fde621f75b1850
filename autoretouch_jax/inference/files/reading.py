"""Reads photographs: any format, depth, colour space and orientation, as they are stored."""

import contextlib
import io
import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, JpegImagePlugin, UnidentifiedImageError

from autoretouch_jax.data import images, libvips
from autoretouch_jax.data.colour import adobe_rgb_profile, in_mode
from autoretouch_jax.data.containers import bits_per_channel
from autoretouch_jax.data.spaces import Space
from autoretouch_jax.errors import BadInput, first_line
from autoretouch_jax.inference.files import exif, tiff, unsupported

# Endings of photographs. HEIC needs a package of its own (extra `heic`), which is asked for when such a file is read.
SUFFIXES = tuple(dict.fromkeys((*images.SUFFIXES, ".avif", ".heic", ".heif", ".hif")))
BAND = 256  # rows that are converted at a time: a photograph of 100 megapixels must not be in memory in every form at once


@dataclass(frozen=True, eq=False)
class Photo:
    """Pixels uint8 or uint16 `[H, W, C]` as the file stores them: colours in their own space, then alpha if there is one."""

    pixels: np.ndarray
    format: str
    """Pillow's name."""
    space: Space
    data: bytes = field(default=b"", repr=False)
    """The file."""
    orientation: int = 1
    """EXIF's orientation, 1 to 8; 1 is upright."""
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    """What its encoder needs to know: Pillow's names."""

    @property
    def has_alpha(self) -> bool:
        """Whether a channel follows the colours."""
        return self.pixels.shape[2] > self.space.channels

    def seen(self) -> np.ndarray:
        """Returns `uint8[h, w, 3]`, upright and in sRGB: what a viewer shows, the detector searches and the network sees."""
        shown = images.upright_view(self.pixels, self.orientation)
        if self.space.is_srgb and shown.shape[2] == 3 and shown.dtype == np.uint8:
            return np.ascontiguousarray(shown)
        out = np.empty((*shown.shape[:2], 3), np.uint8)
        for top in range(0, len(out), BAND):
            out[top : top + BAND] = self.space.to_srgb(shown[top : top + BAND, :, : self.space.channels])
        return out

    def applied(self, change: np.ndarray) -> np.ndarray:
        """Returns new stored pixels, with a change of what was `seen`: integers or floats `[h, w, 3]`, in levels of 255.

        Where the change is zero they are bit-identical, and so is alpha everywhere. Raises ValueError for another shape.
        """
        new = self.pixels.copy()
        shown = images.upright_view(new, self.orientation)
        if change.shape != (*shown.shape[:2], 3):
            raise ValueError(f"a change of {change.shape} cannot be applied to a photograph of {shown.shape[:2]}")
        channels = self.space.channels
        for top in range(0, len(shown), BAND):
            band, step = shown[top : top + BAND], change[top : top + BAND]
            # Only what changes is converted: most of a photograph does not.
            where = step.any(-1)
            if where.any():
                own = band[where]
                own[:, :channels] = self.space.changed(own[:, :channels], step[where])
                band[where] = own
        return new


def read_photo(file: Path | BinaryIO, name: str = "") -> Photo:
    """Reads a photograph of any supported kind. Pixels stay as stored. An open file has no name: `name` is for the messages.

    Raises BadInput, naming the file and the reason, for one that cannot be decoded, is too large, has several frames or layers,
    or is of another kind; before decoding it, where that can be known.
    """
    name = name or str(file)
    try:
        with file.open("rb") if isinstance(file, Path) else contextlib.nullcontext(file) as stream:
            stream.seek(0)
            head = stream.read(unsupported.HEAD)
            fault = unsupported.fault_of_kind(head)
            photo = None if fault else _reader(head)(stream, name)
    except BadInput:
        raise
    except Exception as error:  # each decoder has its own exceptions, and a damaged file may cause any of them
        raise BadInput(f"{name}: cannot be decoded ({_reason(error)}); replace or remove it") from error
    if photo is None:
        raise BadInput(f"{name}: {fault}")
    return photo


def _reason(error: Exception) -> str:
    # Pillow's own message shows the file object.
    kinds = f"damaged, or of a kind that is not read; {' '.join((*images.FORMATS, 'HEIC'))} are"
    return kinds if isinstance(error, UnidentifiedImageError) else first_line(error)


def _reader(head: bytes) -> Callable[[BinaryIO, str], Photo]:
    if unsupported.is_heif(head):
        return _heif
    return _tiff if head.startswith(unsupported.TIFF_HEADS) else _photo


def _photo(file: BinaryIO, name: str) -> Photo:
    """Reads what Pillow opens; libvips reads the pixels of a PNG of 16 bits."""
    with Image.open(file, formats=images.FORMATS) as image:
        if fault := unsupported.fault_of_header(image, file):
            raise BadInput(f"{name}: {fault}")
        file.seek(0)
        data, options = file.read(), _options(image)
        if image.format == "PNG" and bits_per_channel(image, file) > 8:
            images.read_late_metadata(image, file)
            pixels = libvips.read(data, "PNG")
            mode = "L" if pixels.shape[2] < 3 else "RGB"
        else:
            image.load()
            pixels, mode = _pixels(image, name)
        # MPO is a JPEG with further pictures behind it, which the retouched photograph does not keep.
        kind = "JPEG" if image.format == "MPO" else image.format or ""
        return Photo(pixels, kind, _space(image, mode), data, images.orientation_of(image), name, options)


def _tiff(file: BinaryIO, name: str) -> Photo:
    # Mapped, so that a large file is not read before it is refused.
    size = file.seek(0, io.SEEK_END)
    view: Any = file.getbuffer() if isinstance(file, io.BytesIO) else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with contextlib.closing(view) if isinstance(view, mmap.mmap) else view:
        header = tiff.header(view)
    if fault := unsupported.fault_of_size(header.width, header.height, size, header.depth) or header.fault:
        raise BadInput(f"{name}: {fault}")
    file.seek(0)
    data = file.read()
    space = Space(header.mode, header.profile)
    pixels = tiff.read(data)
    if pixels.shape[2] < space.channels:
        raise ValueError(f"{pixels.shape[2]} channels")
    return Photo(pixels, "TIFF", space, data, header.orientation, name)


def _pixels(image: Image.Image, name: str) -> tuple[np.ndarray, str]:
    """Returns the pixels of a decoded image of 8 bits a channel, `[H, W, C]`, and the mode of their colours."""
    wanted = {"1": "L", "P": "RGB", "PA": "RGBA"}.get(image.mode, image.mode)
    # A colour that stands for transparency becomes a channel: the network could make more pixels of that colour.
    if "transparency" in image.info and wanted in ("L", "RGB"):
        wanted += "A"
    if wanted not in ("L", "LA", "RGB", "RGBA", "CMYK"):
        raise BadInput(f"{name}: {image.mode} pixels; convert it to RGB")
    image = in_mode(image, wanted)
    pixels = np.empty((image.height, image.width, len(image.getbands())), np.uint8)
    for top in range(0, image.height, BAND):
        band = image.crop((0, top, image.width, min(top + BAND, image.height)))
        pixels[top : top + BAND] = np.asarray(band).reshape(band.height, band.width, -1)
    return pixels, "L" if wanted in ("L", "LA") else "CMYK" if wanted == "CMYK" else "RGB"


def _space(image: Image.Image, mode: str) -> Space:
    profile = image.info.get("icc_profile") or b""
    if not profile and mode == "RGB" and exif.adobe_rgb(image.info.get("exif") or b""):
        profile = adobe_rgb_profile()
    return Space(mode, profile)


def _options(image: Image.Image) -> dict[str, Any]:
    info = image.info
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        # With the photograph's own tables, areas that were not retouched are encoded as they were before.
        tables = [table for _, table in sorted(image.quantization.items())]
        options: dict[str, Any] = {"progressive": bool(info.get("progressive")), "qtables": tables}
        if image.mode == "CMYK":
            return options | {"qtables": tables[:1]}
        if image.mode == "L":
            return options
        if info.get("adobe_transform") == 0:
            return options | {"keep_rgb": True, "qtables": tables[:1]}
        # -1 stands for one that Pillow cannot write: then none is subsampled.
        return options | {"subsampling": max(0, JpegImagePlugin.get_sampling(image))}
    if image.format == "AVIF":
        return {name: info[name] for name in ("exif", "xmp") if info.get(name)}
    if image.format == "BMP" and info.get("dpi"):
        return {"dpi": info["dpi"]}
    return {}


def _heif(file: BinaryIO, name: str) -> Photo:
    """Reads HEIC, of 8 bits or more a channel. libheif turns the pixels upright."""
    try:
        import pillow_heif
    except ModuleNotFoundError as error:
        raise BadInput(f"{name}: HEIC needs {error.name}: pip install 'autoretouch-jax[heic]'") from error
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    data = file.read()
    heif = pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=False)
    if len(heif) > 1:
        raise BadInput(f"{name}: {len(heif)} frames or pages; save the one to retouch as a file of its own")
    width, height = heif.size
    if fault := unsupported.fault_of_size(width, height, size):
        raise BadInput(f"{name}: {fault}")
    mode, info = heif.mode.removesuffix(";16"), dict(heif.info)
    pillow_heif.set_orientation(info)
    pixels = np.asarray(heif)
    options = {key: info[key] for key in ("exif", "xmp") if info.get(key)}
    space = Space("L" if mode in ("L", "LA", "I") else "RGB", info.get("icc_profile") or b"")
    return Photo(pixels.reshape(height, width, -1), "HEIF", space, data, 1, name, options)
