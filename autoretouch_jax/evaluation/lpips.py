"""LPIPS as a metric: it loads the weights once, and then takes pairs of 8-bit images and returns distances."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from autoretouch_jax.errors import Refused
from autoretouch_jax.models import lpips
from autoretouch_jax.models.pixels import to_float
from autoretouch_jax.models.vgg_weights import TORCHVISION
from autoretouch_jax.models.weights_file import read_arrays
from autoretouch_jax.runtime.download import download

# The heads of LPIPS 0.1 (BSD-2), as released with the package `lpips` 0.1.4, with the SHA-256 of each file.
HEADS_AT = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/"
HEADS = {
    "alex": ("alex.pth", "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"),
    "vgg16": ("vgg.pth", "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"),
    "squeeze": ("squeeze.pth", "4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76"),
}
SMALLEST = 32  # sides below this leave the last layers without pixels

Metric = Callable[[np.ndarray, np.ndarray], float | None]


def load(backbone: lpips.Backbone, weights: str = "download", heads: str = "download") -> Metric:
    """Returns `(uint8[H, W, 3], uint8[H, W, 3]) → distance`, which is None for images too small for the network.

    `weights` (torchvision's ImageNet network) and `heads` are files, or `download`. Raises Refused when one does not fit.
    """
    network = download(*TORCHVISION[backbone]) if weights == "download" else Path(weights)
    name, digest = HEADS[backbone]
    linear = download(HEADS_AT + name, digest, prefix=f"lpips_v0.1_{backbone}_") if heads == "download" else Path(heads)
    # The message names the flag of the wrong file, because people mix up the two.
    try:
        params = lpips.params_from_torchvision(backbone, read_arrays(network))
    except Refused as error:
        raise Refused(f"--lpips-weights {network}: {error}") from error
    try:
        vectors = [jnp.asarray(head) for head in lpips.heads_from_file(backbone, read_arrays(linear))]
    except Refused as error:
        raise Refused(f"--lpips-heads {linear}: {error}") from error
    distance = jax.jit(functools.partial(lpips.distance, backbone))

    def metric(a: np.ndarray, b: np.ndarray) -> float | None:
        if min(a.shape[:2]) < SMALLEST:
            return None
        # A batch of one: the pairs of a folder differ in size.
        x, y = (to_float(jnp.asarray(image[None])) for image in (a, b))
        return float(distance(params, vectors, x, y)[0])

    return metric
