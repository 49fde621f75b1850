"""Files that are no photograph that can be retouched: told by their first bytes and their header, before a pixel is decoded."""

import os
from typing import BinaryIO

from PIL import Image

from autoretouch_jax.data import images
from autoretouch_jax.data.containers import bits_per_channel, is_whole

# A strip of this length is no photograph, and the detector and the network work on whole rows of it.
LONGEST_SIDE = 40_000  # pixels; panoramas of telephones reach about 30,000
# An upper bound for what can be packed into a small file: any photograph has more, also one of a grey wall.
LARGE, BYTES_PER_PIXEL = 25_000_000, 1 / 200
# Bytes of the decoded pixels: those of the largest photograph of 16 bits. A TIFF may state any number of channels.
MOST_BYTES = 6 * images.MAX_PIXELS
SAVE_AS = "save it as TIFF, PNG or JPEG"
# By their first bytes. What has no entry is described by Pillow's words or as unknown.
KINDS = (
    (b"8BPS", f"is a Photoshop document; {SAVE_AS}"),
    (b"GIF8", f"is a GIF, which has too few colours for a photograph; {SAVE_AS}"),
    (b"\0\0\0\x0cJXL ", f"is a JPEG XL, which is not read; {SAVE_AS}"),
    (b"\xff\x0a", f"is a JPEG XL, which is not read; {SAVE_AS}"),
    (b"\0\0\0\x0cjP  ", f"is a JPEG 2000, which is not read; {SAVE_AS}"),
    (b"%PDF", f"is a PDF; {SAVE_AS}"),
    (b"\x76\x2f\x31\x01", f"is an OpenEXR, which has floating-point pixels; {SAVE_AS}"),
    (b"FUJIFILMCCD-RAW", f"is a camera's raw file; develop it, and {SAVE_AS}"),
    (b"II*\0\x10\0\0\0CR", f"is a camera's raw file; develop it, and {SAVE_AS}"),
    (b"IIU\0", f"is a camera's raw file; develop it, and {SAVE_AS}"),
    (b"IIRO", f"is a camera's raw file; develop it, and {SAVE_AS}"),
)
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
HEAD = 4096


def fault_of_kind(head: bytes) -> str:
    """Returns why a file that begins so is not read, "" where nothing is known against it."""
    if not head:
        return "is empty (0 bytes); replace or remove it"
    if head.startswith((b"<", b"\xef\xbb\xbf<")) and b"<svg" in head.lower():
        return f"is an SVG drawing, whatever its name says; {SAVE_AS}"
    return next((reason for start, reason in KINDS if head.startswith(start)), "")


def is_heif(head: bytes) -> bool:
    """Whether a file that begins so is HEIC or another HEIF, but not AVIF, which Pillow reads itself."""
    brands = head[8 : int.from_bytes(head[:4], "big")]
    return head[4:8] == b"ftyp" and brands[:4] in HEIF_BRANDS and b"avif" not in brands


def fault_of_size(width: int, height: int, size: int, depth: int = 1) -> str:
    """Returns what speaks against decoding so many pixels of `depth` bytes from a file of `size` bytes, "" for nothing."""
    pixels = f"{width}×{height} pixels"
    if width * height > images.MAX_PIXELS:
        return f"{pixels}, more than the {images.MAX_PIXELS // 10**6} million that are read; scale it down"
    if width * height * depth > MOST_BYTES:
        return f"{pixels} of {depth} bytes, more than {MOST_BYTES / 1e9:g} GB; scale it down"
    if max(width, height) > LONGEST_SIDE:
        return f"{pixels}, longer than the {LONGEST_SIDE} that are read; cut it into parts"
    if width * height > LARGE and size < width * height * BYTES_PER_PIXEL:
        return f"{pixels} in {size} bytes, which no photograph would fit into; replace or remove it"
    return ""


def fault_of_header(image: Image.Image, file: BinaryIO) -> str:
    """Returns what speaks against decoding an image that Pillow has opened, "" for nothing."""
    depth = len(image.getbands()) * (2 if bits_per_channel(image, file) > 8 else 1)
    if fault := fault_of_size(image.width, image.height, file.seek(0, os.SEEK_END), depth):
        return fault
    # The second picture of an MPO is a gain map, a depth map or another view: the first one is the photograph.
    frames = int(getattr(image, "n_frames", 1))
    if image.format != "MPO" and frames > 1:
        return f"{frames} frames or pages; save the one to retouch as a file of its own"
    if image.format == "AVIF" and bits_per_channel(image, file) > 8:
        return f"an AVIF with more than 8 bits a channel, which is not read; {SAVE_AS}"
    return "" if is_whole(image, file) else "cut short (the file's end is missing); copy it again"
