"""`autoretouch retouch`: photographs and folders in, the same retouched out, several at a time.

One thread does all of a photograph: it decodes, finds faces, runs the network, applies the edit, encodes and writes. While one
of them waits for the devices, the others decode and encode.
"""

import contextlib
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from autoretouch_jax.config.paths import PRETRAINED
from autoretouch_jax.config.schema import Faces, Metadata
from autoretouch_jax.data.images import read_header
from autoretouch_jax.errors import EXIT_DONE, EXIT_FAILED, BadInput, Refused, first_line
from autoretouch_jax.inference import compare, photo
from autoretouch_jax.inference.ahead import Room, ahead
from autoretouch_jax.inference.edit import Edit, final_change
from autoretouch_jax.inference.listing import Item, list_photographs, parse_shard, part
from autoretouch_jax.inference.masks import Masks
from autoretouch_jax.inference.outcomes import Outcome, Report, Status, summary
from autoretouch_jax.inference.retoucher import Retoucher, check
from autoretouch_jax.runtime import storage
from autoretouch_jax.runtime.failures import explain
from autoretouch_jax.runtime.stop import StopRequest

# Pixels of the photographs that are decoded at one time: as many as one large photograph has, which must fit in any case.
PIXELS_AT_ONCE = 100_000_000


@dataclass(frozen=True)
class Job:
    """What to retouch, and how: the flags of the command, which `RetouchArguments` explains."""

    photos: Sequence[Path]
    out: Path
    strength: float = 1.0
    faces: Faces = "auto"
    metadata: Metadata = "keep"
    mask: Path | None = None
    compare: Path | None = None
    report: Path | None = None
    skip_existing: bool = False
    shard: str | None = None


