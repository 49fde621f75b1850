"""Finds faces in photographs, and where their skin is. The only importer of dlib.

The detector (histograms of oriented gradients, Dalal and Triggs 2005; King 2015) is compiled into dlib, so nothing is
downloaded. benchmarks/README.md compares it with three others. Images are uint8 `[H, W, 3]`, RGB. A face's size is the side of
the detector's square, in pixels: it reaches from the brows to below the lips, and is about half as wide as a head is high.
"""

import threading
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageFilter

Found = Literal["auto", "all"]

# The longer side of the image in which faces are looked for. The detector's window is 80 pixels wide: small photographs are
# enlarged, and in large ones a face must be a thirtieth of the longer side.
SEARCHED = (1000, 2400)
SURE, UNSURE = 0.5, 0.0  # the detector's scores that `auto` and `all` ask for; portraits score 1 to 3, a statue 0.6
SMALLEST = 56  # faces below this size, in pixels, have no skin to speak of
# The detector's sizes are 20 % apart. The face is looked at again at these sizes, and the median of what is found is taken.
REFINED_AT = (88, 94, 100, 107, 114, 122)
SKIN_CHROMA = 0.05  # the distance, in shares of red and green, within which a colour counts as a face's skin


@dataclass(frozen=True)
class Face:
    """A face: the centre and side of its square in pixels, and the detector's score."""

    y: float
    x: float
    size: float
    score: float


def find_faces(image: np.ndarray, found: Found = "auto") -> list[Face]:
    """Returns the faces of a photograph, the largest first. `all` also returns those that the detector is less sure of."""
    height, width = image.shape[:2]
    longer = max(height, width)
    scale = min(max(longer, SEARCHED[0]), SEARCHED[1]) / longer
    # A strip of a few pixels has no room for a head, and enlarging it could take all memory.
    if min(height, width) < 2 * SMALLEST:
        return []
    faces = [
        _refined(image, face) for face in _detect(image, (0, 0, width, height), scale, SURE if found == "auto" else UNSURE)
    ]
    faces = [face for face in faces if face.size >= SMALLEST and _has_skin(image, face)]
    return sorted(faces, key=lambda face: -face.size)


def scaled(image: np.ndarray, faces: list[Face], factor: float) -> tuple[np.ndarray, list[Face]]:
    """Returns a photograph resized by a factor, and its faces there."""
    height, width = image.shape[:2]
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    resized = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
    return np.asarray(resized), [Face(f.y * factor, f.x * factor, f.size * factor, f.score) for f in faces]


_own = threading.local()


def _detector() -> Any:
    """This thread's detector: dlib's objects keep their work in themselves, and two threads in one of them crash."""
    if not hasattr(_own, "detector"):
        import dlib

        _own.detector = dlib.get_frontal_face_detector()
    return _own.detector


def _detect(image: np.ndarray, box: tuple[int, int, int, int], scale: float, score: float) -> list[Face]:
    """Looks for faces inside a box (left, top, right, bottom), resized by `scale`."""
    left, top, right, bottom = box
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    looked_at = Image.fromarray(image[top:bottom, left:right]).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    rectangles, scores, _ = _detector().run(np.ascontiguousarray(looked_at), 0, score)
    return [
        Face(top + (r.top() + r.height() / 2) / scale, left + (r.left() + r.width() / 2) / scale, r.width() / scale, float(s))
        for r, s in zip(rectangles, scores, strict=True)
    ]


def _refined(image: np.ndarray, face: Face) -> Face:
    """Returns the face with its square measured more finely than in the detector's own steps."""
    height, width = image.shape[:2]
    reach = 1.1 * face.size
    box = (
        max(0, int(face.x - reach)),
        max(0, int(face.y - reach)),
        min(width, int(face.x + reach)),
        min(height, int(face.y + reach)),
    )
    again = []
    for side in REFINED_AT:
        near = [
            other
            for other in _detect(image, box, side / face.size, UNSURE)
            if abs(other.x - face.x) + abs(other.y - face.y) < 0.5 * face.size and 0.6 < other.size / face.size < 1.6
        ]
        again += [max(near, key=lambda other: other.score)] if near else []
    if not again:
        return face
    y, x, size = np.median([(other.y, other.x, other.size) for other in again], axis=0)
    return Face(float(y), float(x), float(size), face.score)


PARTS = ("skin", "eyes", "mouth", "hair", "background")  # see `parts`


# ---- the parts of a face ----------------------------------------------------------------------------------------------------

# Ellipses in units of the face's size, from its centre: (right, down, half width, half height). Measured on 122 portraits.
CHEEKS_AND_FOREHEAD = ((-0.22, 0.03, 0.08, 0.07), (0.22, 0.03, 0.08, 0.07), (0.0, -0.4, 0.1, 0.06))
EYES = ((-0.2, -0.22, 0.12, 0.06), (0.2, -0.22, 0.12, 0.06))
BROWS = ((-0.2, -0.34, 0.15, 0.05), (0.2, -0.34, 0.15, 0.05))
NOSTRILS = ((0.0, 0.06, 0.11, 0.035),)
MOUTH = ((0.0, 0.2, 0.19, 0.1),)
UNDER_EYES = ((-0.2, -0.125, 0.14, 0.055), (0.2, -0.125, 0.14, 0.055))
HEAD = ((0.0, -0.1, 0.62, 0.9),)
SKIN_AROUND = ((0.0, 0.17, 0.62, 0.9),)


