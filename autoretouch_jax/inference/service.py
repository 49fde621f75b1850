"""What `autoretouch serve` does with one upload: look at its size, decode it, find the edit, apply it, encode. No HTTP here.

Calls may come from several threads at once. Nothing of an upload is written to a log, or to a disk but for the moment in which
a JPEG is encoded (`files/blocks.py`).
"""

import hashlib
import io
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from autoretouch_jax.config.schema import Faces, Metadata
from autoretouch_jax.data.images import FORMATS
from autoretouch_jax.errors import BadInput
from autoretouch_jax.inference.ahead import Room
from autoretouch_jax.inference.compare import as_jpeg
from autoretouch_jax.inference.edit import Edit, final_change
from autoretouch_jax.inference.files.unsupported import HEAD, fault_of_kind
from autoretouch_jax.inference.photo import Photo, encode, read_photo
from autoretouch_jax.inference.retoucher import Retoucher

NAME = "the photograph"  # in messages: an upload has no name
KEPT_BYTES = 1 << 29  # of edits that wait for another strength; a photograph of 50 megapixels has one of 500 MB
KEPT_SECONDS = 600.0
PREVIEW_SIDE = 8192  # pixels; a browser shows larger pictures badly or not at all


class TooLarge(BadInput):
    """An upload with more pixels than are accepted."""


class WrongKind(BadInput):
    """An upload that is no image, or one of a kind that is not read."""


@dataclass(frozen=True)
class Options:
    """What a request asks for; the flags of `autoretouch retouch`."""

    strength: float = 1.0
    faces: Faces = "auto"
    metadata: Metadata = "keep"


class Answer(NamedTuple):
    """A file, its media type, the photograph's upright size in pixels, and what was found; None where nothing was sought."""

    data: bytes
    media_type: str
    size: tuple[int, int]
    """Width and height."""
    faces: int | None
    changed: float | None
    """Share of the pixels that differ from the photograph's."""


class KeptEdits:
    """The newest edits, so that another strength of the same photograph needs no network. Bounded in bytes and in time."""

    def __init__(self, room: int = KEPT_BYTES, seconds: float = KEPT_SECONDS, clock: Callable[[], float] = time.monotonic):
        self._edits: OrderedDict[str, tuple[Edit, float]] = OrderedDict()
        self._room, self._seconds, self._clock = room, seconds, clock
        self._lock = threading.Lock()

    def get(self, key: str) -> Edit | None:
        """Returns the edit of that key where it is still there, and keeps it for longer."""
        self.forget_old()
        with self._lock:
            if key not in self._edits:
                return None
            edit = self._edits.pop(key)[0]
            self._edits[key] = (edit, self._clock() + self._seconds)
            return edit

    def put(self, key: str, edit: Edit) -> None:
        """Keeps an edit, unless it alone needs more room than there is. The oldest make room for it."""
        with self._lock:
            self._edits.pop(key, None)
            if _bytes(edit) > self._room:
                return
            self._edits[key] = (edit, self._clock() + self._seconds)
            while sum(_bytes(kept) for kept, _ in self._edits.values()) > self._room:
                self._edits.popitem(last=False)

    def forget_old(self) -> None:
        """Drops what nobody has asked for in its time."""
        with self._lock:
            # The order is that of the last use, and with it that of the ends.
            while self._edits and next(iter(self._edits.values()))[1] <= self._clock():
                self._edits.popitem(last=False)

    def __len__(self) -> int:
        return len(self._edits)


def _bytes(edit: Edit) -> int:
    return edit.change.nbytes + (0 if edit.mask is None else edit.mask.nbytes)


