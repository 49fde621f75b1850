"""`autoretouch retouch`: applies a model to photographs."""

import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from autoretouch_jax.data.images import list_images
from autoretouch_jax.errors import EXIT_DONE, EXIT_FAILED, BadInput, Refused
from autoretouch_jax.inference.apply import retouch_array
from autoretouch_jax.inference.photo import read_photo, write_photo
from autoretouch_jax.models.folder import load_model


def run(model: str | Path, photos: Sequence[Path], out: Path, strength: float) -> int:
    """Retouches every photograph into `out` under its own name. Returns the exit status: 1 when some failed.

    The failed ones are named, and the others are written.
    """
    if not 0 <= strength <= 1:
        raise Refused(f"--strength {strength}: must be between 0 (the photo as it is) and 1 (all of the model's retouch)")
    # The photographs are checked before the model is loaded, and both before the folder is made.
    jobs = _plan(photos, out)
    loaded = load_model(model)
    out.mkdir(parents=True, exist_ok=True)
    faults = []
    for path, destination in tqdm(jobs, desc="retouching", unit="photo", dynamic_ncols=True, disable=None):
        try:
            photo = read_photo(path)
            write_photo(destination, photo, retouch_array(loaded, photo.pixels, strength))
        # One bad photograph, or a write that fails, does not stop the others. Each is named at the end.
        except (BadInput, OSError) as error:
            faults.append(str(error))
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)
    print(f"{len(jobs) - len(faults)} of {len(jobs)} photo(s) written to {out}")
    return EXIT_FAILED if faults else EXIT_DONE


def _plan(photos: Sequence[Path], out: Path) -> list[tuple[Path, Path]]:
    """Returns `(photo, destination)` of every file. A folder stands for all images below it. No photo may be overwritten."""
    paths: list[Path] = []
    for photo in photos:
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