def regions(image: np.ndarray, faces: list[Face]) -> np.ndarray:
    """`uint8[H, W, 2]`: how surely each pixel is bare skin of one of the faces, and how far it lies in the hollow below an eye.

    Skin has the colour of the face's own cheeks and forehead. Eyes, brows, nostrils and the mouth are left out.
    """
    result = np.zeros((*image.shape[:2], 2), np.uint8)
    for face in faces:
        rows, columns, offsets = _around(image, face)
        skin = _skin(image[rows, columns], face, offsets)
        hollow = _cover(offsets, UNDER_EYES, soft=True) * skin
        view = result[rows, columns]
        np.maximum(view, np.rint(255 * np.stack([skin, hollow], -1)).astype(np.uint8), out=view)
    return result


def find_parts(image: np.ndarray) -> dict[str, np.ndarray]:
    """Finds the faces of a photograph, and returns their `parts`; nothing where there is none."""
    faces = find_faces(image)
    return parts(image, faces) if faces else {}


def parts(image: np.ndarray, faces: list[Face]) -> dict[str, np.ndarray]:
    """Returns where the skin, eyes (with brows), mouth and hair of the faces are, and the background: `bool[H, W]` each.

    Each pixel is in exactly one of them. Hair is what is on the head and none of the others: hats and glasses too.
    """
    shape = image.shape[:2]
    found = {name: np.zeros(shape, bool) for name in ("skin", "eyes", "mouth", "hair")}
    found["skin"] = regions(image, faces)[..., 0] > 127
    for face in faces:
        rows, columns, offsets = _around(image, face)
        found["eyes"][rows, columns] |= _cover(offsets, EYES + BROWS) > 0
        found["mouth"][rows, columns] |= _cover(offsets, MOUTH) > 0
        found["hair"][rows, columns] |= _cover(offsets, HEAD) > 0
    found["mouth"] &= ~found["skin"]
    found["eyes"] &= ~found["skin"] & ~found["mouth"]
    found["hair"] &= ~found["skin"] & ~found["eyes"] & ~found["mouth"]
    return found | {"background": ~np.any(list(found.values()), axis=0)}


Offsets = tuple[np.ndarray, np.ndarray]  # a pixel's distance from the face's centre, down and right, in units of its size


def _around(image: np.ndarray, face: Face) -> tuple[slice, slice, Offsets]:
    """Returns the rows and columns in which a face's skin can lie, and the offsets of their pixels."""
    height, width = image.shape[:2]
    rows = slice(max(0, int(face.y - face.size)), min(height, int(face.y + 1.2 * face.size)))
    columns = slice(max(0, int(face.x - 0.7 * face.size)), min(width, int(face.x + 0.7 * face.size)))
    down = (np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - face.y) / face.size
    right = (np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] - face.x) / face.size
    return rows, columns, (down, right)


def _cover(offsets: Offsets, ellipses: tuple[tuple[float, float, float, float], ...], soft: bool = False) -> np.ndarray:
    """`float32[h, w]`: 1 inside one of the ellipses and 0 outside. `soft` falls from 1 at a centre like a bell."""
    down, right = offsets
    nearest = np.min([((right - x) / a) ** 2 + ((down - y) / b) ** 2 for x, y, a, b in ellipses], axis=0)
    return np.exp(-nearest) if soft else (nearest < 1).astype(np.float32)


def _chroma(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The shares of red and green, `[h, w, 2]`, and the sum of the channels."""
    total = image.sum(-1, dtype=np.float32) + 1
    return image[..., :2] / total[..., None], total


def _reference(image: np.ndarray, offsets: Offsets) -> tuple[np.ndarray, float] | None:
    """The median chroma and brightness of cheeks and forehead. None where they lie outside the photograph."""
    inside = _cover(offsets, CHEEKS_AND_FOREHEAD) > 0
    if not inside.any():
        return None
    chroma, total = _chroma(image[inside])
    return np.median(chroma, axis=0), float(np.median(total))


def _skin(image: np.ndarray, face: Face, offsets: Offsets) -> np.ndarray:
    reference = _reference(image, offsets)
    if reference is None:
        return np.zeros(image.shape[:2], np.float32)
    chroma, total = _chroma(image)
    # Lips and hair are often close in hue, so red counts more than the other directions.
    difference = chroma - reference[0]
    near = np.hypot(difference[..., 0] * 1.3, difference[..., 1]) < SKIN_CHROMA
    lit = (total > 0.4 * reference[1]) & (total < 1.9 * reference[1])
    features = _cover(offsets, EYES + BROWS + NOSTRILS + MOUTH)
    skin = (near & lit).astype(np.float32) * _cover(offsets, SKIN_AROUND) * (1 - features)
    # Single pixels of hair that have the skin's colour vanish in the blur, and so do pores inside the skin.
    blurred = Image.fromarray(np.rint(255 * skin).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.012 * face.size))
    return np.clip(np.asarray(blurred, np.float32) / 127.5 - 1, 0, 1)


def _has_skin(image: np.ndarray, face: Face) -> bool:
    """Whether the face could be a living one: a statue's is grey, though the photograph is in colour."""
    rows, columns, offsets = _around(image, face)
    reference = _reference(image[rows, columns], offsets)
    if reference is None:
        return False
    (red, green), _ = reference
    return red - green > 0.012 or np.abs(image[..., 0].astype(np.int16) - image[..., 2]).mean() < 3
