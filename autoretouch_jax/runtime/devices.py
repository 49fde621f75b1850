"""Devices, axes, shardings and collectives: the only file that names them.

The training step is written for one device's share of the batch and averages over `AXIS`. Both ways to spread it, `jit` and
`pmap`, take and return the same state, without a device axis, on the devices of one process or of many.
"""

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from autoretouch_jax.config import Config, ParallelConfig
from autoretouch_jax.config.loading import with_values
from autoretouch_jax.errors import Refused

AXIS = "data"
AMPERE = 8.0  # the compute capability of NVIDIA's first GPUs that multiply bfloat16
SMALLEST_SHARDED = 1024  # scalars; sharding smaller arrays saves nothing


# ---- meshes ---------------------------------------------------------------------------------------------------------------


def make_mesh(config: ParallelConfig, batch: int) -> Mesh:
    """Returns a one-axis mesh over the devices of all processes, those of a process side by side.

    Raises Refused when there are too few devices, or the batch cannot be divided evenly over them.
    """
    available = _in_process_order(jax.devices())
    count = config.devices or len(available)
    if count > len(available):
        raise Refused(f"--parallel.devices {count}: only {len(available)} {available[0].platform} device(s) here")
    if jax.process_count() > 1 and count != len(available):
        raise Refused(f"--parallel.devices {count}: {jax.process_count()} processes use all their devices; leave it out")
    check_batch(batch, count, config.accumulate)
    return Mesh(np.array(available[:count]), (AXIS,))


def _in_process_order(devices: Any) -> list[Any]:
    # A process feeds one contiguous run of the batch, so its devices must lie side by side.
    return sorted(devices, key=lambda device: (device.process_index, device.id))


def check_batch(batch: int, devices: int, accumulate: int) -> None:
    """Refuses a batch that cannot be divided evenly over this many devices and microbatches."""
    if batch % devices:
        raise Refused(f"--train.batch {batch} does not divide over {devices} devices; choose a multiple of {devices}")
    if batch // devices % accumulate:
        raise Refused(
            f"--parallel.accumulate {accumulate}: a device's share of the batch, {batch // devices} image(s), does not divide "
            "into so many microbatches"
        )


def mesh_of_slice(topology: str) -> Mesh:
    """Returns the mesh of a TPU slice that is not here, such as `v5e:2x2`, to compile for. It needs libtpu."""
    from jax.experimental import topologies

    devices: Any = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.array(_in_process_order(devices)), (AXIS,))


def on_cpu() -> bool:
    """Whether this process computes on CPUs."""
    return jax.default_backend() == "cpu"


def with_precision(config: Config) -> Config:
    """Fills in `train.precision` where it is `auto`: bfloat16 if all devices of all processes multiply it fast, or float32."""
    if config.train.precision != "auto":
        return config
    precision = "bfloat16" if all(map(_multiplies_bfloat16, jax.devices())) else "float32"
    return with_values(config, {"train.precision": precision})


def _multiplies_bfloat16(device: jax.Device) -> bool:
    if device.platform != "gpu":
        return device.platform == "tpu"
    # AMD's GPUs name their architecture instead. Which of them are fast has not been looked into.
    try:
        return float(device.compute_capability) >= AMPERE
    except (AttributeError, ValueError):
        return False


# ---- shardings: where arrays live -----------------------------------------------------------------------------------------


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of weights: the same on every device."""
    return NamedSharding(mesh, P())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts a copy of every leaf on every device of the mesh. Every process passes the same values."""
    return jax.tree.map(lambda leaf: _put(leaf, replicated(mesh)), tree)


def put(tree: Any, shardings: Any) -> Any:
    """Places every leaf as its sharding says. Every process passes the same, whole values."""
    return jax.tree.map(_put, tree, shardings)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if jax.process_count() == 1:
        return jax.device_put(leaf, sharding)
    # `device_put` cannot reach the other processes' devices, so each process fills the parts on its own devices.
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda part: whole[part])


def to_host(tree: Any) -> Any:
    """Returns host arrays of leaves that every device holds whole, so that one process can go on with them alone."""
    return jax.device_get(tree)


