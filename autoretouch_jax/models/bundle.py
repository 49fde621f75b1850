"""A trained generator as a folder: `model.safetensors` and a `model.json` that describes it completely.

Also the one way a generator is applied to a whole image; evaluation, sampling and retouching all come here.
"""

import dataclasses
import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from autoretouch_jax.config import GeneratorConfig
from autoretouch_jax.errors import Refused
from autoretouch_jax.models.autoretouch import AutoRetouchGenerator, receptive_radius

FORMAT = 1
TILE = 512  # largest side of a tile's core; memory stays bounded whatever the photo's size
TILE_STEP = 64  # smaller images get a smaller tile, in these steps, so that few shapes are compiled


@dataclass(frozen=True)
class Model:
    """A generator ready to use. `variables` are what `AutoRetouchGenerator.apply` takes."""

    config: GeneratorConfig
    variables: dict[str, Any]


def save_model(folder: Path, config: GeneratorConfig, params: Any, stats: Any, step: int) -> None:
    """Write (or replace) the folder; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = {"params": jax.device_get(params), **({"batch_stats": jax.device_get(stats)} if stats else {})}
    arrays = {name: np.ascontiguousarray(value) for name, value in flax.traverse_util.flatten_dict(tree, sep="/").items()}
    save_file(arrays, folder / "model.safetensors.part", metadata={"step": str(step)})
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")
    description = {
        "format": FORMAT,
        "network": "autoretouch",
        "generator": dataclasses.asdict(config),
        "weights": "model.safetensors",
        "input": "NHWC float32 RGB, uint8 / 127.5 - 1",
        "output": "the same; clip to [-1, 1], (x + 1) * 127.5, round to uint8; then keep the input's pixel where no channel "
        "changed by more than generator.dead_zone",
    }
    (folder / "model.json.part").write_text(json.dumps(description, indent=2) + "\n")
    os.replace(folder / "model.json.part", folder / "model.json")


def load_model(folder: str | Path) -> Model:
    """The model of a run folder or of a `model/` folder. Raises Refused, naming the file, for anything else."""
    folder = Path(folder)
    home = folder / "model" if (folder / "model" / "model.json").is_file() else folder
    path = home / "model.json"
    if not path.is_file():
        raise Refused(
            f"{folder}: no model here (no model.json, nor model/model.json); "
            "give the --workdir of a run that has reached a checkpoint, or its model/ folder"
        )
    try:
        description = json.loads(path.read_text())
        if description["format"] != FORMAT or description["network"] != "autoretouch":
            raise Refused(
                f"{path}: format {description['format']}, network {description['network']}; this version "
                f"reads format {FORMAT}, network autoretouch"
            )
        config = GeneratorConfig(**description["generator"])
        flat = load_file(home / description["weights"])
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise Refused(f"{path}: broken model ({type(error).__name__}: {error}); copy the folder again") from error
    variables = flax.traverse_util.unflatten_dict(flat, sep="/")
    _check_shapes(path, config, variables)
    return Model(config, variables)


def _check_shapes(path: Path, config: GeneratorConfig, variables: Any) -> None:
    module = AutoRetouchGenerator(config)
    expected = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    want = {k: v.shape for k, v in flax.traverse_util.flatten_dict(expected, sep="/").items()}
    have = {k: v.shape for k, v in flax.traverse_util.flatten_dict(variables, sep="/").items()}
    if wrong := sorted(k for k in want.keys() | have.keys() if want.get(k) != have.get(k)):
        raise Refused(f"{path}: the weights do not fit the description at {wrong[0]}; copy the folder again")


def to_uint8(image: np.ndarray) -> np.ndarray:
    """[-1, 1] float → uint8, clipped and rounded."""
    return np.rint((np.clip(image, -1, 1) + 1) * 127.5).astype(np.uint8)


@functools.partial(jax.jit, static_argnums=0)
def _apply(config: GeneratorConfig, variables: Any, tiles: jax.Array) -> jax.Array:
    source = tiles.astype(np.float32) / 127.5 - 1.0
    return AutoRetouchGenerator(config).apply(variables, source)


def retouch_array(model: Model, image: np.ndarray, strength: float = 1.0, tile: int = TILE) -> np.ndarray:
    """`uint8[H, W, 3]` of any size → the retouched image, uint8, same size.

    The image is mirrored beyond its borders and cut into tiles that overlap by the network's reach, so that the tile size
    does not show. `strength` 0 returns the input, 1 the model's output, in between a blend.
    """
    height, width = image.shape[:2]
    halo = receptive_radius(model.config)
    core = min(tile, -(-max(height, width) // TILE_STEP) * TILE_STEP)
    rows, columns = -(-height // core), -(-width // core)
    padded = _mirror(image, halo, halo + rows * core - height, halo + columns * core - width)
    out = np.empty_like(image)
    for top in range(0, height, core):
        for left in range(0, width, core):
            window = padded[top : top + core + 2 * halo, left : left + core + 2 * halo]
            result = np.asarray(_apply(model.config, model.variables, window[None]))[0, halo:-halo, halo:-halo]
            place = np.s_[top : min(top + core, height), left : min(left + core, width)]
            patch = result[: place[0].stop - top, : place[1].stop - left]
            out[place] = to_uint8(patch)
    return _finish(image, out, model.config.dead_zone, strength)


def _finish(image: np.ndarray, output: np.ndarray, dead_zone: int, strength: float) -> np.ndarray:
    """Leave alone what changes by no more than the dead zone; blend by strength. All on 8-bit levels."""
    delta = output.astype(np.int16) - image
    delta *= (np.abs(delta).max(-1, keepdims=True) > dead_zone).astype(np.int16)
    return (image + np.rint(strength * delta.astype(np.float32))).astype(np.uint8)


def _mirror(image: np.ndarray, before: int, bottom: int, right: int) -> np.ndarray:
    """Reflect-pad; numpy repeats the reflection where an image is smaller than the padding."""
    margins = ((before, bottom), (before, right), (0, 0))
    return np.pad(image, margins, mode="reflect") if min(image.shape[:2]) > 1 else np.pad(image, margins, mode="edge")
