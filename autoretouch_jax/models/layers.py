"""Layers that several networks share. Feature maps are `[N, H, W, C]`."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from autoretouch_jax.models import convolution, sums
from autoretouch_jax.runtime import devices

Remat = Literal["none", "norms", "full"]  # see `rematerialised`

LEAK = 0.2  # LeakyReLU's slope in AutoRetouch's reference implementation, pix2pix and pix2pixHD
CONTRAST_GAIN = 4.0  # ours: brings the stem's response to skin texture to about unit scale
INSTANCE_EPSILON = 1e-5  # PyTorch's default
NORMAL_INIT = nn.initializers.normal(0.02)  # the kernels of pix2pix and pix2pixHD


class Conv(nn.Module):
    """A convolution, `[N, H, W, C]` → `[N, h, w, features]`, and its bias. Parameters and first values are those of `nn.Conv`.

    That layer sums the bias's gradient in the compute type. In bfloat16 such a sum over many pixels stops growing. Ours has no
    forward-mode derivative.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: str | Sequence[tuple[int, int]] = "SAME"  # or VALID, or the zeros above and below, left and right
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (*self.kernel_size, x.shape[-1], self.features))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        x = convolution.convolve(x, kernel, self.strides, self.padding)
        return add_bias(x, self.param("bias", self.bias_init, (self.features,))) if self.use_bias else x


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """`x + bias` in the type of `x`, `[…, C]` + `[C]`. The gradient by the bias is a sum in float32, whatever that type is."""
    return x + bias.astype(x.dtype)


def _add_bias_forward(x: jax.Array, bias: jax.Array) -> Any:
    return x + bias.astype(x.dtype), bias


def _add_bias_backward(bias: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    wide = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
    return gradient, sums.of_channels(wide).astype(bias.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def leaky(x: jax.Array) -> jax.Array:
    """LeakyReLU with slope `LEAK`."""
    return nn.leaky_relu(x, LEAK)


def contrast_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """LeCun's initialisation with each kernel's mean subtracted, times `CONTRAST_GAIN`. It is ours.

    Without norm layers, the stem would otherwise pass on mostly the local brightness and hardly the faint contrast of a
    blemish.
    """
    kernel = nn.initializers.lecun_normal()(key, shape, dtype)
    return CONTRAST_GAIN * (kernel - kernel.mean((0, 1), keepdims=True))


def as_stored(x: jax.Array) -> jax.Array:
    """Returns `x`, which XLA then stores in its own type. It would carry bfloat16 on as float32, twice the bytes, by itself."""
    return x if x.dtype == jnp.float32 else jax.lax.optimization_barrier(x)


def upsample_nearest(x: jax.Array) -> jax.Array:
    """×2 nearest neighbour, `[N, h, w, C]` → `[N, 2h, 2w, C]`.

    By broadcast and reshape, which compiles everywhere and exports to ONNX with symbolic sizes. One side after the other: XLA
    expects both at once, with the gradient, to take a TPU longer.
    """
    n, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, :, None], (n, h, w, 2, c)).reshape(n, h, 2 * w, c)
    return jnp.broadcast_to(x[:, :, None], (n, h, 2, 2 * w, c)).reshape(n, 2 * h, 2 * w, c)


