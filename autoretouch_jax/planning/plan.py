"""The plan of a config on a machine that is not here: memory, FLOPs, communication, a bound of the time, and what would fit.

For a TPU slice the real step is compiled: memory, FLOPs and collectives are XLA's (`tpu.py`), and the bytes through memory and
XLA's estimate of the operations are read from the compiled program (`traffic.py`). For GPUs the same figures are estimated from
the traced step (`gpu.py`). The time is a roofline of our own over them (`chips.py`).
"""

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from autoretouch_jax.config import Config
from autoretouch_jax.config.loading import with_values
from autoretouch_jax.config.schema import DATA_FORMS
from autoretouch_jax.config.validation import validate
from autoretouch_jax.errors import EXIT_DONE, EXIT_FAILED, Refused
from autoretouch_jax.planning import chips, gpu, tpu
from autoretouch_jax.planning.chips import Slice
from autoretouch_jax.runtime import storage
from autoretouch_jax.runtime.devices import check_batch
from autoretouch_jax.runtime.tables import text_table

GIB = 2**30
RESERVED = 0.75  # GiB of a GPU that the driver, cuDNN's workspaces and fragmentation take
JAX_SHARE = 0.75  # of a GPU's memory, which JAX takes unless one of these variables says otherwise; the second is its old name
SHARE_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
SHORT_LIST = 3  # candidates of --fit that are compiled


def run(config: Config, topology: str, fit: bool, json_path: Path | None) -> int:
    """Analyses, prints, and writes the JSON. Returns the exit status: 1 when the step does not fit."""
    config, machine = plannable(config), chips.read_slice(topology)
    if config.train.precision == "auto":  # all of our chips multiply bfloat16
        config = with_values(config, {"train.precision": "bfloat16"})
    validate(config)
    if fit:
        config = best_fit(config, machine)
    result = analyse(config, machine)
    print(report(config, machine, result))
    # Printed as flags, which can be copied into the next command.
    if fit:
        flags = f"--train.batch {config.train.batch} --data.crop {config.data.crop} --parallel.remat {config.parallel.remat}"
        print(f"the fastest that fits: {flags}")
    if json_path:
        storage.write_output(json_path, json.dumps(result, indent=2) + "\n")
    return EXIT_DONE if result["fits"] else EXIT_FAILED


def plannable(config: Config) -> Config:
    """Returns the config with what a plan ignores filled in: data, VGG weights, number of steps, explicit processes."""
    data = config.data
    # Validation asks for data. A plan opens none, and a folder of pairs suits every config.
    if not any(getattr(data, key) for form in DATA_FORMS for key in form):
        data = dataclasses.replace(data, source="not looked at", target="not looked at")
    return dataclasses.replace(
        config,
        data=data,
        loss=dataclasses.replace(config.loss, vgg_weights="random"),
        train=dataclasses.replace(config.train, steps=config.train.steps or 100_000, start_from=None),
        parallel=dataclasses.replace(config.parallel, mode="jit", devices=0, coordinator=None, processes=0, process=0),
    )


def analyse(config: Config, machine: Slice) -> dict[str, Any]:
    """Returns the figures of the step per device, and its time and speed on one chip, one host, and so on to all chips."""
    check_batch(config.train.batch, machine.count, config.parallel.accumulate)
    # A TPU's compiler runs anywhere; a GPU's needs its GPU.
    if machine.is_tpu:
        figures = tpu.compile_for(config, machine.topology, storage.cache_folder() / "plan")
    else:
        figures = gpu.estimate(config, machine.count)
        need, limit = figures["memory"]["peak"], _limit(machine)
        figures |= {"fits": need <= limit, "need": need, "limit": limit, "share": memory_share()}
    # Weak scaling: every chip keeps its images, so the figures of one serve for any number.
    figures["batch_per_device"] = config.train.batch // machine.count
    if "flops" in figures:
        figures["scaling"] = [_scaled(config, machine, figures, count) for count in _chip_counts(machine)]
        figures["estimate"] = _estimate(machine, figures)
    return figures


def memory_share() -> float:
    """The share of a GPU's memory that JAX would take with the variables of this environment."""
    # Only this allocator has no limit. XLA_PYTHON_CLIENT_PREALLOCATE=false changes when memory is taken, not how much at most.
    if os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR") == "platform":
        return 1.0
    for name in SHARE_VARIABLES:
        if text := os.environ.get(name):
            with contextlib.suppress(ValueError):
                if float(text) > 0:
                    return min(1.0, float(text))  # more than 1 would be the computer's own memory
            raise Refused(f"{name}={text}: must be a number above 0, such as 0.95")
    return JAX_SHARE


def _limit(machine: Slice) -> float:
    """Bytes of a GPU's memory that a step may use. On a TPU XLA knows them itself."""
    share = 1.0 if machine.is_tpu else memory_share()
    return share * (machine.chip.memory - RESERVED) * GIB


