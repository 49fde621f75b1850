"""`autoretouch export`: a model as one file for other software, compared with JAX before it is written."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
from PIL import Image

from autoretouch_jax import __version__
from autoretouch_jax.config.networks import Generator
from autoretouch_jax.errors import EXIT_DONE, BadInput, Refused, needing
from autoretouch_jax.inference.edit import Edit, apply_edit, find_edit
from autoretouch_jax.models.folder import Model, load_model
from autoretouch_jax.runtime import storage

Format = Literal["onnx", "stablehlo"]
Precision = Literal["float32", "float16"]
# uint8 [N, H, W, 3] → the outputs by name: `retouched`, `ungated` and, where the network predicts one, `mask`.
Runner = Callable[[np.ndarray], Mapping[str, np.ndarray]]

# Odd sizes, one of them thinner than any margin. Each is compiled once for JAX.
CHECKED_SIZES = ((61, 83), (1, 47), (34, 95))


class Tolerance(NamedTuple):
    """How far a file's outputs may be from JAX': levels of 255, and the mask's probability."""

    levels: int
    mask: float


# float32: a sum in another order can tip the rounding to 8 bits, by one level. float16: twice what was seen with the largest
# networks here, where it has 11 bits for sums of a thousand products.
TOLERANCES = {"float32": Tolerance(1, 1e-3), "float16": Tolerance(4, 0.05)}


class Deviation(NamedTuple):
    """How far a file's outputs were from JAX', at most."""

    levels: int
    """Levels of 255 in an image, where the network's decision to leave a pixel alone is beyond doubt."""
    mask: float
    """The mask's probability."""
    share: float
    """Share of the samples that differ at all."""


def run(model: str, to: Format, out: Path, precision: Precision) -> int:
    """Writes a model to a file. Returns the exit status.

    Raises Refused where the model, the network, the file or a missing package do not allow it, and BadInput where the file
    would not compute what JAX computes. In both cases nothing is written.
    """
    if out.is_dir():
        raise Refused(f"--out {out}: is a folder; name a file in it")
    loaded = load_model(model)
    if loaded.config.test_mode == "train":
        # Its outputs depend on random dropout and on the photograph's own statistics.
        raise Refused(f"{model}: a model with test_mode train cannot be exported; convert it with --test-mode eval")
    with needing(to):
        content, runner, software, smallest = (_onnx if to == "onnx" else _stablehlo)(loaded, precision)
    deviation = compare(loaded, runner, TOLERANCES[precision], smallest)
    out.parent.mkdir(parents=True, exist_ok=True)
    storage.write(out, content)
    print(f"{out}: {len(content) / 1e6:.1f} MB, {precision}, for sides from {smallest} pixel(s) on; run by {software}")
    equal = 100 * (1 - deviation.share)
    print(
        f"at most {deviation.levels} of 255 levels from JAX on {len(CHECKED_SIZES)} sizes, {equal:.2f} % of the samples equal"
    )
    return EXIT_DONE


def whole_gate(model: Model) -> float:
    """The gate that is applied where a whole photograph is retouched, see `edit.find_edit`."""
    return model.config.gate if model.face_size is None else max(model.config.gate, model.config.gate_off_faces)


