"""`autoretouch models`: the networks with their costs and receptive fields, measured on the networks themselves."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from autoretouch_jax.config import networks
from autoretouch_jax.errors import EXIT_DONE
from autoretouch_jax.models import forms
from autoretouch_jax.models.modules import GENERATORS, make_discriminator, make_generator
from autoretouch_jax.models.outputs import discriminator_scales, generator_output
from autoretouch_jax.runtime.tables import text_table

SIDES = (512, 1024)  # of the images for which the cost is given, in pixels
NETWORKS: dict[str, tuple[networks.Generator | networks.Discriminator, str]] = {
    "autoretouch": (networks.AutoRetouch(), "Shafaei, Little and Schmidt, WACV 2021"),
    "retouch": (networks.Retouch(), "ours: configs/retouch.py"),
    "pix2pix (U-Net-256)": (networks.Pix2Pix(), "Isola et al., CVPR 2017"),
    "pix2pix (U-Net-128)": (networks.Pix2Pix(levels=7), "Isola et al., CVPR 2017"),
    "pix2pixhd_global": (networks.Pix2PixHDGlobal(), "Wang et al., CVPR 2018"),
    "pix2pixhd_local": (networks.Pix2PixHDLocal(), "Wang et al., CVPR 2018"),
    "autoretouch_patchgan": (networks.AutoRetouchPatchGAN(), "AutoRetouch's reference implementation"),
    "patchgan": (networks.PatchGAN(), "Isola et al., CVPR 2017"),
    "patchgan, 2 scales": (networks.PatchGAN(norm="instance", scales=2, padding=2), "pix2pixHD, Wang et al., CVPR 2018"),
}


def run() -> int:
    """Prints the table and returns the exit status."""
    header = ["", "parameters", "sees, px", *(f"GMAC at {side}²" for side in SIDES), "source"]
    rows = []
    for name, (config, source) in tqdm(NETWORKS.items(), desc="measuring", unit="network", leave=False, disable=None):
        sees = f"{receptive_field(config)}" + (
            ", and the image's statistics" if getattr(config, "norm", "") == "instance" else ""
        )
        costs = [f"{multiply_accumulates(config, side) / 1e9:,.1f}" for side in SIDES]
        rows.append([name, f"{parameters(config):,}", sees, *costs, source])
    print(text_table(header, rows, left=(0, len(header) - 1)))
    print("parameters are the trainable ones; a multiply-accumulate is two FLOPs; the receptive field is that of the layers")
    return EXIT_DONE


def module_and_images(config: Any, height: int, width: int) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """Returns the module, and the shapes of the images that it takes."""
    image = jax.ShapeDtypeStruct((1, height, width, 3), np.float32)
    if type(config) in GENERATORS:
        return make_generator(config), [image]
    return make_discriminator(config), [image, image]


def _variables(config: Any) -> Any:
    module, images = module_and_images(config, 256, 256)
    return jax.eval_shape(module.init, jax.random.key(0), *images)


def parameters(config: Any) -> int:
    """The number of trainable parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(_variables(config)["params"]))


def multiply_accumulates(config: Any, side: int) -> int:
    """Counts the multiply-accumulates of all convolutions on a side × side image, without taps that fall on zero padding."""
    module, images = module_and_images(config, side, side)
    with forms.plain():
        jaxpr = jax.make_jaxpr(lambda variables, *inputs: module.apply(variables, *inputs))(_variables(config), *images)
    return sum(_multiply_accumulates(equation) for equation in _convolutions(jaxpr.jaxpr))


def _convolutions(jaxpr: Any) -> Iterator[Any]:
    """Yields the convolutions of a traced program, including those of the programs inside it."""
    for equation in jaxpr.eqns:
        inner = [value for value in equation.params.values() if hasattr(value, "jaxpr") or hasattr(value, "eqns")]
        if inner:
            for value in inner:
                yield from _convolutions(getattr(value, "jaxpr", value))
        elif equation.primitive.name == "conv_general_dilated":
            yield equation


def _multiply_accumulates(equation: Any) -> int:
    image, kernel = (variable.aval.shape for variable in equation.invars)
    spec = equation.params["dimension_numbers"]
    taps = 1
    for axis, stride, (before, _) in zip((2, 3), equation.params["window_strides"], equation.params["padding"], strict=True):
        size, width = image[spec.lhs_spec[axis]], kernel[spec.rhs_spec[axis]]
        outputs = equation.outvars[0].aval.shape[spec.out_spec[axis]]
        # For each position of the window along this axis, the part of it that lies on the image.
        starts = np.arange(outputs) * stride - before
        taps *= int((np.minimum(starts + width, size) - np.maximum(starts, 0)).sum())
    channels_in, channels_out = kernel[spec.rhs_spec[1]], kernel[spec.rhs_spec[0]]
    return int(image[spec.lhs_spec[0]]) * taps * int(channels_in) * int(channels_out)


def receptive_field(config: Any, side: int = 512) -> int:
    """Returns the side of the largest square that an output pixel sees through the layers, without the norms.

    It is measured on a tall, narrow image, with convolutions that average, by counting the input rows that have a gradient.
    """
    # One channel will do, and one scale: a coarser scale sees the same number of its own, larger pixels.
    smallest = {"width": 1, "norm": "none", "scales": 1}
    known = {field.name for field in dataclasses.fields(config)}
    config = dataclasses.replace(config, **{name: value for name, value in smallest.items() if name in known})
    grid = getattr(config, "grid", 1)
    module, images = module_and_images(config, side, max(grid, 32))
    shapes = jax.eval_shape(module.init, jax.random.key(0), *images)
    averaging = jax.tree.map(lambda leaf: np.full(leaf.shape, _average(leaf.shape), np.float32), shapes)
    dark = np.full(images[0].shape, 1e-20, np.float32)  # so dark that the tanh after the residual sums stays linear

    def pixel(image: jax.Array, offset: int) -> jax.Array:
        output = module.apply(averaging, *[dark] * (len(images) - 1), image)
        values = generator_output(output).image if len(images) == 1 else discriminator_scales(output)[0][-1]
        return values[0, values.shape[1] // 2 + offset, values.shape[2] // 2].sum()

    gradient = jax.jit(jax.grad(pixel))
    seen = 0
    for offset in {0, grid // 2, grid - 1}:  # how far a pixel sees depends on its position on the grid
        rows = np.flatnonzero(np.abs(np.asarray(gradient(dark, offset))).sum((0, 2, 3)))
        seen = max(seen, int(rows[-1] - rows[0] + 1))
    return receptive_field(config, 2 * side) if seen >= side // 2 and side < 4096 else seen


def _average(shape: tuple[int, ...]) -> float:
    """Kernels average what they see and biases are zero, so that nothing saturates or vanishes between the layers."""
    return 1 / math.prod(shape[:-1]) if len(shape) == 4 else 0.0
