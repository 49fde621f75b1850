"""Devices, axes and shardings: the only file that names them.

The training step is written for one device's share of the batch and averages over `AXIS`. Both ways to spread it take and
return the same state, without a device axis, on one process's devices or on those of many.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from autoretouch_jax.config import ParallelConfig
from autoretouch_jax.errors import Refused

AXIS = "data"
SMALLEST_PART = 1024  # scalars: arrays below are not worth cutting


def make_mesh(config: ParallelConfig, batch: int) -> Mesh:
    """A one-axis mesh over the devices of all processes, those of a process side by side.

    Raises Refused when there are too few devices or the batch does not divide.
    """
    available = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    count = config.devices or len(available)
    if count > len(available):
        raise Refused(f"--parallel.devices {count}: only {len(available)} {available[0].platform} device(s) here")
    if jax.process_count() > 1 and count != len(available):
        raise Refused(f"--parallel.devices {count}: {jax.process_count()} processes use all their devices; leave it out")
    check_batch(batch, count, config.accumulate)
    return Mesh(np.array(available[:count]), (AXIS,))


def check_batch(batch: int, devices: int, accumulate: int) -> None:
    """Refuse a batch that does not divide over so many devices and parts."""
    if batch % devices:
        raise Refused(f"--train.batch {batch} does not divide over {devices} devices; choose a multiple of {devices}")
    if batch // devices % accumulate:
        raise Refused(
            f"--parallel.accumulate {accumulate}: a device's share of the batch, {batch // devices} image(s), does not divide "
            "into so many parts"
        )


def mesh_of_slice(topology: str) -> Mesh:
    """The mesh of a TPU slice that is not here, `v5e:2x2`, to compile for; needs libtpu."""
    from jax.experimental import topologies

    devices: Any = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.array(sorted(devices, key=lambda device: (device.process_index, device.id))), (AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of weights: the same on every device."""
    return NamedSharding(mesh, P())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Put a copy of every leaf on every device of the mesh. Every process gives the same values."""
    return jax.tree.map(lambda leaf: _put(leaf, replicated(mesh)), tree)


def place(tree: Any, shardings: Any) -> Any:
    """Put every leaf where its sharding says. Every process gives the same, whole values."""
    return jax.tree.map(_put, tree, shardings)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if jax.process_count() == 1:
        return jax.device_put(leaf, sharding)
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda part: whole[part])


def local(tree: Any) -> Any:
    """Host arrays of leaves that every device holds whole: what one process may go on with alone."""
    return jax.device_get(tree)


def cut_spec(shape: tuple[int, ...], count: int) -> P:
    """How an array is cut into `count` parts: along its longest side that divides; not at all if it is small or none does."""
    sides = [side if side % count == 0 else 0 for side in shape]
    if count == 1 or not sides or not max(sides) or np.prod(shape) < SMALLEST_PART:
        return P()
    longest = sides.index(max(sides))
    return P(*[AXIS if i == longest else None for i in range(len(shape))])


def shardings(specs: Any, mesh: Mesh) -> Any:
    """Specs → shardings on the mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P))


def shapes(tree: Any, places: Any) -> Any:
    """The shapes of a tree's leaves, each with its sharding: what a step can be lowered with."""
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, places)


def split(batch: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a batch."""
    return jax.tree.map(lambda _: NamedSharding(mesh, P(AXIS)), batch)


def shard_batch(batch: Any, mesh: Mesh, mode: str) -> Any:
    """This process's run of the batch `[N / processes, …]` → device arrays, N split over the mesh (for pmap `[D, N/D, …]`)."""
    here = mesh.local_mesh.size
    if mode == "pmap":
        batch = jax.tree.map(lambda x: x.reshape(here, -1, *x.shape[1:]), batch)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(NamedSharding(mesh, P(AXIS)), x), batch)


def local_devices() -> int:
    """How many devices this process has."""
    return jax.local_device_count()


def spread(batch: np.ndarray) -> Any:
    """A batch over as many of this process's devices as it has entries; a single entry stays where JAX puts it."""
    if len(batch) == 1:
        return batch
    mesh = Mesh(np.array(jax.local_devices()[: len(batch)]), (AXIS,))
    return jax.device_put(batch, NamedSharding(mesh, P(AXIS)))