def space_to_depth(x: jax.Array) -> jax.Array:
    """`[N, 2h, 2w, C]` → `[N, h, w, 4C]`. The channels of the upper left pixel come first."""
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(n, h // 2, w // 2, 4 * c)


def depth_to_space(x: jax.Array) -> jax.Array:
    """The inverse of `space_to_depth`: `[N, h, w, 4C]` → `[N, 2h, 2w, C]`."""
    n, h, w, c = x.shape
    return x.reshape(n, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, c // 4)


class BatchNorm(nn.Module):
    """BatchNorm over batch and space (Ioffe and Szegedy 2015). Statistics are float32 whatever the compute type.

    With `axis` the statistics are those of all devices along it, which costs two small all-reduces a layer. `unbiased` decides
    which variance the moving average takes: n / (n − 1) times the batch's, as PyTorch does, or the batch's, as Keras does.
    Flax' own layer knows the second only, and its faster variance, E[x²] − E[x]², loses digits where the mean is large.
    """

    momentum: float
    epsilon: float
    unbiased: bool
    axis: str | None = None
    scale_init: Any = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, offset: jax.Array | float = 0.0) -> jax.Array:
        """Returns `x + offset`, normalised, as float32. `offset` is one value for each channel, see `ConvBeforeNorm`."""
        shape = (x.shape[-1],)
        scale, bias = self.param("scale", self.scale_init, shape), self.param("bias", nn.initializers.zeros, shape)
        moving_mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(shape, jnp.float32))
        moving_var = self.variable("batch_stats", "var", lambda: jnp.ones(shape, jnp.float32))
        if not train:
            factor = jax.lax.rsqrt(moving_var.value + self.epsilon) * scale
            return (x.astype(jnp.float32) - (moving_mean.value - offset)) * factor + bias
        # What is added to a whole channel goes with its mean.
        out, mean, var = _normalise_batch(x, scale, bias, self.epsilon, self.axis)
        count = x.size // x.shape[-1] * (devices.sharing() if self.axis else 1)
        # The innermost level of a U-Net can have a single value: its variance is 0, whatever it is multiplied with.
        correction = count / max(1, count - 1) if self.unbiased else 1.0
        moving_mean.value = self.momentum * moving_mean.value + (1 - self.momentum) * (mean + jax.lax.stop_gradient(offset))
        moving_var.value = self.momentum * moving_var.value + (1 - self.momentum) * correction * var
        return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalise_batch(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, axis: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns `x` normalised by its own statistics, as float32, and these: mean and variance, through which nothing learns.

    The gradient is written out (Ioffe and Szegedy 2015, section 3). Derived from the two passes over `x`, it takes more
    operations on every value, and more passes over memory.
    """
    return _normalise_batch_forward(x, scale, bias, epsilon, axis)[0]


def _normalise_batch_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, axis: str | None) -> Any:
    x = as_stored(x)
    y = x.astype(jnp.float32)
    mean = _mean_of_channels(y, axis)
    var = _mean_of_channels(jnp.square(y - mean), axis)
    inverse = jax.lax.rsqrt(var + epsilon)
    return ((y - mean) * (inverse * scale) + bias, mean, var), (x, scale, mean, inverse)


def _normalise_batch_backward(epsilon: float, axis: str | None, kept: Any, cotangents: Any) -> Any:
    (x, scale, mean, inverse), gradient = kept, cotangents[0]
    centred = x.astype(jnp.float32) - mean
    own_sum, own_product = sums.of_channels(gradient), sums.of_channels(gradient * centred)
    count = x.size // x.shape[-1]
    # What a value does through the mean, and through the variance: both are shared by all devices along `axis`.
    shared = (own_sum / count, own_product / count)
    through_mean, through_var = devices.mean(shared) if axis else shared
    factor = inverse * scale
    by_input = factor * gradient - (factor * jnp.square(inverse) * through_var) * centred - factor * through_mean
    return by_input.astype(x.dtype), own_product * inverse, own_sum


_normalise_batch.defvjp(_normalise_batch_forward, _normalise_batch_backward)


def _mean_of_channels(values: jax.Array, axis: str | None) -> jax.Array:
    """The mean of every channel of `[N, H, W, C]`, over all devices along `axis`, if given."""
    mean = sums.of_channels(values) / (values.size // values.shape[-1])
    return devices.mean(mean) if axis else mean


def rematerialised(block: Any, remat: Remat, static: tuple[int, ...] = ()) -> Any:
    """Returns a block whose backward pass recomputes what its forward pass did not store.

    `none` stores everything. `norms` stores the results of convolutions and recomputes norms and activations. `full` stores
    only the block's input. `static` are the positions of arguments that are not arrays, `self` being 0.
    """
    if remat == "none":
        return block
    # Convolutions are expensive, so their results are stored. Norms and activations are cheap to recompute.
    policy = _is_convolution if remat == "norms" else None
    return nn.remat(block, policy=policy, static_argnums=static, prevent_cse=True)


def _is_convolution(primitive: Any, *_args: Any, **params: Any) -> bool:
    # On a CPU a convolution may be no operation of its own, so its result has a name.
    return primitive.name == "conv_general_dilated" or (primitive.name == "name" and params["name"] == convolution.NAME)


def instance_norm(x: jax.Array) -> jax.Array:
    """Normalises each image's channels to mean 0 and variance 1, in float32 and without parameters (Ulyanov et al. 2016)."""
    # In bfloat16 the mean of many pixels would be rounded.
    y = x.astype(jnp.float32)
    mean, variance = y.mean((1, 2), keepdims=True), y.var((1, 2), keepdims=True)
    return ((y - mean) * jax.lax.rsqrt(variance + INSTANCE_EPSILON)).astype(x.dtype)


def pytorch_bias(fan_in: int) -> Any:
    """PyTorch's default for the biases of a convolution: uniform within ± 1 / √fan_in.

    `fan_in` is the kernel's area times its input channels, or times its output channels where the convolution is transposed.
    """
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def conv(
    features: int,
    kernel: int,
    stride: int,
    padding: int,
    dtype: Any,
    name: str,
    init: Any = NORMAL_INIT,
    bias: Any = nn.initializers.zeros,
) -> Any:
    """A convolution that takes the same pixels as PyTorch's `Conv2d(…, kernel, stride, padding)`; `bias` None: without."""
    return Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        padding=((padding, padding), (padding, padding)),
        use_bias=bias is not None,
        dtype=dtype,
        name=name,
        kernel_init=init,
        bias_init=bias or nn.initializers.zeros,
    )


