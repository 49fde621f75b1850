"""`autoretouch bench`: measures the speed of reading data on this machine, beside a baseline measured in the same run."""

import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from autoretouch_jax.config import BlemishConfig, Config, DataConfig, ParallelConfig
from autoretouch_jax.data import pipeline, prepare
from autoretouch_jax.data.blemishes import add_blemishes
from autoretouch_jax.data.folders import checked_pairs
from autoretouch_jax.data.records import RecordSource
from autoretouch_jax.demo import faces
from autoretouch_jax.errors import EXIT_DONE, BadInput
from autoretouch_jax.runtime import storage
from autoretouch_jax.runtime.cores import cores
from autoretouch_jax.runtime.memory import keep_freed_memory
from autoretouch_jax.runtime.tables import text_table

SIDE = 1024  # of the drawn faces, in pixels
CROPS = (256, 512, None)  # sides in pixels; None is the whole image
ROUNDS = 6  # the baseline and the records take turns, so that a slow minute slows both

Reader = Callable[[np.random.Generator, int | None], None]


def data(source: Path | None, target: Path | None, pairs: int, seconds: float, out: Path | None) -> int:
    """Prints the table of `autoretouch bench data`, and writes its figures where `out` is given."""
    with tempfile.TemporaryDirectory(prefix="autoretouch-bench-") as scratch:
        home = Path(scratch)
        if source is None or target is None:
            source, target = _draw(home / "drawn", pairs)
        png = _as_png(source, target, home / "png", pairs)
        prepare.run(checked_pairs(*png)[0], home / "records", 0, "fail", None)
        result = _measure(png, home / "records", seconds)
    print(_table(result))
    if out:
        storage.write_output(out, json.dumps(result, indent=2) + "\n")
    return EXIT_DONE


def _draw(home: Path, count: int) -> tuple[Path, Path]:
    """Draws faces with sensor noise, blemished and clean, and returns their folders."""
    blemishes = BlemishConfig(per_megapixel=(100.0, 300.0), clean_share=0.0)
    for name in ("source", "target"):
        (home / name).mkdir(parents=True)
    for seed in tqdm(range(count), desc="drawing faces", unit="pair", disable=None):
        rng = np.random.default_rng(seed)
        face = faces.draw_face(seed, SIDE)
        clean = np.clip(face + np.rint(rng.normal(0, 1.5, face.shape)), 0, 255).astype(np.uint8)
        Image.fromarray(clean).save(home / "target" / f"{seed:03d}.bmp")
        Image.fromarray(add_blemishes(rng, clean, blemishes)).save(home / "source" / f"{seed:03d}.bmp")
    return home / "source", home / "target"


