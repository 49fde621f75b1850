"""The pictures of a run's report: the fixed validation faces, as data URLs."""

import base64
import io
import re
from typing import Any

from PIL import Image

from autoretouch_jax.training.history import read_bytes

FACES, TIMES = 4, 12  # the most faces, and the most moments of each
BUDGET = 4_000_000  # bytes of all pictures together, before base64 makes them a third larger
STEP = re.compile(r"\d{8}\.webp")


def faces(workdir: Any) -> list[dict[str, Any]]:
    """Returns the validation faces: `name`, `source`, `target`, `size`, and `outputs`, pairs of a step and a picture.

    The pictures are data URLs. Files that are cut are left out, and so is a face whose source is.
    """
    folders = _folders(workdir / "validation")[:FACES]
    for times in (TIMES, 6, 3, 2):
        found = [face for folder in folders if (face := _read(folder, times))]
        # Pictures that are larger than expected are shown at fewer moments rather than left out.
        if sum(len(data) for face in found for data in _contents(face)) <= BUDGET:
            break
    # Two moments of four faces may still be too much: then fewer faces are shown.
    while found and sum(len(data) for face in found for data in _contents(face)) > BUDGET:
        found.pop()
    return [_as_urls(face) for face in found]


def _folders(path: Any) -> list[Any]:
    try:
        return sorted((folder for folder in path.iterdir() if folder.is_dir()), key=lambda folder: folder.name)
    except Exception:  # no such folder, or a store that cannot be reached
        return []


def _read(folder: Any, times: int) -> dict[str, Any] | None:
    source, target = _picture(folder / "source.webp"), _picture(folder / "target.webp")
    if source is None:
        return None
    try:
        names = sorted(file.name for file in folder.iterdir() if STEP.fullmatch(file.name))
    except Exception:
        names = []
    outputs = [(int(name[:8]), data) for name in _spread(names, times) if (data := _picture(folder / name))]
    # The size keeps the place of a picture free while the page loads.
    with Image.open(io.BytesIO(source)) as image:
        size = image.size
    return {"name": folder.name, "source": source, "target": target, "outputs": outputs, "size": size}


def _spread(names: list[str], most: int) -> list[str]:
    """At most so many names, evenly spread, with the first and the last."""
    if len(names) <= most:
        return names
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


def _picture(path: Any) -> bytes | None:
    """The bytes of a picture, or None where it is missing or cannot be decoded."""
    data = read_bytes(path)
    if not data:
        return None
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except Exception:  # Pillow raises many kinds for a cut file
        return None
    return data


def _contents(face: dict[str, Any]) -> list[bytes]:
    return [face["source"], face["target"] or b"", *(data for _, data in face["outputs"])]


def _as_urls(face: dict[str, Any]) -> dict[str, Any]:
    def url(data: bytes | None) -> str | None:
        return "data:image/webp;base64," + base64.b64encode(data).decode() if data else None

    outputs = [(step, url(data)) for step, data in face["outputs"]]
    return face | {"source": url(face["source"]), "target": url(face["target"]), "outputs": outputs}
