"""Where the parts of a face are: bare skin, the hollows below the eyes, eyes, mouth, hair. Images are uint8 `[H, W, 3]`."""

import numpy as np
from PIL import Image, ImageFilter

from autoretouch_jax.data.faces import Face, find_faces, span

PARTS = ("skin", "eyes", "mouth", "hair", "background")  # see `parts`
COLOURLESS = 3.0  # the mean difference of red and blue, in levels, below which a photograph is black and white
REDDER, STRIDE = 0.005, 8  # how much redder than the photograph it is at least; every 8th pixel is enough to tell
LEAST_RED = 0.012  # how much more red than green there is in skin, in shares of all light; a statue has less
SKIN_CHROMA = 0.05  # the distance, in shares of red and green, within which a colour counts as a face's skin

# Ellipses in units of the face's size, from its centre: (right, down, half width, half height). Set by eye on twenty
# portraits; over 122 of them the size of the face varied by 5 %.
CHEEKS_AND_FOREHEAD = ((-0.22, 0.03, 0.08, 0.07), (0.22, 0.03, 0.08, 0.07), (0.0, -0.4, 0.1, 0.06))
EYES = ((-0.2, -0.22, 0.12, 0.06), (0.2, -0.22, 0.12, 0.06))
BROWS = ((-0.2, -0.34, 0.15, 0.05), (0.2, -0.34, 0.15, 0.05))
NOSTRILS = ((0.0, 0.06, 0.11, 0.035),)
MOUTH = ((0.0, 0.2, 0.19, 0.1),)
UNDER_EYES = ((-0.2, -0.125, 0.12, 0.055), (0.2, -0.125, 0.12, 0.055))
HEAD = ((0.0, -0.1, 0.62, 0.9),)
SKIN_AROUND = ((0.0, 0.17, 0.62, 0.9),)


def find_living_faces(image: np.ndarray) -> list[Face]:
    """Returns the faces of which the detector is sure, without statues: a statue is grey in a photograph that is in colour."""
    faces = find_faces(image)
    # In a black-and-white photograph every face is grey.
    if not faces or np.abs(image[..., 0].astype(np.int16) - image[..., 2]).mean() < COLOURLESS:
        return faces
    chroma = _chroma(image[::STRIDE, ::STRIDE])[0]
    usual = float(np.median(chroma[..., 0] - chroma[..., 1]))
    colours = [(face, skin_colour(image, face)) for face in faces]
    # Under green or blue light skin is not red, but still redder than what is around it.
    least = min(LEAST_RED, usual + REDDER)
    return [face for face, colour in colours if colour is not None and colour[0] - colour[1] > least]


def regions(image: np.ndarray, faces: list[Face]) -> np.ndarray:
    """`uint8[H, W, 2]`: how surely each pixel is bare skin of one of the faces, and how far it lies in the hollow below an eye.

    Skin has the colour of the face's own cheeks and forehead. Eyes, brows, nostrils and the mouth are left out.
    """
    result = np.zeros((*image.shape[:2], 2), np.uint8)
    for face in faces:
        rows, columns, offsets = _around(image, face)
        skin = _skin(image[rows, columns], face, offsets)
        hollow = _hollow(offsets) * skin
        view = result[rows, columns]
        np.maximum(view, np.rint(255 * np.stack([skin, hollow], -1)).astype(np.uint8), out=view)
    return result


def parts(image: np.ndarray, faces: list[Face]) -> dict[str, np.ndarray]:
    """Returns where the skin, eyes (with brows), mouth and hair of the faces are, and the background: `bool[H, W]` each.

    Without a face there are no parts. Each pixel is in exactly one of them. Hair is what is on the head and none of the others:
    hats and glasses too.
    """
    if not faces:
        return {}
    shape = image.shape[:2]
    masks = {name: np.zeros(shape, bool) for name in ("skin", "eyes", "mouth", "hair")}
    masks["skin"] = regions(image, faces)[..., 0] > 127
    for face in faces:
        rows, columns, offsets = _around(image, face)
        masks["eyes"][rows, columns] |= _cover(offsets, EYES + BROWS) > 0
        masks["mouth"][rows, columns] |= _cover(offsets, MOUTH) > 0
        masks["hair"][rows, columns] |= _cover(offsets, HEAD) > 0
    masks["mouth"] &= ~masks["skin"]
    masks["eyes"] &= ~masks["skin"] & ~masks["mouth"]
    masks["hair"] &= ~masks["skin"] & ~masks["eyes"] & ~masks["mouth"]
    return masks | {"background": ~np.any(list(masks.values()), axis=0)}


Offsets = tuple[np.ndarray, np.ndarray]  # a pixel's distance from the face's centre, down and right, in units of its size


def _around(image: np.ndarray, face: Face) -> tuple[slice, slice, Offsets]:
    """Returns the rows and columns in which a face's skin can lie, and the offsets of their pixels."""
    height, width = image.shape[:2]
    rows = span(face.y - face.size, face.y + 1.2 * face.size, height)
    columns = span(face.x - 0.7 * face.size, face.x + 0.7 * face.size, width)
    down = (np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - face.y) / face.size
    right = (np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] - face.x) / face.size
    return rows, columns, (down, right)


def _cover(offsets: Offsets, ellipses: tuple[tuple[float, float, float, float], ...]) -> np.ndarray:
    """`float32[h, w]`: 1 inside one of the ellipses and 0 outside."""
    down, right = offsets
    inside = [((right - x) / a) ** 2 + ((down - y) / b) ** 2 < 1 for x, y, a, b in ellipses]
    return np.any(inside, axis=0).astype(np.float32)


def _hollow(offsets: Offsets) -> np.ndarray:
    """`float32[h, w]`: 1 in the middle of the hollow below an eye. It fades like a bell, and ends at the corners of the eye."""
    down, right = offsets
    distance = [((right - x) / a) ** 4 + ((down - y) / b) ** 2 for x, y, a, b in UNDER_EYES]
    return np.exp(-np.min(distance, axis=0))


def _chroma(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The shares of red and green, `[h, w, 2]`, and the sum of the channels."""
    total = image.sum(-1, dtype=np.float32) + 1
    return image[..., :2] / total[..., None], total


def skin_colour(image: np.ndarray, face: Face) -> np.ndarray | None:
    """Returns the shares of red and green in a face's skin, or None where its cheeks and forehead lie outside the image."""
    rows, columns, offsets = _around(image, face)
    reference = _reference(image[rows, columns], offsets)
    return None if reference is None else reference[0]


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
