"""TIFF: changed strips and tiles put into a copy of the file, in its own compression. Every other byte of it stays.

So metadata of any kind stay where they are, and so does the compressed form of what was not retouched. The directory of tags is
written anew behind the rest. Pixels in a form that cannot be written again (a palette, fewer than 8 bits, JPEG inside the TIFF)
are written as RGB or grey in Deflate, without losses. Tags and forms are those of TIFF 6.0 and of its technical notes.
"""

import dataclasses
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from autoretouch_jax.data import libvips
from autoretouch_jax.inference.files import exif
from autoretouch_jax.inference.files.exif import LONG, LONG8, SHORT, UNDEFINED, Directory, Tags
from autoretouch_jax.inference.files.metadata import Policy

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, ROWS, PLANES, PREDICTOR = 256, 257, 258, 259, 262, 277, 278, 284, 317
TILE_WIDTH, TILE_HEIGHT, EXTRA, FORM, COLOURS, LAYERS = 322, 323, 338, 339, 320, 37724
STRIPS, TILES = (273, 279), (324, 325)  # the tags of positions and sizes
PROFILE, SUBFILE, DNG_VERSION = 34675, 254, 50706
PREVIEW, UNSIGNED = 1, 1  # a bit of SUBFILE; a value of FORM
MODES = {0: "L", 1: "L", 2: "RGB", 3: "RGB", 5: "CMYK", 6: "RGB"}  # of the colours, by PHOTOMETRIC
MOST_PICTURES = 1000  # directories may lead to each other in a circle
NONE, LZW, DEFLATE, OLD_DEFLATE, PACKBITS = 1, 5, 8, 32946, 32773
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, CMYK = 0, 1, 2, 5
HORIZONTAL = 2  # the predictor that stores differences to the pixel on the left
MULTIPLIED = 1  # of the extra channel: alpha by which the colours are multiplied
FILL_ORDER = 266  # the order of the bits in a byte
OF_JPEG = (347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532)
# What `none` keeps: the form of the pixels, their profile, and how they are turned.
NEEDED = {WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, *STRIPS, exif.ORIENTATION, SAMPLES, ROWS, PLANES,
          PREDICTOR, COLOURS, TILE_WIDTH, TILE_HEIGHT, *TILES, 332, 334, EXTRA, FORM, PROFILE, *OF_JPEG}  # fmt: skip
LARGEST = 1 << 32  # bytes that a TIFF's positions reach
STRIP = 1 << 18  # bytes of a strip in a form that is written anew

Compress = Callable[[bytes, int, int], bytes]  # of bytes that are `width` to a row, by the number of a compression


@dataclasses.dataclass(frozen=True)
class Form:
    """How the pixels of a TIFF are stored. `block` is the height and width of its strips or tiles."""

    compression: int
    photometric: int
    predictor: int
    planar: bool
    tiled: bool
    block: tuple[int, int]
    samples: int
    can_be_written: bool


@dataclasses.dataclass(frozen=True)
class Header:
    """What the tags of the first picture state. `mode` is that of its colours: L, RGB or CMYK."""

    width: int
    height: int
    depth: int
    """Bytes of a pixel."""
    mode: str
    orientation: int
    profile: bytes
    fault: str = ""
    """What speaks against decoding it, "" for nothing."""


