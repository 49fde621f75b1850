"""Convolutions whose gradient by the kernel is a few products of matrices, beside the plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autoretouch_jax.config import networks
from autoretouch_jax.models import convolution, forms, kernel_gradient
from autoretouch_jax.models.layers import TransposedConv
from autoretouch_jax.models.patchgan import AutoRetouchPatchGAN

CALL = "xla_metadata_call"  # what holds the products
OUTPUTS, GRADIENTS = 1e-5, 1e-4  # relative to the largest value


def noise(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def error(value, reference):
    return float(jnp.abs(value - reference).max() / jnp.abs(reference).max())


def convolve(x, kernel, strides, padding):
    return convolution.convolve(x, kernel, strides, padding)


def plainly(function, *arguments):
    with forms.plain():
        return function(*arguments)


# sides, channels in and out, the kernel's sides, strides, padding
CASES = [
    ((12, 13), 3, 8, (7, 7), (1, 1), ((3, 3), (3, 3))),  # few channels in
    ((12, 13), 8, 3, (3, 3), (1, 1), "SAME"),  # few out: image and gradient change roles
    ((13, 12), 8, 16, (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((12, 12), 6, 8, (4, 4), (2, 2), "SAME"),
    ((9, 9), 8, 1, (4, 4), (1, 1), ((1, 2), (2, 1))),
    ((16, 15), 3, 5, (2, 3), (2, 1), ((0, 0), (2, -1))),  # a column cut off
    ((10, 10), 4, 2, (2, 2), (1, 1), ((0, 1), (1, 0))),
    ((10, 11), 6, 2, (3, 3), (1, 1), ((3, 0), (1, 4))),  # more margin than a kernel reaches
]


@pytest.mark.parametrize("largest", [2**26, 0], ids=["whole", "an image at a time"])
@pytest.mark.parametrize(("sides", "inputs", "outputs", "kernel", "strides", "padding"), CASES)
def test_outputs_and_gradients_are_those_of_the_plain_convolution(
    sides, inputs, outputs, kernel, strides, padding, largest, monkeypatch
):
    monkeypatch.setattr(kernel_gradient, "LARGEST", largest)
    x, kernel = noise(3, *sides, inputs), noise(*kernel, inputs, outputs, seed=1)
    weight = noise(*plainly(convolve, x, kernel, strides, padding).shape, seed=2)

    def gradients(x, kernel):
        return jax.value_and_grad(lambda *a: (weight * convolve(*a, strides, padding)).sum(), (0, 1))(x, kernel)

    assert CALL in str(jax.make_jaxpr(gradients)(x, kernel)), "both ways would be the plain one"
    value, ours = jax.jit(gradients)(x, kernel)
    plain_value, plain = plainly(jax.jit(lambda *a: gradients(*a)), x, kernel)
    assert abs(value - plain_value) <= OUTPUTS * float(jnp.abs(weight).sum())
    assert all(error(a, b) <= GRADIENTS for a, b in zip(ours, plain, strict=True))  # not `max`, which passes over NaN


def test_a_penalty_on_a_gradient_has_the_plain_gradient():
    """R1 differentiates the discriminator's gradient by the image once more."""
    x, kernel = noise(2, 12, 12, 6), noise(4, 4, 6, 8, seed=1)

    def penalty(kernel):
        by_image = jax.grad(lambda x: jnp.tanh(convolve(x, kernel, (2, 2), "SAME")).sum())(x)
        return jnp.square(by_image).sum()

    assert CALL in str(jax.make_jaxpr(jax.grad(lambda *a: convolve(*a, (2, 2), "SAME").sum(), 1))(x, kernel))
    assert error(jax.grad(penalty)(kernel), plainly(jax.grad(penalty), kernel)) <= GRADIENTS


@pytest.mark.parametrize("change", [{"dtype": jnp.bfloat16}, {"platform": "gpu"}, {"side": 1}])
def test_other_convolutions_stay_plain(change, monkeypatch):
    if "platform" in change:
        monkeypatch.setattr(forms.devices, "on_cpu", lambda: False)
    x, side = noise(1, 8, 8, 4).astype(change.get("dtype", jnp.float32)), change.get("side", 3)
    kernel = noise(side, side, 4, 4).astype(x.dtype)

    def has_own_gradient(x, kernel):
        return "custom_vjp" in str(jax.make_jaxpr(lambda *a: convolve(*a, (1, 1), "SAME"))(x, kernel))

    assert not has_own_gradient(x, kernel)
    monkeypatch.undo()
    assert has_own_gradient(noise(1, 8, 8, 4), noise(3, 3, 4, 4))


@pytest.mark.parametrize("name", ["discriminator", "upsampling"])
def test_the_layers_use_it(name):
    if name == "discriminator":
        module, inputs = (
            AutoRetouchPatchGAN(networks.AutoRetouchPatchGAN(width=4)),
            (noise(1, 64, 64, 3), noise(1, 64, 64, 3, seed=1)),
        )
    else:
        module, inputs = TransposedConv(4, 4, jnp.float32), (noise(1, 8, 8, 4),)
    variables = module.init(jax.random.key(0), *inputs)

    def gradients(params):
        output = lambda p: module.apply(variables | {"params": p}, *inputs)  # noqa: E731
        return jax.grad(lambda p: sum(x.sum() for x in jax.tree.leaves(output(p))))(params)

    assert CALL in str(jax.make_jaxpr(gradients)(variables["params"]))
    assert CALL not in str(plainly(jax.make_jaxpr(lambda p: gradients(p)), variables["params"]))
