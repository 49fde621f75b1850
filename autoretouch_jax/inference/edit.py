"""What a model changes in a photograph: on the whole of it, or on its faces, each at the size that the model was trained at.

Evaluation, sampling and retouching all use this. Images are uint8 `[H, W, 3]`, RGB, of any size.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from autoretouch_jax.config.networks import Generator
from autoretouch_jax.config.schema import Faces
from autoretouch_jax.data.face_parts import find_living_faces
from autoretouch_jax.data.faces import Face, find_faces, span
from autoretouch_jax.inference.tiles import Area, network_output, plan_for
from autoretouch_jax.models.folder import Model

# Within this factor of the trained size a face is not resized, so that the edit keeps every pixel's detail.
CLOSE_ENOUGH = 1.3
# The part of a photograph that belongs to a face: an ellipse around its centre, in units of its size.
WINDOW_CENTRE, WINDOW_HALF_HEIGHT, WINDOW_HALF_WIDTH = 0.12, 1.1, 0.8
WINDOW_FADE = 0.15  # share of the ellipse's radius over which the edit fades out
FACE_STEP = 128  # sides of what the network sees around a face are multiples of this, so that few shapes are compiled
BAND = 1 << 20  # pixels of a photograph that are worked on at once, so that what is needed in between takes little memory


class Edit(NamedTuple):
    """What a model would change, before gate and dead zone: int16 `[H, W, 3]` in 8-bit levels, faded out around each face.

    The mask, float32 `[H, W]` or None, is the probability that a pixel needs an edit. `faces` are those that were edited, or
    None where the network saw the whole photograph. Around the faces, change and mask are zeros that take no memory.
    """

    change: np.ndarray
    mask: np.ndarray | None
    faces: list[Face] | None
    gate: float = 0.0
    """The probability below which a pixel is left alone."""


def retouch_array(model: Model, image: np.ndarray, strength: float = 1.0, faces: Faces = "auto") -> np.ndarray:
    """Returns the retouched image, uint8, of the same size.

    `strength` 0 returns the input, 1 the model's output, and a value in between a blend of the two. `faces` says where the
    model looks: on faces at their trained size (`auto`, `all`), or on the whole image as it is (`off`).
    """
    return apply_edit(model.config, image, find_edit(model, image, faces), strength)


def find_edit(model: Model, image: np.ndarray, faces: Faces = "auto") -> Edit:
    """Returns what the model would change. Without a face, `auto` and `all` change nothing.

    A model that was trained without faces sees the whole photograph in any case.
    """
    if faces == "off" or model.face_size is None:
        output, mask = network_output(model, image)
        # A model that knows faces is stricter where none was looked for: most of a photograph is no skin.
        gate = model.config.gate if model.face_size is None else max(model.config.gate, model.config.gate_off_faces)
        return Edit(np.subtract(output, image, dtype=np.int16), mask, None, gate)
    found = find_living_faces(image) if faces == "auto" else find_faces(image, sure=False)
    return _edit_faces(model, image, found, model.face_size)


def final_change(config: Generator, edit: Edit, strength: float = 1.0, mask: np.ndarray | None = None) -> np.ndarray:
    """Returns what is added to the photograph: int16 `[H, W, 3]`, in 8-bit levels, zero exactly where a pixel is left alone.

    A pixel is left alone where its mask is below the edit's gate, or where no channel would change by more than the dead zone,
    both at strength 1. `strength` multiplies the change, and so does the user's `mask`, float `[H, W]` in [0, 1].
    """
    final = np.zeros_like(edit.change)
    for rows in _bands(*edit.change.shape[:2]):
        change = edit.change[rows]
        applied = np.abs(change).max(-1) > config.dead_zone
        if edit.mask is not None:
            applied &= edit.mask[rows] >= edit.gate
        # Zeros that are not written take no memory.
        if applied.any():
            factor = np.where(applied, np.float32(strength), 0)
            factor = factor if mask is None else factor * mask[rows]
            final[rows] = np.rint(factor[..., None] * change)
    return final


def apply_edit(config: Generator, image: np.ndarray, edit: Edit, strength: float = 1.0) -> np.ndarray:
    """Returns the image, uint8 `[H, W, 3]`, with `final_change` added to it. What is left alone is bit-identical."""
    # On 8-bit levels, so that an unchanged pixel is unchanged in the file too.
    return np.clip(image + final_change(config, edit, strength), 0, 255).astype(np.uint8)


def _bands(height: int, width: int) -> Iterator[slice]:
    """Yields the rows of a photograph, about `BAND` pixels at a time."""
    step = max(1, BAND // width)
    return (slice(first, first + step) for first in range(0, height, step))


def _edit_faces(model: Model, image: np.ndarray, faces: list[Face], face_size: float) -> Edit:
    """Returns the edits of the faces. Where two of them meet, each pixel takes that of the face to which it belongs most."""
    # Memory that is only reserved: the system provides it where a face is written.
    change, weight = np.zeros(image.shape, np.int16), np.zeros(image.shape[:2], np.float32)
    mask = np.zeros(image.shape[:2], np.float32)
    has_mask = False
    for face in faces:
        area, window = _window(image, face)
        taken = window > weight[area]
        np.copyto(weight[area], window, where=taken)
        own_change, own_mask = _scaled_edit(model, image, area, face_size / face.size)
        for channel, values in enumerate(own_change):
            np.copyto(change[area][..., channel], np.rint(window * values), where=taken, casting="unsafe")
        if own_mask is not None:
            has_mask = True
            np.copyto(mask[area], own_mask, where=taken)
    return Edit(change, mask if has_mask else None, faces, model.config.gate)


def _window(image: np.ndarray, face: Face) -> tuple[Area, np.ndarray]:
    """Returns the part of the photograph that belongs to a face, and how much each of its pixels does, float32 in [0, 1]."""
    y, up, across = face.y + WINDOW_CENTRE * face.size, WINDOW_HALF_HEIGHT * face.size, WINDOW_HALF_WIDTH * face.size
    rows = span(y - up, y + up + 1, image.shape[0])
    columns = span(face.x - across, face.x + across + 1, image.shape[1])
    down = (np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - y) / up
    right = (np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] - face.x) / across
    return (rows, columns), np.clip((1 - np.hypot(down, right)) / WINDOW_FADE, 0, 1)


def _scaled_edit(model: Model, image: np.ndarray, area: Area, factor: float) -> tuple[Iterator[np.ndarray], np.ndarray | None]:
    """Returns the change and mask of an area, as the network sees them on the photograph resized by `factor`.

    Both are float32. The change is yielded channel by channel.
    """
    if 1 / CLOSE_ENOUGH < factor < CLOSE_ENOUGH:
        factor = 1.0
    # The network sees beyond the area as far as its radius reaches. Beyond the photograph's border it sees a mirror: most
    # portraits end within that radius, and with zeros there the edit of their faces was a little worse.
    margin = int((model.config.receptive_radius or 0) / factor) + 1
    wanted = [(part.start - margin, part.stop + margin) for part in area]
    rows, columns = (span(*ends, side) for ends, side in zip(wanted, image.shape, strict=False))
    seen = image[rows, columns]
    height, width = seen.shape[:2]
    small = seen if factor == 1 else _resized(seen, (round(width * factor), round(height * factor)))
    across, down = small.shape[1] / width, small.shape[0] / height
    # The mirror is added to the small picture, because it can be larger than the photograph.
    missing = [(part.start - start, stop - part.stop) for part, (start, stop) in zip((rows, columns), wanted, strict=True)]
    pads = [tuple(math.ceil(scale * side) for side in sides) for scale, sides in zip((down, across), missing, strict=True)]
    shown = np.pad(small, (*pads, (0, 0)), mode="reflect")
    output, mask = network_output(model, shown, plan_for(model.config, shown.shape, FACE_STEP))
    inside = np.s_[pads[0][0] : pads[0][0] + small.shape[0], pads[1][0] : pads[1][0] + small.shape[1]]
    change, mask = np.subtract(output[inside], small, dtype=np.float32), mask if mask is None else mask[inside]
    top, left = area[0].start - rows.start, area[1].start - columns.start
    bottom, right = area[0].stop - rows.start, area[1].stop - columns.start
    if factor == 1:
        own = np.s_[top:bottom, left:right]
        return iter(np.moveaxis(change[own], -1, 0)), mask if mask is None else mask[own]
    # The edit is resized to the photograph, and not the output: what the network leaves alone keeps all of its detail.
    box = (left * across, top * down, min(right * across, small.shape[1]), min(bottom * down, small.shape[0]))
    size = (right - left, bottom - top)
    channels = (_resized(change[..., channel], size, box) for channel in range(3))
    return channels, mask if mask is None else _resized(mask, size, box)


def _resized(values: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> np.ndarray:
    """uint8 `[h, w, 3]` or float32 `[h, w]`, or a box (left, top, right, bottom) of it → the same at `(width, height)`."""
    width, height = max(1, size[0]), max(1, size[1])
    return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC, box, reducing_gap=3.0))
