"""The segments of JPEG, the chunks of PNG and WebP: a photograph's own metadata put around newly encoded pixels.

Each function takes the photograph's file and a file with the new pixels, and returns the new file; where both are the same
file, only metadata are dropped. What lies behind the end of the picture, such as films and further pictures, is not copied.
"""

import struct
import zlib
from collections.abc import Iterator

from autoretouch_jax.data.containers import JPEG_END, JPEG_MARKER, WITHOUT_LENGTH
from autoretouch_jax.inference.files import exif
from autoretouch_jax.inference.files.metadata import Policy

LONGEST_TEXT = 1 << 26  # bytes of unpacked XMP in a PNG

# ---- JPEG -------------------------------------------------------------------------------------------------------------------

SOS, APP0, APP1, APP2, APP13, APP14, APP15, COMMENT = 0xDA, 0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xEF, 0xFE
XMP_NAME, PHOTOSHOP_NAME = b"http://ns.adobe.com/xap/1.0/\0", b"Photoshop 3.0\0"
LONGEST_SEGMENT = 0xFFFF - 2
PLAIN_JFIF = b"JFIF\0\1\1\0\0\1\0\1\0\0"

Segment = tuple[int, bytes]  # the second byte of its marker, and its content


def jpeg(original: bytes, encoded: bytes, policy: Policy) -> bytes:
    """A JPEG with the pixels of `encoded` and the metadata of `original`."""
    own, _ = _jpeg_segments(original)
    new, pixels = _jpeg_segments(encoded)
    is_metadata = lambda marker: APP0 <= marker <= APP15 or marker == COMMENT  # noqa: E731
    kept = [kept for segment in own if is_metadata(segment[0]) and (kept := _jpeg_kept(*segment, policy))]
    kept += _photoshop(own, policy)
    if not any(content.startswith(exif.PREFIX) for _, content in kept):
        kept += [(APP1, content) for content in (_lost_orientation(policy),) if content]
    # Adobe's segment says how the colours are coded, and so belongs to the pixels.
    kept += [segment for segment in new if not is_metadata(segment[0]) or segment[0] == APP14]
    head = b"".join(b"\xff%c%s%s" % (marker, struct.pack(">H", len(content) + 2), content) for marker, content in kept)
    return b"\xff\xd8" + head + encoded[pixels : _jpeg_end(encoded, pixels)]


def _jpeg_segments(data: bytes) -> tuple[list[Segment], int]:
    """Returns the segments before the pixels, and where the segment that the pixels follow begins."""
    segments: list[Segment] = []
    place = 2
    while True:
        # Any number of 0xFF may precede a marker.
        while data[place : place + 2] == b"\xff\xff":
            place += 1
        if data[place : place + 1] != b"\xff" or place + 4 > len(data):
            raise ValueError("the segments of the JPEG are damaged")
        marker = data[place + 1]
        if marker == SOS:
            return segments, place
        size = 0 if marker in WITHOUT_LENGTH else int.from_bytes(data[place + 2 : place + 4], "big")
        if size:
            segments.append((marker, data[place + 4 : place + 2 + size]))
        place += 2 + size


def _jpeg_end(data: bytes, place: int) -> int:
    """Returns the position behind the end mark of the picture whose pixels begin at `place`."""
    while marker := JPEG_MARKER.search(data, place):
        place = marker.end()
        if marker[0] == JPEG_END:
            return place
        if marker[0][1] not in WITHOUT_LENGTH:
            place += int.from_bytes(data[place : place + 2], "big")
    return len(data)


def _jpeg_kept(marker: int, content: bytes, policy: Policy) -> Segment | None:
    """Returns what is left of a segment of metadata, None for nothing."""
    if marker == APP14 or content.startswith((b"MPF\0", PHOTOSHOP_NAME)):  # an index of pictures that are not copied
        return None
    if marker == APP2 and content.startswith(b"ICC_PROFILE\0"):
        return marker, content
    if marker == APP0 and content.startswith(b"JFIF\0"):
        if policy.metadata == "none":
            return marker, PLAIN_JFIF
        # Its last two bytes are the size of a preview that follows, of which no program is known that writes it.
        return marker, content[:12] + b"\0\0" if policy.drops_previews and len(content) > len(PLAIN_JFIF) else content
    if marker == APP0 and content.startswith(b"JFXX\0") and policy.drops_previews:
        return None
    if marker == APP1 and content.startswith(exif.PREFIX):
        content = policy.exif(content)
    elif marker == APP1 and content.startswith(XMP_NAME):
        xmp = policy.xmp(content[len(XMP_NAME) :])
        content = XMP_NAME + xmp if xmp else b""
    elif not policy.keeps and not (marker == COMMENT and policy.metadata == "safe"):
        return None
    return (marker, content) if content and len(content) <= LONGEST_SEGMENT else None


def _photoshop(segments: list[Segment], policy: Policy) -> list[Segment]:
    """Photoshop's resources, which may continue in further segments."""
    own = [segment for segment in segments if segment[0] == APP13 and segment[1].startswith(PHOTOSHOP_NAME)]
    content = b"".join(content[len(PHOTOSHOP_NAME) :] for _, content in own)
    kept = policy.photoshop(content)
    if kept == content:
        return own
    step = LONGEST_SEGMENT - len(PHOTOSHOP_NAME)
    return [(APP13, PHOTOSHOP_NAME + kept[start : start + step]) for start in range(0, len(kept), step)]


def _lost_orientation(policy: Policy) -> bytes:
    """EXIF with the orientation, where other metadata that are dropped may have stated it; b"" where nothing is lost."""
    only = b"" if policy.keeps else exif.only_orientation(policy.orientation)
    return exif.PREFIX + only if only else b""


