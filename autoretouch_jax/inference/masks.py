"""The user's masks: grey images, white where a photograph may be edited."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from autoretouch_jax.data.edits import LUMA
from autoretouch_jax.data.images import read_rgb
from autoretouch_jax.data.pairing import named_images, unique_names
from autoretouch_jax.errors import BadInput, Refused


class Masks:
    """One mask for every photograph of a job, or a folder of masks that is laid out as the job's results are."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        """Looks for the masks of photographs. `names` are the paths of their results below the job's folder.

        Raises Refused when there is no such file or folder, or a folder in which no photograph has a mask.
        """
        self.path, self._by_name = path, {}
        if path.is_dir():
            # Without the ending: the mask of a JPEG is best a PNG.
            self._by_name = unique_names(path, named_images(path, "--mask"))
            if not any(_without_ending(name) in self._by_name for name in names):
                raise Refused(f"--mask {path}: holds no mask for any of the photographs; {self._advice(names[0])}")
        elif not path.is_file():
            raise Refused(f"--mask {path}: no such file or folder")

    def read(self, name: str, size: tuple[int, int]) -> np.ndarray:
        """Returns the mask of a photograph, float32 `[h, w]` in [0, 1]. `size` is the photograph's, `(h, w)`, upright.

        Raises BadInput when it has no mask, or one of another size.
        """
        path: Any = self._by_name.get(_without_ending(name)) if self._by_name else self.path
        if path is None:
            advice = f"{self._advice(name)}, white where everything may be edited"
            raise BadInput(f"{name}: has no mask in --mask {self.path}; {advice}")
        grey = np.rint(read_rgb(path) @ LUMA).astype(np.float32) / 255
        if grey.shape != size:
            (height, width), (own_height, own_width) = size, grey.shape
            raise BadInput(
                f"{path}: the mask has {own_width}×{own_height} pixels and the photograph {width}×{height}, upright; "
                "make the mask as large as the photograph is shown"
            )
        return grey

    def _advice(self, name: str) -> str:
        return f"name one {_without_ending(name)}.png there"


def checked(mask: Any, size: tuple[int, int]) -> np.ndarray:
    """Returns a mask that a program gave, bool, uint8 or float `[h, w]`, as float32 in [0, 1]. Raises BadInput for others."""
    values = np.asarray(mask)
    if values.shape != size or not (values.dtype in (bool, np.uint8) or np.issubdtype(values.dtype, np.floating)):
        wanted = f"give bool, uint8, or float in [0, 1], {list(size)}, upright"
        raise BadInput(f"the mask is {values.dtype} {list(values.shape)}; {wanted}")
    values = values.astype(np.float32) / (255 if values.dtype == np.uint8 else 1)
    if not ((values >= 0) & (values <= 1)).all():  # NaN is neither
        raise BadInput("the mask has values outside [0, 1]; 0 forbids an edit and 1 allows it")
    return values


def _without_ending(name: str) -> str:
    # In the form of `unique_names`: macOS writes an umlaut as two characters.
    return unicodedata.normalize("NFC", PurePosixPath(name).with_suffix("").as_posix())
