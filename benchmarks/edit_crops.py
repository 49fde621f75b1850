"""The variance of the gradient with edit crops, for several limits of their weights, on frames with one edited face.

    python benchmarks/edit_crops.py --faces PORTRAITS --backgrounds PHOTOS

A portrait with drawn blemishes is pasted into each background of 6000×4000. Crops are drawn as `--data.edit-crops 0.7` does.
Each gradient of the pixel and mask losses of `configs/finetune.py` is computed once, for the model in the box, and weighted for
every limit.
"""

import argparse
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from autoretouch_jax.config import BlemishConfig
from autoretouch_jax.data import crops
from autoretouch_jax.data.blemishes import add_blemishes
from autoretouch_jax.data.images import list_images, read_rgb
from autoretouch_jax.models.folder import load_model
from autoretouch_jax.models.modules import make_generator
from autoretouch_jax.models.pixels import to_float
from autoretouch_jax.runtime.tables import text_table
from autoretouch_jax.training import losses

FRAME, FRAMES = (6000, 4000), 3  # width and height in pixels
SHARE, SIDE = 0.7, 192
LIMITS = (0, 30, 10, 5, 3, 2, 1)  # 0 does not clip
CONFIG = Path(__file__).parent.parent / "configs" / "finetune.py"


def frame(rng: np.random.Generator, face: Path, background: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns source and target, `uint8[4000, 6000, 3]`. They differ in the blemishes of one face."""
    clean = read_rgb(face)
    large = np.asarray(Image.fromarray(read_rgb(background)).resize(FRAME, Image.Resampling.LANCZOS))
    # An enlarged photograph is smoother than a camera's.
    target = np.clip(np.rint(large + rng.normal(0, 1.5, large.shape)), 0, 255).astype(np.uint8)
    top, left = (int(rng.integers(a - b)) for a, b in zip(target.shape[:2], clean.shape[:2], strict=True))
    box = np.s_[top : top + clean.shape[0], left : left + clean.shape[1]]
    source = target.copy()
    source[box], target[box] = add_blemishes(rng, clean, BlemishConfig(clean_share=0.0)), clean
    return source, target


def gradient_function():
    """Returns the function (source, target) → loss and gradient, a vector, of one crop."""
    spec = importlib.util.spec_from_file_location("finetune", CONFIG)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    model, loss = load_model("pretrained"), recipe.config.loss
    network = make_generator(model.config)

    def objective(params, source, target):
        source, target = to_float(source)[None], to_float(target)[None]
        output = network.apply({"params": params}, source)
        pixel = losses.pixel(loss.pixel, output.image, target, source, loss.edit_weight)
        return (loss.pixel_weight * pixel + loss.mask_weight * losses.mask(output, source, target))[0]

    @jax.jit
    def gradient(params, source, target):
        value, tree = jax.value_and_grad(objective)(params, source, target)
        return value, jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])

    return lambda source, target: gradient(model.variables["params"], source, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faces", type=Path, required=True)
    parser.add_argument("--backgrounds", type=Path, required=True)
    parser.add_argument("--crops", type=int, default=160)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    places = zip(list_images(options.faces), list_images(options.backgrounds), strict=False)
    pairs = [frame(rng, *place) for place, _ in zip(places, range(FRAMES), strict=False)]
    maps, gradient = [crops.edit_map(*pair) for pair in pairs], gradient_function()
    # Two halves of the crops: the product of their means estimates the squared norm of the expected gradient without bias.
    sums = {limit: [0.0, 0.0] for limit in LIMITS}
    rows = {limit: [] for limit in LIMITS}  # weight, whether there is an edit, loss, squared norm of the weighted gradient
    for number in tqdm(range(options.crops), unit="crop", disable=None):
        pair, edits = pairs[number % FRAMES], maps[number % FRAMES]
        top, left, exact = crops.draw(rng, *pair[0].shape[:2], edits, SIDE, SHARE)
        source, target = (image[top : top + SIDE, left : left + SIDE] for image in pair)
        loss, vector = (np.asarray(value, np.float64) for value in gradient(source, target))
        for limit in LIMITS:
            weight = np.clip(exact, 1 / limit, limit) if limit else exact
            sums[limit][number // FRAMES % 2] += weight * vector
            rows[limit].append((weight, (source != target).any(), weight * loss, weight**2 * (vector @ vector)))
    table = []
    for limit in LIMITS:
        first, second = sums[limit]
        weights, edited, weighted, squares = np.array(rows[limit], float).T
        mean = 4 * (first @ second) / options.crops**2
        cosine = (first @ sums[0][1] + second @ sums[0][0]) / 2 / np.sqrt((first @ second) * (sums[0][0] @ sums[0][1]))
        share = (weights * edited).sum() / weights.sum()
        variances = (weighted.var() / weighted.mean() ** 2, (squares.mean() - mean) / mean)
        table.append([limit or "none", f"{share:.3f}", *(f"{value:.1f}" for value in variances), f"{cosine:.2f}"])
    heads = ["limit", "weight of crops with an edit", "variance of the loss", "of the gradient", "cosine to no limit"]
    print(text_table(heads, table))


if __name__ == "__main__":
    main()