def _chip_counts(machine: Slice) -> list[int]:
    """Returns the counts to show: one chip, one host, twice as many hosts, and so on to the whole machine."""
    # Communication slows down at the border of a host, so only whole hosts are worth showing.
    counts, count = [1], min(machine.chip.per_host, machine.count)
    while count < machine.count:
        counts.append(count)
        count *= 2
    return sorted({*counts, machine.count})


def _scaled(config: Config, machine: Slice, figures: dict[str, Any], count: int) -> dict[str, Any]:
    """Returns time and speed on `count` chips with the same images per device."""
    # All-reduces carry nearly all of the bytes; other collectives are counted as if they were one.
    reduced = sum(entry["bytes"] for entry in figures["collectives"].values())
    collectives = sum(entry["count"] for entry in figures["collectives"].values())
    precision = config.train.precision
    time = chips.roofline(machine.chip, precision, figures["flops"], figures["bytes"], reduced, collectives, count)
    return {
        "chips": count,
        "hosts": -(-count // machine.chip.per_host),
        **dataclasses.asdict(time),
        "step": time.step,
        "images_per_s": count * figures["batch_per_device"] / time.step,
        # The share of the step in which the chip computes or moves memory, and does not wait for the network.
        "efficiency": max(time.compute, time.memory) / time.step,
    }


def _estimate(machine: Slice, figures: dict[str, Any]) -> dict[str, float] | None:
    """Returns the time and the speed on all chips if the operations take as long as XLA expects. None where it is not known."""
    clock, bound = chips.CLOCKS.get(machine.chip.name), figures["scaling"][-1]
    if not clock or not figures.get("cycles"):
        return None
    # The cycles have no transfers in them.
    operations = max(figures["cycles"] / clock, bound["memory"])
    step = operations + bound["communication"]
    speed = machine.count * figures["batch_per_device"] / step
    return {"operations": operations, "step": step, "images_per_s": speed, "efficiency": operations / step}


# ---- what would fit ---------------------------------------------------------------------------------------------------------


def best_fit(config: Config, machine: Slice) -> Config:
    """Returns the fastest of the config's variants that fits: images per device, crop and remat, by pixels per second.

    Estimates make a short list. On a TPU, XLA then decides.
    """
    candidates: list[tuple[float, Config]] = []
    grid = max(16, config.generator.grid)
    # Only the config's crop, twice and half of it: a very different crop would be another recipe.
    crops = {config.data.crop, 2 * config.data.crop, max(64, config.data.crop // 2 // grid * grid)}
    for crop in sorted(crop for crop in crops if crop % grid == 0):
        for remat in ("none", "norms", "full"):
            candidates += _largest_that_fits(_variant(config, crop, 1, remat, machine), machine)
    if not candidates:
        raise Refused(
            f"--fit: not even one image of crop {config.data.crop} with --parallel.remat full fits a {machine.chip.name}"
        )
    # By pixels, not images, so that crops of different sizes compare.
    candidates.sort(key=lambda candidate: -candidate[0])
    print(_candidate_table(candidates, machine))
    # Compiling takes minutes, so only a few candidates are compiled.
    confirmed = [_confirm(variant, machine) for _, variant in candidates[:SHORT_LIST]]
    fitting = [candidate for candidate in confirmed if candidate is not None]
    if not fitting:
        raise Refused("--fit: none of the short list fits; plan a smaller crop")
    return max(fitting, key=lambda candidate: candidate[0])[1]


def _candidate_table(candidates: list[tuple[float, Config]], machine: Slice) -> str:
    rows = [
        [f"{speed:.2e}", str(variant.data.crop), str(variant.train.batch // machine.count), variant.parallel.remat]
        for speed, variant in candidates
    ]
    return text_table(["pixels/s", "crop", "images per device", "remat (estimated)"], rows, left=(3,))


def _variant(config: Config, crop: int, images: int, remat: Any, machine: Slice) -> Config:
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, crop=crop, resize=0),
        train=dataclasses.replace(config.train, batch=images * machine.count),
        parallel=dataclasses.replace(config.parallel, remat=remat, accumulate=1),
    )


def _largest_that_fits(config: Config, machine: Slice) -> list[tuple[float, Config]]:
    """Returns the variant with the largest power of two of images per device that fits by estimate, and its speed.

    The list is empty when not even one image fits.
    """
    best: list[tuple[float, Config]] = []
    # Memory, FLOPs and bytes grow linearly with the images, so one trace serves for all.
    one = gpu.estimate(config, machine.count)
    fixed = one["memory"]["argument"]
    per_image = one["memory"]["peak"] - fixed
    images = 1
    # Powers of two are fine enough for a search, and take few steps.
    while fixed + per_image * images <= _limit(machine):
        variant = _variant(config, config.data.crop, images, config.parallel.remat, machine)
        figures = one | {"flops": one["flops"] * images, "bytes": one["bytes"] * images, "batch_per_device": images}
        best = [(_pixels_per_s(variant, _scaled(variant, machine, figures, machine.count)), variant)]
        images *= 2
    return best


def _confirm(config: Config, machine: Slice) -> tuple[float, Config] | None:
    """Analyses a candidate, halving its images until it fits. Returns the speed and the config that fits, or None."""
    images = config.train.batch // machine.count
    # An estimate can be too low. Where XLA says that the step does not fit, half the images may.
    while images:
        config = _variant(config, config.data.crop, images, config.parallel.remat, machine)
        figures = analyse(config, machine)
        if figures["fits"]:
            return _pixels_per_s(config, figures.get("estimate") or figures["scaling"][-1]), config
        images //= 2
    return None


def _pixels_per_s(config: Config, scaled: dict[str, Any]) -> float:
    return scaled["images_per_s"] * config.data.crop**2


# ---- what is printed --------------------------------------------------------------------------------------------------------


def report(config: Config, machine: Slice, figures: dict[str, Any]) -> str:
    """Returns what `plan` prints."""
    source = "XLA's analysis of the compiled step" if machine.is_tpu else "arithmetic on the traced step, without a GPU"
    lines = [
        f"{config.generator.network} on {machine.topology}: {machine.count} chip(s), {machine.hosts} host(s); "
        f"{figures['batch_per_device']} image(s) of {config.data.crop}² per device, {config.train.precision}, "
        f"remat {config.parallel.remat}, accumulate {config.parallel.accumulate}",
        f"per device, from {source}:",
    ]
    if not figures["fits"]:
        need, limit, advice = figures["need"] / GIB, figures["limit"] / GIB, _advice(config, figures["batch_per_device"])
        lines.append(f"  DOES NOT FIT: needs {need:.2f} GiB, has {limit:.2f} GiB. {advice}")
    if "memory" in figures:
        memory = {name: size / GIB for name, size in figures["memory"].items()}
        lines.append(
            f"  memory   peak {memory['peak']:.2f} GiB of the chip's {machine.chip.memory:.0f}; state and batch "
            f"{memory['argument']:.2f}, buffer for temporaries {memory['temp']:.2f}"
        )
        if "share" in figures:
            lines.append(_share_line(figures))
        lines.append(f"  compute  {figures['flops'] / 1e12:.3f} TFLOP, {figures['bytes'] / 1e9:.1f} GB through memory")
        moved = [f"{entry['count']} {kind}, {entry['bytes'] / 1e6:.1f} MB" for kind, entry in figures["collectives"].items()]
        lines.append(f"  network  {'; '.join(moved) or 'nothing: one chip'}")
        lines.append("predicted at the roofline, with the same images per device (a bound: real steps take longer):")
        lines.append(_scaling_table(figures["scaling"]))
        if estimate := figures["estimate"]:
            lines.append(_estimate_line(machine, estimate))
    if machine.is_tpu:
        cached = " by an earlier plan (cached)" if figures["cached"] else ""
        lines.append(f"compiled in {figures['compile_seconds']:.0f} s{cached}")
    return "\n".join(lines)


def _share_line(figures: dict[str, Any]) -> str:
    share, limit = figures["share"], figures["limit"] / GIB
    raise_it = f"; {SHARE_VARIABLES[1]}=0.95, set here and for the run, raises it" if share < 0.95 else ""
    return f"           JAX takes {share:.0%} of it, which leaves {limit:.2f} GiB for a step{raise_it}"


def _scaling_table(scaling: list[dict[str, Any]]) -> str:
    rows = []
    for row in scaling:
        parts = {"computing": row["compute"], "memory": row["memory"], "network": row["communication"]}
        slowest = max(parts, key=lambda name: parts[name])
        speed = [f"{1e3 * row['step']:.2f}", f"{row['images_per_s']:.1f}", f"{row['efficiency']:.1%}", slowest]
        rows.append([str(row["chips"]), str(row["hosts"]), *speed])
    return text_table(["chips", "hosts", "step ms", "images/s", "efficiency", "bound by"], rows, left=(5,))


def _estimate_line(machine: Slice, estimate: dict[str, float]) -> str:
    operations, step = 1e3 * estimate["operations"], 1e3 * estimate["step"]
    return (
        f"XLA itself expects {operations:.1f} ms of operations on a chip. With {machine.count} that is a step of "
        f"{step:.1f} ms, {estimate['images_per_s']:.0f} images/s, efficiency {estimate['efficiency']:.1%}."
    )


def _advice(config: Config, images: int) -> str:
    """Returns advice on what to change, the cheapest first."""
    # Ordered by cost: time, precision, more steps, and last a smaller crop, which changes the recipe.
    options = []
    if config.parallel.remat != "full":
        options.append("--parallel.remat full")
    if config.train.precision == "float32":
        options.append("--train.precision bfloat16")
    if images > 1:
        options.append(f"--parallel.accumulate {images}, or a smaller --train.batch")
    options.append(f"--data.crop {max(64, config.data.crop // 2)}")
    return "Try " + "; ".join(options) + "; or --fit"
