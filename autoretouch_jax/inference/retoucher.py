"""The retoucher as a Python object: arrays, Pillow images and files in, the same retouched out.

docs/retouching.md shows it in use. `inference/job.py` is the command.
"""

import dataclasses
import io
from collections.abc import Iterable, Iterator
from os import PathLike
from typing import Any, get_args, overload

import numpy as np
from PIL import Image

from autoretouch_jax.config.paths import PRETRAINED
from autoretouch_jax.config.schema import Faces
from autoretouch_jax.errors import BadInput, Refused
from autoretouch_jax.inference import arrays, masks
from autoretouch_jax.inference.ahead import ahead
from autoretouch_jax.inference.edit import Edit, final_change, find_edit
from autoretouch_jax.inference.photo import Photo, encode, read_photo
from autoretouch_jax.models.folder import Model, load_model
from autoretouch_jax.runtime.storage import open_path

SMALLEST_FACE = 32  # pixels to which faces may be brought; in smaller ones no blemish is left
STRONGEST = 1.5  # beyond it, a spot that was removed becomes one of the opposite colour


class Retoucher:
    """A model that retouches photographs: `Retoucher.load()(image)`. Threads may share it.

    The keywords are the same everywhere. `strength` is from 0, which leaves an image as it is, to 1.5; 1 is all of the model's
    edit. `faces` is `auto`, `all` (also faces of which the detector is less sure) or `off` (the whole image). `mask` is bool,
    uint8 or float in [0, 1], of the image's upright height and width: where it is 0, nothing changes.
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    @classmethod
    def load(cls, model: Any = PRETRAINED, face_size: float | None = None, sha256: str | None = None) -> "Retoucher":
        """Returns a retoucher with the model in the box, or that of a run or a model/ folder, also in gs:// or s3://.

        `face_size` is the size in pixels to which faces are brought, by default the one that the model was trained at. `sha256`
        is what the model's weights, `model.safetensors`, must hash to. Raises Refused when there is no such model, when it is
        another one, or when the size is too small.
        """
        if face_size is not None and not face_size >= SMALLEST_FACE:
            advice = "leave it out for the size that the model was trained at"
            raise Refused(f"--face-size {face_size}: must be at least {SMALLEST_FACE} pixels; {advice}")
        loaded = load_model(model, sha256)
        return cls(dataclasses.replace(loaded, face_size=face_size or loaded.face_size))

    # ---- one image -----------------------------------------------------------------------------------------------------------

    @overload
    def __call__(self, image: np.ndarray, strength: float = 1.0, faces: Faces = "auto", mask: Any = None) -> np.ndarray: ...
    @overload
    def __call__(self, image: Image.Image, strength: float = 1.0, faces: Faces = "auto", mask: Any = None) -> Image.Image: ...
    @overload
    def __call__(self, image: str | PathLike, strength: float = 1.0, faces: Faces = "auto", mask: Any = None) -> bytes: ...

    def __call__(self, image: Any, strength: float = 1.0, faces: Faces = "auto", mask: Any = None) -> Any:
        """Returns the retouched image, of the kind that was given. What is left alone stays bit-identical.

        An array gives an array of the same type and shape: uint8, uint16 or float in [0, 1], `[H, W]`, `[H, W, 3]` or
        `[H, W, 4]`, taken for sRGB. A Pillow image gives one of the same mode, size and `info`. A path gives the bytes of a
        file of the same format, with its profile and metadata. Raises BadInput for an image of another kind or a file that
        cannot be read, and Refused for a strength or a word that is not known.
        """
        check(strength, faces)
        if isinstance(image, np.ndarray):
            photo = arrays.photo_of_array(image)
            return arrays.array_of(photo, self._pixels(photo, strength, faces, mask), image)
        if isinstance(image, Image.Image):
            photo, picture = arrays.photo_of_picture(image)
            return arrays.picture_of(self._pixels(photo, strength, faces, mask), picture)
        if isinstance(image, str | PathLike):
            photo = read_photo(io.BytesIO(open_path(image).read_bytes()), str(image))
            return encode(photo, self._pixels(photo, strength, faces, mask))
        raise BadInput(f"the image is a {type(image).__name__}; give an array, a Pillow image or the path of a file")

    def photograph(
        self, photo: Photo, strength: float = 1.0, faces: Faces = "auto", mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, Edit]:
        """Returns a decoded photograph's new pixels, as its file stores them, and what the model would change: see `Edit`.

        `mask` is float `[h, w]` in [0, 1], upright.
        """
        edit = self.edit(photo.seen(), faces)
        return photo.applied(final_change(self.model.config, edit, strength, mask)), edit

    def edit(self, seen: np.ndarray, faces: Faces = "auto") -> Edit:
        """Returns what the model would change in `uint8[h, w, 3]`, upright, in sRGB: see `Edit`."""
        return find_edit(self.model, seen, faces)

    # ---- many images ---------------------------------------------------------------------------------------------------------

    @overload
    def stream(self, images: Iterable[np.ndarray], strength: float = 1.0, faces: Faces = "auto") -> Iterator[np.ndarray]: ...
    @overload
    def stream(self, images: Iterable[Image.Image], strength: float = 1.0, faces: Faces = "auto") -> Iterator[Image.Image]: ...
    @overload
    def stream(self, images: Iterable[str | PathLike], strength: float = 1.0, faces: Faces = "auto") -> Iterator[bytes]: ...

    def stream(self, images: Iterable[Any], strength: float = 1.0, faces: Faces = "auto") -> Iterator[Any]:
        """Yields the retouched images in order. Threads work a few images ahead, and take no further ones meanwhile.

        An image that cannot be retouched raises in its turn and ends the stream.
        """
        check(strength, faces)
        return ahead(lambda image: self(image, strength, faces), images)

    @overload
    def batch(self, images: Iterable[np.ndarray], strength: float = 1.0, faces: Faces = "auto") -> list[np.ndarray]: ...
    @overload
    def batch(self, images: Iterable[Image.Image], strength: float = 1.0, faces: Faces = "auto") -> list[Image.Image]: ...
    @overload
    def batch(self, images: Iterable[str | PathLike], strength: float = 1.0, faces: Faces = "auto") -> list[bytes]: ...

    def batch(self, images: Iterable[Any], strength: float = 1.0, faces: Faces = "auto") -> list[Any]:
        """Returns the retouched images, several at a time. They may be of different kinds and sizes."""
        return list(self.stream(images, strength, faces))

    def _pixels(self, photo: Photo, strength: float, faces: Faces, mask: Any) -> np.ndarray:
        """Returns the new pixels of a photograph, with a mask that a program gave."""
        seen = photo.seen()
        checked = None if mask is None else masks.checked(mask, seen.shape[:2])
        return photo.applied(final_change(self.model.config, self.edit(seen, faces), strength, checked))


def check(strength: float, faces: str = "auto") -> None:
    """Raises Refused for a strength outside 0 to 1.5, and for a word that `faces` does not take."""
    if not 0 <= strength <= STRONGEST:
        ends = f"0 (the photo as it is) and {STRONGEST}; 1 is all of the model's retouch"
        raise Refused(f"--strength {strength}: must be between {ends}")
    if faces not in (words := get_args(Faces)):
        raise Refused(f"--faces {faces}: must be one of {', '.join(words)}")
