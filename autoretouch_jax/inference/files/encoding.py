"""Encodes photographs: new pixels in the form of the file that they were read from. The only writer of photographs.

JPEG gets the photograph's own tables and subsampling, and its own blocks wherever nothing was retouched (`blocks.py`). WebP and
HEIC are written without losses, because another lossy encoding would change every pixel. Pillow cannot write AVIF so: its best
errs by 2 levels of 255.
"""

import contextlib
import io
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from autoretouch_jax.config.schema import Metadata
from autoretouch_jax.data import libvips
from autoretouch_jax.data.spaces import Space
from autoretouch_jax.errors import BadInput
from autoretouch_jax.inference.files import exif, segments, tiff
from autoretouch_jax.inference.files.blocks import with_own_blocks
from autoretouch_jax.inference.files.metadata import Policy
from autoretouch_jax.inference.files.reading import BAND, Photo

TIFF_NAMES = {tiff.LZW: "tiff_lzw", tiff.PACKBITS: "packbits"}  # Pillow's, of the compressions that zlib lacks
PREVIEW_SIDE = 160  # pixels, of a preview whose own size cannot be read: EXIF's usual one
PREVIEW_QUALITIES = (90, 80, 65, 50, 30, 10)


def encode(photo: Photo, pixels: np.ndarray, metadata: Metadata = "keep") -> bytes:
    """Returns a file with new stored pixels, of the type and shape of `photo.pixels`, in the photograph's own form.

    `keep` keeps all metadata and renews the preview in EXIF. `safe` drops location and previews, and `none` all but the colour
    profile and the orientation. Pixels that are the same as before are not encoded again. Raises BadInput where the
    photograph's own file is too damaged to put new pixels into.
    """
    same = pixels is photo.pixels or np.array_equal(pixels, photo.pixels)
    if same and metadata == "keep":
        return photo.data
    policy = Policy(metadata, photo.orientation, None if same else _preview_of(photo, pixels))
    try:
        return _encoded(photo, pixels, same, policy)
    except exif.BROKEN as error:
        raise BadInput(f"{photo.name}: cannot be written back ({error}); save a copy with an editor first") from error


def _encoded(photo: Photo, pixels: np.ndarray, same: bool, policy: Policy) -> bytes:
    match photo.format:
        case "TIFF":
            return tiff.written(photo.data, photo.pixels, pixels, policy, _tiff_compressed)
        case "JPEG":
            return segments.jpeg(photo.data, photo.data if same else _jpeg(photo, pixels), policy)
        case "PNG":
            new = libvips.png(pixels) if pixels.dtype == np.uint16 else _saved(photo, pixels)
            return segments.png(photo.data, photo.data if same else new, policy)
        case "WEBP":
            new = photo.data if same else _saved(photo, pixels, lossless=True, exact=True)
            return segments.webp(photo.data, new, policy, pixels.shape[1::-1], photo.has_alpha)
        case "AVIF" | "HEIF":
            return _with_boxes(photo, pixels, same, policy)
    return photo.data if same else _saved(photo, pixels, **photo.options)  # BMP has no metadata but its density


def _saved(photo: Photo, pixels: np.ndarray, **options: Any) -> bytes:
    """Returns 8-bit pixels in a file that Pillow writes."""
    out = io.BytesIO()
    _picture(pixels, photo.space).save(out, format=photo.format, **options)
    return out.getvalue()


def _picture(pixels: np.ndarray, space: Space) -> Image.Image:
    mode = space.mode + ("A" if pixels.shape[2] > space.channels else "")
    return Image.frombytes(mode, pixels.shape[1::-1], np.ascontiguousarray(pixels).data)


def _jpeg(photo: Photo, pixels: np.ndarray) -> bytes:
    changed = np.empty(pixels.shape[:2], bool)
    for top in range(0, len(pixels), BAND):
        np.any(pixels[top : top + BAND] != photo.pixels[top : top + BAND], axis=-1, out=changed[top : top + BAND])
    return with_own_blocks(photo.data, _saved(photo, pixels, **photo.options), changed)


