"""libvips: pixels of 16 bits a channel, TIFF's pixels as they are stored, and colours converted at 16 bits.

Pillow, which reads everything else, reads 16 bits as 8 and converts colours of 8 bits alone. Of what else can do this, measured
in benchmarks/RESULTS.md, libvips is the smallest that reads every kind. It is LGPL, and its wheels have all in them.
"""

import functools
from typing import Any

import numpy as np

from autoretouch_jax.data.colour import srgb_profile

TYPES = {"uchar": np.uint8, "ushort": np.uint16}


@functools.cache
def _library() -> Any:
    # Here, because most photographs do not need it.
    import pyvips

    pyvips.cache_set_max(0)  # it would keep the last files in memory
    return pyvips


def read(data: bytes, kind: str) -> np.ndarray:
    """Returns the pixels of a PNG or a TIFF as it stores them, uint8 or uint16 `[H, W, C]`.

    Raises ValueError for a damaged file and for pixels of another kind.
    """
    vips = _library()
    load = vips.Image.pngload_buffer if kind == "PNG" else vips.Image.tiffload_buffer
    try:
        image = load(data, access="sequential", fail_on="truncated")
        if image.format not in TYPES:
            raise ValueError(f"{image.format} pixels")
        pixels = image.write_to_memory()
    except vips.Error as error:
        raise ValueError(str(error.detail or error).strip().replace("\n", "; ")) from error
    return np.frombuffer(pixels, TYPES[image.format]).reshape(image.height, image.width, image.bands)


def png(pixels: np.ndarray) -> bytes:
    """Returns a PNG of `uint16[H, W, C]`, without metadata."""
    data: bytes = _image(pixels, "rgb16" if pixels.shape[2] > 2 else "grey16").pngsave_buffer(
        compression=6, filter="all", bitdepth=16, keep="none"
    )
    return data


def to_srgb(colours: np.ndarray, profile: bytes) -> np.ndarray:
    """Converts `uint16[H, W, C]` from a profile of grey (C = 1), RGB or CMYK to sRGB, `uint16[H, W, 3]`."""
    return _converted(colours, profile, srgb_profile())


def from_srgb(colours: np.ndarray, profile: bytes) -> np.ndarray:
    """Converts `uint16[H, W, 3]` from sRGB to a profile. Raises ValueError for a profile of an input device."""
    return _converted(colours, srgb_profile(), profile)


def _converted(colours: np.ndarray, source: bytes, target: bytes) -> np.ndarray:
    # By the same rule as in `colour.py`, which converts what the network sees.
    vips, rule = _library(), {"intent": "relative", "black_point_compensation": True, "pcs": "xyz"}
    interpretation = {1: "grey16", 3: "rgb16", 4: "cmyk"}[colours.shape[2]]
    try:
        image = _with_profile(_image(colours, interpretation), source).icc_import(embedded=True, **rule)
        image = _with_profile(image, target).icc_export(depth=16, **rule)
        converted = image.write_to_memory()
    except vips.Error as error:
        raise ValueError(str(error.detail or error).strip()) from error
    return np.frombuffer(converted, np.uint16).reshape(image.height, image.width, image.bands)


def _image(pixels: np.ndarray, interpretation: str) -> Any:
    height, width, channels = pixels.shape
    data = np.ascontiguousarray(pixels)
    format = "ushort" if pixels.dtype == np.uint16 else "uchar"
    return _library().Image.new_from_memory(data.data, width, height, channels, format).copy(interpretation=interpretation)


def _with_profile(image: Any, profile: bytes) -> Any:
    image = image.copy()
    image.set_type(_library().GValue.blob_type, "icc-profile-data", profile)
    return image
