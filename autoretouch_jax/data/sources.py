"""What a source of training examples is: the protocol, and an example whose images are in memory.

`source[i]` is one example: its `name`, `height`, `width`, `weight`, a map of where its edit is, and `cut(box)`, which returns
`{"source", "target"}`, uint8 `[h, w, 3]` each. Clean faces have only `target`. The sources are in `folders.py`, `records.py`
and `tfds_source.py`; `opening.py` chooses among them.
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
        """Unique in its source."""

    @property
    def height(self) -> int:
        """In pixels."""

    @property
    def width(self) -> int:
        """In pixels."""

    @property
    def weight(self) -> float:
        """How much it counts in the loss; 1 by default."""

    def edits(self) -> np.ndarray:
        """Where the edit is: `uint8[⌈h / 16⌉, ⌈w / 16⌉]`, see `crops.edit_map`."""

    def cut(self, box: Box) -> Images:
        """A box (top, left, height, width) of each image. Raises BadInput, by name, when it cannot be read."""


class Source(Protocol):
    """Examples by number. Any source that has this trains."""

    names: list[str]
    smallest: tuple[Path, int, int]  # the example with the shortest side, its width and height
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
        """In pixels."""
        return self.images["target"].shape[0]

    @property
    def width(self) -> int:
        """In pixels."""
        return self.images["target"].shape[1]

    def edits(self) -> np.ndarray:
        """See `Example.edits`. It is computed when it is first asked for, and kept."""
        return self._edits

    @functools.cached_property
    def _edits(self) -> np.ndarray:
        return edit_map(self.images["source"], self.images["target"])

    def cut(self, box: Box) -> Images:
        """Returns views of the images."""
        top, left, height, width = box
        # Views: whoever changes the pixels copies them first.
        return {name: image[top : top + height, left : left + width] for name, image in self.images.items()}


def whole(example: Example) -> Images:
    """All of an example's pixels."""
    return example.cut((0, 0, example.height, example.width))
