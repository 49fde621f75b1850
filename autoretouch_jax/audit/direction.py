"""Which of two images is the retouched one: a retoucher takes away spots, so the spots tell that lie on smooth surroundings.

Both images are searched at three sizes, from pimples to uneven light. A spot is a small edited region. In the image before the
retouch it stands out from the unedited ring around it, and in the retouched one it does not. Eyes, teeth and lips, which
retouchers make stronger, have no smooth ring and say nothing.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

LONGEST = 1024  # pixels of the longer side at the first size; the others are a third and a ninth
SIZES = (1, 3, 9)
LEAST_CHANGE, NOISE = 4.0, 5.0  # levels of an edited pixel, also as multiples of the median change, which saving causes
SMALLEST, LARGEST = 4, 0.06  # pixels of a spot, and the share of the image's longer side that it may measure
RING = 3  # width in pixels
CLEARER, STANDS_OUT = 2.0, 4.0  # a spot must stand out so many times and levels more in one image than in the other
SMOOTH = 0.5  # the ring's standard deviation, relative to how far the spot stands out
# Spots by which those of the target must outnumber twice those of the source. Measured on 52 portraits: 2 in clean pairs (teeth
# alone whitened, or patches pasted with hard borders), and 5 or more in swapped ones, where many spots may overlap.
FEWEST = 4


class Direction(NamedTuple):
    """How many spots stand out in the source alone, and how many in the target alone."""

    before: int
    after: int

    @property
    def is_swapped(self) -> bool:
        """Whether the source seems to be the retouched one."""
        return self.after - 2 * self.before >= FEWEST


def compare(source: np.ndarray, target: np.ndarray) -> Direction:
    """Counts the spots of two images, uint8[H, W, 3], of one size."""
    pictures = [Image.fromarray(np.ascontiguousarray(image)) for image in (source, target)]
    first = max(1, round(max(source.shape[:2]) / LONGEST))
    before = after = 0
    for size in SIZES:
        if min(source.shape[:2]) >= 16 * first * size:
            counts = _count(*(np.asarray(picture.reduce(first * size)).astype(np.float32) for picture in pictures))
            before, after = before + counts[0], after + counts[1]
    return Direction(before, after)


def _count(source: np.ndarray, target: np.ndarray) -> tuple[int, int]:
    change = np.abs(target - source).max(-1)
    limit = max(LEAST_CHANGE, NOISE * float(np.median(change)))
    spots, number = ndimage.label(change > limit, np.ones((3, 3)))
    if number == 0:
        return 0, 0
    sizes = np.bincount(spots.ravel(), minlength=number + 1)
    longest = max(16.0, LARGEST * max(source.shape))
    small = np.array([0] + [max(s.stop - s.start for s in box) <= longest for box in ndimage.find_objects(spots)], bool)
    chosen = np.flatnonzero(small & (sizes >= SMALLEST))
    if not len(chosen):
        return 0, 0
    # The faint border of an edit belongs to neither the spot nor its ring.
    around = ndimage.maximum_filter(np.where(small[spots], spots, 0), 2 * RING + 3)
    ring = np.where(change > limit / 2, 0, np.where(ndimage.minimum_filter(change <= limit, 3), around, 0))
    contrasts, unevenness = zip(*(_contrast(image, spots, ring, chosen) for image in (source, target)), strict=True)
    is_smooth = np.maximum(*unevenness) <= SMOOTH * np.maximum(*contrasts)
    seen = is_smooth & (np.bincount(ring.ravel(), minlength=number + 1)[chosen] >= 2 * RING)
    a, b = contrasts
    return int((seen & (a > CLEARER * b + STANDS_OUT)).sum()), int((seen & (b > CLEARER * a + STANDS_OUT)).sum())


def _contrast(image: np.ndarray, spots: np.ndarray, ring: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns how far each spot stands out from its ring, in levels, and the ring's standard deviation."""
    distance, variance = np.zeros(len(chosen)), np.zeros(len(chosen))
    for channel in np.moveaxis(image, -1, 0):
        inside, _ = _moments(channel, spots, chosen)
        outside, spread = _moments(channel, ring, chosen)
        distance += np.square(inside - outside)
        variance += spread
    return np.sqrt(distance / 3), np.sqrt(variance / 3)


def _moments(channel: np.ndarray, regions: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean and the variance of the chosen regions; 0 for an empty one."""
    where = np.flatnonzero(regions)
    labels, values = regions.ravel()[where], channel.ravel()[where].astype(np.float64)
    count, total, squares = (
        np.bincount(labels, weights, minlength=chosen[-1] + 1)[chosen] for weights in (None, values, np.square(values))
    )
    mean = total / np.maximum(count, 1)
    return mean, np.maximum(squares / np.maximum(count, 1) - np.square(mean), 0)
