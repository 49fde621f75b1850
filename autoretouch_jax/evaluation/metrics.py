"""Full-reference metrics on what a user would see: uint8 RGB `[H, W, 3]` at full resolution. PSNR is in dB.

The *edit* is where source and target differ in any channel by at least 1/255. A metric that is not defined for an image
is None: identical images have no PSNR, and an untouched pair has no edit. A new metric is added to `compare` or
`compare_edit`, and to `report.COLUMNS`.
"""

import math
from typing import Any

import numpy as np
from skimage.metrics import structural_similarity

from autoretouch_jax.data.face_parts import PARTS

SSIM_WINDOW = 11  # Wang et al. 2004: a Gaussian of sigma 1.5, 11 pixels wide

Values = dict[str, float | None]


def psnr(a: np.ndarray, b: np.ndarray) -> float | None:
    """Peak signal-to-noise ratio over all pixels and channels, in dB. None when the images are identical or empty."""
    if a.size == 0:
        return None
    # float64: the sum of millions of squares loses digits in float32.
    error = np.mean(np.square(a.astype(np.float64) - b.astype(np.float64)))
    return None if error == 0 else 10 * math.log10(255.0**2 / error)


def ssim(a: np.ndarray, b: np.ndarray) -> float | None:
    """SSIM with the Gaussian window (Wang et al. 2004), averaged over channels. None for images smaller than the window."""
    if min(a.shape[:2]) < SSIM_WINDOW:
        return None
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(a, b, channel_axis=2, data_range=255, **options))


def edit_mask(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """`bool[H, W]`: where the retoucher changed something."""
    return (source != target).any(-1)


def compare(source: np.ndarray, target: np.ndarray, output: np.ndarray) -> Values:
    """Measures how close `output` is to `target`. Every row of the table has these, the identity's (output = source) too."""
    edit = edit_mask(source, target)
    return {
        "psnr_rgb_u8": psnr(output, target),
        "ssim_rgb_u8_gauss11": ssim(output, target),
        "edit_psnr": psnr(output[edit], target[edit]),
    }


def compare_edit(source: np.ndarray, target: np.ndarray, output: np.ndarray) -> Values:
    """Measures what a model did inside and outside the edit.

    * `edit_recovered`: 0 when nothing of the edit was done, 1 when all of it was, negative when it made matters worse.
    * `outside_error`: mean change outside the edit, in 1/255.
    * `outside_identical`: share of the pixels outside the edit that came back bit-identical.
    """
    edit = edit_mask(source, target)
    source, target, output = (image.astype(np.int64) for image in (source, target, output))  # uint8 would wrap around
    recovered = outside = identical = None
    if edit.any():
        recovered = 1 - float(np.abs(output - target)[edit].sum() / np.abs(source - target)[edit].sum())
    if not edit.all():
        outside = float(np.abs(output - source)[~edit].mean())
        identical = float((output == source).all(-1)[~edit].mean())
    return {"edit_recovered": recovered, "outside_error": outside, "outside_identical": identical}


def compare_untouched(photo: np.ndarray, output: np.ndarray) -> Values:
    """Measures what a model changed in a photograph in which nothing should change.

    * `alone_error`: mean change of all pixels, in 1/255.
    * `alone_identical`: share of the pixels that came back bit-identical.
    """
    change = np.abs(output.astype(np.int16) - photo)
    return {"alone_error": float(change.mean()), "alone_identical": float((change == 0).all(-1).mean())}


def change_by_part(source: np.ndarray, output: np.ndarray, parts: dict[str, np.ndarray], edit: np.ndarray) -> Values:
    """Returns `change_PART`: how much a model changed each part of the faces where the retoucher changed nothing, in 1/255.

    `parts` is what `face_parts.parts` returns. A part without a pixel outside the edit is None; so are all without a face.
    """
    change = np.abs(output.astype(np.int16) - source).mean(-1)
    outside = {name: parts[name] & ~edit for name in PARTS if name in parts}
    return {f"change_{name}": float(change[outside[name]].mean()) if np.any(outside.get(name)) else None for name in PARTS}


def mean(rows: list[Values]) -> dict[str, Any]:
    """Returns the mean of each metric over the images where it is defined, and, under `undefined`, how many were left out."""
    # Every row has the same metrics, some of them None.
    names = list(rows[0])
    defined = {name: [value for row in rows if (value := row[name]) is not None] for name in names}
    means: dict[str, Any] = {name: float(np.mean(values)) if values else None for name, values in defined.items()}
    return means | {"undefined": {name: len(rows) - len(values) for name, values in defined.items()}}