class ConvBeforeNorm(nn.Module):
    """A 3×3 convolution of stride 1, `[N, h, w, C]` → `[N, h, w, features]`, and its bias, `[features]`, not added.

    BatchNorm takes both. In training it would take the bias out again with the mean, so no pass over the feature map adds it,
    and its gradient is 0. The parameters are those of `Conv`.
    """

    features: int
    dtype: Any
    init: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        kernel = self.param("kernel", self.init, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        y = convolution.convolve(x.astype(self.dtype), kernel.astype(self.dtype), (1, 1), "SAME")
        return y, bias


def apply_layer(layer: nn.Module, x: jax.Array, train: bool, spectral_norm: bool) -> jax.Array:
    """Returns `layer(x)`, with the kernel divided by its largest singular value if `spectral_norm` (Miyato et al. 2018).

    The kernel is viewed as a matrix from patch to channel. Each pass in training makes a step of power iteration. Its vector is
    in `batch_stats`, and moves wherever BatchNorm's averages do. The parameters' names stay those of `layer`.
    """
    if not spectral_norm:
        return layer(x)
    return nn.SpectralNorm(layer, name=f"{layer.name}_spectral")(x, update_stats=train)


def reflect(x: jax.Array, margin: int) -> jax.Array:
    """Mirrors `margin` pixels beyond each border. The border itself is not repeated."""
    return jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)), mode="reflect")


class TransposedConv(nn.Module):
    """×2 upsampling as PyTorch's `ConvTranspose2d` with padding 1: `kernel=4`, or `kernel=3` with output padding 1.

    `[N, h, w, C]` → `[N, 2h, 2w, features]`. The parameter `kernel` is `[k, k, C, features]`. Each of the four phases of the
    output is an ordinary convolution with the taps that reach it. The arithmetic is that of the transposed form, which XLA runs
    7 to 21 times slower on a CPU than its FLOPs say.
    """

    features: int
    kernel: int
    dtype: Any
    bias: Any = nn.initializers.zeros  # None: without

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", NORMAL_INIT, shape).astype(self.dtype)
        x = x.astype(self.dtype)
        rows = [[self._phase(x, kernel, top, left) for left in (0, 1)] for top in (0, 1)]
        out = jnp.stack([jnp.stack(row, axis=3) for row in rows], axis=2)  # [N, h, 2, w, 2, C]
        n, h, _, w, _, c = out.shape
        out = out.reshape(n, 2 * h, 2 * w, c)
        if self.bias is not None:
            out = add_bias(out, self.param("bias", self.bias, (self.features,)))
        return out

    def _phase(self, x: jax.Array, kernel: jax.Array, top: int, left: int) -> jax.Array:
        """The output's rows `top::2` and columns `left::2`. Output 2i + p takes input i + d through tap p + 1 − 2d."""
        taps, padding = [], []
        for phase in (top, left):
            offsets = [d for d in (-1, 0, 1) if 0 <= phase + 1 - 2 * d < self.kernel]
            taps.append(slice(phase + 1 - 2 * offsets[0], None, -2))
            padding.append((-offsets[0], offsets[-1]))
        part = kernel[taps[0], taps[1]]
        return convolution.convolve(x, part, (1, 1), padding)
