"""The scalars of a config that the compiled step takes as arguments: other learning rates or weights need no other program.

The step is compiled for a config without them (`without_scalars`). When it is traced, `with_scalars` puts traced arrays in
their place, so the step reads `config.optim.generator_lr` whether that is a number or an argument of the program. A weight of 0
switches a computation off. It stays a number, so that nothing is compiled for it: see `is_off`.
"""

from typing import Any

import jax
import numpy as np

from autoretouch_jax.config import Config
from autoretouch_jax.config.loading import PATH_KEYS, flatten, with_values

Scalars = dict[str, Any]  # key of the config → float32 or int32 scalar, or a tuple of them

ALWAYS = (
    "train.seed",
    "train.steps",
    "optim.generator_lr",
    "optim.discriminator_lr",
    "optim.warmup_steps",
    "optim.decay_share",
    "loss.edit_weight",
    "loss.adversarial_ramp",
    "loss.r1_every",
    "loss.perceptual_layer_weights",
    "guard.spike",
    "guard.patience",
    "guard.diverged",
)
UNLESS_OFF = (
    "loss.pixel_weight",
    "loss.adversarial_weight",
    "loss.feature_matching_weight",
    "loss.mask_weight",
    "loss.perceptual_weight",
    "loss.r1_weight",
    "loss.left_share",
    "loss.edit_weight_steps",
    "optim.clip_norm",
    "optim.global_frozen_share",
    "optim.ema",
)
# Keys that no program reads: the same step serves other data.
UNREAD = (
    *PATH_KEYS,
    "train.epochs",
    "train.checkpoint_every",
    "train.log_every",
    "train.sample_every",
    "train.trackers",
    "parallel.input_threads",
    "parallel.input_processes",
    "parallel.prefetch",
)


def is_off(value: Any) -> bool:
    """Whether a value of the config is the number 0, which switches something off. An array is an argument, and never off."""
    return not isinstance(value, jax.Array) and value == 0


def scalars(config: Config) -> Scalars:
    """Returns the arguments of the step, as NumPy arrays."""
    return {key: jax.tree.map(_as_array, value) for key, value in _values(config).items()}


def without_scalars(config: Config) -> Config:
    """Returns the config with every argument set to 1, and without paths: configs that are equal then have one program."""
    default, own = flatten(Config()), flatten(config)
    config = with_values(config, {key: default[key] for key in UNREAD if key in default and key in own})
    # 1 and not 0, because 0 would switch things off.
    return with_values(config, {key: jax.tree.map(lambda x: type(x)(1), value) for key, value in _values(config).items()})


def with_scalars(config: Config, arrays: Scalars) -> Config:
    """Returns the config with arrays in place of its scalars."""
    return with_values(config, arrays)


def _values(config: Config) -> dict[str, Any]:
    """The values that are arguments here, each an int or a float as its key is, or a tuple of floats."""
    chosen = {}
    for key in (*ALWAYS, *UNLESS_OFF):
        value, default = _value(config, key), _value(Config(), key)
        if key in ALWAYS or not is_off(value):
            # A config file may say 100 where 100.0 is meant. An integer would be another program.
            chosen[key] = jax.tree.map(int if isinstance(default, int) else float, value)
    return chosen


def _value(config: Config, key: str) -> Any:
    group, name = key.split(".")
    return getattr(getattr(config, group), name)


def _as_array(value: float) -> np.ndarray:
    if isinstance(value, int):
        return np.asarray(value % 2**32, np.uint32).astype(np.int32)  # a seed may need more than 31 bits
    return np.asarray(value, np.float32)
