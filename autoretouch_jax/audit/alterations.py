"""What was done to the whole target: blurred, sharpened, enlarged from a smaller export, noise added or removed.

A retouch leaves parts of a photograph as they are: hair, eyes, cloth, background. So these faults are told by what even the
least changed squares show. In each square of 64 pixels the spectra of source and target give a gain, how strongly the target
shows the source's detail, and noise, the detail of one that the other does not have. Frequencies are cycles per pixel.
"""

from typing import NamedTuple

import numpy as np

from autoretouch_jax.audit.detail import HIGH, LOW, MIDDLE, Spectra, spectra
from autoretouch_jax.data.edits import LUMA

FAINTEST = 0.3  # power in squared levels, three times that of rounding to levels, below which a square shows no gain
FEWEST = 6  # squares with detail that a judgement needs

# The limits lie between what was measured on clean and altered pairs of 52 portraits (512² to 1024²). Clean pairs, with half
# the face or all skin smoothed among them: the gain of the middle band that a tenth of the squares exceeds is 0.98 or more.
BLURRED = 0.85  # a Gaussian blur by 0.7 pixels: 0.69, by 1 pixel: 0.46; export at half size: 0.81 or less
SHARPENED = (1.08, 1.15)  # middle and high gain of the median square; unsharp masks from 50 %: 1.13, 1.28; clean: 1.02, 1.04
FINEST = 0.3  # the same of the high band, for exports at half size of soft photographs: 0.15; saved at quality 50: 0.38
STEEP = 3.0  # decline of the logarithm of the median gain from middle to high; Gaussian: 2.4, half size: 3.5 to 8
STEEP_BELOW, STEEP_RATIO = 0.2, 5.5  # the same from low to middle, for a middle gain near 0; Gaussian: 4.4, quarter size: 7.4
ALTERNATING = 1.1  # ratio of the roughness of even and odd pixels, which interpolation leaves: from 1.15 on; natural: 1.03
NOISY, EVEN = 0.9, 0.8  # levels of noise in nine of ten squares, and relative to the median; noise of 3 levels: 1.44 and 0.95
SMOOTHED, EDGES = 0.6, 0.85  # gain of the fainter squares where noise was removed, and of contours, which that leaves


class Alteration(NamedTuple):
    """A fault's code, a message, and the figure that it states."""

    code: str
    message: str
    value: float


def find(source: np.ndarray, target: np.ndarray, exact: bool) -> Alteration | None:
    """Two images, uint8[H, W, 3], of one size → what was done to the whole target, or None.

    `source` has been saved as the target was. `exact` says that this changed nothing: noise that is missing shows only then.
    """
    found = spectra(source, target)
    if found is None:
        return None
    has_detail = found.source > FAINTEST
    if has_detail[MIDDLE].sum() < FEWEST:
        return None
    gains = [found.gain[band][has_detail[band]] for band in (LOW, MIDDLE, HIGH)]
    usual = [float(np.median(gain)) if len(gain) >= FEWEST else 0.0 for gain in gains]
    largest = [float(np.quantile(gain, 0.9)) if len(gain) >= FEWEST else 1.0 for gain in gains]
    if largest[MIDDLE] < BLURRED or largest[HIGH] < FINEST:
        return _softer(usual, _alternation(target @ LUMA) / _alternation(source @ LUMA))
    if usual[MIDDLE] > SHARPENED[0] and usual[HIGH] > SHARPENED[1]:
        percent = 100 * (usual[HIGH] - 1)
        return Alteration(
            "sharpened", f"target is sharper all over: fine detail is {percent:.0f} % stronger; {EXPORT}", percent
        )
    return _noise(found, has_detail[HIGH], exact)


EXPORT = "export it again without that, or leave the pair out"


def _softer(gains: list[float], alternation: float) -> Alteration:
    """Names the cause of missing detail. A blur takes it away little by little, an export at a smaller size all at once."""
    logarithms = [-np.log(min(0.999, max(gain, 1e-3))) for gain in gains]
    band, ratio = (MIDDLE, STEEP) if gains[MIDDLE] > STEEP_BELOW else (LOW, STEEP_RATIO)
    if logarithms[band + 1] > ratio * logarithms[band] or alternation > ALTERNATING:
        lost = 100 * (1 - max(gains[HIGH], 0))
        text = (
            f"target was enlarged from a smaller export: {lost:.0f} % of the finest detail is missing; export it at full size"
        )
        return Alteration("resampled", text, lost)
    # A Gaussian's gain at the middle of the band, f = 0.22, is exp(-2 π² σ² f²).
    sigma = float(np.sqrt(logarithms[MIDDLE] / (2 * np.pi**2)) / 0.22)
    text = f"target is softer all over, as after a Gaussian blur by {sigma:.1f} pixels; {EXPORT}"
    return Alteration("blurred", text, sigma)


def _alternation(image: np.ndarray) -> float:
    """Returns how unequally rough even and odd rows and columns are, at least 1."""
    ratios = []
    for x in (image, image.T):
        rough = np.abs(np.diff(x, 1, 0))
        even, odd = float(rough[::2].mean()) + 1e-3, float(rough[1::2].mean()) + 1e-3
        ratios.append(max(even / odd, odd / even))
    return float(np.mean(ratios))


def _noise(spectra: Spectra, has_detail: np.ndarray, exact: bool) -> Alteration | None:
    added = spectra.noise()[HIGH]
    least, usual = np.quantile(added, (0.1, 0.5))
    # Losses of compression are noise too, but they follow the image's detail.
    if least > NOISY and least > EVEN * usual:
        return Alteration("noisy", f"target has noise all over that the source has not ({least:.1f} levels); {EXPORT}", least)
    gain, power = spectra.gain[HIGH][has_detail], spectra.source[HIGH][has_detail]
    if not exact or len(gain) < 4 * FEWEST:
        return None
    faint = power <= np.median(power)
    if np.quantile(gain[faint], 0.9) < SMOOTHED and np.quantile(gain[~faint], 0.9) > EDGES:
        share = 100 * (1 - float(np.median(gain[faint])))
        return Alteration("noisy", f"{share:.0f} % of the source's noise was removed all over the target; {EXPORT}", -share)
    return None
