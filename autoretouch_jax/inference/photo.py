"""Photographs in, and the same photographs out. `files/` does the work; other files use these names."""

from pathlib import Path

import numpy as np

from autoretouch_jax.config.schema import Metadata
from autoretouch_jax.inference.files.encoding import encode
from autoretouch_jax.inference.files.reading import SUFFIXES, Photo, read_photo
from autoretouch_jax.runtime.storage import replacing

__all__ = ["SUFFIXES", "Photo", "encode", "read_photo", "write_photo"]


def write_photo(path: Path, photo: Photo, pixels: np.ndarray, metadata: Metadata = "keep") -> None:
    """Writes `encode(photo, pixels, metadata)`. The file appears whole or not at all."""
    data = encode(photo, pixels, metadata)
    with replacing(path) as part:
        part.write_bytes(data)
