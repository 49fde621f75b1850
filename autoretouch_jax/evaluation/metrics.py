"""Full-reference metrics on what a user would see: uint8 RGB `[H, W, 3]` at full resolution. PSNR is in dB.

The *edit* is where source and target differ in any channel. Which metrics an image has depends on its source and target alone,
never on a model's output, so that every row of a table is over the same images. A metric that an image does not have is None:
an untouched pair has no edit. A new metric is added to `compare`, and to `report.COLUMNS`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from skimage.metrics import structural_similarity

from autoretouch_jax.data.edits import edit_mask
from autoretouch_jax.data.face_parts import PARTS

SSIM_WINDOW = 11  # Wang et al. 2004: a Gaussian of sigma 1.5, 11 pixels wide
# The PSNR at which the mean squared error is 1/12 level², that of rounding to 8 bits. Identical images have none of their own.
CEILING = 10 * math.log10(255**2 * 12)
POOLED_PSNR = {"psnr_pooled": "psnr_rgb_u8", "edit_psnr_pooled": "edit_psnr"}  # each with the PSNR of single images
RESAMPLES = 2000  # of the bootstrap: the ends of a 95 % interval then rest on 50 of them each

Values = dict[str, float | None]
Sums = dict[str, int]
Row = dict[str, Any]  # the metrics of an image, and its `sums`


# ---- one image --------------------------------------------------------------------------------------------------------------


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`|a − b|`, uint8, of two uint8 arrays of the same shape."""
    return np.maximum(a, b) - np.minimum(a, b)  # uint8 would wrap around, and int16 takes twice the memory


def psnr(a: np.ndarray, b: np.ndarray) -> float | None:
    """Peak signal-to-noise ratio over all pixels and channels, in dB. None when the images are identical or empty."""
    return _decibels(_squares(difference(a, b)), a.size)


def ssim(a: np.ndarray, b: np.ndarray) -> float | None:
    """SSIM with the Gaussian window (Wang et al. 2004), averaged over channels. None for images smaller than the window."""
    if min(a.shape[:2]) < SSIM_WINDOW:
        return None
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(a, b, channel_axis=2, data_range=255, **options))


def count(source: np.ndarray, target: np.ndarray, output: np.ndarray, ungated: np.ndarray | None = None) -> Sums:
    """Returns the sums from which `ratios` computes the pooled metrics, over the pixels of one image.

    `pixels` and those `edited`; in the edit, what the retoucher has `drawn`, Σ|source − target|, and what is `left` of it,
    Σ|output − target|, in levels; `squared_error` of all pixels and of the edit; outside it, Σ|output − source| and the pixels
    changed.
    """
    edit = edit_mask(source, target)
    error = difference(output, target)
    left = int(error[edit].sum())
    sums = {
        "pixels": edit.size,
        "edited": int(edit.sum()),
        "drawn": int(difference(source, target).sum()),
        "left": left,
        "squared_error": _squares(error),
        "edit_squared_error": _squares(error[edit]),
        # Outside the edit the target is the source, so that the error is the change.
        "outside_change": int(error.sum()) - left,
        "outside_changed": int((error.any(-1) & ~edit).sum()),
    }
    return sums if ungated is None else sums | {"left_ungated": int(difference(ungated, target)[edit].sum())}


def ratios(sums: Mapping[str, int]) -> Values:
    """Returns what follows from the sums of one image, or of many.

    * `psnr_pooled`, `edit_psnr_pooled`: PSNR of all pixels, and of the edit. None without any error, see `score`.
    * `edit_recovered`: 0 when nothing of the edit was done, 1 when all of it was, negative when it made matters worse.
      `edit_recovered_ungated`: the same of the network's own output.
    * `outside_error`: mean change outside the edit, in 1/255.
    * `outside_identical`: share of the pixels outside the edit that came back bit-identical.
    """
    drawn, outside = sums["drawn"], sums["pixels"] - sums["edited"]
    values: Values = {
        "psnr_pooled": _decibels(sums["squared_error"], 3 * sums["pixels"]),
        "edit_psnr_pooled": _decibels(sums["edit_squared_error"], 3 * sums["edited"]),
        "edit_recovered": 1 - sums["left"] / drawn if drawn else None,
    }
    if "left_ungated" in sums:
        values["edit_recovered_ungated"] = 1 - sums["left_ungated"] / drawn if drawn else None
    return values | {
        "outside_error": sums["outside_change"] / (3 * outside) if outside else None,
        "outside_identical": (outside - sums["outside_changed"]) / outside if outside else None,
    }


