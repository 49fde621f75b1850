"""Files without a partner: names the file on the other side that shows the same photograph."""

import base64
import dataclasses
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from autoretouch_jax.audit import copies
from autoretouch_jax.audit.inputs import UnpairedFile, file_stamp, unpacked
from autoretouch_jax.audit.journal import Journal
from autoretouch_jax.audit.reading import ahead, read_reduced
from autoretouch_jax.errors import BadInput

LIKELY = 0.98  # correlation of thumbnails; a retouch changes it less than another photograph does
READ_AT = 128  # pixels of the longer side at which files are read for their thumbnails


def explain(unpaired: Sequence[UnpairedFile], journal: Journal) -> list[UnpairedFile]:
    """Adds to the message of a file without a partner which file of the other side it was probably renamed from."""
    single = [item for item in unpaired if item.code == "unpaired"]
    if {item.role for item in single} != {"source", "target"}:
        return list(unpaired)
    thumbnails = _thumbnails(single, journal)
    sides = [[item for item in single if item.role == role and str(item.file) in thumbnails] for role in ("source", "target")]
    if not all(sides):
        return list(unpaired)
    partner: dict[str, str] = {}
    for side, other in (sides, sides[::-1]):
        ours, theirs = (np.stack([thumbnails[str(item.file)] for item in items]) for items in (side, other))
        for item, number in zip(side, _nearest(ours, theirs), strict=True):
            if number >= 0:
                partner[str(item.file)] = str(other[number].file)
    return [
        dataclasses.replace(item, message=f"{item.message}; shows the same photo as {partner[str(item.file)]}: renamed?")
        if item.code == "unpaired" and str(item.file) in partner
        else item
        for item in unpaired
    ]


def _nearest(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Returns, for each of our thumbnails, the number of the most similar one of theirs, or -1 where that is another photo."""
    first, second = copies.vectors(ours), copies.vectors(theirs)
    nearest = np.empty(len(ours), np.int64)
    # Block by block, as in `copies.py`: comparing each with each by itself takes a day for 70,000 files.
    for start in range(0, len(ours), copies.BLOCK):
        part = slice(start, start + copies.BLOCK)
        likeness = first[part] @ second.T
        best = likeness.argmax(1)
        same = (likeness.max(1) > LIKELY) & (copies.differences(ours[part], theirs[best]) < copies.SAME)
        nearest[part] = np.where(same, best, -1)
    return nearest


def _thumbnails(items: Sequence[UnpairedFile], journal: Journal) -> dict[str, np.ndarray]:
    """Returns the thumbnail of each file that can be decoded, by its name."""
    by_name = {str(item.file): item.file for item in items}
    known = journal.section("thumbnail", lambda name: file_stamp(by_name[name]))
    packed = {name: known.get(name) for name in by_name}
    rest = [name for name, data in packed.items() if data is None]

    def read(name: str) -> str:
        try:
            with unpacked(by_name[name]) as path:
                return base64.b64encode(copies.small(read_reduced(path, READ_AT)[0]).tobytes()).decode()
        except (BadInput, OSError):
            return ""

    for name, data in tqdm(ahead(rest, read), "files without a partner", len(rest), unit="file", disable=None):
        packed[name] = known[name] = data
    return {name: np.frombuffer(base64.b64decode(data), np.uint8) for name, data in packed.items() if data}
