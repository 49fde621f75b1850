"""Finds faces in photographs. The only importer of dlib.

The detector (histograms of oriented gradients, Dalal and Triggs 2005; King 2015) is compiled into dlib, so nothing is
downloaded. benchmarks/README.md compares it with three others. Images are uint8 `[H, W, 3]`, RGB. A face's size is the side of
the detector's square, in pixels: it reaches from the brows to the chin, and is about half as wide as a head is high.
"""

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

# The longer side of the image in which faces are looked for. The detector's window is 80 pixels wide: small photographs are
# enlarged, and in large ones a face must be a thirtieth of the longer side.
SEARCHED = (1000, 2400)
SURE, UNSURE = 0.5, 0.0  # the detector's lowest scores; portraits score 1 to 3, a statue 0.6
SMALLEST = 56  # faces below this size, in pixels, are too small to show the texture of skin
# The detector's sizes are 20 % apart. The face is looked at again at these sizes, and the median of what is found is taken.
REFINED_AT = (88, 94, 100, 107, 114, 122)


@dataclass(frozen=True)
class Face:
    """A face: the centre and side of its square in pixels, and the detector's score."""

    y: float
    x: float
    size: float
    score: float


def find_faces(image: np.ndarray, sure: bool = True) -> list[Face]:
    """Returns the faces of a photograph, the largest first. Without `sure`, also those of which the detector is less sure."""
    height, width = image.shape[:2]
    longer = max(height, width)
    scale = min(max(longer, SEARCHED[0]), SEARCHED[1]) / longer
    # A strip of a few pixels has no room for a head, and enlarging it could take all memory.
    if min(height, width) < 2 * SMALLEST:
        return []
    found = _detect(image, (0, 0, width, height), scale, SURE if sure else UNSURE)
    faces = [face for face in (_refined(image, face) for face in found) if face.size >= SMALLEST]
    return sorted(faces, key=lambda face: -face.size)


def span(start: float, stop: float, size: int) -> slice:
    """Returns the pixels from `start` to `stop` along an axis of `size` pixels; none where they all lie outside."""
    first = min(max(0, int(start)), size)
    return slice(first, min(max(first, int(stop)), size))


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
    reach = 1.1 * face.size
    rows, columns = (span(at - reach, at + reach, size) for at, size in zip((face.y, face.x), image.shape, strict=False))
    box = (columns.start, rows.start, columns.stop, rows.stop)
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
