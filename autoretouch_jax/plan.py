"""`autoretouch plan`: what a config's step needs on machines that are not here, before they are paid for.

For a TPU slice the real step is compiled, and memory, FLOPs, bytes and collectives are XLA's. For GPUs, whose compiler needs
one, the same figures come by arithmetic from the traced step. The time is a roofline of our own over them: see `chips.py`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from autoretouch_jax import ahead, architecture, arithmetic, chips, rules
from autoretouch_jax import config as configs
from autoretouch_jax.chips import Slice
from autoretouch_jax.config import Config
from autoretouch_jax.errors import Refused
from autoretouch_jax.files import cache_folder
from autoretouch_jax.parallel import check_batch

GIB = 2**30
RESERVED = 0.75  # GiB of a GPU that the driver, cuDNN's workspaces and fragmentation take
SHORT_LIST = 3  # candidates of --fit that are compiled


def run(config: Config, topology: str, fit: bool, json_path: Path | None) -> int:
    """Analyse, print, write. Returns the exit status: 1 when the step does not fit."""
    config, machine = plannable(config), chips.read_slice(topology)
    rules.validate(config)
    if fit:
        config = best_fit(config, machine)
    result = analyse(config, machine)
    print(report(config, machine, result))
    if fit:
        flags = f"--train.batch {config.train.batch} --data.crop {config.data.crop} --parallel.remat {config.parallel.remat}"
        print(f"the fastest that fits: {flags}")
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["fits"] else 1


def plannable(config: Config) -> Config:
    """The config with what a plan does not look at filled in: data, weights of the VGG, number of steps, explicit peers."""
    data = config.data
    if not any(getattr(data, key) for form in configs.DATA_FORMS for key in form):
        data = dataclasses.replace(data, records="not looked at")
    return dataclasses.replace(
        config,
        data=data,
        loss=dataclasses.replace(config.loss, vgg_weights="random"),
        train=dataclasses.replace(config.train, steps=config.train.steps or 100_000, start_from=None),
        parallel=dataclasses.replace(config.parallel, mode="jit", devices=0, coordinator=None, processes=0, process=0),
    )


def analyse(config: Config, machine: Slice) -> dict[str, Any]:
    """The figures of the step per device, its time, and how that grows from one host to all."""
    check_batch(config.train.batch, machine.count, config.parallel.accumulate)
    if machine.is_tpu:
        found = ahead.compile_for(config, machine.topology, cache_folder() / "plan")
    else:
        found = arithmetic.estimate(config, machine.count)
        limit = (machine.chip.memory - RESERVED) * GIB
        found |= {"fits": found["memory"]["peak"] <= limit, "need": found["memory"]["peak"], "limit": limit}
    found["batch_per_device"] = config.train.batch // machine.count
    if "flops" in found:
        found["scaling"] = [_at(config, machine, found, chips_used) for chips_used in _numbers(machine)]
    return found


def _numbers(machine: Slice) -> list[int]:
    """One chip, one host, twice as many hosts, and so on to the whole."""
    numbers, count = [1], min(machine.chip.per_host, machine.count)
    while count < machine.count:
        numbers.append(count)
        count *= 2
    return sorted({*numbers, machine.count})


def _at(config: Config, machine: Slice, found: dict[str, Any], count: int) -> dict[str, Any]:
    """Time and speed on `count` chips with the same images per device."""
    reduced = sum(entry["bytes"] for entry in found["collectives"].values())
    number = sum(entry["count"] for entry in found["collectives"].values())
    time = chips.roofline(machine.chip, config.train.precision, found["flops"], found["bytes"], reduced, number, count)
    images = count * found["batch_per_device"] / time.step
    hosts = -(-count // machine.chip.per_host)
    share = (max(time.compute, time.memory)) / time.step
    return {
        "chips": count,
        "hosts": hosts,
        **dataclasses.asdict(time),
        "step": time.step,
        "images_per_s": images,
        "efficiency": share,
    }


def best_fit(config: Config, machine: Slice) -> Config:
    """The fastest of the config's variants that fits: images per device, crop and remat, by pixels per second.

    Arithmetic makes the short list; on a TPU XLA has the last word.
    """
    rows, grid = [], max(16, architecture.grid(config.generator))
    crops = {config.data.crop, 2 * config.data.crop, max(64, config.data.crop // 2 // grid * grid)}
    for crop in sorted(crop for crop in crops if crop % grid == 0):
        for remat in ("none", "norms", "full"):
            rows += _largest(_variant(config, crop, 1, remat, machine), machine)
    if not rows:
        raise Refused(
            f"--fit: not even one image of crop {config.data.crop} with --parallel.remat full fits a {machine.chip.name}"
        )
    rows.sort(key=lambda row: -row[0])
    print("pixels/s   crop  images per device  remat   (by arithmetic)")
    for speed, variant in rows:
        images = variant.train.batch // machine.count
        print(f"{speed:8.2e}  {variant.data.crop:5} {images:18}  {variant.parallel.remat}")
    best: tuple[float, Config] | None = None
    for _, variant in rows[:SHORT_LIST]:
        speed, confirmed = _confirmed(variant, machine)
        if confirmed is not None and (best is None or speed > best[0]):
            best = speed, confirmed
    if best is None:
        raise Refused("--fit: none of the short list fits; plan a smaller crop")
    return best[1]


def _variant(config: Config, crop: int, images: int, remat: Any, machine: Slice) -> Config:
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, crop=crop, resize=0),
        train=dataclasses.replace(config.train, batch=images * machine.count),
        parallel=dataclasses.replace(config.parallel, remat=remat, accumulate=1),
    )


def _largest(config: Config, machine: Slice) -> list[tuple[float, Config]]:
    """The largest power of two of images per device that fits by arithmetic, with its speed; nothing when not even one does."""
    found: list[tuple[float, Config]] = []
    one = arithmetic.estimate(config, machine.count)
    limit, fixed = (machine.chip.memory - RESERVED) * GIB, one["memory"]["argument"]
    images = 1
    while fixed + (one["memory"]["peak"] - fixed) * images <= limit:
        variant = _variant(config, config.data.crop, images, config.parallel.remat, machine)
        figures = one | {"flops": one["flops"] * images, "bytes": one["bytes"] * images, "batch_per_device": images}
        speed = _at(variant, machine, figures, machine.count)["images_per_s"] * config.data.crop**2
        found, images = [(speed, variant)], images * 2
    return found


def _confirmed(config: Config, machine: Slice) -> tuple[float, Config | None]:
    """What XLA says of a candidate; half the images where it does not fit."""
    images = config.train.batch // machine.count
    while images:
        config = _variant(config, config.data.crop, images, config.parallel.remat, machine)
        found = analyse(config, machine)
        if found["fits"]:
            return found["scaling"][-1]["images_per_s"] * config.data.crop**2, config
        images //= 2
    return 0.0, None


def report(config: Config, machine: Slice, found: dict[str, Any]) -> str:
    """What `plan` prints."""
    source = "XLA's analysis of the compiled step" if machine.is_tpu else "arithmetic on the traced step; no GPU was asked"
    lines = [
        f"{config.generator.network} on {machine.topology}: {machine.count} chip(s), {machine.hosts} host(s); "
        f"{found['batch_per_device']} image(s) of {config.data.crop}² per device, {config.train.precision}, "
        f"remat {config.parallel.remat}, accumulate {config.parallel.accumulate}",
        f"per device, from {source}:",
    ]
    if not found["fits"]:
        need, limit = found["need"] / GIB, found["limit"] / GIB
        lines.append(f"  DOES NOT FIT: needs {need:.2f} GiB, has {limit:.2f} GiB. {_advice(config, found['batch_per_device'])}")
    if "memory" in found:
        memory = {name: size / GIB for name, size in found["memory"].items()}
        lines.append(
            f"  memory   {memory['peak']:.2f} GiB at the peak of the chip's {machine.chip.memory:.0f}: state and batch "
            f"{memory['argument']:.2f}, temporaries {memory['temp']:.2f} when laid out"
        )
        lines.append(f"  compute  {found['flops'] / 1e12:.3f} TFLOP, {found['bytes'] / 1e9:.1f} GB through memory")
        moved = [f"{entry['count']} {kind}, {entry['bytes'] / 1e6:.1f} MB" for kind, entry in found["collectives"].items()]
        lines.append(f"  network  {'; '.join(moved) or 'nothing: one chip'}")
        lines += _table(config, found)
    if machine.is_tpu:
        lines.append(
            f"compiled in {found['compile_seconds']:.0f} s" + (" by an earlier plan (cached)" if found["cached"] else "")
        )
    return "\n".join(lines)


def _table(config: Config, found: dict[str, Any]) -> list[str]:
    lines = ["predicted at the roofline, with the same images per device (a bound: real steps take longer):"]
    lines.append("   chips  hosts   step ms   images/s  efficiency  bound by")
    for row in found["scaling"]:
        parts = {"computing": row["compute"], "memory": row["memory"], "network": row["communication"]}
        lines.append(
            f"  {row['chips']:6} {row['hosts']:6} {1e3 * row['step']:9.2f} {row['images_per_s']:10.1f} "
            f"{row['efficiency']:11.1%}  {max(parts, key=lambda name: parts[name])}"
        )
    return lines


def _advice(config: Config, images: int) -> str:
    """What to change, the cheapest first."""
    options = []
    if config.parallel.remat != "full":
        options.append("--parallel.remat full")
    if config.train.precision == "float32":
        options.append("--train.precision bfloat16")
    if images > 1:
        options.append(f"--parallel.accumulate {images}, or a smaller --train.batch")
    options.append(f"--data.crop {max(64, config.data.crop // 2)}")
    return "Try " + "; ".join(options) + "; or --fit"
