"""Opens the source that the config's `data` group names, with the weights of an audit. A new kind of source is added here."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from autoretouch_jax.config import DataConfig
from autoretouch_jax.data.audit_file import Audit, advising_an_audit, read_audit
from autoretouch_jax.data.face_parts import find_living_faces
from autoretouch_jax.data.folders import FaceSource, PairSource
from autoretouch_jax.data.records import RecordSource
from autoretouch_jax.data.sources import Reweighted, Source, whole
from autoretouch_jax.errors import BadInput, Refused, summarise
from autoretouch_jax.runtime import processes, storage

MEASURED_FACES = 12  # images in which faces are measured, where `data.face_size` does not state their size


def open_source(config: DataConfig) -> Source:
    """Returns the source that a config names.

    Raises Refused, naming the faults. It also refuses a crop that is larger than the smallest image. Of pairs that an audit has
    judged, those that are too small are left out instead, and named on stderr.
    """
    audit = read_audit(Path(config.audit), "--data.audit") if config.audit else None
    source: Any = _open(config, audit)
    warnings = list(source.files.warnings) if isinstance(source, PairSource) else audit.check(source.names) if audit else []
    # Records may have been made with an audit, whose weights they hold. An audit that is given now takes precedence.
    weights: dict[str, float] | None = getattr(source, "weights", None)
    if audit:
        weights = (weights or {}) | audit.weights
    if weights is not None:
        source = Weighted(source, weights, 0 if config.resize else config.crop)
        warnings += source.warnings
    for warning in warnings if processes.is_first() else ():
        print(warning, file=sys.stderr)
    # With `resize` every image has one size, and validation has compared it with the crop.
    path, width, height = source.smallest
    if not config.resize and config.crop > min(width, height):
        raise Refused(
            f"--data.crop {config.crop} is larger than {path} ({width}×{height}); choose a smaller crop, or leave it out"
        )
    return source


def _open(config: DataConfig, audit: Audit | None) -> Source:
    if config.root:
        return FaceSource(Path(config.root), config.face_size)
    if config.records:
        return RecordSource(storage.open_path(config.records))
    if config.tfds:
        # TFDS takes seconds to import, and only this form needs it.
        from autoretouch_jax.data.tfds_source import TfdsSource

        return TfdsSource(Path(config.tfds), config.split, config.edit_threshold)
    assert config.source
    assert config.target
    roots = Path(config.source), Path(config.target)
    with advising_an_audit("--data.audit", audit, roots):
        return PairSource(*roots, config.face_size, audit, config.edit_threshold)


def typical_face_size(source: Source, config: DataConfig) -> float | None:
    """Returns the usual size of the faces that a network is trained on, in pixels of its crops.

    It is `data.face_size`, or else the median over the first images; None where no face is found in them.
    """
    centre = float(np.sqrt(config.zoom[0] * config.zoom[1]))
    if config.face_size:
        return round(config.face_size * centre, 1)
    sizes = []
    for index in range(min(MEASURED_FACES, len(source))):
        try:
            image = whole(source[index])["target"]
        except BadInput:  # training counts unreadable examples
            continue
        if faces := find_living_faces(image):
            # pix2pix resizes every photograph to one side.
            sizes.append(faces[0].size * (config.resize / min(image.shape[:2]) if config.resize else 1.0))
    return round(float(np.median(sizes)) * centre, 1) if sizes else None


class Weighted:
    """A source with the weights of an audit. Examples of weight 0 are left out, and those with a side shorter than `side`."""

    def __init__(self, source: Any, weights: dict[str, float], side: int = 0) -> None:
        """`source` also has `sizes`, the height and width of each example. Raises Refused when nothing is left."""
        self.source, self.weights, self.license = source, weights, source.license
        self.edit_threshold: float | None = getattr(source, "edit_threshold", 0.0)
        sound = [i for i, name in enumerate(source.names) if weights.get(name, 1.0) > 0]
        self.indices = [i for i in sound if min(source.sizes[i]) >= side]
        self.names = [source.names[i] for i in self.indices]
        # An audit cannot know the crop, so a small image is no fault to it.
        small = [source.names[i] for i in sound if min(source.sizes[i]) < side]
        if not self.names:
            raise Refused(f"--data.crop {side} is larger than every pair that the audit finds sound; choose a smaller crop")
        self.warnings = [f"left out {len(small)} pairs smaller than --data.crop {side}: {summarise(small)}"] if small else []
        height, width = min((source.sizes[i] for i in self.indices), key=min)
        # The number of the first example of this size, for its name.
        first = next(i for i in self.indices if tuple(source.sizes[i]) == (height, width))
        self.smallest = Path(source.names[first]), width, height

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        example = self.source[self.indices[index]]
        # The weight multiplies the crop's own, and the loss takes their product.
        return Reweighted(example, self.weights.get(example.name, 1.0))

    def marks(self) -> list[str]:
        """Returns a text for each example that changes with its files."""
        # A source of one's own need not give marks.
        marks = self.source.marks() if hasattr(self.source, "marks") else [""] * len(self.source)
        return [marks[i] for i in self.indices]
