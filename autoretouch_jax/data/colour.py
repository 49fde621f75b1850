"""Colour profiles (ICC): decoded images to sRGB. `spaces.py` carries changes back to a photograph's own colours.

Relative colorimetric with black point compensation, which photo editors use by default: a source in another profile meets a
target that an editor has converted to sRGB. For the usual RGB profiles, which are a matrix and three curves, every rendering
intent gives the same colours, apart from the white point of the absolute one.
"""

import functools
import io
import struct

import numpy as np
from PIL import Image, ImageCms

INTENT, FLAGS = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
# Levels by which a profile may differ from sRGB and still be taken for it. There are many sRGB profiles, rounded in different
# ways, and a conversion would change pixels of a pair whose other side has none.
SAME = 2
# Adobe RGB (1998): the XYZ of red, green and blue for profiles' white point, as its ICC profile states them, and its power.
ADOBE_RGB = {b"r": (0.60974, 0.31111, 0.01947), b"g": (0.20528, 0.62567, 0.06087), b"b": (0.14919, 0.06322, 0.74457)}
ADOBE_POWER, WHITE = 563, (0.9642, 1.0, 0.8249)  # the power times 256; D50
PROFILES = 64  # transforms that are kept; a data set has few profiles


def srgb(image: Image.Image) -> Image.Image:
    """Returns a decoded image in mode RGB, sRGB. An alpha channel is dropped.

    A missing profile, one that cannot be read and one of another colour space are ignored, as viewers do: RGB is taken for
    sRGB, and CMYK is converted by PostScript's rule for inks without a profile.
    """
    # A profile describes RGB, grey or CMYK; Pillow itself converts the few other modes.
    mode = {"LA": "L", "L": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    transform = _to_srgb(image.info.get("icc_profile") or b"", mode)
    if transform is None:
        return in_mode(image, "RGB")
    return transform.apply(in_mode(image, mode))


def is_srgb(profile: bytes) -> bool:
    """Whether RGB pixels of this profile are taken as they are."""
    return _to_srgb(profile, "RGB") is None


def converts(profile: bytes, mode: str, both_ways: bool = False) -> bool:
    """Whether pixels of a mode are converted from a profile to sRGB; with `both_ways`, whether they also can be back."""
    return _to_srgb(profile, mode) is not None and not (both_ways and _from_srgb(profile, mode) is None)


@functools.cache
def srgb_profile() -> bytes:
    """The ICC profile of sRGB."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@functools.cache
def adobe_rgb_profile() -> bytes:
    """An ICC profile of Adobe RGB (1998), for cameras that name it in EXIF alone."""
    xyz = lambda values: b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))  # noqa: E731
    tags = {b"desc": b"desc\0\0\0\0\0\0\0\x0aAdobe RGB\0" + bytes(79), b"wtpt": xyz(WHITE)}
    tags |= {name + b"XYZ": xyz(values) for name, values in ADOBE_RGB.items()}
    tags |= {name + b"TRC": b"curv\0\0\0\0" + struct.pack(">IHH", 1, ADOBE_POWER, 0) for name in ADOBE_RGB}
    place, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name, place + len(body), len(content))
        body += content.ljust(-(-len(content) // 4) * 4, b"\0")
    head = struct.pack(">I4xI4s4s4s12x4s", 128 + len(table) + len(body), 0x02400000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    return head.ljust(68, b"\0") + xyz(WHITE)[8:].ljust(60, b"\0") + table + body


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """Converts a decoded image to another of Pillow's modes; the image itself is returned where it has that mode."""
    if image.mode == mode:
        return image
    # By way of RGBA, because Pillow warns where a palette with an alpha channel is converted to RGB.
    return image.convert("RGBA").convert(mode) if image.mode == "P" else image.convert(mode)


@functools.lru_cache(maxsize=PROFILES)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from a profile to sRGB, or None where the pixels are to be taken for sRGB."""
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(own, ImageCms.createProfile("sRGB"), mode, "RGB", INTENT, FLAGS)
    except (ImageCms.PyCMSError, OSError):
        return None
    return None if mode == "RGB" and _changes_little(transform) else transform


@functools.lru_cache(maxsize=PROFILES)
def _from_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from sRGB to a profile, or None where the profile is one of an input device, which has only one way."""
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.buildTransform(ImageCms.createProfile("sRGB"), own, "RGB", mode, INTENT, FLAGS)
    except (ImageCms.PyCMSError, OSError):
        return None


def _changes_little(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether a transform moves no colour by more than a few levels."""
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(9, -1, 3)
    moved = np.asarray(transform.apply(Image.fromarray(colours))).astype(np.int16) - colours
    return bool(np.abs(moved).max() <= SAME)
