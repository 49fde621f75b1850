"""What training carries from step to step, and the networks it trains."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autoretouch_jax import architecture, parallel
from autoretouch_jax.architecture import Pix2PixHDLocal
from autoretouch_jax.config import Config
from autoretouch_jax.errors import Refused
from autoretouch_jax.models import build
from autoretouch_jax.models.bundle import Model
from autoretouch_jax.models.pix2pixhd import global_config
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

    generator: Any
    discriminator: Any  # None without adversarial loss
    vgg: Any  # VGG, or None without perceptual loss


def make_networks(config: Config) -> tuple[Networks, Any]:
    """The networks of a run, and the frozen VGG parameters (None when the perceptual weight is 0)."""
    dtype = jnp.dtype(config.train.precision)
    axis = parallel.AXIS if config.train.batch_norm == "global" else None
    loss = config.loss
    vgg, frozen = (None, None)
    if loss.perceptual_weight > 0:
        vgg, frozen = load_vgg(loss.vgg, loss.perceptual_layers, loss.vgg_weights, dtype, loss.vgg_input == "raw")
    discriminator = build.discriminator(config.discriminator, dtype, axis) if loss.adversarial_weight > 0 else None
    return Networks(build.generator(config.generator, dtype, axis, config.parallel.remat), discriminator, vgg), frozen


def init_state(config: Config, networks: Networks) -> State:
    """A fresh state, a function of `train.seed` alone."""
    # rbg keys: jitting a many-layer init over threefry keys takes minutes to compile on a CPU.
    generator_key, discriminator_key = jax.random.split(jax.random.key(config.train.seed, impl="rbg"))
    side = max(32, architecture.grid(config.generator))  # parameters do not depend on it
    image = np.zeros((1, side, side, 3), np.float32)

    def learner(module: Any, optimizer: Any, key: jax.Array, *inputs: np.ndarray) -> Learner:
        variables = jax.jit(module.init)(key, *inputs)
        params = variables["params"]
        return Learner(params, variables.get("batch_stats", {}), optimizer.init(params))

    generator_optimizer = optim.optimizer(config.optim, config.optim.generator_optimizer)
    generator = learner(networks.generator, generator_optimizer, generator_key, image)
    discriminator = None
    if networks.discriminator is not None:
        discriminator = learner(networks.discriminator, optim.optimizer(config.optim), discriminator_key, image, image)
    ema = jax.tree.map(jnp.array, generator.params)  # a copy: the step donates both
    return State(jnp.zeros((), jnp.int32), generator, discriminator, ema)


def state_specs(state: State, devices: int) -> State:
    """How a state is cut over devices where `parallel.optimizer_state` is `sharded`: the optimizers' arrays, nothing else."""

    def whole(tree: Any) -> Any:
        return jax.tree.map(lambda _: parallel.cut_spec((), 1), tree)

    def learner(one: Learner) -> Learner:
        return Learner(
            whole(one.params), whole(one.stats), jax.tree.map(lambda x: parallel.cut_spec(x.shape, devices), one.opt)
        )

    discriminator = None if state.discriminator is None else learner(state.discriminator)
    return State(whole(state.step), learner(state.generator), discriminator, whole(state.ema))


def check_start(model: Model, config: Config) -> None:
    """Refuse to start a run from a model that is neither of its network nor, for a local enhancer, its global generator."""
    generator = config.generator
    if not _same_weights(model.config, generator) and not _is_global_of(generator, model):
        raise Refused(f"--train.start-from {config.train.start_from}: holds {model.config}, this run trains {generator}")


def _same_weights(one: architecture.Generator, other: architecture.Generator) -> bool:
    """Whether two descriptions differ in nothing but what acts on the output when retouching."""
    plain: list[Any] = []
    for config in (one, other):
        kept = {key: value for key, value in dataclasses.asdict(config).items() if key not in ("gate", "dead_zone")}
        plain.append(kept)
    return plain[0] == plain[1]


def _is_global_of(generator: architecture.Generator, model: Model) -> bool:
    return isinstance(generator, Pix2PixHDLocal) and model.config == global_config(generator)


def start_from(state: State, model: Model, config: Config) -> State:
    """`state` with the generator of `model`: the whole of it, or, for a local enhancer, its global generator."""
    params, stats = model.variables["params"], model.variables.get("batch_stats", {})
    if _is_global_of(config.generator, model):
        params, stats = state.generator.params | {"global": params["global"]}, state.generator.stats
    learner = dataclasses.replace(state.generator, params=jax.tree.map(jnp.array, params), stats=stats)
    return dataclasses.replace(state, generator=learner, ema=jax.tree.map(jnp.array, params))


def count(params: Any) -> int:
    """Number of scalars in a tree."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
