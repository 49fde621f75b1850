"""Devices, axes and shardings: the only file that names them.

The training step is written for one device's share of the batch and averages over `AXIS`. Both ways to spread it take and
return the same state, without a device axis.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from autoretouch_jax.config import ParallelConfig
from autoretouch_jax.errors import Refused

AXIS = "data"


def make_mesh(config: ParallelConfig, batch: int) -> Mesh:
    """A one-axis mesh. Raises Refused when there are too few devices or the batch does not divide."""
    available = jax.devices()
    count = config.devices or len(available)
    if count > len(available):
        raise Refused(f"--parallel.devices {count}: only {len(available)} {available[0].platform} device(s) here")
    if batch % count:
        raise Refused(f"--train.batch {batch} does not divide over {count} devices; choose a multiple of {count}")
    return Mesh(np.array(available[:count]), (AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of state and weights: the same on every device."""
    return NamedSharding(mesh, P())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Put a copy of every leaf on every device of the mesh."""
    return jax.device_put(tree, replicated(mesh))


def shard_batch(batch: Any, mesh: Mesh, mode: str) -> Any:
    """Host arrays `[N, …]` → device arrays, N split over the mesh (`[D, N/D, …]` for pmap)."""
    if mode == "pmap":
        batch = jax.tree.map(lambda x: x.reshape(mesh.size, -1, *x.shape[1:]), batch)
    return jax.device_put(batch, NamedSharding(mesh, P(AXIS)))


def wrap_step(step: Callable, mesh: Mesh, mode: str) -> Callable:
    """Compile `step(state, batch, frozen) -> (state, metrics)` for the mesh; the state's buffers are donated.

    check_vma=False: the body differentiates its own share and then averages; with the default check the gradients of
    replicated parameters arrive already summed and would be counted once per device.
    """
    if mode == "pmap":
        return jax.pmap(
            step, AXIS, in_axes=(None, 0, None), out_axes=(None, None), donate_argnums=(0,), devices=list(mesh.devices.flat)
        )
    body = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(AXIS), P()), out_specs=(P(), P()), check_vma=False)
    return jax.jit(body, donate_argnums=(0,))


def mean(tree: Any) -> Any:
    """Average over the devices; to be called inside the step."""
    return jax.lax.pmean(tree, AXIS)


def fold_in_device(key: jax.Array) -> jax.Array:
    """A key of this device's own; to be called inside the step."""
    return jax.random.fold_in(key, jax.lax.axis_index(AXIS))
