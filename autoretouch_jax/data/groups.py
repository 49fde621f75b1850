"""Which pairs belong together, so that a split does not tear them apart: those of one folder, one burst, or nearly alike.

Two photographs of one person, taken seconds apart, in training and in validation make every measure too good.
"""

import datetime
import io
import re
from collections.abc import Mapping
from typing import Protocol

from PIL import ExifTags, Image

BURST = datetime.timedelta(seconds=60)  # photographs with shorter pauses between them are a burst
COUNTED = re.compile(r"(.*\D)(\d{4,})\D*")  # a name with a camera's counter, such as IMG_0012 or DSC01234
MINUTE = re.compile(r".*(?:19|20)\d{6}[_-]?\d{4}")  # a name with date, hour and minute, such as PXL_20240131_120503
BLOCK = 10  # consecutive numbers of a camera's counter that are kept together
HEAD = 1 << 17  # bytes that hold a JPEG's EXIF data, which are at most 65536


class Readable(Protocol):
    """A file, on its own or inside a tar file."""

    def read(self, most: int = -1) -> bytes:
        """Returns its first bytes, or all."""


def groups(files: Mapping[str, Readable], alike: Mapping[str, str]) -> dict[str, str]:
    """Returns for each name the name of its group, which does not change when other groups are added.

    `files` are the photographs by name. `alike` gives those that an audit found to be nearly the same one name.
    """
    folders = {name: name.rpartition("/")[0] for name in files}
    # Where all lie in one folder, it says nothing about which of them belong together.
    several = len(set(folders.values())) > 1
    keys = {name: folder for name, folder in folders.items() if several and folder}
    keys |= _bursts({name: file for name, file in files.items() if name not in keys})
    return _joined(keys, alike)


def _bursts(files: Mapping[str, Readable]) -> dict[str, str]:
    """Groups photographs by when they were taken or, where their files do not say it, by what their names count."""
    taken = {name: time for name, file in files.items() if (time := _taken(file))}
    keys, first, before = {}, "", datetime.datetime.min
    for time, name in sorted((time, name) for name, time in taken.items()):
        if time - before > BURST:
            first = name
        keys[name], before = first, time
    return keys | {name: _counted(name) for name in files if name not in taken}


def _counted(name: str) -> str:
    """The minute or the block of a counter in a name; else the name itself."""
    if minute := MINUTE.match(name):
        return minute[0]
    if counted := COUNTED.fullmatch(name):
        return f"{counted[1]}{int(counted[2]) // BLOCK}"
    return name


def _taken(file: Readable) -> datetime.datetime | None:
    """When the camera took a photograph, if its EXIF data say so."""
    try:
        with Image.open(io.BytesIO(file.read(HEAD))) as image:
            # Pillow would decode a PNG to its end to look for them.
            if "exif" not in image.info:
                return None
            # Not the time of the last change, which an export sets for all photographs at once.
            text = str(image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.DateTimeOriginal, ""))
            return datetime.datetime.strptime(text[:19], "%Y:%m:%d %H:%M:%S")
    except Exception:  # decoders raise anything for damaged data, and then the time is not known
        return None


def _joined(keys: dict[str, str], alike: Mapping[str, str]) -> dict[str, str]:
    """Joins the groups of photographs that are alike."""
    joined: dict[str, str] = {}

    def root(key: str) -> str:
        while key in joined:
            key = joined[key]
        return key

    for name, shared in alike.items():
        if name in keys:
            # The shared name is usually that of a photograph, which may itself be in a folder or burst.
            a, b = sorted((root(keys[name]), root(keys.get(shared, shared))))
            if a != b:
                joined[b] = a
    return {name: root(key) for name, key in keys.items()}
