"""The audit as a page that can be mailed: one HTML file with the pictures inside it."""

import base64
import contextlib
import importlib.resources
import io
from collections.abc import Mapping
from typing import Any

import jinja2
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from autoretouch_jax.audit.inputs import Pair
from autoretouch_jax.audit.reading import ahead, read_reduced
from autoretouch_jax.errors import BadInput

SHOWN = 200  # flagged pairs with pictures; the others are listed
SIDE = 320  # of a picture, in pixels
AMPLIFY = 8  # the difference is shown as 128 + 8 · (target − source)


def render(result: dict[str, Any], pairs: Mapping[str, Pair]) -> str:
    """Returns the page of an audit's result. `pairs` are those of its names."""
    flagged = [name for name, pair in result["pairs"].items() if pair["flagged"]]
    shown = flagged[:SHOWN]
    drawn = ahead(shown, lambda name: _pictures(pairs[name], result["pairs"][name].get("spots", [])))
    pictures = dict(tqdm(drawn, "drawing the page", len(shown), unit="pair", dynamic_ncols=True, disable=None))
    text = importlib.resources.files("autoretouch_jax.audit").joinpath("page.html").read_text()
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)
    return page.render(result=result, flagged=flagged, pictures=pictures, shown=SHOWN)


def _pictures(pair: Pair, spots: list[list[float]]) -> list[tuple[str, str]]:
    """Returns `(caption, data URL)` of each image that can be decoded. In the target, spots that were left are circled."""
    images, pictures = {}, []
    # A pair in a data set may not be read at all, a pair of files by halves.
    with contextlib.suppress(Exception), pair.files() as files:
        for caption, path in zip(("source", "target"), files, strict=True):
            with contextlib.suppress(BadInput):
                images[caption], factor = read_reduced(path)
                # Spots are given in the file's pixels.
                circles = [[value / factor for value in spot] for spot in spots] if caption == "target" else []
                pictures.append((caption, _url(images[caption], circles)))
    if len(images) == 2 and images["source"].shape == images["target"].shape:
        difference = images["target"].astype(np.int16) - images["source"]
        amplified = np.clip(128 + AMPLIFY * difference, 0, 255).astype(np.uint8)
        pictures.append((f"difference × {AMPLIFY}", _url(amplified, [])))
    return pictures


def _url(image: np.ndarray, spots: list[list[float]]) -> str:
    """Returns a small JPEG of the image as a data URL."""
    picture = Image.fromarray(image)
    scale = SIDE / max(picture.size)
    picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    draw = ImageDraw.Draw(picture)
    for row, column, radius in spots:
        reach = max(5.0, 1.5 * radius * scale)
        x, y = column * scale, row * scale
        draw.ellipse([x - reach, y - reach, x + reach, y + reach], outline=(255, 40, 40), width=2)
    packed = io.BytesIO()
    picture.save(packed, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(packed.getvalue()).decode()