def partition_spec(shape: tuple[int, ...], count: int) -> P:
    """Returns how an array is sharded over `count` devices: along its longest side that divides, or not at all.

    Small arrays, and those of which no side divides, stay whole.
    """
    sides = [side if side % count == 0 else 0 for side in shape]
    if count == 1 or not sides or not max(sides) or np.prod(shape) < SMALLEST_SHARDED:
        return P()
    longest = sides.index(max(sides))
    return P(*[AXIS if i == longest else None for i in range(len(shape))])


def shardings(specs: Any, mesh: Mesh) -> Any:
    """Partition specs → shardings on the mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a batch: its images are spread over the mesh."""
    return jax.tree.map(lambda _: NamedSharding(mesh, P(AXIS)), batch)


def abstract(tree: Any, shardings: Any) -> Any:
    """The shapes of a tree's leaves, each with its sharding. A step can be lowered with them in place of arrays."""
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings)


def shardings_of(shapes: Any) -> Any:
    """The sharding of every leaf of what `abstract` returns."""
    return jax.tree.map(lambda leaf: leaf.sharding, shapes)


def bytes_per_device(tree: Any, specs: Any, count: int) -> int:
    """Bytes that one device holds of a tree of shapes, sharded over `count` devices as `specs` says."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(specs, is_leaf=_is_spec), strict=True)
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize // (count if AXIS in spec else 1) for leaf, spec in leaves)


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, P)  # a PartitionSpec is a tuple, which JAX would take for a branch of the tree


def shard_batch(batch: Any, mesh: Mesh, mode: str) -> Any:
    """Puts this process's share of a batch, `[N / processes, …]`, on its devices, as part of the whole batch.

    The result is `[N, …]` for jit and `[D, N / D, …]` for pmap, spread over the D devices of the mesh.
    """
    if mode == "pmap":
        batch = jax.tree.map(lambda x: x.reshape(mesh.local_mesh.size, -1, *x.shape[1:]), batch)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(NamedSharding(mesh, P(AXIS)), x), batch)


def local_devices() -> int:
    """The number of devices of this process."""
    return jax.local_device_count()


def spread_over_local_devices(batch: np.ndarray) -> Any:
    """Puts a batch on as many of this process's devices as it has entries. A single entry stays where JAX puts it."""
    if len(batch) == 1:
        return batch
    mesh = Mesh(np.array(jax.local_devices()[: len(batch)]), (AXIS,))
    return jax.device_put(batch, NamedSharding(mesh, P(AXIS)))


def copy_to_local_devices(tree: Any, count: int) -> Any:
    """Puts a copy of every leaf on each of `count` of this process's devices, those that `spread_over_local_devices` takes."""
    if count == 1:
        return jax.device_put(tree)
    return jax.device_put(tree, replicated(Mesh(np.array(jax.local_devices()[:count]), (AXIS,))))


# ---- the step on a mesh ---------------------------------------------------------------------------------------------------


def wrap_step(step: Callable, mesh: Mesh, mode: str, specs: Any = None) -> Callable:
    """Returns `step(state, batch, frozen) -> (state, metrics)` jitted for the mesh. The state's buffers are donated.

    `specs` are the partition specs of the state. Without them, and with `pmap`, it is replicated. On a CPU the step has
    compiler options, so JAX refuses it inside another `jit`.
    """
    if mode == "pmap":
        devices = list(mesh.devices.flat)
        mapped = jax.pmap(step, AXIS, in_axes=(None, 0, None), out_axes=None, donate_argnums=(0,), devices=devices)
        if jax.process_count() == 1:
            return mapped
        return lambda *arguments: _as_global_arrays(mapped(*arguments), replicated(mesh))
    state = P() if specs is None else specs
    # check_vma=False: the body differentiates its own share and then averages. With the default check the gradients of
    # replicated parameters arrive already summed, and would be counted once per device.
    body = jax.shard_map(step, mesh=mesh, in_specs=(state, P(AXIS), P()), out_specs=(state, P()), check_vma=False)
    return jax.jit(body, donate_argnums=(0,), compiler_options=_compiler_options(mesh.devices.flat[0].platform))


