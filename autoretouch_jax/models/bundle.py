"""A trained generator as a folder: `model.safetensors` and a `model.json` that describes it completely.

Also the one way a generator is applied to a whole image; evaluation, sampling and retouching all come here.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from autoretouch_jax import architecture, files, parallel
from autoretouch_jax.architecture import AutoRetouch, Generator, Retouch, generator_from_json
from autoretouch_jax.errors import Refused
from autoretouch_jax.models import build

FORMAT = 2
TILE = 512  # largest side of a tile's core; memory stays bounded whatever the photo's size
TILE_STEP = 64  # smaller images get a smaller tile, in these steps, so that few shapes are compiled


@dataclass(frozen=True)
class Model:
    """A generator ready to use. `variables` are what its module's `apply` takes."""

    config: Generator
    variables: dict[str, Any]
    data_license: str | None = None
    """The licence of what it was trained on, where that was stated."""


def save_model(folder: Path, config: Generator, params: Any, stats: Any, step: int, data_license: str | None = None) -> None:
    """Write (or replace) the folder; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = {"params": jax.device_get(params), **({"batch_stats": jax.device_get(stats)} if stats else {})}
    arrays = {name: np.ascontiguousarray(value) for name, value in flax.traverse_util.flatten_dict(tree, sep="/").items()}
    files.write(folder / "model.safetensors", save(arrays, metadata={"step": str(step)}))
    description = {
        "format": FORMAT,
        "generator": dataclasses.asdict(config),
        "weights": "model.safetensors",
        "data_license": data_license,
        "input": "NHWC float32 RGB, uint8 / 127.5 - 1",
        "output": "the same; clip to [-1, 1], (x + 1) * 127.5, round to uint8; then keep the input's pixel where the mask's "
        "probability is below generator.gate, or no channel changed by more than generator.dead_zone, where it has them",
    }
    files.write(folder / "model.json", json.dumps(description, indent=2) + "\n")


def load_model(folder: Any) -> Model:
    """The model of a run folder or of a `model/` folder. Raises Refused, naming the file, for anything else."""
    folder = files.place(folder)
    home = folder / "model" if (folder / "model" / "model.json").is_file() else folder
    path = home / "model.json"
    if not path.is_file():
        raise Refused(
            f"{folder}: no model here (no model.json, nor model/model.json); "
            "give the --workdir of a run that has reached a checkpoint, or its model/ folder"
        )
    try:
        description = json.loads(path.read_text())
        if description["format"] != FORMAT:
            raise Refused(f"{path}: format {description['format']}; this version reads format {FORMAT}")
        config = generator_from_json(description["generator"])
        flat = load((home / description["weights"]).read_bytes())
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise Refused(f"{path}: broken model ({type(error).__name__}: {error}); copy the folder again") from error
    variables = flax.traverse_util.unflatten_dict(flat, sep="/")
    check_shapes(path, config, variables)
    return Model(config, variables, description.get("data_license"))


def check_shapes(path: Path, config: Generator, variables: Any) -> None:
    """Refuse weights, read from `path`, that are not exactly those of the network described."""
    side = max(32, architecture.grid(config))
    expected = jax.eval_shape(build.generator(config).init, jax.random.key(0), np.zeros((1, side, side, 3), np.float32))
    want = {k: v.shape for k, v in flax.traverse_util.flatten_dict(expected, sep="/").items()}
    have = {k: v.shape for k, v in flax.traverse_util.flatten_dict(variables, sep="/").items()}
    if wrong := sorted(k for k in want.keys() | have.keys() if want.get(k) != have.get(k)):
        raise Refused(f"{path}: the weights do not fit {config} at {wrong[0]}; is the file complete, and of this network?")


@functools.partial(jax.jit, static_argnums=0)
def _apply(config: Generator, variables: Any, tile: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    source = tile.astype(np.float32) / 127.5 - 1.0
    image, logits = build.retouched(build.generator(config).apply(variables, source))
    output = jnp.rint((jnp.clip(image, -1, 1) + 1) * 127.5).astype(jnp.uint8)
    return output, None if logits is None else jax.nn.sigmoid(logits[..., 0])


def retouch_array(model: Model, image: np.ndarray, strength: float = 1.0, tile: int = TILE) -> np.ndarray:
    """`uint8[H, W, 3]` of any size → the retouched image, uint8, same size.

    The image is mirrored beyond its borders and cut into tiles that overlap by the network's reach, so that the tile size
    does not show; networks that look at the whole image at once get it whole. `strength` 0 returns the input, 1 the model's
    output, in between a blend.
    """
    output, need = raw_output(model, image, tile)
    return finish(model.config, image, output, need, strength)


def raw_output(model: Model, image: np.ndarray, tile: int = TILE) -> tuple[np.ndarray, np.ndarray | None]:
    """The network's own 8-bit output before anything is left alone, and each pixel's predicted need for an edit, in [0, 1].

    `uint8[H, W, 3]` → `(uint8[H, W, 3], float32[H, W] or None)`.
    """
    height, width = image.shape[:2]
    grid, reach = architecture.grid(model.config), build.receptive_radius(model.config)
    if reach is None:
        halo, core_height, core_width = 0, -(-height // grid) * grid, -(-width // grid) * grid
    else:
        halo = reach
        core_height = core_width = min(tile, -(-max(height, width) // TILE_STEP) * TILE_STEP)
    rows, columns = -(-height // core_height), -(-width // core_width)
    padded = _mirror(image, halo, halo + rows * core_height - height, halo + columns * core_width - width)
    corners = [(top, left) for top in range(0, height, core_height) for left in range(0, width, core_width)]
    windows = [padded[top : top + core_height + 2 * halo, left : left + core_width + 2 * halo] for top, left in corners]
    out, need = np.empty_like(image), None
    for (top, left), (patch, patch_need) in zip(corners, _on_all_devices(model, windows), strict=True):
        inside = np.s_[halo : halo + min(core_height, height - top), halo : halo + min(core_width, width - left)]
        place = np.s_[top : top + core_height, left : left + core_width]
        out[place] = patch[inside]
        if patch_need is not None:
            need = np.empty((height, width), np.float32) if need is None else need
            need[place] = patch_need[inside]
    return out, need


def _on_all_devices(model: Model, windows: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """The network's output for each window, a round over this process's devices at a time, the last filled up."""
    at_once = min(len(windows), parallel.local_devices())
    for first in range(0, len(windows), at_once):
        group = windows[first : first + at_once]
        filled = np.stack(group + [group[-1]] * (at_once - len(group)))
        patches, needs = _apply(model.config, model.variables, parallel.spread(filled))
        for i in range(len(group)):
            yield np.asarray(patches[i]), None if needs is None else np.asarray(needs[i])


def finish(
    config: Generator, image: np.ndarray, output: np.ndarray, need: np.ndarray | None, strength: float = 1.0
) -> np.ndarray:
    """What is left alone, and the blend, on 8-bit levels; what is left alone comes back bit-identical.

    A pixel is left alone when its predicted need is below the network's gate, or when no channel would change by more than
    its dead zone.
    """
    delta = output.astype(np.int16) - image
    dead_zone = config.dead_zone if isinstance(config, AutoRetouch | Retouch) else 0
    keep = np.abs(delta).max(-1) > dead_zone
    if need is not None and isinstance(config, Retouch):
        keep &= need >= config.gate
    delta *= keep[..., None].astype(np.int16)
    return (image + np.rint(strength * delta.astype(np.float32))).astype(np.uint8)


def _mirror(image: np.ndarray, before: int, bottom: int, right: int) -> np.ndarray:
    """Reflect-pad; numpy repeats the reflection where an image is smaller than the padding."""
    margins = ((before, bottom), (before, right), (0, 0))
    return np.pad(image, margins, mode="reflect") if min(image.shape[:2]) > 1 else np.pad(image, margins, mode="edge")
