"""Colour profiles (ICC): decoded images to sRGB, and pixels from sRGB back to a profile.

Relative colorimetric with black point compensation, which photo editors use by default: a source in another profile meets a
target that an editor has converted to sRGB. For the usual RGB profiles, which are a matrix and three curves, every rendering
intent gives the same colours, apart from the white point of the absolute one.
"""

import functools
import io

import numpy as np
from PIL import Image, ImageCms

INTENT, FLAGS = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
# Levels by which a profile may differ from sRGB and still be taken for it. There are many sRGB profiles, rounded in different
# ways, and a conversion would change pixels of a pair whose other side has none.
SAME = 2
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


def pixels_to_srgb(pixels: np.ndarray, profile: bytes) -> np.ndarray:
    """Converts `uint8[H, W, 3]` from a profile to sRGB. A profile that `srgb` would ignore changes nothing."""
    transform = _to_srgb(profile, "RGB")
    return pixels if transform is None else np.asarray(transform.apply(Image.fromarray(pixels)))


def change_from_srgb(pixels: np.ndarray, change: np.ndarray, profile: bytes) -> np.ndarray:
    """Converts a change of sRGB pixels to one of the same pixels in a profile. Where nothing changes, that stays so.

    `pixels` are uint8 and `change` is int16, both `[H, W, 3]` in 8-bit levels.
    """
    transform = _from_srgb(profile) if _to_srgb(profile, "RGB") is not None else None
    if transform is None:
        return change
    after = np.clip(pixels + change, 0, 255).astype(np.uint8)
    before, after = (np.asarray(transform.apply(Image.fromarray(image))) for image in (pixels, after))
    return after.astype(np.int16) - before


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
def _from_srgb(profile: bytes) -> ImageCms.ImageCmsTransform | None:
    """The transform from sRGB to a profile, or None where the profile is one of an input device, which has only one way."""
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.buildTransform(ImageCms.createProfile("sRGB"), own, "RGB", "RGB", INTENT, FLAGS)
    except (ImageCms.PyCMSError, OSError):
        return None


def _changes_little(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether a transform moves no colour by more than a few levels."""
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(9, -1, 3)
    moved = np.asarray(transform.apply(Image.fromarray(colours))).astype(np.int16) - colours
    return bool(np.abs(moved).max() <= SAME)