def wrap_step(step: Callable, mesh: Mesh, mode: str, specs: Any = None) -> Callable:
    """Compile `step(state, batch, frozen) -> (state, metrics)` for the mesh; the state's buffers are donated.

    `specs` says how the state is cut, where it is (`jit` only). check_vma=False: the body differentiates its own share and then
    averages; with the default check the gradients of replicated parameters arrive already summed and would be counted once
    per device.
    """
    if mode == "pmap":
        devices = list(mesh.devices.flat)
        mapped = jax.pmap(step, AXIS, in_axes=(None, 0, None), out_axes=None, donate_argnums=(0,), devices=devices)
        return mapped if jax.process_count() == 1 else lambda *arguments: _of_all(mapped(*arguments), replicated(mesh))
    state = P() if specs is None else specs
    body = jax.shard_map(step, mesh=mesh, in_specs=(state, P(AXIS), P()), out_specs=(state, P()), check_vma=False)
    return jax.jit(body, donate_argnums=(0,))


def _of_all(tree: Any, sharding: NamedSharding) -> Any:
    """What pmap returns among several processes knows only this one's devices; the same buffers as arrays on all of them."""

    def whole(leaf: jax.Array) -> jax.Array:
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, [part.data for part in leaf.addressable_shards])

    return jax.tree.map(whole, tree)


def mean(tree: Any) -> Any:
    """Average float32 leaves over the devices, all of them in one collective; to be called inside the step."""
    if jax.lax.axis_size(AXIS) == 1:
        return tree
    flat, restore = ravel_pytree(tree)
    return restore(jax.lax.pmean(flat, AXIS))


def own_part(tree: Any) -> Any:
    """This device's part of each leaf, cut as `cut_spec` says; to be called inside the step."""
    return jax.tree.map(_own_part, tree)


def _own_part(leaf: jax.Array) -> jax.Array:
    spec, count = cut_spec(leaf.shape, jax.lax.axis_size(AXIS)), jax.lax.axis_size(AXIS)
    if AXIS not in spec:
        return leaf
    side = spec.index(AXIS)
    size = leaf.shape[side] // count
    return jax.lax.dynamic_slice_in_dim(leaf, jax.lax.axis_index(AXIS) * size, size, side)


def join_parts(tree: Any, like: Any) -> Any:
    """The inverse of `own_part`, for leaves of the shapes of `like`; to be called inside the step."""
    return jax.tree.map(_join_parts, tree, like)


def _join_parts(part: jax.Array, like: jax.Array) -> jax.Array:
    spec = cut_spec(like.shape, jax.lax.axis_size(AXIS))
    return jax.lax.all_gather(part, AXIS, axis=spec.index(AXIS), tiled=True) if AXIS in spec else part


def fold_in_device(key: jax.Array) -> jax.Array:
    """A key of this device's own; to be called inside the step."""
    return jax.random.fold_in(key, jax.lax.axis_index(AXIS))


def bytes_of_part(tree: Any, specs: Any, count: int) -> int:
    """Bytes of one device's part of a tree of shapes cut over `count` devices as `specs` says."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, P)), strict=True)
    sizes = (int(np.prod(leaf.shape)) * leaf.dtype.itemsize // (count if AXIS in spec else 1) for leaf, spec in leaves)
    return sum(sizes)


def describe_devices() -> list[str]:
    """A line for each kind of device that this run has, with the memory of one where it is known."""
    kinds: dict[tuple[str, str], int] = {}
    for device in jax.devices():
        kinds[device.platform, device.device_kind] = kinds.get((device.platform, device.device_kind), 0) + 1
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    size = f", {memory / 2**30:.1f} GiB each" if memory else ""
    here = f", {jax.local_device_count()} of them in this process" if jax.process_count() > 1 else ""
    return [f"{number} {platform} ({kind}){here}{size}" for (platform, kind), number in kinds.items()]


def time_all_reduce(size: int, rounds: int = 5) -> tuple[float, bool]:
    """Seconds of an all-reduce of `size` bytes over all devices, the best of some rounds, and whether its sum was right."""
    mesh = Mesh(np.array(sorted(jax.devices(), key=lambda device: (device.process_index, device.id))), (AXIS,))
    ones = np.ones((mesh.local_mesh.size, size // 4), np.float32)
    numbers = jax.make_array_from_process_local_data(NamedSharding(mesh, P(AXIS)), ones)
    summed = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, AXIS), mesh=mesh, in_specs=P(AXIS), out_specs=P()))
    best, out = float("inf"), jax.block_until_ready(summed(numbers))
    for _ in range(rounds):
        started = time.perf_counter()
        out = jax.block_until_ready(summed(numbers))
        best = min(best, time.perf_counter() - started)
    return best, bool(np.all(np.asarray(out.addressable_shards[0].data) == mesh.size))
