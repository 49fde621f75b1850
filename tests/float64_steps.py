"""Runs the published recipes' steps in float64 and prints, as JSON, how far they are from PyTorch's.

`test_published.py` starts it as a process of its own, because the package computes in float32: here `jnp.float32` is replaced
before the package is imported.
"""

import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_enable_x64", True)
jnp.float32 = jnp.float64

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "golden")]

import published_steps as golden  # noqa: E402
from conftest import edited  # noqa: E402
from reference_weights import import_patchgan  # noqa: E402

from autoretouch_jax.config import ParallelConfig  # noqa: E402
from autoretouch_jax.config.loading import load  # noqa: E402
from autoretouch_jax.models import pytorch_import, vgg  # noqa: E402
from autoretouch_jax.models.modules import make_discriminator, make_generator  # noqa: E402
from autoretouch_jax.runtime import devices  # noqa: E402
from autoretouch_jax.training import optimizers  # noqa: E402
from autoretouch_jax.training.state import Learner, Networks, State  # noqa: E402
from autoretouch_jax.training.step import train_step  # noqa: E402

RECIPES = {"pix2pix": ["pix2pix"], "global": ["global"], "local": ["local_frozen", "local_unfrozen"]}
CONFIGS = {"pix2pix": "pix2pix", "global": "pix2pixhd", "local": "pix2pixhd_local"}
LONG = 1000  # steps of the whole run, so that the learning rate does not fall yet


def take_float64(self, name):
    self.left.discard(name)
    return np.asarray(self.arrays[name], np.float64)


def keep_the_same_units(key, p, shape):
    del key, p
    return jnp.asarray(golden.kept_units(shape))


pytorch_import.StateDict._take = take_float64
jax.random.bernoulli = keep_the_same_units
vgg.CHANNELS = tuple(widths[0] for widths in golden.VGG_WIDTHS)


def variables(arrays_g, arrays_d):
    """`((config, variables), …)` of the generator and the discriminator with the authors' arrays."""
    return pytorch_import.import_generator(arrays_g), import_patchgan(arrays_d)


def frozen_vgg():
    """The VGG's parameters as the module names them."""
    params = {}
    for name, value in golden.vgg_weights().items():
        layer, leaf = name.split(".")
        ours = {"kernel": value.transpose(2, 3, 1, 0)} if leaf == "weight" else {"bias": value}
        params.setdefault(layer, {}).update(ours)
    return params


def learner(variables, optim):
    variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), variables)
    params = variables["params"]
    return Learner(params, variables.get("batch_stats", {}), optimizers.optimizer(optim).init(params))


def run(recipe, expected):
    """Yields, for each stage of a recipe, `(stage, worst error)`: of a parameter's change, relative to the change."""
    (config_g, g), (config_d, d) = variables(*golden.weights(recipe))
    config = load(HERE.parent / "configs" / f"{CONFIGS[recipe]}.py")
    frozen_share = golden.FROZEN / LONG if recipe == "local" else 0.0
    # Everything else is the recipe's own: losses, weights, optimizer, order.
    config = edited(config, train={"steps": LONG}, optim={"global_frozen_share": frozen_share})
    recipe_d = {key: getattr(config.discriminator, key) for key in ("norm", "scales", "padding", "layers")}
    assert recipe_d == {key: getattr(config_d, key) for key in recipe_d}
    perceptual, frozen = None, None
    if config.loss.perceptual_weight:
        perceptual = vgg.VGG("vgg19", config.loss.perceptual_layers, config.loss.vgg_input, jnp.float64)
        frozen = frozen_vgg()
    networks = Networks(make_generator(config_g, jnp.float64), make_discriminator(config_d, jnp.float64), perceptual)
    mesh = devices.make_mesh(ParallelConfig(devices=1), 1)
    step = devices.wrap_step(functools.partial(train_step, networks=networks, config=config), mesh, "jit")
    state = State(jnp.zeros((), jnp.int32), learner(g, config.optim), learner(d, config.optim), None)
    # On the mesh from the start, so that the step is compiled once.
    state, frozen = devices.replicate(state, mesh), devices.replicate(frozen, mesh)
    before, number = (g, d), 0
    for stage in RECIPES[recipe]:
        for _ in range(golden.STEPS):
            source, target = (np.ascontiguousarray(image.transpose(0, 2, 3, 1)) for image in golden.batch(recipe, number))
            state, _ = step(state, {"source": source, "target": target}, frozen)
            number += 1
        prefixes = [f"{stage}/{side}/" for side in "GD"]
        theirs = [{key.removeprefix(p): value for key, value in expected.items() if key.startswith(p)} for p in prefixes]
        after = variables(*theirs)
        ours = (state.generator, state.discriminator)
        yield stage, max(worst(a, b, c[1]) for a, b, c in zip(ours, before, after, strict=True))


def worst(ours, before, theirs):
    """The largest error of a tensor's change over 20 or 40 steps, relative to the change.

    The generator's running statistics count too. The discriminator's act nowhere: PyTorch moves them in a third pass.
    """
    errors = {}
    flat = functools.partial(jax.tree_util.tree_leaves_with_path)
    if "head" in ours.params or "up0" in ours.params:
        empty = {"batch_stats": {}}
        trees = [{"params": ours.params, "batch_stats": ours.batch_stats}, empty | before, empty | theirs]
    else:
        trees = [ours.params, before["params"], theirs["params"]]
    # A bias before a norm has no effect and no gradient: Adam moves it by rounding errors. These have no norm behind them.
    effective = ("head", "conv0", "logits", *(["up0"] if "down0" in ours.params else []))
    for (path, a), (_, b), (_, c) in zip(*map(flat, trees), strict=True):
        layer, leaf = (key.key for key in path[-2:])
        if leaf == "bias" and layer not in effective and "norm" not in layer:
            continue
        a, b, c = (np.asarray(x) for x in (a, b, c))
        # What is frozen must not have moved at all.
        change = np.abs(c - b).max() or 1.0
        errors[jax.tree_util.keystr(path)] = float(np.abs(a - c).max() / change)
    return max(errors.values())


if __name__ == "__main__":
    with np.load(HERE / "golden" / "published_steps.npz") as archive:
        everything = {name: archive[name] for name in archive.files}
    print(json.dumps({stage: error for recipe in RECIPES for stage, error in run(recipe, everything)}))