def header(data: Any) -> Header:
    """Returns what a TIFF states, from its bytes or a mapped file. Raises what `exif.BROKEN` names for broken tags."""
    tags = Tags(data)
    directory = tags.first()
    one = lambda tag, default: tags.integers(directory.entries.get(tag), (default,))[0]  # noqa: E731
    photometric, orientation = one(PHOTOMETRIC, BLACK_IS_ZERO), one(exif.ORIENTATION, 1)
    return Header(
        one(WIDTH, 0),
        one(HEIGHT, 0),
        one(SAMPLES, 1) * -(-one(BITS, 1) // 8),
        MODES.get(photometric, "RGB"),
        orientation if orientation in range(1, 9) else 1,
        tags.content(directory.entries.get(PROFILE)),
        _fault(tags, directory, photometric),
    )


def _fault(tags: Tags, directory: Directory, photometric: int) -> str:
    values = lambda tag, default: tags.integers(directory.entries.get(tag), (default,))  # noqa: E731
    if DNG_VERSION in directory.entries or values(SUBFILE, 0)[0] & PREVIEW:
        return "a camera's raw file, whose first picture is a preview; develop it, and save it as TIFF"
    if LAYERS in directory.entries:
        # An editor shows the layers, so that the retouch would not be seen; and without them work would be lost.
        return "a TIFF with layers; save a copy without layers"
    if (pictures := _pictures(tags, directory)) > 1:
        return f"{pictures} frames or pages; save the one to retouch as a file of its own"
    bits, form = set(values(BITS, 1)), set(values(FORM, UNSIGNED))
    if len(bits) > 1 or max(bits) > 16 or form != {UNSIGNED}:
        return "a TIFF with floating-point, signed or 32-bit pixels; convert it to 16 bits"
    if photometric not in MODES:
        return "a TIFF of other colours than grey, RGB and CMYK; convert it to RGB"
    places = TILES if TILE_WIDTH in directory.entries else STRIPS
    ends = (start + size for start, size in zip(*(values(tag, 0) for tag in places), strict=False))
    return "cut short (the file's end is missing); copy it again" if max(ends, default=0) > len(tags.data) else ""


def _pictures(tags: Tags, directory: Directory) -> int:
    """The number of pictures, up to `MOST_PICTURES`. Previews do not count."""
    pictures, places = 1, {directory.place}
    while (place := tags.number(directory.next, tags.pointer)) and place not in places and len(places) < MOST_PICTURES:
        places.add(place)
        directory = tags.directory(place)
        pictures += not tags.integers(directory.entries.get(SUBFILE), (0,))[0] & PREVIEW
    return pictures


def read(data: bytes) -> np.ndarray:
    """Returns the pixels as the file stores them, uint8 or uint16 `[H, W, C]`, but always with black as zero."""
    tags = Tags(data)
    extra = tags.first().entries.get(EXTRA)
    if extra and MULTIPLIED in tags.integers(extra):
        # libvips would divide the colours by their alpha, and so change pixels that are to stay as they are.
        tags = Tags(bytearray(data))
        struct.pack_into(f"{tags.order}{extra.count}H", tags.data, extra.value, *[2] * extra.count)
    return libvips.read(bytes(tags.data), "TIFF")


def written(data: bytes, old: np.ndarray, new: np.ndarray, policy: Policy, compress: Compress) -> bytes:
    """Returns a copy of a TIFF in which the `old` pixels, those that `read` returned, are the `new` ones."""
    tags = Tags(bytearray(data))
    directory = _filtered(tags, policy)
    changes: dict[int, tuple[int, list[int]]] = _new_metadata(tags, directory, policy)
    if not np.array_equal(old, new):
        form = form_of(tags, directory, new)
        if form.can_be_written:
            changes |= _blocks(tags, directory, form, old, new, compress)
        else:
            directory = tags.remove(directory, {COLOURS, TILE_WIDTH, TILE_HEIGHT, *TILES, *OF_JPEG})
            changes |= _anew(tags, new, compress)
    _write_directory(tags, directory, changes, following=policy.keeps and policy.preview is None)
    if not tags.big and len(tags.data) >= LARGEST:
        raise ValueError("the retouched TIFF would be larger than 4 GB; save the photograph as BigTIFF")
    return bytes(tags.data)


def form_of(tags: Tags, directory: Directory, pixels: np.ndarray) -> Form:
    """Returns how the pixels are stored, and whether this module can write them so."""
    one = lambda tag, default: tags.integers(directory.entries.get(tag), (default,))[0]  # noqa: E731
    height, width, samples = pixels.shape
    tiled = TILE_WIDTH in directory.entries
    block = (one(TILE_HEIGHT, 0), one(TILE_WIDTH, 0)) if tiled else (min(one(ROWS, height), height), width)
    planar = one(PLANES, 1) == 2 and samples > 1
    form = Form(one(COMPRESSION, NONE), one(PHOTOMETRIC, BLACK_IS_ZERO), one(PREDICTOR, 1), planar, tiled, block, samples, True)
    rows, columns = -(-height // max(1, block[0])), -(-width // max(1, block[1]))
    places, sizes = (tags.integers(directory.entries.get(name)) for name in (TILES if tiled else STRIPS))
    fits = (
        form.compression in (NONE, LZW, DEFLATE, OLD_DEFLATE, PACKBITS)
        and form.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, CMYK)
        and form.predictor in (1, HORIZONTAL)
        and set(tags.integers(directory.entries.get(BITS), (1,))) == {8 * pixels.itemsize}
        and one(SAMPLES, 1) == samples
        and one(FILL_ORDER, 1) == 1
        and len(places) == len(sizes) == rows * columns * (samples if planar else 1)
        and len(set(places)) == len(places)  # no block stands for several
    )
    return dataclasses.replace(form, can_be_written=fits)


# ---- pixels -----------------------------------------------------------------------------------------------------------------


def _blocks(
    tags: Tags, directory: Directory, form: Form, old: np.ndarray, new: np.ndarray, compress: Compress
) -> dict[int, tuple[int, list[int]]]:
    """Writes the strips or tiles in which a pixel changed, and returns the tags of all of them."""
    names = TILES if form.tiled else STRIPS
    starts, sizes = (list(tags.integers(directory.entries.get(name))) for name in names)
    for number, area in enumerate(_areas(new.shape, form)):
        if np.array_equal(old[area], new[area]):
            continue
        packed = _packed(new[area], form, tags.order, compress)
        if len(packed) <= sizes[number]:
            place = starts[number]
            tags.data[place : place + sizes[number]] = packed.ljust(sizes[number], b"\0")
        else:
            place = _append(tags, packed)
        starts[number], sizes[number] = place, len(packed)
    kind = LONG8 if tags.big else LONG
    return {names[0]: (kind, starts), names[1]: (kind, sizes)}


def _areas(shape: tuple[int, ...], form: Form) -> Iterator[tuple[slice, slice, slice]]:
    """The rows, columns and channels of each strip or tile, in the order of their positions."""
    height, width, samples = shape
    down, across = form.block
    for plane in range(samples) if form.planar else (None,):
        channels = slice(None) if plane is None else slice(plane, plane + 1)
        for top in range(0, height, down):
            for left in range(0, width, across):
                yield slice(top, min(top + down, height)), slice(left, min(left + across, width)), channels


def _packed(pixels: np.ndarray, form: Form, order: str, compress: Compress) -> bytes:
    """Returns the bytes of a strip or tile."""
    if form.photometric == WHITE_IS_ZERO:
        pixels = np.iinfo(pixels.dtype).max - pixels
    if form.tiled:  # tiles at the border are as large as the others
        missing = [(0, size - there) for size, there in zip(form.block, pixels.shape, strict=False)]
        pixels = np.pad(pixels, (*missing, (0, 0)), mode="edge")
    if form.predictor == HORIZONTAL:
        # Differences wrap around, as the integers do.
        pixels = np.concatenate([pixels[:, :1], pixels[:, 1:] - pixels[:, :-1]], 1)
    data = pixels.astype(f"{order}u{pixels.itemsize}").tobytes()
    if form.compression == NONE:
        return data
    if form.compression in (DEFLATE, OLD_DEFLATE):
        return zlib.compress(data)
    return compress(data, len(data) // len(pixels), form.compression)


def _anew(tags: Tags, new: np.ndarray, compress: Compress) -> dict[int, tuple[int, list[int]]]:
    """Appends all pixels in a form of their own, and returns its tags."""
    _, width, samples = new.shape
    rows = max(1, STRIP // (width * samples * new.itemsize))
    photometric = {1: BLACK_IS_ZERO, 2: BLACK_IS_ZERO}.get(samples, RGB)
    form = Form(DEFLATE, photometric, HORIZONTAL, False, False, (rows, width), samples, True)
    strips = [_packed(new[area], form, tags.order, compress) for area in _areas(new.shape, form)]
    tags_of_form = {BITS: [8 * new.itemsize] * samples, COMPRESSION: [DEFLATE], PHOTOMETRIC: [photometric], SAMPLES: [samples],
                    PLANES: [1], PREDICTOR: [HORIZONTAL], FILL_ORDER: [1]}  # fmt: skip
    if samples in (2, 4):
        tags_of_form[EXTRA] = [2]
    kind = LONG8 if tags.big else LONG
    places = {STRIPS[0]: [_append(tags, strip) for strip in strips], STRIPS[1]: [len(strip) for strip in strips], ROWS: [rows]}
    return {tag: (SHORT, values) for tag, values in tags_of_form.items()} | {tag: (kind, v) for tag, v in places.items()}


# ---- metadata ---------------------------------------------------------------------------------------------------------------


def _filtered(tags: Tags, policy: Policy) -> Directory:
    """Removes what the policy does not keep, and returns the first directory."""
    directory = tags.first()
    if policy.metadata == "none":
        return tags.remove(directory, {tag for tag in directory.entries if tag not in NEEDED})
    if policy.metadata == "safe":
        for place in tags.integers(directory.entries.get(exif.EXIF_TAGS)):
            tags.remove(tags.directory(place), exif.UNSAFE)
        return tags.remove(directory, {exif.GPS_TAGS, exif.MAKER_NOTE, exif.PREVIEWS})
    return tags.remove(directory, {exif.PREVIEWS} if policy.drops_previews else ())


def _new_metadata(tags: Tags, directory: Directory, policy: Policy) -> dict[int, tuple[int, list[int]]]:
    """Returns the tags of metadata of which something is dropped, with their new bytes."""
    changes: dict[int, tuple[int, list[int]]] = {}
    for tag, filtered in ((exif.XMP, policy.xmp), (exif.IPTC, policy.iptc), (exif.PHOTOSHOP, policy.photoshop)):
        content = tags.content(directory.entries.get(tag))
        if content and (left := filtered(content)) != content:
            tags.erase(directory.entries[tag])
            changes[tag] = (UNDEFINED if tag != exif.XMP else 1, list(left))
    return changes


# ---- the directory ----------------------------------------------------------------------------------------------------------


def _append(tags: Tags, content: bytes) -> int:
    """Puts bytes behind the file, at an even position, and returns it."""
    tags.data += bytes(len(tags.data) % 2)
    tags.data += content
    return len(tags.data) - len(content)


def _write_directory(tags: Tags, directory: Directory, changes: dict[int, tuple[int, list[int]]], following: bool) -> None:
    """Puts the first directory behind the file, with some tags changed; an empty list removes a tag.

    `following` keeps further directories, which hold previews: more than one picture is not read.
    """
    entries = {tag: bytes(tags.data[entry.place : entry.place + tags.step]) for tag, entry in directory.entries.items()}
    for tag, (kind, values) in changes.items():
        code = "B" if kind == UNDEFINED else exif.INTEGERS[kind]
        content = struct.pack(f"{tags.order}{len(values)}{code}", *values)
        field = content.ljust(tags.inline, b"\0")
        if len(content) > tags.inline:
            field = struct.pack(tags.order + tags.pointer, _append(tags, content))
        entries[tag] = struct.pack(f"{tags.order}HH{tags.pointer}", tag, kind, len(values)) + field
        if not values:
            del entries[tag]
    next_place = tags.number(directory.next, tags.pointer) if following else 0
    packed = struct.pack(tags.order + tags.counter, len(entries)) + b"".join(entries[tag] for tag in sorted(entries))
    place = _append(tags, packed + struct.pack(tags.order + tags.pointer, next_place))
    tags.put(tags.start, tags.pointer, place)