# ---- PNG --------------------------------------------------------------------------------------------------------------------

PNG_HEAD = b"\x89PNG\r\n\x1a\n"
PNG_COLOURS = (b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"cICP", b"mDCV", b"cLLI")
PNG_OF_TYPE = (b"PLTE", b"tRNS", b"bKGD", b"hIST", b"sBIT", b"sPLT")  # whose form depends on the kind of the pixels
PNG_TEXT, PNG_XMP = (b"tEXt", b"zTXt", b"iTXt"), b"XML:com.adobe.xmp\0"

Chunk = tuple[bytes, bytes]  # its name and its content


def png(original: bytes, encoded: bytes, policy: Policy) -> bytes:
    """A PNG with the pixels of `encoded` and the metadata of `original`."""
    chunks = list(_png_chunks(original))
    new = chunks if encoded is original else list(_png_chunks(encoded))
    same_type = new[0][1][8:10] == chunks[0][1][8:10]  # the depth and the kind of the pixels
    pixels = [chunk for chunk in new if chunk[0] == b"IDAT"]
    out, written = [new[0]], False
    for chunk in chunks[1:]:
        if chunk[0] == b"IDAT":
            out += [] if written else pixels
            written = True
        elif chunk[0] in PNG_OF_TYPE:
            out += [chunk] if same_type else []
        elif chunk[0] != b"IEND" and (kept := _png_kept(*chunk, policy)):
            out.append(kept)
    only = exif.only_orientation(policy.orientation)
    if only and not policy.keeps and not any(name == b"eXIf" for name, _ in out):
        out.insert(1, (b"eXIf", only))
    return PNG_HEAD + b"".join(map(_png_packed, [*out, (b"IEND", b"")]))


def _png_chunks(data: bytes) -> Iterator[Chunk]:
    place = len(PNG_HEAD)
    while place + 12 <= len(data):
        size, name = struct.unpack_from(">I4s", data, place)
        yield name, data[place + 8 : place + 8 + size]
        if name == b"IEND":
            return
        place += 12 + size


def _png_packed(chunk: Chunk) -> bytes:
    name, content = chunk
    return struct.pack(">I4s", len(content), name) + content + struct.pack(">I", zlib.crc32(content, zlib.crc32(name)))


def _png_kept(name: bytes, content: bytes, policy: Policy) -> Chunk | None:
    """Returns what is left of a chunk of metadata, None for nothing."""
    if name in PNG_COLOURS:
        return name, content
    if name == b"eXIf":
        content = policy.exif(content).removeprefix(exif.PREFIX)
        return (name, content) if content else None
    if name in PNG_TEXT and content.startswith(PNG_XMP):
        return _png_xmp(name, content, policy)
    if policy.keeps:
        # ImageMagick's copies of EXIF and Photoshop's resources have previews too, of which the renewed ones are elsewhere.
        return name, content
    # Text of other kinds may hold a copy of EXIF or the name of a place.
    return (name, content) if policy.metadata == "safe" and name in (b"pHYs", b"tIME") else None


def _png_xmp(name: bytes, content: bytes, policy: Policy) -> Chunk | None:
    """XMP in a text chunk: the keyword, whether it is packed and how, two names that end with 0, and the XMP."""
    if policy.keeps and policy.preview is None:
        return name, content
    head = len(PNG_XMP)
    try:
        text = content[head + 2 :].split(b"\0", 2)[2]
    except IndexError:
        return None
    if name != b"iTXt":
        return None
    if content[head]:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(text, LONGEST_TEXT)
        if unpacker.unconsumed_tail:
            return None
    xmp = policy.xmp(text)
    if xmp == text:
        return name, content
    return (name, PNG_XMP + bytes(4) + xmp) if xmp else None


# ---- WebP -------------------------------------------------------------------------------------------------------------------

WEBP_PIXELS = (b"VP8 ", b"VP8L", b"ALPH")
WEBP_FLAGS = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}
WEBP_ALPHA = 0x10


def webp(original: bytes, encoded: bytes, policy: Policy, size: tuple[int, int], alpha: bool) -> bytes:
    """A WebP with the pixels of `encoded`, whose size is (width, height), and the metadata of `original`."""
    own, new = list(_webp_chunks(original)), list(_webp_chunks(encoded))
    metadata = {name: content for name, content in own if name in WEBP_FLAGS}
    metadata[b"EXIF"] = policy.exif(metadata.get(b"EXIF", b"")) if b"EXIF" in metadata or not policy.keeps else b""
    metadata[b"XMP "] = policy.xmp(metadata.get(b"XMP ", b""))
    metadata = {name: content for name, content in metadata.items() if content}
    others = [chunk for chunk in own if chunk[0] not in (*WEBP_PIXELS, *WEBP_FLAGS, b"VP8X")] if policy.keeps else []
    flags = sum(WEBP_FLAGS[name] for name in metadata) | (WEBP_ALPHA if alpha else 0)
    # The profile stands before the pixels, the rest behind them.
    chunks = [(b"VP8X", struct.pack("<I", flags) + b"".join((side - 1).to_bytes(3, "little") for side in size))]
    chunks += [(name, content) for name, content in metadata.items() if name == b"ICCP"]
    chunks += [chunk for chunk in new if chunk[0] in WEBP_PIXELS]
    chunks += [(name, content) for name, content in metadata.items() if name != b"ICCP"] + others
    body = b"".join(name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2) for name, content in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _webp_chunks(data: bytes) -> Iterator[Chunk]:
    place, end = 12, min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while place + 8 <= end:
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        yield name, data[place + 8 : place + 8 + size]
        place += 8 + size + size % 2
