"""A model as StableHLO, in the file format of `jax.export`: JAX alone reads and runs it, without this package.

`jax.export.deserialize(content).call(image)` returns a dictionary of the outputs that the ONNX file has, see `onnx_model.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from autoretouch_jax.errors import Refused, first_line
from autoretouch_jax.inference.tiles import canvas_step
from autoretouch_jax.models import forms
from autoretouch_jax.models.folder import Model
from autoretouch_jax.models.modules import make_generator
from autoretouch_jax.models.outputs import generator_output
from autoretouch_jax.models.pixels import to_float, to_uint8

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")  # one file for all of them


def stablehlo(model: Model, gate: float, dtype: Any) -> tuple[bytes, int]:
    """Returns the file's content, and the smallest side that it takes, in pixels. The arguments are those of `onnx_model`.

    Raises Refused when `jax.export` cannot express the network for all sizes.
    """
    retouch, grid = jax.jit(retouching(model, gate, dtype)), model.config.grid
    # pix2pixHD mirrors inside the network, which JAX allows only where it can prove that there is something to mirror.
    for smallest in (1, grid + 1):
        constraints = [f"{side} >= {smallest}" for side in ("height", "width")]
        shape = (*export.symbolic_shape("batch, height, width", constraints=constraints), 3)
        try:
            # The file states the precision: by default a GPU or TPU would compute products of float32 in less.
            with jax.default_matmul_precision("highest"), forms.plain():
                exported = export.export(retouch, platforms=PLATFORMS)(jax.ShapeDtypeStruct(shape, jnp.uint8))
        except (TypeError, ValueError) as error:  # what JAX raises where it would have to know a size
            reason = first_line(error)
        else:
            return bytes(exported.serialize()), smallest
    raise Refused(f"network {model.config.network}: JAX cannot export it for all sizes ({reason}); try --to onnx")


def retouching(model: Model, gate: float, dtype: Any) -> Any:
    """Returns the function: uint8 `[N, H, W, 3]` → the outputs."""
    config, module, step = model.config, make_generator(model.config, dtype), canvas_step(model.config)
    # Kernels are stored in the type in which they are used. Norms keep float32.
    variables = jax.tree.map(lambda x: jnp.asarray(x, dtype if x.ndim == 4 else x.dtype), model.variables)

    def retouch(image: jax.Array) -> dict[str, jax.Array]:
        canvas = _mirrored(_mirrored(image, 1, step), 2, step)
        output = generator_output(module.apply(variables, to_float(canvas)))
        inside = (slice(None), slice(image.shape[1]), slice(image.shape[2]))
        ungated = to_uint8(output.image[inside])
        applied = jnp.abs(ungated.astype(jnp.int32) - image).max(-1, keepdims=True) > config.dead_zone
        outputs = {"ungated": ungated}
        if output.mask_logits is not None:
            outputs["mask"] = jax.nn.sigmoid(output.mask_logits[inside][..., 0])
            applied &= outputs["mask"][..., None] >= gate
        return outputs | {"retouched": jnp.where(applied, ungated, image)}

    return retouch


def _mirrored(x: jax.Array, axis: int, step: int) -> jax.Array:
    """Mirrors beyond the end of an axis up to a multiple of `step`, as `tiles.network_output` does."""
    # By indices, because `jnp.pad` mirrors only where it knows the size.
    size = x.shape[axis]
    period = jnp.maximum(2 * jnp.asarray(size) - 2, 1)
    indices = jnp.arange((size + step - 1) // step * step) % period
    return jnp.take(x, jnp.minimum(indices, period - indices), axis=axis, mode="clip")
