"""Retouches a photograph with an exported ONNX file. Needs onnxruntime, numpy and Pillow, and nothing of this project.

The whole photograph:  python retouch_onnx.py retouch.onnx PHOTO.jpg OUT.png

A face, at the size that the model was trained at:  python retouch_onnx.py retouch.onnx PHOTO.jpg OUT.png --face X Y SIZE

X and Y are the face's centre, SIZE is from brows to chin, in pixels of the upright photograph. Any detector of faces will do.
"""

import argparse
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

# As in `autoretouch retouch`, so that this gives the same result. The part of a photograph that belongs to a face is an ellipse
# around its centre, in units of its size. The edit fades out over a share of the ellipse's radius.
WINDOW_CENTRE, WINDOW_HALF_HEIGHT, WINDOW_HALF_WIDTH, WINDOW_FADE = 0.12, 1.1, 0.8, 0.15
CLOSE_ENOUGH = 1.3  # a face whose size is within this factor of the trained one is not resized


def retouch_whole(session, image):
    """uint8 [height, width, 3] → the same, retouched. What the model leaves alone comes back exactly."""
    return session.run(["retouched"], {"image": image[None]})[0][0]


def retouch_face(session, image, x, y, size):
    """uint8 [height, width, 3] and a face → the same size, with that face retouched."""
    about = {key: as_number(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    if not about["face_size"]:
        raise SystemExit("this model was trained without faces: leave out --face")
    factor = about["face_size"] / size
    if 1 / CLOSE_ENOUGH < factor < CLOSE_ENOUGH:
        factor = 1.0
    rows, columns, window = face_window(image, x, y, size)
    # The network sees beyond the window as far as its radius reaches.
    margin = int((about["receptive_radius"] or 0) / factor) + 1
    top, left = max(0, rows.start - margin), max(0, columns.start - margin)
    seen = image[top : rows.stop + margin, left : columns.stop + margin]
    height, width = seen.shape[:2]
    small = seen if factor == 1 else resized(seen, (round(width * factor), round(height * factor)))
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, {"image": small[None]}), strict=True))
    change = outputs["ungated"][0].astype(np.float32) - small
    mask = outputs["mask"][0] if "mask" in outputs else np.ones(small.shape[:2], np.float32)
    # The change is resized to the photograph, and not the output: what is left alone keeps all of its detail.
    across, down = small.shape[1] / width, small.shape[0] / height
    box = (columns.start - left) * across, (rows.start - top) * down, (columns.stop - left) * across, (rows.stop - top) * down
    box = (*box[:2], min(box[2], small.shape[1]), min(box[3], small.shape[0]))
    size = (columns.stop - columns.start, rows.stop - rows.start)
    change = np.stack([resized(change[..., channel], size, box) for channel in range(3)], -1)
    change = np.rint(window[..., None] * change).astype(int)
    applied = (np.abs(change).max(-1) > about["dead_zone"]) & (resized(mask, size, box) >= about["gate_on_faces"])
    result = image.copy()
    result[rows, columns] = np.clip(image[rows, columns] + change * applied[..., None], 0, 255)
    return result


def face_window(image, x, y, size):
    """Returns the rows and columns that belong to a face, and how far each of their pixels does, from 0 to 1."""
    y, up, across = y + WINDOW_CENTRE * size, WINDOW_HALF_HEIGHT * size, WINDOW_HALF_WIDTH * size
    rows = slice(max(0, int(y - up)), min(image.shape[0], int(y + up + 1)))
    columns = slice(max(0, int(x - across)), min(image.shape[1], int(x + across + 1)))
    vertical = (np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - y) / up
    horizontal = (np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] - x) / across
    return rows, columns, np.clip((1 - np.hypot(vertical, horizontal)) / WINDOW_FADE, 0, 1)


def resized(values, size, box=None):
    """uint8 [h, w, 3] or float32 [h, w], or a box of it, at (width, height)."""
    return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BICUBIC, box, reducing_gap=3.0))


def as_number(text):
    """The metadata are texts. Numbers among them are JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("photo")
    parser.add_argument("out")
    parser.add_argument("--face", nargs=3, type=float, metavar=("X", "Y", "SIZE"))
    arguments = parser.parse_args()
    session = onnxruntime.InferenceSession(arguments.model, providers=["CPUExecutionProvider"])
    image = np.asarray(ImageOps.exif_transpose(Image.open(arguments.photo)).convert("RGB"))
    result = retouch_face(session, image, *arguments.face) if arguments.face else retouch_whole(session, image)
    Image.fromarray(result).save(arguments.out)
    print(f"{arguments.out}: {100 * (result != image).any(-1).mean():.1f} % of the pixels changed")


if __name__ == "__main__":
    main()
