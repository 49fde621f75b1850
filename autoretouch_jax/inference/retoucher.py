"""`autoretouch retouch`, and its counterpart in Python: a model applied to photographs."""

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from autoretouch_jax.config.paths import PRETRAINED
from autoretouch_jax.config.schema import Faces
from autoretouch_jax.data.colour import change_from_srgb, pixels_to_srgb
from autoretouch_jax.data.images import list_images
from autoretouch_jax.errors import EXIT_DONE, EXIT_FAILED, BadInput, Refused, summarise
from autoretouch_jax.inference.edit import Edit, apply_edit, find_edit
from autoretouch_jax.inference.photo import MODES, read_photo, write_photo
from autoretouch_jax.models.folder import Model, load_model
from autoretouch_jax.runtime.storage import replacing

SMALLEST_FACE = 32  # pixels to which faces may be brought; in smaller ones no blemish is left


class Retoucher:
    """A model that retouches photographs: `Retoucher.load()(image)`."""

    def __init__(self, model: Model) -> None:
        self.model = model

    @classmethod
    def load(cls, model: Any = PRETRAINED, face_size: float | None = None) -> "Retoucher":
        """Returns a retoucher with the model in the box, or that of a run or a model/ folder.

        `face_size` is the size in pixels to which faces are brought, by default the one that the model was trained at. Raises
        Refused when there is no such model, or the size is not positive.
        """
        if face_size is not None and not face_size >= SMALLEST_FACE:
            advice = "leave it out for the size that the model was trained at"
            raise Refused(f"--face-size {face_size}: must be at least {SMALLEST_FACE} pixels; {advice}")
        loaded = load_model(model)
        return cls(dataclasses.replace(loaded, face_size=face_size or loaded.face_size))

    def __call__(self, image: Any, strength: float = 1.0, faces: Faces = "auto") -> np.ndarray:
        """Returns the retouched image, `uint8[H, W, 3]`. `image` is such an array, or a Pillow image, which is turned upright.

        An array is taken for sRGB. A Pillow image with a colour profile is returned in the colours of that profile.
        `strength` 0 leaves it as it is. `faces` is `auto`, `all` (also faces of which the detector is less sure) or
        `off` (the whole image). Raises BadInput for an image of another kind.
        """
        profile = b""
        if isinstance(image, Image.Image):
            if image.mode not in MODES:
                raise BadInput(f"the image has {image.mode} pixels; convert it to 8-bit RGB first")
            profile = image.info.get("icc_profile") or b""
            image = ImageOps.exif_transpose(image).convert("RGB")
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
            raise BadInput(f"the image is {pixels.dtype} {list(pixels.shape)}; give uint8 [height, width, 3], RGB")
        return apply_edit(self.model.config, pixels, self.edit(pixels, faces, profile), strength)

    def edit(self, pixels: np.ndarray, faces: Faces = "auto", profile: bytes = b"") -> Edit:
        """Returns what the model would change in `uint8[H, W, 3]`, whose colours an ICC profile describes: see `Edit`."""
        # The network sees sRGB, as in training. What it would change is converted, so that other pixels stay as they are.
        seen = pixels_to_srgb(pixels, profile)
        edit = find_edit(self.model, seen, faces)
        return edit._replace(change=change_from_srgb(seen, edit.change, profile))


def run(
    photos: Sequence[Path], out: Path, model: str | Path, strength: float, faces: Faces, face_size: float | None = None
) -> int:
    """Retouches every photograph into `out` under its own name. Returns the exit status: 1 when some failed.

    The failed ones are named, and the others are written.
    """
    if not 0 <= strength <= 1:
        raise Refused(f"--strength {strength}: must be between 0 (the photo as it is) and 1 (all of the model's retouch)")
    # The photographs are checked before the model is loaded, and both before the folder is made.
    jobs = _plan(photos, out)
    retoucher = Retoucher.load(model, face_size)
    out.mkdir(parents=True, exist_ok=True)
    faults: list[str] = []
    faceless: list[str] = []
    for path, destination in tqdm(jobs, desc="retouching", unit="photo", dynamic_ncols=True, disable=None):
        try:
            edit = _retouch(retoucher, path, destination, strength, faces)
            if edit.faces == []:
                faceless.append(path.name)
        # One bad photograph, or a write that fails, does not stop the others. Each is named at the end.
        except (BadInput, OSError) as error:
            faults.append(str(error))
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)
    if faceless:
        print(f"no face found, written unchanged: {summarise(faceless)}; --faces off retouches a photograph as a whole")
    print(f"{len(jobs) - len(faults)} of {len(jobs)} photo(s) written to {out}")
    return EXIT_FAILED if faults else EXIT_DONE


def _retouch(retoucher: Retoucher, path: Path, destination: Path, strength: float, faces: Faces) -> Edit:
    """Writes one retouched photograph, and returns its edit."""
    photo = read_photo(path)
    upright = photo.upright()
    edit = retoucher.edit(upright, faces, photo.profile)
    pixels = photo.as_stored(apply_edit(retoucher.model.config, upright, edit, strength))
    if np.array_equal(pixels, photo.pixels):
        # The same bytes: encoding a JPEG again would change a photograph in which there was nothing to do.
        with replacing(destination) as part:
            shutil.copyfile(path, part)
    else:
        write_photo(destination, photo, pixels)
    return edit


def _plan(photos: Sequence[Path], out: Path) -> list[tuple[Path, Path]]:
    """Returns `(photo, destination)` of every file. A folder stands for all images below it. No photo may be overwritten."""
    paths: list[Path] = []
    for photo in photos:
        if photo.is_dir() and ((photo / "model.json").is_file() or (photo / "model").is_dir()):
            raise Refused(f"photo {photo}: is a model; name it with --model {photo}")
        if photo.is_dir():
            paths += list_images(photo)
        elif photo.is_file():
            paths.append(photo)
        else:
            raise Refused(f"photo {photo}: no such file")
    if not paths:
        raise Refused("no photos: the folders given hold no images")
    destinations: dict[Path, Path] = {}
    for path in paths:
        destination = out / path.name
        # Writing one over the other would lose a retouched photograph without a word.
        if destination in destinations:
            raise Refused(f"{destinations[destination]} and {path} have the same name; retouch them into different folders")
        if destination.resolve() == path.resolve():
            raise Refused(f"--out {out}: {path} would overwrite itself; choose another folder")
        destinations[destination] = path
    return [(path, destination) for destination, path in destinations.items()]