# XLA's options for a step on a CPU.
CPU_OPTIONS = {
    # What XLA leaves to YNNPACK, a library of kernels. In jaxlib 0.10.2 it has products of matrices too. Eigen computes these a
    # little faster; and when a program is read from the cache, XLA looks up each operation of the library among all of the
    # program's. For the thousand products of full-size AutoRetouch's step that took ten seconds.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION,LIBRARY_FUSION_TYPE_REDUCE",
    # Without it XLA copies each of the generator's moments and parameters before it updates them in place.
    "xla_cpu_copy_insertion_use_region_analysis": "True",
}


@functools.cache
def _compiler_options(platform: str) -> dict[str, str] | None:
    """XLA's options for a jitted step, beside those that the user has set; None where there are none. `pmap` takes none."""
    if platform != "cpu":
        return None
    # Whoever sets an option in XLA_FLAGS has a reason to.
    chosen = {name: value for name, value in CPU_OPTIONS.items() if name not in os.environ.get("XLA_FLAGS", "")}
    return {name: value for name, value in chosen.items() if _is_known({name: value})} or None


def _is_known(option: dict[str, str]) -> bool:
    """Whether this version of XLA has an option. It refuses a program with an unknown one."""
    try:
        jax.jit(lambda: 0, compiler_options=option).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _as_global_arrays(tree: Any, sharding: NamedSharding) -> Any:
    """Returns pmap's results, which know only this process's devices, as arrays over the devices of all processes.

    The buffers stay the same.
    """

    def whole(leaf: jax.Array) -> jax.Array:
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, [part.data for part in leaf.addressable_shards])

    return jax.tree.map(whole, tree)


# ---- inside the step ------------------------------------------------------------------------------------------------------


def mean(tree: Any) -> Any:
    """Averages float32 leaves over the devices. XLA combines them into one collective."""
    return tree if jax.lax.axis_size(AXIS) == 1 else jax.lax.pmean(tree, AXIS)


def sharing() -> int:
    """How many devices share the step's batch: those that `mean` averages over."""
    return int(jax.lax.axis_size(AXIS))


def own_part(tree: Any) -> Any:
    """This device's part of each leaf, sharded as `partition_spec` says."""
    return jax.tree.map(_own_part, tree)


def _own_part(leaf: jax.Array) -> jax.Array:
    count = jax.lax.axis_size(AXIS)
    spec = partition_spec(leaf.shape, count)
    if AXIS not in spec:
        return leaf
    side = spec.index(AXIS)
    size = leaf.shape[side] // count
    return jax.lax.dynamic_slice_in_dim(leaf, jax.lax.axis_index(AXIS) * size, size, side)


def join_parts(tree: Any, like: Any) -> Any:
    """The inverse of `own_part`, for leaves of the shapes of `like`."""
    return jax.tree.map(_join_parts, tree, like)


def _join_parts(part: jax.Array, like: jax.Array) -> jax.Array:
    spec = partition_spec(like.shape, jax.lax.axis_size(AXIS))
    return jax.lax.all_gather(part, AXIS, axis=spec.index(AXIS), tiled=True) if AXIS in spec else part


def fold_in_device(key: jax.Array) -> jax.Array:
    """Returns a random key that is different on every device."""
    return jax.random.fold_in(key, jax.lax.axis_index(AXIS))


# ---- looking at the machine -----------------------------------------------------------------------------------------------


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
    """Returns the seconds of an all-reduce of `size` bytes over all devices, and whether its sum was right.

    The time is the best of `rounds`, after a warm-up, because other work on the machine can only make a round slower.
    """
    mesh = Mesh(np.array(_in_process_order(jax.devices())), (AXIS,))
    ones = np.ones((mesh.local_mesh.size, size // 4), np.float32)
    numbers = jax.make_array_from_process_local_data(NamedSharding(mesh, P(AXIS)), ones)
    summed = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, AXIS), mesh=mesh, in_specs=P(AXIS), out_specs=P()))
    best, out = float("inf"), jax.block_until_ready(summed(numbers))
    for _ in range(rounds):
        started = time.perf_counter()
        out = jax.block_until_ready(summed(numbers))
        best = min(best, time.perf_counter() - started)
    return best, bool(np.all(np.asarray(out.addressable_shards[0].data) == mesh.size))
