"""Opens what is measured while training: pairs, or clean faces with fixed blemishes, and photographs to be left alone."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autoretouch_jax.config import DataConfig
from autoretouch_jax.data.blemishes import add_blemishes
from autoretouch_jax.data.folders import FaceSource, PairSource, PhotoSource
from autoretouch_jax.data.records import RecordSource
from autoretouch_jax.data.sources import Decoded, Source, whole
from autoretouch_jax.runtime import storage


class Some:
    """So many examples of a source, evenly spaced over it."""

    def __init__(self, source: Source, count: int) -> None:
        self.source, self.license = source, source.license
        self.edit_threshold: float | None = getattr(source, "edit_threshold", 0.0)
        self.indices = [int(i) for i in np.linspace(0, len(source) - 1, min(count, len(source))).round()]
        self.names: Sequence[str] = [source.names[i] for i in self.indices]
        self.smallest = source.smallest

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.source[self.indices[index]]


class Blemished(Some):
    """Clean faces with blemishes as `source`. They are drawn from the example's number, so they are the same every time."""

    def __init__(self, source: Source, count: int, config: DataConfig) -> None:
        super().__init__(source, count)
        # Every face gets some: without an edit there is nothing to measure.
        self.blemish = dataclasses.replace(config.blemish, clean_share=0.0)

    def __getitem__(self, index: int) -> Decoded:
        """Returns a pair. Raises BadInput, naming the file, if it is unreadable."""
        images = whole(super().__getitem__(index))
        target = images["target"]
        rng = np.random.default_rng([self.indices[index], 1])
        blemished = add_blemishes(rng, target, self.blemish, images.get("regions"))
        return Decoded(self.names[index], {"source": blemished, "target": target})


def open_validation(config: DataConfig) -> tuple[Any, Any]:
    """Returns the pairs and the photographs to be left alone that `data.validation` names, None where it names none.

    Raises Refused, naming the faults.
    """
    given = config.validation
    pairs, alone = _pairs(config), None
    if given.alone:
        alone = Some(PhotoSource(Path(given.alone), "--data.validation.alone"), given.images)
    return pairs, alone


def _pairs(config: DataConfig) -> Any:
    given = config.validation
    if given.root:
        return Blemished(FaceSource(Path(given.root), config.face_size, "--data.validation.root"), given.images, config)
    if given.source and given.target:
        roots = Path(given.source), Path(given.target)
        return Some(PairSource(*roots, config.face_size, edit_threshold=config.edit_threshold), given.images)
    if given.records:
        return Some(RecordSource(storage.open_path(given.records)), given.images)
    if given.tfds:
        # TFDS takes seconds to import, and only this form needs it.
        from autoretouch_jax.data.tfds_source import TfdsSource

        return Some(TfdsSource(Path(given.tfds), given.split, config.edit_threshold), given.images)
    return None
