"""The losses. Images are float32 `[N, H, W, 3]` in [-1, 1], logits are float32, and every loss is float32 `[N]`.

Each is the mean over an image. The step weights the images and averages over the batch.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from autoretouch_jax.models.layers import as_stored
from autoretouch_jax.models.outputs import GeneratorOutput, Scales
from autoretouch_jax.training.scalars import is_off

Features = dict[str, jax.Array]

# Half a level of 8 bits. An error below it is rounded away, so there the loss is flat and does not push.
CHARBONNIER_EPSILON = 1 / 255


def pixel(
    kind: str,
    fake: jax.Array,
    target: jax.Array,
    source: jax.Array,
    edit_weight: jax.Array | float,
    trust: jax.Array | float = 1.0,
) -> jax.Array:
    """`mse` (the paper's), `l1` (Isola et al. 2017, equation 3) or `charbonnier`: √(e² + ε²) − ε (Charbonnier et al. 1994).

    Edited pixels, where source and target differ, count `edit_weight` times, the others `trust` times (`trust_unedited`). A
    retoucher touches so little that, with an unweighted L1 loss, training takes long to leave the identity.
    """
    error = fake - target
    if kind == "charbonnier":
        error = jnp.sqrt(jnp.square(error) + CHARBONNIER_EPSILON**2) - CHARBONNIER_EPSILON
    else:
        error = jnp.square(error) if kind == "mse" else jnp.abs(error)
    edit = jnp.any(source != target, axis=-1, keepdims=True)
    return _per_image(jnp.where(edit, edit_weight, trust) * error)


def edit_weight(initial: jax.Array | float, steps: jax.Array | int, step: jax.Array) -> jax.Array:
    """The weight of edited pixels at `step`: it falls linearly from `initial` to 1 over `steps`. With 0 steps it stays."""
    if is_off(steps):
        return jnp.asarray(initial, jnp.float32)
    return 1.0 + (initial - 1.0) * jnp.clip(1.0 - step / steps, 0.0, 1.0)


def perceptual(fake: Features, target: Features, weights: Sequence[jax.Array | float] = (), scale: str = "rms") -> jax.Array:
    """The mean absolute difference of VGG features per layer, summed with `weights`, or averaged where none are given.

    `scale="none"` is pix2pixHD's (Wang et al. 2018, section 3.3). `scale="rms"`, ours, divides by the RMS of the target's
    features.
    """
    total: jax.Array | float = 0.0
    for weight, (name, reference) in zip(weights or [1 / len(target)] * len(target), target.items(), strict=True):
        reference = as_stored(reference)
        difference = _mean_difference(as_stored(fake[name]), reference)
        if scale == "rms":
            # The activations of torchvision's and Keras' weights differ by a factor of 60.
            difference *= jax.lax.rsqrt(_per_image(jnp.square(reference.astype(jnp.float32))) + 1e-12)
        total += weight * difference
    return jnp.asarray(total)


def feature_matching(fake: Scales, real: Scales) -> jax.Array:
    """The mean absolute difference of D's features, without the logits (Wang et al. 2018, equation 4).

    As in the authors' code, the sum over layers and scales is weighted by 4 / layers / scales.
    """
    total: jax.Array | float = 0.0
    for fake_features, real_features in zip(fake, real, strict=True):
        for a, b in zip(fake_features[:-1], real_features[:-1], strict=True):
            total += 4.0 / (len(fake_features) - 1) / len(fake) * _mean_difference(a, b)
    return jnp.asarray(total)


def _mean_difference(fake: jax.Array, reference: jax.Array) -> jax.Array:
    """Each image's mean absolute difference of features, subtracted in their own type and averaged in float32."""
    # These are the largest arrays of a step, and XLA would store float32 copies of them.
    return _per_image(jnp.abs(fake - jax.lax.stop_gradient(reference)))


def mask(fake: GeneratorOutput, source: jax.Array, target: jax.Array, left_share: jax.Array | float = 0.0) -> jax.Array:
    """Binary cross-entropy of the predicted mask against where source and target differ.

    If retouchers left a share of the blemishes, a blemish of probability p is edited with probability (1 − share) · p. The loss
    is then that of (1 − share) · p, so that p is again the probability of a blemish (Elkan and Noto 2008, lemma 1; as a loss:
    Patrini et al. 2017, theorem 2). An unedited pixel costs at most −log(share), however sure the network is.
    """
    edit = jnp.any(source != target, axis=-1, keepdims=True)
    assert fake.mask_logits is not None
    if is_off(left_share):
        return _per_image(optax.sigmoid_binary_cross_entropy(fake.mask_logits, edit.astype(jnp.float32)))
    logits = fake.mask_logits
    # −log(1 − (1 − share) p), in logits. The constant −log(1 − share) of edited pixels is left out.
    unedited = jax.nn.softplus(logits) - jax.nn.softplus(logits + jnp.log(left_share))
    return _per_image(jnp.where(edit, jax.nn.softplus(-logits), unedited))


def trust_unedited(fake: GeneratorOutput, left_share: jax.Array | float) -> jax.Array:
    """The probability that an unedited pixel is no blemish that was left: float32 `[N, H, W, 1]`, without gradient.

    With p from the mask it is (1 − p) / (1 − (1 − share) · p) (Elkan and Noto 2008, section 3).
    """
    assert fake.mask_logits is not None
    return jax.lax.stop_gradient(jax.nn.sigmoid(-(fake.mask_logits + jnp.log(left_share))))


def discriminator(kind: str, real: Scales, fake: Scales) -> jax.Array:
    """Half the sum of the real and the fake part, so that D learns at half speed (Isola et al. 2017, section 3.3).

    `bce` (Goodfellow et al. 2014), `lsgan` (Mao et al. 2017) or `hinge` (Lim and Ye 2017), summed over D's scales.
    """
    parts = [_real_part(kind, a[-1]) + _fake_part(kind, b[-1]) for a, b in zip(real, fake, strict=True)]
    return 0.5 * sum(parts[1:], parts[0])


def r1(discriminate: Callable[[jax.Array], Scales], target: jax.Array) -> jax.Array:
    """Half the squared norm of the gradient of D's logits at the target, for each image (Mescheder et al. 2018, section 4.1).

    A PatchGAN has many logits. The gradient is that of their sum, divided by the root of their number, so that the penalty does
    not depend on the crop. With a single logit it is the paper's.
    """

    def logits(image: jax.Array) -> jax.Array:
        # Summed over the batch as well: an image's logits depend on no other image, BatchNorm's statistics aside.
        return sum((jnp.sum(scale[-1]) / scale[-1][0].size ** 0.5 for scale in discriminate(image)), jnp.zeros(()))

    return 0.5 * jnp.sum(jnp.square(jax.grad(logits)(target)), axis=(1, 2, 3))


def adversarial(kind: str, fake: Scales) -> jax.Array:
    """The generator's adversarial loss: the non-saturating form of each loss above, summed over D's scales."""
    parts = [-_per_image(scale[-1]) if kind == "hinge" else _real_part(kind, scale[-1]) for scale in fake]
    return sum(parts[1:], parts[0])


def _real_part(kind: str, logits: jax.Array) -> jax.Array:
    if kind == "bce":
        return _per_image(optax.sigmoid_binary_cross_entropy(logits, jnp.ones_like(logits)))
    return _per_image(jnp.square(logits - 1) if kind == "lsgan" else jax.nn.relu(1 - logits))


def _fake_part(kind: str, logits: jax.Array) -> jax.Array:
    if kind == "bce":
        return _per_image(optax.sigmoid_binary_cross_entropy(logits, jnp.zeros_like(logits)))
    return _per_image(jnp.square(logits) if kind == "lsgan" else jax.nn.relu(1 + logits))


def edit_measures(fake: jax.Array, source: jax.Array, target: jax.Array) -> dict[str, jax.Array]:
    """Metrics of a batch, in 1/255 per channel: how much of the edit is left to do, how much there was, and what else changed.

    `edit/left` and `edit/drawn` are sums over the edited pixels over the number of all pixels, so that means over steps can be
    divided: 1 − left / drawn is the share of the edit that is made. `edit/outside` is the mean change of the other pixels.
    """
    edit = jnp.any(source != target, axis=-1, keepdims=True)
    fake, source, target = (image.astype(jnp.float32) * 127.5 for image in (fake, source, target))
    left, drawn = (jnp.mean(jnp.where(edit, jnp.abs(image - target), 0)) for image in (fake, source))
    untouched = jnp.maximum(jnp.mean(1.0 - edit), 1e-6)
    outside = jnp.mean(jnp.where(edit, 0, jnp.abs(fake - source))) / untouched
    return {"edit/left": left, "edit/drawn": drawn, "edit/outside": outside}


def _per_image(values: jax.Array) -> jax.Array:
    return jnp.mean(values.astype(jnp.float32), axis=tuple(range(1, values.ndim)))
