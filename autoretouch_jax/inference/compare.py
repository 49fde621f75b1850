"""The picture that `--compare` writes of a photograph: before, after, and the amplified change, side by side."""

import io

import numpy as np
from PIL import Image

AMPLIFY = 8  # the change is shown as 128 + 8 · change, as in `evaluate --pictures`
LONGEST = 1600  # pixels of the longer side of each of the three, which is enough to see where something changed
QUALITY = 92  # of the JPEG


def side_by_side(seen: np.ndarray, change: np.ndarray) -> np.ndarray:
    """Returns `uint8[h, 3w, 3]`: a photograph as it is seen, the same with the change, and the change × 8 on grey.

    `seen` is `uint8[H, W, 3]`, and `change` is `[H, W, 3]` in levels of 255. Larger photographs are scaled down.
    """
    # In 16 bits, and one after another, because a large photograph takes much memory already.
    levels = change.astype(np.int16)
    after = _scaled_down(np.clip(seen + levels, 0, 255).astype(np.uint8))
    amplified = _scaled_down(np.clip(128 + AMPLIFY * levels, 0, 255).astype(np.uint8))
    return np.hstack([_scaled_down(seen), after, amplified])


def as_jpeg(picture: np.ndarray) -> bytes:
    """Returns a picture as the bytes of a JPEG."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=QUALITY, subsampling="4:4:4")
    return file.getvalue()


def _scaled_down(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    factor = min(1.0, LONGEST / max(height, width))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    # Resizing a photograph of the right size would still copy it.
    return image if factor == 1 else np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX, reducing_gap=3.0))
