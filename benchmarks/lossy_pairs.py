"""How well the edit is found in pairs that were saved with losses: precision and recall over pixels, for each way of saving.

    python benchmarks/lossy_pairs.py --faces PORTRAITS --out runs/lossy

It draws blemishes on the portraits, or pastes skin over them (`--edits patches`), and saves each pair in several ways. For
each way OUT/CASE gets the folders source and target, and lossless_source and lossless_target with the same pairs as PNG.
"""

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from autoretouch_jax.config import BlemishConfig
from autoretouch_jax.data.blemishes import add_blemishes
from autoretouch_jax.data.edits import codec_of, read_pair
from autoretouch_jax.data.images import list_images, read_rgb
from autoretouch_jax.runtime.tables import text_table

SIDE = 1024
BLEMISHES = BlemishConfig(per_megapixel=(100.0, 400.0), radius=(1.5, 9.0), patch=(4.0, 12.0), clean_share=0.0)
PATCHES, OFFSET = 25, 30  # patches of skin, and how far away they are taken from, in pixels
# The source's quality (0: lossless) and the target's quality and subsampling, as Pillow counts it: 0 is 4:4:4, 2 is 4:2:0.
CASES = {
    "camera 92, then 95 4:4:4": (92, 95, 0),
    "95, then 95": (95, 95, 2),
    "PNG, then 95": (0, 95, 2),
    "PNG, then 85": (0, 85, 2),
}


def with_blemishes(rng: np.random.Generator, photo: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns source and target: the target is the photograph, the source has blemishes."""
    return add_blemishes(rng, photo, BLEMISHES), photo


def with_patches(rng: np.random.Generator, photo: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns source and target: the target has discs of skin from nearby pasted over it, with borders two pixels wide."""
    height, width = photo.shape[:2]
    rows, columns = np.mgrid[:height, :width]
    target = photo.astype(np.float32)
    for _ in range(PATCHES):
        row, column = rng.integers(height // 4, 3 * height // 4), rng.integers(width // 4, 3 * width // 4)
        alpha = np.clip((rng.uniform(5, 22) - np.hypot(rows - row, columns - column)) / 2 + 0.5, 0, 1)[..., None]
        target += (np.roll(photo, rng.integers(-OFFSET, OFFSET, 2), (0, 1)) - target) * alpha
    return photo, np.rint(target).astype(np.uint8)


def save(folder: Path, name: str, image: np.ndarray, quality: int, subsampling: int = 2) -> Path:
    """Saves a PNG, or with a quality a JPEG, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.{'jpg' if quality else 'png'}"
    options = {"quality": quality, "subsampling": subsampling} if quality else {}
    Image.fromarray(image).save(path, **options)
    return path


def measure(folder: Path, name: str, pair: tuple[np.ndarray, np.ndarray], case: tuple[int, int, int]) -> list[float]:
    """Saves a pair, and returns the true edit's share, precision, recall, and the measured threshold in levels."""
    source_quality, quality, subsampling = case
    edit = pair[1].astype(np.int16) - pair[0]
    source_path = save(folder / "source", name, pair[0], source_quality)
    source = read_rgb(source_path)
    # The retoucher edits what the camera has saved.
    target = np.clip(source + edit, 0, 255).astype(np.uint8)
    target_path = save(folder / "target", name, target, quality, subsampling)
    save(folder / "lossless_source", name, source, 0)
    save(folder / "lossless_target", name, target, 0)
    true, found = (source != target).any(-1), np.not_equal(*read_pair(source_path, target_path)).any(-1)
    both = float((true & found).sum())
    codec = codec_of(target_path)
    assert codec  # every case saves the target as a JPEG
    return [float(true.mean()), both / max(1, found.sum()), both / max(1, true.sum()), codec.threshold]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=Path, required=True, help="a folder of portraits")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--edits", choices=("blemishes", "patches"), default="blemishes")
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--side", type=int, default=SIDE, help="the portraits are resized to this side, in pixels")
    options = parser.parse_args()
    draw = with_blemishes if options.edits == "blemishes" else with_patches
    figures: dict[str, list[list[float]]] = {case: [] for case in CASES}
    paths = list_images(options.faces)[: options.images]
    for number, path in enumerate(tqdm(paths, disable=None)):
        photo = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
        # Resizing removes the squares of the portrait's own JPEG.
        pixels = np.asarray(photo.resize((options.side, options.side), Image.Resampling.LANCZOS))
        pair = draw(np.random.default_rng(number), pixels)
        for case, saving in CASES.items():
            folder = options.out / case.translate(str.maketrans(" :", "__", ","))
            figures[case].append(measure(folder, path.stem, pair, saving))
    rows = [
        [
            case,
            *(
                form.format(value)
                for form, value in zip(("{:.1%}", "{:.3f}", "{:.3f}", "{:.2f}"), np.mean(values, 0), strict=True)
            ),
        ]
        for case, values in figures.items()
    ]
    print(text_table(["saved as", "true edit", "precision", "recall", "threshold"], rows))


if __name__ == "__main__":
    main()
