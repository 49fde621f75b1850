"""The losses. Images are float32 `[N, H, W, 3]` in [-1, 1], logits are float32, and every loss is float32 `[N]`.

Each is the mean over an image. The step weights the images and averages over the batch.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from autoretouch_jax.models.outputs import GeneratorOutput, Scales

Features = dict[str, jax.Array]


def pixel(kind: str, fake: jax.Array, target: jax.Array, source: jax.Array, edit_weight: jax.Array | float) -> jax.Array:
    """`mse` (the paper's) or `l1` (Isola et al. 2017, equation 3), with edited pixels counted `edit_weight` times.

    The edit is where source and target differ. A retoucher touches so little that, with an unweighted L1 loss, training takes
    long to leave the identity.
    """
    error = fake - target
    error = jnp.square(error) if kind == "mse" else jnp.abs(error)
    edit = jnp.any(source != target, axis=-1, keepdims=True)
    return _per_image(jnp.where(edit, edit_weight, 1.0) * error)


def edit_weight(initial: float, steps: int, step: jax.Array) -> jax.Array:
    """The weight of edited pixels at `step`: it falls linearly from `initial` to 1 over `steps`. With 0 steps it stays."""
    if steps == 0:
        return jnp.asarray(initial, jnp.float32)
    return 1.0 + (initial - 1.0) * jnp.clip(1.0 - step / steps, 0.0, 1.0)


def perceptual(fake: Features, target: Features, weights: Sequence[float] = (), scale: str = "rms") -> jax.Array:
    """The mean absolute difference of VGG features per layer, summed with `weights`, or averaged where none are given.

    `scale="none"` is pix2pixHD's (Wang et al. 2018, section 3.3). `scale="rms"`, ours, divides by the RMS of the target's
    features.
    """
    total: jax.Array | float = 0.0
    for weight, (name, reference) in zip(weights or [1 / len(target)] * len(target), target.items(), strict=True):
        reference = jax.lax.stop_gradient(reference.astype(jnp.float32))
        difference = jnp.abs(fake[name].astype(jnp.float32) - reference)
        if scale == "rms":
            # The activations of torchvision's and Keras' weights differ by a factor of 60.
            difference *= jax.lax.rsqrt(jnp.mean(jnp.square(reference), axis=(1, 2, 3), keepdims=True) + 1e-12)
        total += weight * _per_image(difference)
    return jnp.asarray(total)


def feature_matching(fake: Scales, real: Scales) -> jax.Array:
    """The mean absolute difference of D's features, without the logits (Wang et al. 2018, equation 4).

    As in the authors' code, the sum over layers and scales is weighted by 4 / layers / scales.
    """
    total: jax.Array | float = 0.0
    for fake_features, real_features in zip(fake, real, strict=True):
        for a, b in zip(fake_features[:-1], real_features[:-1], strict=True):
            difference = jnp.abs(a.astype(jnp.float32) - jax.lax.stop_gradient(b).astype(jnp.float32))
            total += 4.0 / (len(fake_features) - 1) / len(fake) * _per_image(difference)
    return jnp.asarray(total)


def mask(fake: GeneratorOutput, source: jax.Array, target: jax.Array) -> jax.Array:
    """Binary cross-entropy of the predicted mask against where source and target differ."""
    edit = jnp.any(source != target, axis=-1, keepdims=True).astype(jnp.float32)
    return _per_image(optax.sigmoid_binary_cross_entropy(fake.mask_logits, edit))


def discriminator(kind: str, real: Scales, fake: Scales) -> jax.Array:
    """Half the sum of the real and the fake part, so that D learns at half speed (Isola et al. 2017, section 3.3).

    `bce` (Goodfellow et al. 2014), `lsgan` (Mao et al. 2017) or `hinge` (Lim and Ye 2017), summed over D's scales.
    """
    parts = [_real_part(kind, a[-1]) + _fake_part(kind, b[-1]) for a, b in zip(real, fake, strict=True)]
    return 0.5 * sum(parts[1:], parts[0])


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


def _per_image(values: jax.Array) -> jax.Array:
    return jnp.mean(values.astype(jnp.float32), axis=tuple(range(1, values.ndim)))