def compare(source: np.ndarray, target: np.ndarray, output: np.ndarray, ungated: np.ndarray | None = None) -> Row:
    """Returns the metrics of one image and, under `sums`, what `count` returns. The identity's output is the source.

    PSNR is at most `CEILING`, so that an identical image has one too. `ungated` is the network's own output, before gate and
    dead zone.
    """
    sums = count(source, target, output, ungated)
    values = ratios(sums)
    whole, inside = values.pop("psnr_pooled"), values.pop("edit_psnr_pooled")
    return {
        "psnr_rgb_u8": _capped(whole),
        "ssim_rgb_u8_gauss11": ssim(output, target),
        "edit_psnr": _capped(inside) if sums["edited"] else None,
        **values,
        "sums": sums,
    }


def compare_untouched(photo: np.ndarray, output: np.ndarray) -> Values:
    """Measures what a model changed in a photograph in which nothing should change.

    * `alone_error`: mean change of all pixels, in 1/255.
    * `alone_identical`: share of the pixels that came back bit-identical.
    """
    change = difference(output, photo)
    return {"alone_error": float(change.mean()), "alone_identical": float((change == 0).all(-1).mean())}


def change_by_part(source: np.ndarray, output: np.ndarray, parts: dict[str, np.ndarray], edit: np.ndarray) -> Values:
    """Returns `change_PART`: how much a model changed each part of the faces where the retoucher changed nothing, in 1/255.

    `parts` is what `face_parts.parts` returns. A part without a pixel outside the edit is None; so are all without a face.
    """
    change = np.abs(output.astype(np.int16) - source).mean(-1)
    outside = {name: parts[name] & ~edit for name in PARTS if name in parts}
    return {f"change_{name}": float(change[outside[name]].mean()) if np.any(outside.get(name)) else None for name in PARTS}


# ---- many images ------------------------------------------------------------------------------------------------------------


def mean(rows: Sequence[Row]) -> Row:
    """Returns the mean of each metric over the images that have it, and, under `n`, how many these are."""
    # Every row has the same metrics, some of them None.
    names = [name for name in rows[0] if name != "sums"]
    values = {name: [value for row in rows if (value := row[name]) is not None] for name in names}
    means: Row = {name: float(np.mean(column)) if column else None for name, column in values.items()}
    return means | {"n": {name: len(column) for name, column in values.items()}}


def pool(rows: Sequence[Row]) -> Row:
    """Returns what a model scores over many images, from the rows that `compare` returned.

    Ratios of sums are taken over the pixels of all images together, other metrics are means over the images. `n` says over how
    many images each one is. `edit_recovered_interval` is a 95 % interval, None with fewer than two edits.
    """
    means, sums = mean(rows), [row["sums"] for row in rows]
    n = means.pop("n")
    # Sums of integers are exact in any order, so that the number of processes changes no digit.
    pooled = ratios({name: sum(image[name] for image in sums) for name in sums[0]})
    result: Row = {name: pooled.pop(name) for name in POOLED_PSNR} | means | pooled
    result["edit_recovered_interval"] = recovered_interval(sums)
    return result | {"n": {name: n[single] for name, single in POOLED_PSNR.items()} | n}


def recovered_interval(sums: Sequence[Sums]) -> list[float] | None:
    """Returns the 95 % interval of the pooled `edit_recovered` as [low, high], None with fewer than two edited pairs.

    It is the percentile bootstrap over pairs (Efron and Tibshirani 1993, chapter 13), with a fixed seed.
    """
    edited = [image for image in sums if image["drawn"]]
    if len(edited) < 2:
        return None
    drawn, left = (np.array([image[name] for image in edited], np.float64) for name in ("drawn", "left"))
    chosen = np.random.default_rng(0).integers(len(edited), size=(RESAMPLES, len(edited)))
    recovered = 1 - left[chosen].sum(1) / drawn[chosen].sum(1)
    return [float(end) for end in np.percentile(recovered, (2.5, 97.5))]


def score(values: Mapping[str, Any], name: str) -> float | None:
    """Returns a metric of a row as it is compared: a pooled PSNR without any error is infinite. None where nothing has it."""
    value, n = values.get(name), values.get("n")
    # JSON has no infinity, so a perfect PSNR is null there, as one of no image is. Their n differ.
    if value is None and name in POOLED_PSNR and isinstance(n, dict) and n.get(name):
        return math.inf
    return value if isinstance(value, float | int) else None  # a report reads files that may hold anything


def _capped(decibels: float | None) -> float:
    return CEILING if decibels is None else min(CEILING, decibels)


def _squares(difference: np.ndarray) -> int:
    return int(np.square(difference, dtype=np.uint16).sum(dtype=np.uint64))  # 255² fits into 16 bits


def _decibels(squared_error: int, samples: int) -> float | None:
    # Divided as integers: float32 would lose digits, and the sum of many photographs is exact.
    return 10 * math.log10(255**2 * samples / squared_error) if squared_error and samples else None
