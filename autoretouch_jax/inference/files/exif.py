"""EXIF and the tags of a TIFF: directories of entries, removed and replaced in place, so that every other byte stays.

EXIF is a TIFF without pixels. The forms are those of TIFF 6.0, section 2, and of BigTIFF. Positions count from the first byte.
Broken data raise ValueError or struct.error, which callers catch together as `BROKEN`.
"""

import struct
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

BROKEN = (ValueError, struct.error)
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}  # of a type
INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
SHORT, LONG, LONG8, UNDEFINED = 3, 4, 16, 7
ORIENTATION, XMP, IPTC, PHOTOSHOP, EXIF_TAGS, GPS_TAGS, PREVIEWS, MAKER_NOTE = 274, 700, 33723, 34377, 34665, 34853, 330, 37500
PREVIEW_START, PREVIEW_SIZE = 513, 514  # of a JPEG in the second directory of EXIF
INTEROPERABILITY = 40965
DIRECTORIES = (EXIF_TAGS, GPS_TAGS, INTEROPERABILITY)  # entries whose value is the position of a further directory
# A camera maker's own notes are dropped with the location: their form is secret, and many hold a preview or a position.
UNSAFE = (GPS_TAGS, MAKER_NOTE, PREVIEWS, XMP, IPTC, PHOTOSHOP)
MOST_ENTRIES = 4096
PREFIX = b"Exif\0\0"
EMPTY = b"II*\0\x08\0\0\0" + bytes(6)  # EXIF, without its prefix, that states nothing
# Returns a JPEG of the retouched photograph in the size of another JPEG, and in no more bytes than these; b"" where none fits.
Preview = Callable[[bytes, int], bytes]


@dataclass(frozen=True)
class Entry:
    """One tag: its type and count, the positions of the entry and of its value, and the value's size in bytes."""

    tag: int
    kind: int
    count: int
    place: int
    value: int
    size: int


@dataclass(frozen=True)
class Directory:
    """The entries of one directory by their tags, its own position, and the one where that of the next directory is stated."""

    place: int
    entries: dict[int, Entry]
    next: int


