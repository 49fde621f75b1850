"""What training carries from step to step, and the networks it trains."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autoretouch_jax.config import Config
from autoretouch_jax.models.autoretouch import AutoRetouchGenerator
from autoretouch_jax.models.patchgan import SeedPatchGAN
from autoretouch_jax.models.weights import load_vgg
from autoretouch_jax.training import optim


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Learner:
    """One trained network: float32 parameters, BatchNorm's moving averages (empty without BatchNorm), Adam's moments."""

    params: Any
    stats: Any
    opt: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything a checkpoint must hold for the next step to be the same. `discriminator` is None without adversarial loss."""

    step: jax.Array
    generator: Learner
    discriminator: Learner | None
    ema: Any


@dataclasses.dataclass(frozen=True)
class Networks:
    """The modules; their parameters live in `State`, or, for the frozen VGG, in the step's third argument."""

    generator: Any  # AutoRetouchGenerator
    discriminator: Any  # SeedPatchGAN, or None without adversarial loss
    vgg: Any  # VGG, or None without perceptual loss


def make_networks(config: Config) -> tuple[Networks, Any]:
    """The networks of a run, and the frozen VGG parameters (None when the perceptual weight is 0)."""
    dtype = jnp.dtype(config.train.precision)
    loss = config.loss
    vgg, frozen = (None, None)
    if loss.perceptual_weight > 0:
        vgg, frozen = load_vgg(loss.vgg, loss.perceptual_layers, loss.vgg_weights, dtype)
    discriminator = SeedPatchGAN(config.discriminator, dtype) if loss.adversarial_weight > 0 else None
    return Networks(AutoRetouchGenerator(config.generator, dtype), discriminator, vgg), frozen


def init_state(config: Config, networks: Networks) -> State:
    """A fresh state, a function of `train.seed` alone."""
    # rbg keys: jitting a many-layer init over threefry keys takes minutes to compile on a CPU.
    generator_key, discriminator_key = jax.random.split(jax.random.key(config.train.seed, impl="rbg"))
    image = np.zeros((1, 32, 32, 3), np.float32)

    def learner(module: Any, key: jax.Array, *inputs: np.ndarray) -> Learner:
        variables = jax.jit(module.init)(key, *inputs)
        params = variables["params"]
        return Learner(params, variables.get("batch_stats", {}), optim.optimizer(config.optim).init(params))

    generator = learner(networks.generator, generator_key, image)
    discriminator = None
    if networks.discriminator is not None:
        discriminator = learner(networks.discriminator, discriminator_key, image, image)
    ema = jax.tree.map(jnp.array, generator.params)  # a copy: the step donates both
    return State(jnp.zeros((), jnp.int32), generator, discriminator, ema)


def count(params: Any) -> int:
    """Number of scalars in a tree."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