def _tiff_compressed(data: bytes, width: int, compression: int) -> bytes:
    """Compresses bytes as a strip of a TIFF: as the only strip of a grey image of one byte to a pixel."""
    out = io.BytesIO()
    image = Image.frombytes("L", (width, len(data) // width), data)
    image.save(out, "TIFF", compression=TIFF_NAMES[compression], strip_size=len(data))
    tags = exif.Tags(bytearray(out.getbuffer()))
    entries = tags.first().entries
    (start,), (size,) = (tags.integers(entries[tag]) for tag in tiff.STRIPS)
    return bytes(tags.data[start : start + size])


# ---- AVIF and HEIC ----------------------------------------------------------------------------------------------------------


def _with_boxes(photo: Photo, pixels: np.ndarray, same: bool, policy: Policy) -> bytes:
    own_exif, own_xmp = photo.options.get("exif", b""), photo.options.get("xmp", b"")
    new_exif, new_xmp = policy.exif(own_exif) if own_exif or not policy.keeps else b"", policy.xmp(own_xmp)
    if same and (data := _overwritten(photo.data, ((own_exif, new_exif or exif.EMPTY), (own_xmp, new_xmp)))):
        return data
    options: dict[str, Any] = {"icc_profile": photo.space.profile, "exif": new_exif, "xmp": new_xmp}
    options = {name: content for name, content in options.items() if content}
    if photo.format == "HEIF":
        return _heif(photo, pixels, options)
    if new_exif:
        options["exif"] = _Verbatim(new_exif)
    return _saved(photo, pixels, quality=100, subsampling="4:4:4", **options)


class _Verbatim(Image.Exif):
    """EXIF that Pillow writes as it is. From bytes it would take the orientation, and arrange the rest anew."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        with contextlib.suppress(Exception):  # broken EXIF may cause any exception, and states no orientation
            self.load(data)
        self.data = data

    def __bool__(self) -> bool:
        return True

    def tobytes(self, offset: int = 8) -> bytes:
        return self.data


def _overwritten(data: bytes, parts: tuple[tuple[bytes, bytes], ...]) -> bytes:
    """Returns a file whose metadata are overwritten in place, padded to their length; b"" where they cannot be found."""
    for own, new in parts:
        own, new = own.removeprefix(exif.PREFIX), new.removeprefix(exif.PREFIX)
        if own and (data.count(own) != 1 or len(new) > len(own)):
            return b""
        if own:
            # Spaces may follow XMP. EXIF is read by its positions, and anything may follow it.
            data = data.replace(own, new.ljust(len(own), b"\0" if new.startswith((b"II", b"MM")) else b" "))
    return data


def _heif(photo: Photo, pixels: np.ndarray, options: dict[str, Any]) -> bytes:
    import pillow_heif

    mode = photo.space.mode + ("A" if photo.has_alpha else "") + (";16" if pixels.dtype == np.uint16 else "")
    file = pillow_heif.from_bytes(mode, pixels.shape[1::-1], np.ascontiguousarray(pixels).tobytes())
    out = io.BytesIO()
    file.info.update({name: options[name] for name in ("icc_profile", "xmp") if name in options})
    # Red, green and blue as they are: any other form of colours would round them.
    file.save(out, quality=-1, chroma=444, matrix_coefficients=0, exif=options.get("exif"))
    return out.getvalue()


# ---- previews ---------------------------------------------------------------------------------------------------------------


def _preview_of(photo: Photo, pixels: np.ndarray) -> exif.Preview:
    """Returns what makes a preview of the retouched photograph, in sRGB and turned as the photograph is stored."""

    def preview(old: bytes, limit: int) -> bytes:
        try:
            size = Image.open(io.BytesIO(old), formats=["JPEG"]).size
        except (UnidentifiedImageError, OSError, ValueError):
            size = (PREVIEW_SIDE, PREVIEW_SIDE)
        # Every so many pixels, before anything else: a preview is a hundredth of the photograph's side.
        step = max(1, min(pixels.shape[1] // max(1, 2 * size[0]), pixels.shape[0] // max(1, 2 * size[1])))
        small = photo.space.to_srgb(pixels[::step, ::step, : photo.space.channels])
        image = Image.fromarray(small)
        image.thumbnail(size)
        for quality in PREVIEW_QUALITIES:
            out = io.BytesIO()
            image.save(out, "JPEG", quality=quality)
            if out.tell() <= limit:
                return out.getvalue()
        return b""

    return preview