class Tags:
    """The directories in a TIFF or in EXIF (without its prefix). `data` is changed in place, and may be bytes to read only."""

    def __init__(self, data: bytes | bytearray) -> None:
        self.data: Any = data
        self.order = {b"II": "<", b"MM": ">"}.get(bytes(data[:2]), "")
        version = struct.unpack_from(f"{self.order}H", data, 2)[0] if self.order else 0
        if version not in (42, 43):
            raise ValueError("no TIFF")
        self.big = version == 43
        self.pointer, self.counter = ("Q", "Q") if self.big else ("I", "H")
        self.step = 20 if self.big else 12  # bytes of an entry
        self.inline = 8 if self.big else 4  # bytes of a value that lies in its entry
        self.start = 8 if self.big else 4  # where the position of the first directory is stated

    def number(self, place: int, code: str) -> int:
        """Returns the number at a position; `code` is that of `struct`."""
        value: int = struct.unpack_from(self.order + code, self.data, place)[0]
        return value

    def put(self, place: int, code: str, value: int) -> None:
        """Writes a number at a position."""
        struct.pack_into(self.order + code, self.data, place, value)

    def first(self) -> Directory:
        """Returns the first directory."""
        return self.directory(self.number(self.start, self.pointer))

    def directory(self, place: int) -> Directory:
        """Returns the directory at a position. A value that lies outside the data has the size 0."""
        count, head = self.number(place, self.counter), struct.calcsize("=" + self.counter)
        if count > MOST_ENTRIES or place < 8:
            raise ValueError("no directory")
        entries = {}
        for at in range(place + head, place + head + count * self.step, self.step):
            tag, kind, number = struct.unpack_from(f"{self.order}HH{self.pointer}", self.data, at)
            size, value = SIZES.get(kind, 1) * number, at + self.step - self.inline
            if size > self.inline:
                value = self.number(value, self.pointer)
            if value + size > len(self.data):
                size = 0
            entries[tag] = Entry(tag, kind, number, at, value, size)
        end = place + head + count * self.step
        self.number(end, self.pointer)  # raises where the directory is cut
        return Directory(place, entries, end)

    def content(self, entry: Entry | None) -> bytes:
        """Returns the bytes of a value; b"" without an entry."""
        return bytes(self.data[entry.value : entry.value + entry.size]) if entry else b""

    def integers(self, entry: Entry | None, default: Sequence[int] = ()) -> tuple[int, ...]:
        """Returns the integers of a value; the default where it is absent, or something else."""
        if entry is None or entry.kind not in INTEGERS or not entry.size:
            return tuple(default)
        return struct.unpack_from(f"{self.order}{entry.count}{INTEGERS[entry.kind]}", self.data, entry.value)

    def remove(self, directory: Directory, tags: Collection[int]) -> Directory:
        """Removes entries with their values, and returns the directory that is left."""
        # The entries behind move up. Nothing else moves, because other entries state positions in the data.
        left = b"".join(self.data[e.place : e.place + self.step] for e in directory.entries.values() if e.tag not in tags)
        for entry in directory.entries.values():
            if entry.tag in tags:
                self.erase(entry)
        head, tail = struct.calcsize("=" + self.counter), struct.calcsize("=" + self.pointer)
        following = self.data[directory.next : directory.next + tail]
        start = directory.place + head
        self.data[start : directory.next + tail] = (left + following).ljust(directory.next + tail - start, b"\0")
        self.put(directory.place, self.counter, len(left) // self.step)
        return self.directory(directory.place)

    def erase(self, entry: Entry) -> None:
        """Overwrites a value with zeros, and the whole directory that it leads to."""
        if entry.tag in DIRECTORIES:
            for place in self.integers(entry):
                self.erase_directory(self.directory(place))
        if entry.size > self.inline:
            self.data[entry.value : entry.value + entry.size] = bytes(entry.size)

    def erase_directory(self, directory: Directory) -> None:
        """Overwrites a directory and its values with zeros."""
        for entry in directory.entries.values():
            # Only one level deep, so that directories which lead to each other come to an end.
            if entry.size > self.inline:
                self.data[entry.value : entry.value + entry.size] = bytes(entry.size)
        self.data[directory.place : directory.next] = bytes(directory.next - directory.place)


def safe(exif: bytes) -> bytes:
    """Returns EXIF of the same length without location, previews and maker's notes; b"" where it is broken."""
    prefix, tags = _parsed(exif)
    if tags is None:
        return b""
    try:
        for place in tags.integers(tags.first().entries.get(EXIF_TAGS)):
            tags.remove(tags.directory(place), UNSAFE)
        _remove_preview(tags, tags.remove(tags.first(), UNSAFE))
    except BROKEN:
        return b""
    return prefix + bytes(tags.data)


def renewed(exif: bytes, preview: Preview) -> bytes:
    """Returns EXIF whose preview shows the retouched photograph, in the old one's place. Every other byte stays.

    EXIF that is broken or has no preview is returned as it is. A preview of another kind than JPEG is removed.
    """
    prefix, tags = _parsed(exif)
    try:
        place = tags.number(tags.first().next, tags.pointer) if tags else 0
        if tags is None or not place:
            return exif
        directory = tags.directory(place)
        start, size = (tags.integers(directory.entries.get(tag), (0,))[0] for tag in (PREVIEW_START, PREVIEW_SIZE))
        new = preview(bytes(tags.data[start : start + size]), size) if start and start + size <= len(tags.data) else b""
        if new:
            tags.data[start : start + size] = new.ljust(size, b"\0")
            entry = directory.entries[PREVIEW_SIZE]
            tags.put(entry.value, INTEGERS[entry.kind], len(new))
        else:
            _remove_preview(tags, tags.first())
    except BROKEN:
        return exif
    return prefix + bytes(tags.data)


def only_orientation(orientation: int) -> bytes:
    """Returns EXIF, without its prefix, that states nothing else; b"" where the photograph is upright."""
    if orientation == 1:
        return b""
    return b"II*\0" + struct.pack("<IHHHIII", 8, 1, ORIENTATION, SHORT, 1, orientation, 0)


def adobe_rgb(exif: bytes) -> bool:
    """Whether EXIF says, by its interoperability index R03, that pixels without a profile are Adobe RGB (DCF 2.0)."""
    _, tags = _parsed(exif)
    try:
        directory = tags.first() if tags else None
        for tag in (EXIF_TAGS, INTEROPERABILITY):
            if tags and directory:
                directory = tags.directory(tags.integers(directory.entries.get(tag), (0,))[0])
        return bool(tags and directory and tags.content(directory.entries.get(1))[:3] == b"R03")
    except BROKEN:
        return False


def _parsed(exif: bytes) -> tuple[bytes, Tags | None]:
    prefix = PREFIX if exif.startswith(PREFIX) else b""
    try:
        return prefix, Tags(bytearray(exif[len(prefix) :]))
    except BROKEN:
        return prefix, None


def _remove_preview(tags: Tags, directory: Directory) -> None:
    """Removes the second directory, which describes a preview, and the preview."""
    place = tags.number(directory.next, tags.pointer)
    if not place:
        return
    second = tags.directory(place)
    starts, sizes = (tags.integers(second.entries.get(tag)) for tag in (PREVIEW_START, PREVIEW_SIZE))
    if not starts:  # a preview in strips
        starts, sizes = (tags.integers(second.entries.get(tag)) for tag in (273, 279))
    for start, size in zip(starts, sizes, strict=False):
        end = min(start + size, len(tags.data))
        tags.data[start:end] = bytes(max(0, end - start))
    tags.erase_directory(second)
    tags.put(directory.next, tags.pointer, 0)
