"""`autoretouch models`: what every network costs and sees, read off the networks themselves."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from autoretouch_jax import architecture
from autoretouch_jax.models import build

SIDES = (512, 1024)
NETWORKS: dict[str, tuple[architecture.Generator | architecture.Discriminator, str]] = {
    "autoretouch": (architecture.AutoRetouch(), "Shafaei, Little and Schmidt, WACV 2021"),
    "retouch": (architecture.Retouch(), "ours: configs/retouch.py"),
    "pix2pix (U-Net-256)": (architecture.Pix2Pix(), "Isola et al., CVPR 2017"),
    "pix2pix (U-Net-128)": (architecture.Pix2Pix(levels=7), "Isola et al., CVPR 2017"),
    "pix2pixhd_global": (architecture.Pix2PixHDGlobal(), "Wang et al., CVPR 2018"),
    "pix2pixhd_local": (architecture.Pix2PixHDLocal(), "Wang et al., CVPR 2018"),
    "seed_patchgan": (architecture.SeedPatchGAN(), "AutoRetouch's reference implementation"),
    "patchgan": (architecture.PatchGAN(), "Isola et al., CVPR 2017"),
    "patchgan, 2 scales": (architecture.PatchGAN(norm="instance", scales=2, padding=2), "pix2pixHD, Wang et al., CVPR 2018"),
}


def run() -> int:
    """Print the table; returns the exit status."""
    header = ["", "parameters", "sees, px", *(f"GMAC at {side}²" for side in SIDES), "source"]
    rows = [header]
    for name, (config, source) in tqdm(NETWORKS.items(), desc="measuring", unit="network", leave=False, disable=None):
        field = receptive_field(config)
        sees = f"{field}" + (", and the image's statistics" if getattr(config, "norm", "") == "instance" else "")
        costs = [f"{multiply_accumulates(config, side) / 1e9:,.1f}" for side in SIDES]
        rows.append([name, f"{parameters(config):,}", sees, *costs, source])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells, row[-1]]))
    print("parameters are the trainable ones; a multiply-accumulate is two FLOPs; the receptive field is that of the layers")
    return 0


def module_and_images(config: Any, height: int, width: int) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """The module and the shapes of the images that it takes."""
    image = jax.ShapeDtypeStruct((1, height, width, 3), np.float32)
    is_generator = type(config) in build.GENERATORS
    return (build.generator(config), [image]) if is_generator else (build.discriminator(config), [image, image])


def _variables(config: Any) -> Any:
    module, images = module_and_images(config, 256, 256)
    return jax.eval_shape(module.init, jax.random.key(0), *images)


def parameters(config: Any) -> int:
    """Trainable parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(_variables(config)["params"]))


def multiply_accumulates(config: Any, side: int) -> int:
    """Of all convolutions in one inference on a side × side image; taps that fall on zero padding are not counted."""
    module, images = module_and_images(config, side, side)
    jaxpr = jax.make_jaxpr(lambda variables, *inputs: module.apply(variables, *inputs))(_variables(config), *images)
    return sum(_convolution(equation) for equation in _equations(jaxpr.jaxpr))


def _equations(jaxpr: Any) -> Any:
    for equation in jaxpr.eqns:
        inner = [value for value in equation.params.values() if hasattr(value, "jaxpr") or hasattr(value, "eqns")]
        if inner:
            for value in inner:
                yield from _equations(getattr(value, "jaxpr", value))
        elif equation.primitive.name == "conv_general_dilated":
            yield equation


def _convolution(equation: Any) -> int:
    image, kernel = (variable.aval.shape for variable in equation.invars)
    spec = equation.params["dimension_numbers"]
    taps = 1
    for axis, stride, (before, _) in zip((2, 3), equation.params["window_strides"], equation.params["padding"], strict=True):
        size, width = image[spec.lhs_spec[axis]], kernel[spec.rhs_spec[axis]]
        outputs = equation.outvars[0].aval.shape[spec.out_spec[axis]]
        starts = np.arange(outputs) * stride - before
        taps *= int((np.minimum(starts + width, size) - np.maximum(starts, 0)).sum())
    channels_in, channels_out = kernel[spec.rhs_spec[1]], kernel[spec.rhs_spec[0]]
    return int(image[spec.lhs_spec[0]]) * taps * int(channels_in) * int(channels_out)


def receptive_field(config: Any, side: int = 512) -> int:
    """Side of the square that the most far-sighted output pixel sees through the layers, norms left out.

    Measured on a tall and narrow image: with convolutions that average, the rows of the input that have a gradient. It does not
    depend on the width of the layers.
    """
    narrow = {"width": 1} | ({"norm": "none"} if hasattr(config, "norm") else {})
    if isinstance(config, architecture.PatchGAN):
        narrow |= {"scales": 1}  # one copy; the coarser ones see the same number of their own, larger pixels
    config = dataclasses.replace(config, **narrow)
    grid = architecture.grid(config) if type(config) in build.GENERATORS else 1
    module, images = module_and_images(config, side, max(grid, 32))
    shapes = jax.eval_shape(module.init, jax.random.key(0), *images)
    averaging = jax.tree.map(lambda leaf: np.full(leaf.shape, _average(leaf.shape), np.float32), shapes)
    dark = np.full(images[0].shape, 1e-20, np.float32)  # so dark that the tanh, at the end of residual sums, stays linear

    def pixel(image: jax.Array, offset: int) -> jax.Array:
        output = module.apply(averaging, *[dark] * (len(images) - 1), image)
        found = build.scales(output)[0][-1] if isinstance(output, list) else build.retouched(output).image
        return found[0, found.shape[1] // 2 + offset, found.shape[2] // 2].sum()

    gradient = jax.jit(jax.grad(pixel))
    seen = 0
    for offset in {0, grid // 2, grid - 1}:
        rows = np.flatnonzero(np.abs(np.asarray(gradient(dark, offset))).sum((0, 2, 3)))
        seen = max(seen, int(rows[-1] - rows[0] + 1))
    return receptive_field(config, 2 * side) if seen >= side // 2 and side < 4096 else seen


def _average(shape: tuple[int, ...]) -> float:
    """Kernels average what they see, biases are zero: nothing saturates and nothing vanishes on the way."""
    return 1 / math.prod(shape[:-1]) if len(shape) == 4 else 0.0
