"""What a retouched file keeps of its photograph's metadata: EXIF, XMP, IPTC and Photoshop's resources, as bytes.

`keep` keeps all as it is, except for previews, which would show the photograph before it was retouched. `safe` drops the
location too, and whatever may hold one or a preview and cannot be read. `none` keeps the orientation alone. The colour profile
is no metadata here: it says what the pixels mean, and always stays.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.dom import minidom
from xml.parsers.expat import ExpatError

from autoretouch_jax.config.schema import Metadata
from autoretouch_jax.inference.files import exif

# Names of XMP properties, in any namespace: cameras, drones and editors have their own ones for where a photograph was taken.
LOCATION = re.compile(
    r"gps|location|latitude|longitude|altitude|coverage|address|^(city|state|country|countrycode|provincestate|countryname)$",
    re.I,
)
# Pictures in XMP; the last two announce XMP in further segments, which hold little else.
PICTURES = re.compile(r"thumbnail|^(GImage|GDepth|Data|HasExtendedXMP|HasExtension)$", re.I)
LONGEST_XMP = 1 << 24
# IPTC's data sets, by record and number (IIM 4.2): locations and previews.
IPTC_LOCATION, IPTC_PREVIEW = {(2, number) for number in (26, 27, 90, 92, 95, 100, 101)}, {(2, 200), (2, 201), (2, 202)}
RESOURCE = b"8BIM"
RESOURCE_PREVIEWS, RESOURCE_IPTC = (1033, 1036), 1028
RESOURCE_COPIES = (1058, 1059, 1060)  # of EXIF and XMP


@dataclass(frozen=True)
class Policy:
    """What stays: the user's choice, how the photograph is turned, and the new preview, None where no pixel changed."""

    metadata: Metadata
    orientation: int = 1
    preview: exif.Preview | None = None

    @property
    def keeps(self) -> bool:
        """Whether metadata of which nothing is known stay."""
        return self.metadata == "keep"

    @property
    def drops_previews(self) -> bool:
        """Whether a preview that cannot be renewed has to go."""
        return not self.keeps or self.preview is not None

    def exif(self, data: bytes) -> bytes:
        """Returns the EXIF to write, with its prefix where it had one. b"" stands for none."""
        if self.metadata == "none":
            only = exif.only_orientation(self.orientation)
            return exif.PREFIX + only if only and data.startswith(exif.PREFIX) else only
        if self.metadata == "safe":
            return exif.safe(data) or (Policy("none", self.orientation).exif(data))
        return exif.renewed(data, self.preview) if self.preview else data

    def xmp(self, data: bytes) -> bytes:
        """Returns the XMP to write, b"" for none."""
        if self.metadata == "none" or not data:
            return b""
        if self.metadata == "safe":
            return without(data, LOCATION, PICTURES)
        # Looked for as text first, so that XMP without a preview stays as it is, to the byte.
        return without(data, PICTURES) if self.preview and b"humbnail" in data.replace(b"\0", b"") else data

    def photoshop(self, data: bytes) -> bytes:
        """Returns Photoshop's image resources to write, without the name that precedes them in a JPEG."""
        if self.metadata == "none":
            return b""
        try:
            resources = list(_resources(data))
        except ValueError:
            return data if self.keeps else b""
        out = b""
        for number, whole, content in resources:
            if self.metadata == "safe" and number == RESOURCE_IPTC:
                content = self.iptc(content)
                whole = RESOURCE + struct.pack(">HHI", number, 0, len(content)) + content + bytes(len(content) % 2)
            unsafe = self.metadata == "safe" and number in RESOURCE_COPIES
            if not unsafe and not (self.drops_previews and number in RESOURCE_PREVIEWS):
                out += whole
        return data if len(out) == sum(len(whole) for _, whole, _ in resources) and self.keeps else out

    def iptc(self, data: bytes) -> bytes:
        """Returns the IPTC data sets to write, b"" for none."""
        if self.metadata == "none":
            return b""
        dropped = IPTC_PREVIEW | (IPTC_LOCATION if self.metadata == "safe" else set()) if self.drops_previews else set()
        try:
            return b"".join(whole for key, whole in _data_sets(data) if key not in dropped) if dropped else data
        except (ValueError, struct.error):
            return data if self.keeps else b""


def without(xmp: bytes, *patterns: re.Pattern[str]) -> bytes:
    """Returns XMP without the properties whose names match; b"" for XMP that cannot be read."""
    # A document type could define entities that expand without end. XMP has none.
    if len(xmp) > LONGEST_XMP or b"<!" in xmp.replace(b"\0", b"").replace(b"<!--", b""):
        return b""
    try:
        document = minidom.parseString(xmp.strip(b"\0"))
    except (ExpatError, ValueError, LookupError):
        return b""
    _prune(document, patterns)
    # `toxml` begins with a declaration, which the packet's own first line takes the place of.
    text: bytes = "".join(node.toxml() for node in document.childNodes).encode()
    return text


def _prune(top: Any, patterns: tuple[re.Pattern[str], ...]) -> None:
    """Removes elements and attributes below a node. No recursion: nodes may lie deep."""
    nodes = [top]
    while nodes:
        node = nodes.pop()
        for name in list(node.attributes.keys()) if node.attributes else ():
            if _matches(name, patterns):
                node.removeAttribute(name)
        for child in list(node.childNodes):
            if child.nodeType == child.ELEMENT_NODE and _matches(child.tagName, patterns):
                node.removeChild(child)
            else:
                nodes.append(child)


def _matches(name: str, patterns: tuple[re.Pattern[str], ...]) -> bool:
    prefix, _, local = name.rpartition(":")
    return prefix != "xmlns" and any(pattern.search(local) for pattern in patterns)


def _resources(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Yields the number, all bytes and the content of each resource of Photoshop."""
    place = 0
    while data[place:].strip(b"\0"):
        # Behind the signature and the number: a name with its length, padded to an even size, and the content's length.
        if data[place : place + 4] != RESOURCE or place + 12 > len(data):
            raise ValueError("no resource")
        name = 1 + data[place + 6]
        start = place + 6 + name + name % 2
        size = int.from_bytes(data[start : start + 4], "big")
        end = start + 4 + size
        if end > len(data):
            raise ValueError("a resource is cut")
        yield int.from_bytes(data[place + 4 : place + 6], "big"), data[place : end + size % 2], data[start + 4 : end]
        place = end + size % 2


def _data_sets(data: bytes) -> Iterator[tuple[tuple[int, int], bytes]]:
    """Yields the key and all bytes of each data set of IPTC."""
    place = 0
    while data[place:].strip(b"\0"):
        mark, record, number, size = struct.unpack_from(">BBBH", data, place)
        head = 5
        if size & 0x8000:  # the length of the length
            head += size & 0x7FFF
            size = int.from_bytes(data[place + 5 : place + head], "big")
        if mark != 0x1C or place + head + size > len(data):
            raise ValueError("no data set")
        yield (record, number), data[place : place + head + size]
        place += head + size
