"""Opens the source that the config's `data` group names, with the weights of an audit. A new kind of source is added here."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autoretouch_jax.config import DataConfig
from autoretouch_jax.data.face_parts import find_living_faces
from autoretouch_jax.data.folders import FaceSource, PairSource
from autoretouch_jax.data.records import RecordSource
from autoretouch_jax.data.sources import Source, whole
from autoretouch_jax.errors import BadInput, Refused
from autoretouch_jax.runtime import storage

MEASURED_FACES = 12  # images in which faces are measured, where `data.face_size` does not state their size


def open_source(config: DataConfig) -> Source:
    """Returns the source that a config names.

    Raises Refused, naming the faults. It also refuses a crop that is larger than the smallest image.
    """
    source = _open(config)
    if config.audit:
        source = Weighted(source, _audit_weights(Path(config.audit), source.names))
    # With `resize` every image has one size, and validation has compared it with the crop.
    path, width, height = source.smallest
    if not config.resize and config.crop > min(width, height):
        raise Refused(
            f"--data.crop {config.crop} is larger than {path} ({width}×{height}); choose a smaller crop, or leave it out"
        )
    return source


def _open(config: DataConfig) -> Source:
    if config.root:
        return FaceSource(Path(config.root), config.face_size)
    if config.records:
        return RecordSource(storage.open_path(config.records))
    if config.tfds:
        # TFDS takes seconds to import, and only this form needs it.
        from autoretouch_jax.data.tfds_source import TfdsSource

        return TfdsSource(Path(config.tfds), config.split)
    assert config.source
    assert config.target
    return PairSource(Path(config.source), Path(config.target), config.face_size)


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
    """A source with the weights of an audit. Examples of weight 0 are left out."""

    def __init__(self, source: Source, weights: dict[str, float]) -> None:
        self.source, self.weights, self.license = source, weights, source.license
        self.indices = [i for i, name in enumerate(source.names) if weights.get(name, 1.0) > 0]
        self.names = [source.names[i] for i in self.indices]
        self.smallest = source.smallest

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        example = self.source[self.indices[index]]
        # The weight multiplies the crop's own, and the loss takes their product.
        return dataclasses.replace(example, weight=self.weights.get(example.name, 1.0))


def _audit_weights(path: Path, names: Sequence[str]) -> dict[str, float]:
    """Returns `{name: weight}` of a file that `autoretouch data audit --json` wrote."""
    try:
        weights = {name: float(pair["weight"]) for name, pair in json.loads(path.read_text())["pairs"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"--data.audit {path}: not what `autoretouch data audit --json` writes ({error})") from error
    # Without this check, an audit of other data would silently have no effect.
    if not any(name in weights for name in names):
        raise Refused(f"--data.audit {path}: knows none of the pairs of this data set; audit the data that is trained on")
    if max(weights.get(name, 1.0) for name in names) <= 0:
        raise Refused(f"--data.audit {path}: gives every pair the weight 0; nothing would be left to train on")
    return weights
