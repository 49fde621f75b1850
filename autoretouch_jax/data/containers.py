"""What an image file states about itself, without decoding a pixel: the bits of a channel, and whether the file is whole.

Pillow reads files of 16 bits as 8 bits without a word, and finds out that a file was cut short only by decoding it.
"""

import os
import re
import struct
from typing import BinaryIO

from PIL import Image, TiffImagePlugin

TAIL = 4096  # last bytes of a file, in which its end mark is looked for first: most files end with it
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
JPEG_END = b"\xff\xd9"
# Below this size a JPEG is searched from its beginning: the last bytes may be those of the preview in its EXIF, which also has
# an end mark. EXIF takes at most 64 KiB.
PREVIEW_ENDS = 1 << 17
# A marker of a JPEG. In compressed pixels 0xFF is followed by 0 or a restart marker (ITU-T T.81, section B.1.1).
JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
WITHOUT_LENGTH = (0x01, 0xD8)  # markers that no length follows
PNG_DEPTH = 24  # position of the bits of a channel: signature 8, length 4, `IHDR` 4, width 4, height 4
BITS_PER_SAMPLE, STRIPS, TILES = 258, (273, 279), (324, 325)  # TIFF's tags; the last two are positions and sizes in bytes
AVIF_HEAD = 1 << 18  # bytes in which an AVIF's properties are looked for; a colour profile may lie before them


def bits_per_channel(image: Image.Image, file: BinaryIO) -> int:
    """Returns how many bits the file of an opened image has for each channel; 8 for formats that have no more."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return max(image.tag_v2.get(BITS_PER_SAMPLE, (1,)))
    if image.format not in ("PNG", "AVIF"):
        return 8
    file.seek(0)  # Pillow knows by itself where the pixels begin
    head = file.read(PNG_DEPTH + 1 if image.format == "PNG" else AVIF_HEAD)
    return head[PNG_DEPTH] if image.format == "PNG" else _avif_bits(head)


def _avif_bits(head: bytes) -> int:
    """The largest depth of an AVIF's images, from the third byte of each `av1C` (AV1-ISOBMFF, section 2.3.3)."""
    flags = [head[found.end() + 2] for found in re.finditer(b"av1C", head[:-3])]
    return max((12 if flag & 0x20 else 10 if flag & 0x40 else 8 for flag in flags), default=8)


def is_whole(image: Image.Image, file: BinaryIO) -> bool:
    """Whether the file of an opened image has its end. What lies behind the end does not matter.

    Telephones append films, and programs append data of their own. A download that was cut short has an intact header.
    """
    size = file.seek(0, os.SEEK_END)
    match image.format:
        case "PNG":
            return PNG_END in tail(file) or _png_has_end(_content(file))
        case "JPEG" | "MPO":
            return (size > PREVIEW_ENDS and JPEG_END in tail(file)) or _jpeg_has_end(_content(file))
        case "AVIF":  # Pillow opens one that lacks its last bytes, but no WebP that does
            return _boxes_have_end(file, size)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return _strips_end(image.tag_v2) <= size
    return True


def tail(file: BinaryIO) -> bytes:
    """Returns the last bytes of a file."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
    return file.read()


def _content(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read()


def _png_has_end(data: bytes) -> bool:
    position = 8
    while position + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        if kind == b"IEND":
            return True
        position += 12 + length
    return False


def _jpeg_has_end(data: bytes) -> bool:
    # One loop for headers and pixels: behind a header the next marker follows at once, behind pixels after them.
    position = 2
    while marker := JPEG_MARKER.search(data, position):
        if marker[0] == JPEG_END:
            return True
        position = marker.end()
        if marker[0][1] not in WITHOUT_LENGTH:
            position += int.from_bytes(data[position : position + 2], "big")
    return False


def _boxes_have_end(file: BinaryIO, size: int) -> bool:
    """Whether an AVIF's boxes (ISO/IEC 14496-12, section 4.2) lie inside the file."""
    position = 0
    while position + 8 <= size:
        file.seek(position)
        length, kind, large = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
        # 1: the length is the number behind the name. 0: the box reaches to the end of the file.
        length = large if length == 1 else length or size - position
        if length < 8 or position + length > size:
            return kind not in (b"meta", b"mdat")  # other boxes hold no pixels
        position += length
    return True


def _strips_end(tags: TiffImagePlugin.ImageFileDirectory_v2) -> int:
    """The position behind the last pixels of a TIFF, 0 where the tags do not say."""
    parts = [zip(tags.get(starts, ()), tags.get(sizes, ()), strict=False) for starts, sizes in (STRIPS, TILES)]
    return max((start + size for part in parts for start, size in part), default=0)
