"""The demo's last picture: real, unretouched photographs, through the demo's own model and through the model in the box.

The photographs may be given away: one is NASA's, the others are CC0 (webmorphR.stim). Images are uint8 `[H, W, 3]`.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from skimage import data as skimage_data

from autoretouch_jax.config.paths import PRETRAINED
from autoretouch_jax.data.faces import Face, find_faces
from autoretouch_jax.data.images import read_rgb
from autoretouch_jax.evaluation.report import AMPLIFY
from autoretouch_jax.inference.edit import retouch_array
from autoretouch_jax.models.folder import Model, load_model

PHOTOGRAPHS = Path(__file__).parent / "photographs"
CREDITS = ("Eileen Collins, NASA, public domain", "telephone photographs: webmorphR.stim, CC0")
SIDE, MARGIN = 420, 30  # of a picture, in pixels, and the height of the titles above the columns
TITLES = ("before", "this demo's model", "the model in the box", f"its change, {AMPLIFY} times")


def side_by_side(model: Model) -> np.ndarray:
    """Returns a row for each photograph, cut to its face: before, each model's result, the amplified change of the second."""
    shipped = load_model(PRETRAINED)
    rows = [_row(photo, model, shipped) for photo in photographs()]
    sheet = Image.new("RGB", (len(TITLES) * SIDE, MARGIN + len(rows) * SIDE), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for column, title in enumerate(TITLES):
        draw.text((column * SIDE + 8, 6), title, fill="black", font=font)
    for number, row in enumerate(rows):
        sheet.paste(Image.fromarray(row), (0, MARGIN + number * SIDE))
    return np.asarray(sheet)


def photographs() -> list[np.ndarray]:
    """Returns the photographs."""
    return [skimage_data.astronaut(), *(read_rgb(path) for path in sorted(PHOTOGRAPHS.glob("*.jpg")))]


def _row(photo: np.ndarray, model: Model, shipped: Model) -> np.ndarray:
    ours, theirs = retouch_array(model, photo), retouch_array(shipped, photo)
    change = np.clip(128 + AMPLIFY * (theirs.astype(np.int16) - photo), 0, 255).astype(np.uint8)
    faces = find_faces(photo)
    # A photograph of which the face is not found is shown whole.
    box = _square(photo, faces[0]) if faces else (0, 0, photo.shape[1], photo.shape[0])
    views = [
        Image.fromarray(image).crop(box).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        for image in (photo, ours, theirs, change)
    ]
    return np.concatenate([np.asarray(view) for view in views], axis=1)


def _square(photo: np.ndarray, face: Face) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) of a square around the face, inside the photograph."""
    height, width = photo.shape[:2]
    side = min(int(1.5 * face.size), height, width)
    left = min(max(0, int(face.x - side / 2)), width - side)
    top = min(max(0, int(face.y - side / 2)), height - side)
    return left, top, left + side, top + side
