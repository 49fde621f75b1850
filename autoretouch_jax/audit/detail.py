"""The detail of two photographs, compared in squares at full size: how strongly one shows what the other shows.

Large photographs are compared in windows that are spread evenly, so that 24 megapixels take as long as one.
"""

from typing import NamedTuple

import numpy as np

from autoretouch_jax.data.edits import LUMA

WINDOW, MOST = 128, 8  # side in pixels, a multiple of a JPEG's blocks, and the most windows in a row or column
GRID = 16  # windows start at multiples of it: the blocks of a JPEG with subsampled colour

SQUARE = 64  # pixels
BANDS = ((0.06, 0.16), (0.16, 0.28), (0.28, 0.5))  # cycles per pixel: the detail of features, of skin, and the finest
LOW, MIDDLE, HIGH = range(3)


class Spectra(NamedTuple):
    """For each band and square: the power of source and target and what they share, in squared levels. float[3, N] each."""

    source: np.ndarray
    target: np.ndarray
    shared: np.ndarray

    @property
    def gain(self) -> np.ndarray:
        """How strongly the target shows the source's detail, float[3, N]; 1 for unchanged."""
        return self.shared / np.maximum(self.source, 1e-9)

    def noise(self) -> np.ndarray:
        """The detail of the target that the source does not have, in levels."""
        return np.sqrt(np.maximum(self.target - np.square(self.shared) / np.maximum(self.source, 1e-9), 0))


def mosaic(image: np.ndarray) -> np.ndarray:
    """`uint8[H, W, 3]` → evenly spread windows side by side, at most uint8[1024, 1024, 3]. A small image comes back cropped."""
    starts = []
    for side in image.shape[:2]:
        number = min(MOST, side // WINDOW)
        if number == 0:  # too small for a window: what there is, in whole tiles
            return image[: image.shape[0] // GRID * GRID, : image.shape[1] // GRID * GRID]
        starts.append(np.linspace(0, side - WINDOW, number).astype(int) // GRID * GRID)
    rows = [np.concatenate([image[y : y + WINDOW, x : x + WINDOW] for x in starts[1]], 1) for y in starts[0]]
    return np.concatenate(rows)


def spectra(source: np.ndarray, target: np.ndarray) -> Spectra | None:
    """Two images, uint8[H, W, 3], of one size → their spectra; None for images of less than 2 × 2 squares."""
    if min(source.shape[:2]) < 2 * SQUARE:
        return None
    window = np.outer(np.hanning(SQUARE), np.hanning(SQUARE)).astype(np.float32)
    frequency = np.hypot(np.fft.fftfreq(SQUARE)[:, None], np.fft.rfftfreq(SQUARE))
    a, b = (
        np.fft.rfft2((square - square.mean((1, 2), keepdims=True)) * window)
        for square in (_squares(image.astype(np.float32) @ LUMA) for image in (source, target))
    )
    scale = 2 / (np.square(window).sum() * SQUARE * SQUARE)  # 2, because half of the spectrum is left out
    powers: list[list[np.ndarray]] = [[], [], []]
    for low, high in BANDS:
        band = (frequency >= low) & (frequency < high)
        for power, (x, y) in zip(powers, ((a, a), (b, b), (a, b)), strict=True):
            power.append((x[:, band] * y[:, band].conj()).real.sum(1) * scale)
    return Spectra(*(np.array(power) for power in powers))


def _squares(image: np.ndarray) -> np.ndarray:
    """`[H, W]` → `[N, 64, 64]`."""
    rows, columns = (side // SQUARE for side in image.shape)
    cropped = image[: rows * SQUARE, : columns * SQUARE].reshape(rows, SQUARE, columns, SQUARE)
    return cropped.swapaxes(1, 2).reshape(-1, SQUARE, SQUARE)