class Service:
    """A retoucher for uploads. `retouch` returns what the command would write; `preview` returns a picture for the page.

    Both raise BadInput with the reason for a file that is no photograph, and TooLarge for one with too many pixels.
    """

    def __init__(self, retoucher: Retoucher, max_pixels: int) -> None:
        self._retoucher = retoucher
        self._max_pixels = max_pixels
        # One photograph of the largest size, or several smaller ones: the memory for one must be there in any case.
        self._room = Room(max_pixels)
        self.kept = KeptEdits()

    def retouch(self, upload: BinaryIO, options: Options) -> Answer:
        """Returns the retouched file: the very bytes that `autoretouch retouch` writes for these options."""
        data = upload.read()
        with self._decoded(data) as photo:
            edit = self.kept.get(_key(data, options.faces)) or self._retoucher.edit(photo.seen(), options.faces)
            pixels = photo.applied(final_change(self._retoucher.model.config, edit, options.strength))
            changed = float((pixels != photo.pixels).any(-1).mean())
            file = encode(photo, pixels, options.metadata)
        kind = Image.MIME.get(photo.format, "application/octet-stream")
        return Answer(file, kind, _size(edit.change), _faces(edit), changed)

    def preview(self, upload: BinaryIO, options: Options) -> Answer:
        """Returns a JPEG in sRGB, upright, of at most `PREVIEW_SIDE` pixels a side. Strength 0 shows the photograph as it is.

        The edit is kept for a while: another strength, or the file itself, then comes without the network.
        """
        data = upload.read()
        with self._decoded(data) as photo:
            seen = photo.seen()
            if not options.strength:
                return Answer(_jpeg(seen), "image/jpeg", _size(seen), None, None)
            key = _key(data, options.faces)
            edit = self.kept.get(key)
            if edit is None:
                edit = self._retoucher.edit(seen, options.faces)
                self.kept.put(key, edit)
            change = final_change(self._retoucher.model.config, edit, options.strength)
            # Only what changes is computed: most of a photograph does not.
            where = change.any(-1)
            after = seen.copy()
            after[where] = np.clip(np.rint(seen[where] + change[where]), 0, 255)
            return Answer(_jpeg(after), "image/jpeg", _size(seen), _faces(edit), float(where.mean()))

    @contextmanager
    def _decoded(self, data: bytes) -> Iterator[Photo]:
        """Decodes an upload when there is room for its pixels, and takes the room for the time of the block."""
        # What the header states is looked at before a pixel is decoded: a small file may hold a huge picture.
        stated = self._check_pixels(_stated_size(data))
        with self._room.taken(stated or None):
            try:
                photo = read_photo(io.BytesIO(data), NAME)
            except BadInput as error:
                raise _kind_of_fault(error, data)(str(error)) from error
            self._check_pixels(_size(photo.pixels))
            yield photo

    def _check_pixels(self, size: tuple[int, int]) -> int:
        width, height = size
        if width * height > self._max_pixels:
            limit = f"the {self._max_pixels / 1e6:g} million that are accepted"
            raise TooLarge(f"{NAME}: {width}×{height} pixels, more than {limit}; scale it down")
        return width * height


def _stated_size(data: bytes) -> tuple[int, int]:
    """The size that a file's header states; 0 × 0 where it cannot be read, for which `read_photo` then gives the reason."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.size
    except Exception:  # each of Pillow's decoders has its own exceptions
        return 0, 0


def _kind_of_fault(error: BadInput, data: bytes) -> type[BadInput]:
    """The exception for an upload that cannot be read."""
    if isinstance(error.__cause__, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return TooLarge
    # Pillow does not know it, or a package that would is missing.
    unknown = isinstance(error.__cause__, UnidentifiedImageError | ModuleNotFoundError)
    return WrongKind if unknown or fault_of_kind(data[:HEAD]) else BadInput


def _key(data: bytes, faces: Faces) -> str:
    return f"{hashlib.sha256(data).hexdigest()} {faces}"


def _size(image: np.ndarray) -> tuple[int, int]:
    """The width and height of `[height, width, …]`."""
    return image.shape[1], image.shape[0]


def _faces(edit: Edit) -> int | None:
    return None if edit.faces is None else len(edit.faces)


def _jpeg(pixels: np.ndarray) -> bytes:
    if max(pixels.shape) > PREVIEW_SIDE:
        picture = Image.fromarray(pixels)
        picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        pixels = np.asarray(picture)
    return as_jpeg(pixels)
