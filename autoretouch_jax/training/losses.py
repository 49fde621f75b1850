"""The losses. Images are float32 `[N, H, W, 3]` in [-1, 1], logits float32; every loss is a float32 scalar, a mean."""

import jax
import jax.numpy as jnp
import optax

Features = dict[str, jax.Array]


def pixel(kind: str, fake: jax.Array, target: jax.Array, source: jax.Array, edit_weight: jax.Array | float) -> jax.Array:
    """`mse` (the paper's) or `l1` (pix2pix', Isola et al. 2017, equation 3), with the edit counted `edit_weight` times.

    The edit is where source and target differ. A retoucher touches so little that with an unweighted L1 loss changing nothing
    is a place that training takes long to leave.
    """
    error = fake - target
    error = jnp.square(error) if kind == "mse" else jnp.abs(error)
    edit = jnp.any(source != target, axis=-1, keepdims=True)
    return jnp.mean(jnp.where(edit, edit_weight, 1.0) * error)


def edit_weight(initial: float, steps: int, step: jax.Array) -> jax.Array:
    """The weight of the edit at `step`: from `initial` linearly to 1 over `steps`."""
    return 1.0 + (initial - 1.0) * jnp.clip(1.0 - step / steps, 0.0, 1.0)


def perceptual(fake: Features, target: Features) -> jax.Array:
    """Mean absolute difference of VGG features, per image and layer relative to the target's RMS, averaged over layers.

    Dividing by the RMS is ours: torchvision's and Keras' weights give activations on scales 60 times apart. It is taken per
    image, so that the loss of a batch is the mean of its images' losses however the batch is spread.
    """
    total = jnp.zeros((), jnp.float32)
    for name, reference in target.items():
        reference = jax.lax.stop_gradient(reference.astype(jnp.float32))
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(reference), axis=(1, 2, 3), keepdims=True) + 1e-12)
        total += jnp.mean(scale * jnp.abs(fake[name].astype(jnp.float32) - reference))
    return total / len(target)


def discriminator(kind: str, real_logits: jax.Array, fake_logits: jax.Array) -> jax.Array:
    """Half the sum of the real and the fake part, so that D learns at half speed (Isola et al. 2017, section 3.3).

    `bce` (Goodfellow et al. 2014), `lsgan` (Mao et al. 2017) or `hinge` (Lim and Ye 2017).
    """
    if kind == "bce":
        real = optax.sigmoid_binary_cross_entropy(real_logits, jnp.ones_like(real_logits))
        fake = optax.sigmoid_binary_cross_entropy(fake_logits, jnp.zeros_like(fake_logits))
    elif kind == "lsgan":
        real, fake = jnp.square(real_logits - 1), jnp.square(fake_logits)
    else:
        real, fake = jax.nn.relu(1 - real_logits), jax.nn.relu(1 + fake_logits)
    return 0.5 * (real.mean() + fake.mean())


def adversarial(kind: str, fake_logits: jax.Array) -> jax.Array:
    """What the generator minimises against D: the non-saturating form of each loss above."""
    if kind == "bce":
        return optax.sigmoid_binary_cross_entropy(fake_logits, jnp.ones_like(fake_logits)).mean()
    if kind == "lsgan":
        return jnp.square(fake_logits - 1).mean()
    return -fake_logits.mean()