def _as_png(source: Path, target: Path, home: Path, count: int) -> tuple[Path, Path]:
    """Writes the pairs as PNG with Pillow's defaults, for the baseline to read and for the comparison of sizes."""
    files, _ = checked_pairs(source, target)
    for index in range(min(count, len(files.names))):
        for name, image in zip(("source", "target"), files.read(index), strict=True):
            (home / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(home / name / f"{index:04d}.png")
    return home / "source", home / "target"


def _measure(png: tuple[Path, Path], records: Path, seconds: float) -> dict:
    files, _ = checked_pairs(*png)
    readers = {"png": _png_reader(files.sources, files.targets), "records": _record_reader(RecordSource(records))}
    rows = []
    smallest = min(min(size) for size in files.sizes)
    for crop in [crop for crop in CROPS if crop is None or crop <= smallest]:
        speeds: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(ROUNDS):
            for name, read in readers.items():
                speeds[name].append(_speed(read, crop, seconds / ROUNDS))
        medians = {name: statistics.median(values) for name, values in speeds.items()}
        rows.append({"crop": crop, **medians, "ratio": medians["records"] / medians["png"]})
    keep_freed_memory()  # as training does
    counts = [2**power for power in range(cores().bit_length())]
    crop = min(256, smallest // 16 * 16)
    threads = {str(count): _pipeline_speed(records, crop, seconds, count, 0) for count in counts}
    processes = {}
    for count in counts[1:]:
        try:
            processes[str(count)] = _pipeline_speed(records, crop, seconds, count, count)
        except BadInput as error:  # a small /dev/shm must not cost the other figures
            print(f"{count} processes were not measured: {error}", file=sys.stderr)
    before = sum(path.stat().st_size for path in files.sources + files.targets)
    after = sum(path.stat().st_size for path in records.iterdir())
    return {
        "pairs": len(files.names),
        "sizes": sorted({f"{width}x{height}" for height, width in files.sizes}),
        "pairs_per_s_per_core": rows,
        "pipeline_pairs_per_s_by_threads": threads,
        "pipeline_pairs_per_s_by_processes": processes,
        "bytes": {"png": before, "records": after, "ratio": after / before},
    }


def _png_reader(sources: list[Path], targets: list[Path]) -> Reader:
    """Returns the baseline: it decodes both PNGs and cuts them. The files are in memory, so that no disk is measured."""
    memory = [(source.read_bytes(), target.read_bytes()) for source, target in zip(sources, targets, strict=True)]

    def read(rng: np.random.Generator, crop: int | None) -> None:
        pair = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in memory[rng.integers(len(memory))]]
        if crop:
            top, left = (int(rng.integers(size - crop + 1)) for size in pair[0].shape[:2])
            _ = [np.ascontiguousarray(image[top : top + crop, left : left + crop]) for image in pair]

    return read


def _record_reader(source: RecordSource) -> Reader:
    def read(rng: np.random.Generator, crop: int | None) -> None:
        pair = source[int(rng.integers(len(source)))]
        if crop is None:
            pair.cut((0, 0, pair.height, pair.width))
        else:
            top, left = int(rng.integers(pair.height - crop + 1)), int(rng.integers(pair.width - crop + 1))
            pair.cut((top, left, crop, crop))

    return read


def _speed(read: Reader, crop: int | None, seconds: float) -> float:
    """Returns pairs per second of one thread, after a warm-up."""
    rng = np.random.default_rng(0)
    read(rng, crop)
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or count < 3:
        read(rng, crop)
        count += 1
    return count / elapsed


def _pipeline_speed(records: Path, crop: int, seconds: float, threads: int, processes: int) -> float:
    """Returns pairs per second of the training pipeline: crops around edits, flips, batches of 8."""
    workers = ParallelConfig(input_threads=threads, input_processes=processes)
    config = Config(data=DataConfig(records=str(records), crop=crop, edit_crops=0.7), parallel=workers)
    stream = pipeline.batches(RecordSource(records), config, 0)
    for _ in range(8 * threads):
        next(stream)
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        count += len(next(stream)["weight"])
    return count / elapsed


def _table(result: dict) -> str:
    lines = [f"{result['pairs']} pairs of {', '.join(result['sizes'])}; pairs per second of one core, from memory; medians"]
    rows = []
    for row in result["pairs_per_s_per_core"]:
        name = f"crop {row['crop']}" if row["crop"] else "whole"
        rows.append([name, f"{row['png']:.1f}", f"{row['records']:.1f}", f"{row['ratio']:.1f}x"])
    sizes = result["bytes"]
    rows.append(["MB", f"{sizes['png'] / 1e6:.1f}", f"{sizes['records'] / 1e6:.1f}", f"{sizes['ratio']:.2f}x"])
    lines.append(text_table(["", "PNG, Pillow", "records", "ratio"], rows))
    lines.append("training pipeline, crop 256 or less, edit crops 0.7, pairs per second")
    for workers in ("threads", "processes"):
        speeds = ", ".join(f"{count}: {speed:.0f}" for count, speed in result[f"pipeline_pairs_per_s_by_{workers}"].items())
        lines.append(f"  by {workers}: {speeds or 'not measured'}")
    return "\n".join(lines)