def metadata(model: Model, precision: str) -> dict[str, str]:
    """What a program has to know that uses the file: texts, as ONNX' metadata wants them. docs/export.md explains them."""
    values = {
        "generator": asdict(model.config),
        "precision": precision,
        "gate": whole_gate(model),
        "gate_on_faces": model.config.gate,
        "dead_zone": model.config.dead_zone,
        "face_size": model.face_size,
        "receptive_radius": model.config.receptive_radius,
        "data_license": model.data_license,
        "version": __version__,
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


# ---- the two formats --------------------------------------------------------------------------------------------------------


def _onnx(model: Model, precision: Precision) -> tuple[bytes, Runner, str, int]:
    """Returns the ONNX file's content, a function that runs it, what runs it, and the smallest side that it takes."""
    # onnx is an extra, so it is imported where it is used.
    from autoretouch_jax.inference.export.onnx_model import onnx_model

    graph = onnx_model(model, whole_gate(model), metadata(model, precision), np.dtype(precision))
    content, names = graph.SerializeToString(), [output.name for output in graph.graph.output]
    try:
        import onnxruntime
    except ModuleNotFoundError:  # it has no wheel for some machines; onnx' own interpreter is slow and exact
        from onnx.reference import ReferenceEvaluator

        interpreter = ReferenceEvaluator(graph)
        return content, lambda images: dict(zip(names, interpreter.run(None, {"image": images}), strict=True)), "onnx", 1
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    run_session: Runner = lambda images: dict(zip(names, session.run(names, {"image": images}), strict=True))  # noqa: E731
    return content, run_session, f"onnxruntime {onnxruntime.__version__}", 1


def _stablehlo(model: Model, precision: Precision) -> tuple[bytes, Runner, str, int]:
    """Returns the same for StableHLO."""
    import flatbuffers  # noqa: F401  (what jax.export serialises with; without it, it fails after minutes of tracing)

    from autoretouch_jax.inference.export.stablehlo import stablehlo

    content, smallest = stablehlo(model, whole_gate(model), np.dtype(precision))
    called = jax.export.deserialize(bytearray(content)).call
    return content, lambda images: jax.device_get(called(images)), f"jax {jax.__version__}", smallest


# ---- the comparison ---------------------------------------------------------------------------------------------------------


def compare(model: Model, runner: Runner, tolerance: Tolerance, smallest: int = 1) -> Deviation:
    """Runs drawn pictures of odd sizes, two at a time, and compares the outputs with those of `autoretouch retouch`.

    Their sides are at least `smallest`. Raises BadInput, naming the size, where they are further apart than the tolerance.
    """
    deviations, rng = [], np.random.default_rng(0)
    for height, width in ((side + smallest - 1 for side in size) for size in CHECKED_SIZES):
        images = np.stack([_picture(rng, height, width) for _ in range(2)])
        outputs = runner(images)
        for i, image in enumerate(images):
            # In JAX' full precision, which a GPU or TPU gives only when asked for.
            with jax.default_matmul_precision("highest"):
                edit = find_edit(model, image, "off")
            deviation = deviation_of(
                model.config, image, edit, {name: output[i] for name, output in outputs.items()}, tolerance
            )
            if deviation.levels > tolerance.levels or deviation.mask > tolerance.mask:
                raise BadInput(
                    f"not written: on {height} × {width} pixels the file's output is {deviation.levels} of 255 levels from "
                    f"JAX', {tolerance.levels} are allowed, and its mask {deviation.mask:.4f}, {tolerance.mask} is allowed"
                )
            deviations.append(deviation)
    return Deviation(*(max(values) for values in zip(*deviations, strict=True)))


def deviation_of(
    config: Generator, image: np.ndarray, edit: Edit, outputs: Mapping[str, np.ndarray], tolerance: Tolerance
) -> Deviation:
    """Returns how far the outputs for an image, uint8 `[H, W, 3]`, are from the edit that JAX found and from what it makes.

    Where the mask is as near the gate as the tolerance, or the change as near the dead zone, a pixel may be left alone or not.
    Anything but the input's own pixel or the network's then counts as 255 levels.
    """
    ungated, own = image.astype(int) + edit.change, outputs["ungated"].astype(int)
    retouched = outputs["retouched"].astype(int)
    undecided = np.zeros(image.shape[:2], bool)
    if config.dead_zone:
        undecided |= np.abs(np.abs(edit.change).max(-1) - config.dead_zone) <= tolerance.levels
    mask = 0.0
    if edit.mask is not None:
        mask = float(np.abs(outputs["mask"] - edit.mask).max())
        undecided |= np.abs(edit.mask - edit.gate) <= tolerance.mask
    apart = np.abs(retouched - apply_edit(config, image, edit)).max(-1)
    left = (retouched == image).all(-1) | (retouched == own).all(-1)
    apart = np.where(undecided, 0, apart)
    levels = max(np.abs(own - ungated).max(), apart.max(), 0 if left.all() else 255)
    return Deviation(int(levels), mask, float((own != ungated).mean()))


def _picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draws skin with uneven light, blemishes and noise: uint8 `[height, width, 3]`."""
    # A network leaves noise alone that is no skin, and the comparison would compare nothing.
    coarse = rng.uniform(-40, 40, (4, 5, 1)) + np.array([205, 160, 135]) + rng.normal(0, 6, (4, 5, 3))
    light = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    rows, columns = np.mgrid[:height, :width]
    spots = np.zeros((height, width))
    for _ in range(1 + height * width // 300):
        y, x, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(1, 4)
        spots += rng.uniform(10, 70) * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / radius**2)
    noisy = np.asarray(light) - spots[..., None] * [0.5, 1, 0.9] + rng.normal(0, 3, (height, width, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)
