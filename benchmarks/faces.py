"""Compares detectors of faces: turned, small, dark, partly hidden and several faces, and photographs without any.

    pip install 'opencv-python-headless<5'
    python benchmarks/faces.py --faces PORTRAITS --photos PHOTOS

PORTRAITS show one face each, PHOTOS none. A row gives, for each detector, the share of the faces that it finds, and how many
boxes it finds too many. OpenCV is needed for the two Haar cascades, and left out where it is missing.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data as skimage_data
from skimage.feature import Cascade

from autoretouch_jax.data.face_parts import find_living_faces
from autoretouch_jax.data.images import list_images, read_rgb
from autoretouch_jax.runtime.tables import text_table

Detector = Callable[[np.ndarray], int]  # an image -> the number of faces found


def detectors() -> dict[str, Detector]:
    """Returns the detectors that are installed."""
    lbp = Cascade(skimage_data.lbp_frontal_face_cascade_filename())

    def local_patterns(image: np.ndarray) -> int:
        side = min(image.shape[:2])
        return len(lbp.detect_multi_scale(image, scale_factor=1.2, step_ratio=1, min_size=(60, 60), max_size=(side, side)))

    tools: dict[str, Detector] = {
        "ours (dlib)": lambda image: len(find_living_faces(image)),
        "LBP (scikit-image)": local_patterns,
    }
    try:
        import cv2
    except ImportError:
        return tools
    for name in ("alt2", "default"):
        cascade = cv2.CascadeClassifier(f"{cv2.data.haarcascades}haarcascade_frontalface_{name}.xml")

        def haar(image: np.ndarray, cascade=cascade) -> int:
            return len(cascade.detectMultiScale(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), 1.1, 5, minSize=(48, 48)))

        tools[f"Haar {name} (OpenCV)"] = haar
    return tools


def conditions(rng: np.random.Generator) -> dict[str, Callable[[Image.Image], Image.Image]]:
    """Returns what is done to a portrait, by name."""

    def dark(gain: float) -> Callable[[Image.Image], Image.Image]:
        def change(image: Image.Image) -> Image.Image:
            levels = 255 * gain * (np.asarray(image) / 255.0) ** 1.3
            return Image.fromarray(np.clip(levels + rng.normal(0, 3, levels.shape), 0, 255).astype(np.uint8))

        return change

    def hidden(left: float, top: float, right: float, bottom: float) -> Callable[[Image.Image], Image.Image]:
        def change(image: Image.Image) -> Image.Image:
            width, height = image.size
            covered = image.copy()
            covered.paste((60, 60, 80), (int(left * width), int(top * height), int(right * width), int(bottom * height)))
            return covered

        return change

    def four(image: Image.Image) -> Image.Image:
        half = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
        sheet = Image.new("RGB", (2 * half.width, 2 * half.height))
        for i in range(4):
            sheet.paste(half, (i % 2 * half.width, i // 2 * half.height))
        return sheet

    smaller = lambda factor: lambda im: im.resize((int(im.width * factor), int(im.height * factor)), Image.Resampling.LANCZOS)  # noqa: E731
    turned = lambda angle: lambda im: im.rotate(angle, Image.Resampling.BICUBIC, fillcolor=(90, 90, 90))  # noqa: E731
    return {
        "as it is": lambda image: image,
        **{f"turned by {angle} degrees": turned(angle) for angle in (15, 30, 45)},
        **{f"x {factor}": smaller(factor) for factor in (0.33, 0.25, 0.2)},
        "a quarter of the light": dark(0.25),
        "a tenth of the light": dark(0.1),
        "mouth hidden": hidden(0.2, 0.6, 0.8, 0.95),
        "a third hidden": hidden(0.2, 0.2, 0.42, 1),
        "narrow, as in a turned head": lambda image: image.resize((int(0.7 * image.width), image.height)),
        "four in one": four,
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--every", type=int, default=4, help="take every n-th portrait")
    options = parser.parse_args()
    portraits = [Image.fromarray(read_rgb(path)) for path in list_images(options.faces)[:: options.every]]
    tools = detectors()
    rows = []
    for name, change in conditions(np.random.default_rng(0)).items():
        wanted = 4 if name == "four in one" else 1
        counts = {tool: [detect(np.asarray(change(image))) for image in portraits] for tool, detect in tools.items()}
        rows.append(
            [
                name,
                *(
                    f"{np.mean([min(n, wanted) / wanted for n in c]):.2f} + {sum(max(0, n - wanted) for n in c)}"
                    for c in counts.values()
                ),
            ]
        )
    photos = [read_rgb(path) for path in list_images(options.photos)]
    rows.append(
        [f"{len(photos)} photographs without", *(str(sum(detect(photo) for photo in photos)) for detect in tools.values())]
    )
    print(text_table([f"{len(portraits)} portraits", *tools], rows))


if __name__ == "__main__":
    main()
