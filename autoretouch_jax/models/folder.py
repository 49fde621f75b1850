"""A trained generator as a folder: `model.safetensors` and a `model.json` that describes it completely."""

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from autoretouch_jax.config.networks import Generator, generator_from_json
from autoretouch_jax.config.paths import PRETRAINED
from autoretouch_jax.errors import Refused
from autoretouch_jax.models.modules import make_generator
from autoretouch_jax.runtime import devices, storage

FORMAT = 2
PRETRAINED_FOLDER = Path(__file__).resolve().parent.parent / "pretrained"


@dataclass(frozen=True)
class Model:
    """A generator ready to use. `variables` are what its module's `apply` takes."""

    config: Generator
    variables: dict[str, Any]
    data_license: str | None = None
    """The licence of the data that it was trained on, where that was stated."""
    face_size: float | None = None
    """The size in pixels of the faces that it was trained on, from brows to chin (`data/faces.py`), where there were any."""
    edit_threshold: float | None = 0.0
    """Levels from which a change counted as an edit in its training; None where it was measured for each pair."""

    def on_devices(self, count: int) -> dict[str, Any]:
        """Returns `variables` on this many of the process's devices, on each a copy. They stay there for later calls."""
        # Two threads may both put them there. The second copy then replaces the first, which nobody needs any more.
        if count not in self._on_devices:
            self._on_devices[count] = devices.copy_to_local_devices(self.variables, count)
        return self._on_devices[count]

    @functools.cached_property
    def _on_devices(self) -> dict[int, dict[str, Any]]:
        return {}


def save_model(folder: Any, model: Model, step: int) -> None:
    """Writes or replaces the folder. Each of its files appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    # A network without BatchNorm has no entry for it, as its module's `init` has none.
    tree = {name: jax.device_get(values) for name, values in model.variables.items() if values}
    arrays = {name: np.ascontiguousarray(value) for name, value in flax.traverse_util.flatten_dict(tree, sep="/").items()}
    # Weights first: whoever finds a new model.json must find its weights.
    storage.write(folder / "model.safetensors", save(arrays, metadata={"step": str(step)}))
    description = {
        "format": FORMAT,
        "generator": dataclasses.asdict(model.config),
        "weights": "model.safetensors",
        "data_license": model.data_license,
        "face_size": model.face_size,
        "edit_threshold": model.edit_threshold,
        # For whoever runs the weights with other software.
        "input": "NHWC float32 RGB, uint8 / 127.5 - 1",
        "faces": "resize the photograph so that a face measures face_size from brows to chin, and the change back; where faces "
        "are not looked for, the gate is the larger of generator.gate and generator.gate_off_faces, where it has them",
        "output": "the same; clip to [-1, 1], (x + 1) * 127.5, round to uint8; then keep the input's pixel where the mask's "
        "probability is below generator.gate, or no channel changed by more than generator.dead_zone, where it has them",
    }
    storage.write(folder / "model.json", json.dumps(description, indent=2) + "\n")


def load_model(folder: Any, sha256: str | None = None) -> Model:
    """Returns the model of a run folder or of a `model/` folder, or the one in the box, `pretrained`.

    Raises Refused, naming the file, for anything else, and for weights whose SHA-256 is not the one given. A folder of your own
    of that name is `./pretrained`.
    """
    folder = PRETRAINED_FOLDER if folder == PRETRAINED else storage.open_path(folder)
    # A run folder and its model/ folder are both accepted, because people give either.
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
        weights = (home / description["weights"]).read_bytes()
        # Of the bytes that are used: the file could be another one by the time it is read again.
        if sha256 is not None and (actual := hashlib.sha256(weights).hexdigest()) != sha256.lower():
            raise Refused(f"{home / description['weights']}: SHA-256 {actual}, expected {sha256}; this is another model")
        flat = load(weights)
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise Refused(f"{path}: broken model ({type(error).__name__}: {error}); copy the folder again") from error
    variables = flax.traverse_util.unflatten_dict(flat, sep="/")
    # Missing weights, or those of another network, are named here instead of failing in the first convolution.
    check_shapes(path, config, variables)
    stated = description.get("data_license"), description.get("face_size"), description.get("edit_threshold", 0.0)
    return Model(config, variables, *stated)


def check_shapes(path: Path, config: Generator, variables: Any) -> None:
    """Refuses weights, read from `path`, that are not exactly those of the network described."""
    # Shapes do not depend on the side; it only has to be large enough for every layer.
    side = max(32, config.grid)
    module, image = make_generator(config), np.zeros((1, side, side, 3), np.float32)
    expected, stored = _shapes(jax.eval_shape(module.init, jax.random.key(0), image)), _shapes(variables)
    if wrong := sorted(key for key in expected.keys() | stored.keys() if expected.get(key) != stored.get(key)):
        raise Refused(f"{path}: the weights do not fit {config} at {wrong[0]}; is the file complete, and of this network?")


def _shapes(variables: Any) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in flax.traverse_util.flatten_dict(variables, sep="/").items()}
