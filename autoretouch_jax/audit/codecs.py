"""What saving a target with losses has damaged, measured rather than told from the format.

The source is saved again with the target's own compression, so that what this changes is known without the edit. The damage is
the power of the change relative to that of the fine detail, in the median square: 0 for none, 1 for detail that is gone.
"""

import numpy as np

from autoretouch_jax.audit.detail import MIDDLE, spectra
from autoretouch_jax.data.edits import Codec, saved_again

# Damage up to which a pair counts fully, and from which it counts nothing. Measured on portraits of 512² to 1024²: quality 95
# up to 0.22, 90 up to 0.40, 75 from 0.35 to 0.72, 50 from 0.57 to 0.96.
HARMLESS, RUINED = 0.3, 0.7
FAINTEST = 1.0  # power in squared levels from which a square has detail
EVERYWHERE = 0.25  # share of changed pixels from which a re-encoding is suspected
SMALL, MOSTLY = 8, 0.6  # a re-encoding moves pixels by at most so many levels, for at least this share of the changed ones
BLOCKS = 1.06  # roughness of the change across the borders of 8×8 blocks, relative to inside them, above which it is a JPEG's
SQUARE = 32  # pixels
CALM, CALM_SHARE = 16, 0.2  # levels that an unedited square's changes stay below, and the share of such squares
COVERED = 0.9  # share of the squares with changes, above which blocks count; without blocks, of those mostly changed
BLOCKY = "in squares of 8 pixels"


def saved_as(source: np.ndarray, codec: Codec | None) -> np.ndarray:
    """`uint8[H, W, 3]` → the source as the target's codec changes it. Only JPEG's settings are known from a file."""
    return saved_again(source, codec) if codec and codec.format == "JPEG" else source


def damage(source: np.ndarray, saved: np.ndarray) -> float:
    """Two images, uint8[H, W, 3] → how much of the detail saving has changed, 0 or more."""
    found = spectra(source, saved)
    if found is None:
        return 0.0
    power = found.source[MIDDLE:].sum(0)
    change = (found.source + found.target - 2 * found.shared)[MIDDLE:].sum(0)
    counts = power > FAINTEST
    return float(np.median(change[counts] / power[counts])) if counts.any() else 0.0


def weight(damage: float) -> float:
    """The weight in training of a pair with this damage, 0 to 1."""
    return round(float(np.clip((RUINED - damage) / (RUINED - HARMLESS), 0, 1)), 3)


def reencoded(difference: np.ndarray) -> str:
    """Returns what in target − source, int16[H, W, 3], suggests that the whole target was once saved with losses, or ""."""
    height, width = (side // SQUARE * SQUARE for side in difference.shape[:2])
    cropped = difference[:height, :width].reshape(height // SQUARE, SQUARE, width // SQUARE, SQUARE, 3)
    squares = cropped.swapaxes(1, 2).reshape(-1, SQUARE, SQUARE, 3)
    largest = np.abs(squares).max(-1)
    changed = largest > 0
    if changed.mean() <= EVERYWHERE or changed.any((1, 2)).mean() <= COVERED:
        return ""
    # In edited squares the edit would hide the blocks.
    calm = largest.max((1, 2)) <= CALM
    if calm.mean() > CALM_SHARE and (rough := _blockiness(squares[calm])) > BLOCKS:
        return f"{BLOCKY} ({rough:.2f} times as rough at their borders)"
    mostly = (changed.mean((1, 2)) > 0.5).mean() > COVERED
    return "everywhere" if mostly and np.mean(largest[changed] <= SMALL) >= MOSTLY else ""


def _blockiness(squares: np.ndarray) -> float:
    """Changes, int16[N, 32, 32, 3] → their mean step across the borders of 8×8 blocks, over the mean step elsewhere."""
    luma = squares.astype(np.float32).mean(-1)
    ratios = []
    for axis in (1, 2):
        steps = np.abs(np.diff(luma, axis=axis)).mean((0, 3 - axis))
        border = np.arange(len(steps)) % 8 == 7
        if steps[~border].mean() > 0:
            ratios.append(steps[border].mean() / steps[~border].mean())
    return float(np.mean(ratios)) if ratios else 1.0
