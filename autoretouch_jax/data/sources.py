"""The protocols of a source and of its examples, an example whose images are in memory, and one with another weight.

`source[i]` is one example: its `name`, `height`, `width`, `weight`, a map of where its edit is, and `cut(box)`, which returns
`{"source", "target"}`, uint8 `[h, w, 3]` each. Clean faces have only `target`, and `regions` where a face is found
(`face_parts.py`). The sources are in `folders.py`, `records.py` and `tfds_source.py`; `opening.py` chooses among them.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from autoretouch_jax.data.crops import Box, edit_map

Images = dict[str, np.ndarray]


# Protocols, not base classes: a source of your own needs to inherit nothing.
class Example(Protocol):
    """One photograph, or a pair of them."""

    @property
    def name(self) -> str:
        """The example's name, unique in its source."""

    @property
    def height(self) -> int:
        """The height in pixels."""

    @property
    def width(self) -> int:
        """The width in pixels."""

    @property
    def weight(self) -> float:
        """Its weight in the loss; 1 by default."""

    def edits(self) -> np.ndarray:
        """Returns where the edit is: `uint8[⌈h / 16⌉, ⌈w / 16⌉]`, see `crops.edit_map`."""

    def cut(self, box: Box) -> Images:
        """Returns a box (top, left, height, width) of each image. Raises BadInput, naming the example, if it is unreadable."""


class Source(Protocol):
    """Examples by number. Training accepts any object with these members.

    Where processes make the batches, each gets a pickled copy of it.
    """

    names: list[str]
    smallest: tuple[Path, int, int]  # the example with the shortest side, its width and height
    sizes: list[tuple[int, int]]  # height and width of each example
    license: str | None  # the data's, if it is stated

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """Returns an `Example`."""


@dataclass(frozen=True)
class Decoded:
    """An example whose images are in memory."""

    name: str
    images: Images
    weight: float = 1.0

    @property
    def height(self) -> int:
        """The height in pixels."""
        return self.images["target"].shape[0]

    @property
    def width(self) -> int:
        """The width in pixels."""
        return self.images["target"].shape[1]

    def edits(self) -> np.ndarray:
        """See `Example.edits`. The map is computed on the first call, and kept."""
        return self._edits

    @functools.cached_property
    def _edits(self) -> np.ndarray:
        return edit_map(self.images["source"], self.images["target"])

    def cut(self, box: Box) -> Images:
        """Returns views of the images."""
        top, left, height, width = box
        # These are views: a caller that changes pixels must copy them first.
        return {name: image[top : top + height, left : left + width] for name, image in self.images.items()}


@dataclass(frozen=True)
class Reweighted:
    """An example with another weight. Its edit map stays the wrapped example's, which may have computed it already."""

    example: Example
    weight: float

    @property
    def name(self) -> str:
        """The example's name."""
        return self.example.name

    @property
    def height(self) -> int:
        """The height in pixels."""
        return self.example.height

    @property
    def width(self) -> int:
        """The width in pixels."""
        return self.example.width

    def edits(self) -> np.ndarray:
        """See `Example.edits`."""
        return self.example.edits()

    def cut(self, box: Box) -> Images:
        """See `Example.cut`."""
        return self.example.cut(box)


def whole(example: Example) -> Images:
    """Returns all pixels of an example's images."""
    return example.cut((0, 0, example.height, example.width))