def run(job: Job, model: Any = PRETRAINED, face_size: float | None = None, stop: StopRequest | None = None) -> int:
    """Retouches every photograph of the job. Returns the exit status: 1 when some failed, 75 or 130 when it was stopped.

    The failed ones are named, and the others are written. Each file appears whole or not at all. Raises Refused before
    anything is written.
    """
    check(job.strength, job.faces)
    shard = parse_shard(job.shard) if job.shard else (1, 1)
    # The photographs are checked before the model is loaded, and both before a folder is made.
    listing = list_photographs(job.photos, job.out, [path for path in (job.mask, job.compare) if path])
    masks = Masks(job.mask, [item.name for item in listing.items]) if job.mask else None
    retoucher = Retoucher.load(model, face_size)
    items = part(listing.items, shard)
    outcomes = [Outcome(path, None, "skipped", reason=reason) for path, reason in part(listing.skipped, shard)]
    for folder in filter(None, (job.out, job.compare)):
        with storage.reachable(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
    pictures = [_picture_path(job.compare, item) for item in items] if job.compare else []
    storage.remove_parts([*(item.destination for item in items), *pictures])
    with stop or StopRequest() as stop, Report(job.report, job.skip_existing) as report, _without_pillows_warnings():
        for outcome in outcomes:
            report.add(outcome)
        # Closed even if the report cannot be written: no thread goes on then.
        with contextlib.closing(ahead(_Worker(job, retoucher, masks, stop, report), items)) as results:
            outcomes += tqdm(results, "retouching", len(items), unit="photo", dynamic_ncols=True, disable=None)
    summary(outcomes, len(items), job.out)
    statuses = {outcome.status for outcome in outcomes}
    if "stopped" in statuses and stop.exit_code is not None:
        return stop.exit_code
    return EXIT_FAILED if "failed" in statuses else EXIT_DONE


@contextlib.contextmanager
def _without_pillows_warnings() -> Iterator[None]:
    # They are about odd metadata and name no file. A photograph is read without a word, or named with the reason.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


class _Worker:
    """Retouches one photograph of a job after another, in several threads."""

    def __init__(self, job: Job, retoucher: Retoucher, masks: Masks | None, stop: StopRequest, report: Report) -> None:
        self.job, self.retoucher, self.masks, self.stop, self.report = job, retoucher, masks, stop, report
        self.room = Room(PIXELS_AT_ONCE)

    def __call__(self, item: Item) -> Outcome:
        """Returns what became of the photograph, and reports it at once: a job that is killed then has lost next to nothing."""
        outcome = self._outcome(item)
        self.report.add(outcome)
        return outcome

    def _outcome(self, item: Item) -> Outcome:
        """It raises nothing: one bad photograph does not stop the others."""
        started = time.perf_counter()
        try:
            if self.stop.exit_code is not None:
                return Outcome(item.source, item.destination, "stopped")
            if self.job.skip_existing and _is_there(item.destination):
                return Outcome(item.source, item.destination, "existing")
            with self.room.taken(_pixels(item.source)):
                started = time.perf_counter()  # without the time for which it waited
                return self._retouch(item, started)
        # Decoders meet any damage with any exception, and too little memory for this one may be enough for the next.
        except Exception as error:
            seconds = time.perf_counter() - started
            return Outcome(item.source, item.destination, "failed", None, None, seconds, _reason(error, item.source))

    def _retouch(self, item: Item, started: float) -> Outcome:
        """Writes one retouched photograph."""
        photograph = photo.read_photo(item.source)
        mask = self.masks.read(item.name, photograph.seen().shape[:2]) if self.masks else None
        pixels, edit = self.retoucher.photograph(photograph, self.job.strength, self.job.faces, mask)
        changed = _share_changed(pixels, photograph.pixels)
        if self.stop.exit_code is not None:
            return Outcome(item.source, item.destination, "stopped")
        # First the picture: a photograph that is there already has its picture too.
        if self.job.compare:
            self._compare(self.job.compare, item, photograph, edit, mask)
        faces = None if edit.faces is None else len(edit.faces)
        del edit  # ten bytes a pixel, while the encoder needs as much
        item.destination.parent.mkdir(parents=True, exist_ok=True)
        photo.write_photo(item.destination, photograph, pixels, self.job.metadata)
        status: Status = "retouched" if changed else "unchanged"
        return Outcome(item.source, item.destination, status, faces, changed, time.perf_counter() - started)

    def _compare(self, folder: Path, item: Item, photograph: photo.Photo, edit: Edit, mask: np.ndarray | None) -> None:
        """Writes the picture of `--compare` to its folder."""
        change = final_change(self.retoucher.model.config, edit, self.job.strength, mask)
        path = _picture_path(folder, item)
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write(path, compare.as_jpeg(compare.side_by_side(photograph.seen(), change)))


def _share_changed(new: np.ndarray, old: np.ndarray) -> float:
    """The share of the pixels that differ. By rows, because a large photograph takes much memory already."""
    return sum(int((a != b).any(-1).sum()) for a, b in zip(new, old, strict=True)) / (old.shape[0] * old.shape[1])


def _picture_path(folder: Path, item: Item) -> Path:
    # The whole name of the photograph: `a.png` and `a.jpg` may lie side by side.
    return folder / (item.name if item.source.suffix.lower() in (".jpg", ".jpeg") else f"{item.name}.jpg")


def _is_there(destination: Path) -> bool:
    # Results appear whole. An empty file is what another program, or a disk without power, has left.
    return destination.is_file() and destination.stat().st_size > 0


def _pixels(path: Path) -> int | None:
    """How many pixels the file states to have; None where that cannot be read."""
    header, _ = read_header(path)
    if header is not None:
        return header.width * header.height
    try:  # HEIC, which needs an extra
        import pillow_heif

        width, height = pillow_heif.open_heif(path).size
        return int(width * height)
    except Exception:  # none of its kind, or damaged in any way
        return None


def _reason(error: Exception, path: Path) -> str:
    """Why a photograph was left out, with its name."""
    if isinstance(error, BadInput | Refused):
        text = str(error)
    elif isinstance(error, MemoryError):
        text = "too little memory for a photograph of this size"
    else:
        text = explain(error, training=False) or f"{type(error).__name__}: {first_line(error)}"
    return text if str(path) in text else f"{path}: {text}"
