"""The state that training carries from step to step, and the networks that it trains."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from autoretouch_jax.config import Config, Generator
from autoretouch_jax.config.networks import RETOUCHING_ONLY
from autoretouch_jax.errors import Refused
from autoretouch_jax.models.folder import Model
from autoretouch_jax.models.modules import make_discriminator, make_generator
from autoretouch_jax.models.vgg_weights import load_vgg
from autoretouch_jax.runtime import devices
from autoretouch_jax.training import guard as guards
from autoretouch_jax.training import optimizers

Params = dict[str, Any]  # a tree of float32 arrays, named as Flax names them
BatchStats = dict[str, Any]  # BatchNorm's moving averages; empty without BatchNorm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Learner:
    """One trained network: float32 parameters, BatchNorm's moving averages, and the optimizer's state."""

    params: Params
    batch_stats: BatchStats
    opt_state: optax.OptState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that a checkpoint must hold for the next step to be the same.

    `discriminator` is None without adversarial loss. `ema`, the generator's moving average, is None where `optim.ema` is 0, and
    `ema_stats`, that of its BatchNorm's statistics, is empty there and without BatchNorm. `guard` is None where it is off.
    """

    step: jax.Array
    generator: Learner
    discriminator: Learner | None
    ema: Params | None
    ema_stats: BatchStats = dataclasses.field(default_factory=dict)
    guard: guards.Guard | None = None


@dataclasses.dataclass(frozen=True)
class Networks:
    """The modules. Their parameters live in `State`, and the frozen VGG's in the step's third argument."""

    generator: nn.Module
    discriminator: Any  # None without adversarial loss
    vgg: Any  # None without perceptual loss


def make_networks(config: Config) -> tuple[Networks, Params | None]:
    """Returns the networks of a run, and the frozen VGG's parameters, which are None without perceptual loss."""
    dtype = jnp.dtype(devices.with_precision(config).train.precision)
    axis = devices.AXIS if config.train.batch_norm == "global" else None
    loss = config.loss
    vgg, frozen = None, None
    if loss.perceptual_weight > 0:
        vgg, frozen = load_vgg(loss.vgg, loss.perceptual_layers, loss.vgg_weights, dtype, loss.vgg_input == "raw")
    discriminator = make_discriminator(config.discriminator, dtype, axis) if loss.adversarial_weight > 0 else None
    return Networks(make_generator(config.generator, dtype, axis, config.parallel.remat), discriminator, vgg), frozen


def init_state(config: Config, networks: Networks) -> State:
    """Returns a fresh state. The same config and `train.seed` give the same one."""
    # rbg keys: jitting a many-layer initialisation over threefry keys takes minutes to compile on a CPU.
    generator_key, discriminator_key = jax.random.split(jax.random.key(config.train.seed, impl="rbg"))
    side = max(32, config.generator.grid)  # the parameters do not depend on it
    image = np.zeros((1, side, side, 3), np.float32)

    def learner(module: Any, optimizer: optax.GradientTransformation, key: jax.Array, *inputs: np.ndarray) -> Learner:
        variables = jax.jit(module.init)(key, *inputs)
        params = variables["params"]
        return Learner(params, variables.get("batch_stats", {}), optimizer.init(params))

    generator_optimizer = optimizers.optimizer(config.optim, config.optim.generator_optimizer)
    generator = learner(networks.generator, generator_optimizer, generator_key, image)
    discriminator = None
    if networks.discriminator is not None:
        discriminator = learner(networks.discriminator, optimizers.optimizer(config.optim), discriminator_key, image, image)
    guard = guards.initial() if config.guard.enabled else None
    return State(jnp.zeros((), jnp.int32), generator, discriminator, **_initial_ema(config, generator), guard=guard)


def _initial_ema(config: Config, learner: Learner) -> dict[str, Any]:
    """Returns the fields `ema` and `ema_stats` of a run that begins with this generator."""
    # Copies: the step donates the buffers of both, and a buffer can be donated only once.
    copy = jax.tree.map(jnp.array, (learner.params, learner.batch_stats))
    return {"ema": copy[0], "ema_stats": copy[1]} if config.optim.ema else {"ema": None, "ema_stats": {}}


def state_specs(state: State, count: int) -> State:
    """Returns how a state is sharded over so many devices: the optimizers' arrays are cut, nothing else is."""

    def whole(tree: Any) -> Any:
        return jax.tree.map(lambda _: devices.partition_spec((), 1), tree)

    def learner(one: Learner) -> Learner:
        cut = jax.tree.map(lambda x: devices.partition_spec(x.shape, count), one.opt_state)
        return Learner(whole(one.params), whole(one.batch_stats), cut)

    discriminator = None if state.discriminator is None else learner(state.discriminator)
    averages = {"ema": whole(state.ema), "ema_stats": whole(state.ema_stats)}
    return State(whole(state.step), learner(state.generator), discriminator, **averages, guard=whole(state.guard))


# ---- starting from a trained model ------------------------------------------------------------------------------------------


def check_start(model: Model, config: Config) -> None:
    """Refuses to start a run from a model of another network, unless it is the global generator of a local enhancer."""
    generator = config.generator
    if not _same_weights(model.config, generator) and model.config != generator.global_generator:
        raise Refused(f"--train.start-from {config.train.start_from}: holds {model.config}, this run trains {generator}")


def _same_weights(a: Generator, b: Generator) -> bool:
    """Whether two descriptions have the same weights: they may differ in what acts only when retouching."""
    first, second = (
        {key: value for key, value in dataclasses.asdict(config).items() if key not in RETOUCHING_ONLY} for config in (a, b)
    )
    return first == second


def start_from(state: State, model: Model, discriminator: Params, config: Config) -> State:
    """Returns `state` with the weights of `model` as its generator, or as its global generator for a local enhancer.

    `discriminator` are the parameters of the model's discriminator, which come along where they fit; {} where it has none.
    """
    params, batch_stats = model.variables["params"], model.variables.get("batch_stats", {})
    if model.config == config.generator.global_generator:
        params = state.generator.params | {"global": params["global"]}
        batch_stats = state.generator.batch_stats
    params = jax.tree.map(jnp.array, params)
    learner = dataclasses.replace(state.generator, params=params, batch_stats=batch_stats)
    return dataclasses.replace(
        state,
        generator=learner,
        discriminator=_with_weights(state.discriminator, discriminator),
        **_initial_ema(config, learner),
    )


def _with_weights(learner: Learner | None, weights: Params) -> Learner | None:
    """A discriminator with the weights of another one, whose scales may be fewer. One of another form stays as it is."""
    if learner is None or not weights:
        return learner
    if "scale0" in weights:
        # Scales are matched from the coarsest, as in pix2pixHD's code: the local enhancer has one more, a finer one.
        more = len(learner.params) - len(weights)
        weights = {f"scale{int(name.removeprefix('scale')) + more}": value for name, value in weights.items()}
    own = {name: learner.params.get(name) for name in weights}
    if jax.tree.map(np.shape, own) != jax.tree.map(np.shape, weights):
        return learner
    return dataclasses.replace(learner, params=learner.params | jax.tree.map(jnp.array, weights))


def parameter_count(params: Any) -> int:
    """The number of scalars in a tree."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
