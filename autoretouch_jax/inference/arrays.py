"""Arrays and Pillow images that a program gives, as photographs; and the new pixels of these in the form that was given.

An array is `[H, W]` or `[H, W, C]` with one channel (grey), two (grey and alpha), three (RGB) or four (RGB and alpha), uint8,
uint16 or float in [0, 1], and is taken for sRGB.
"""

import numpy as np
from PIL import Image

from autoretouch_jax.data.colour import in_mode
from autoretouch_jax.data.images import orientation_of
from autoretouch_jax.data.spaces import Space
from autoretouch_jax.errors import BadInput
from autoretouch_jax.inference.photo import Photo

DEEPEST = 65535  # floats are retouched as 16-bit levels
TYPES = ("uint8", "uint16", "float16", "float32", "float64")
# Pillow's modes that can be retouched, and the kind of their colours. A palette becomes RGB: it may lack the new colours.
MODES = {"RGB": "RGB", "RGBA": "RGB", "L": "L", "LA": "L", "I;16": "L", "CMYK": "CMYK"}
WANTED = "give uint8, uint16, or float in [0, 1], [height, width] or [height, width, channels] with 1 to 4 channels"


def photo_of_array(array: np.ndarray) -> Photo:
    """Returns an array as a photograph. Raises BadInput for an array of any other kind."""
    if array.dtype.name not in TYPES or array.ndim not in (2, 3) or 0 in array.shape or array.shape[2:] > (4,):
        raise BadInput(f"the image is {array.dtype} {list(array.shape)}; {WANTED}")
    pixels = array.reshape(*array.shape[:2], -1)
    if array.dtype.kind == "f":
        # NaN is neither. Levels of 255 in an array of floats would be seen as white, and come back unchanged.
        if not ((array >= 0) & (array <= 1)).all():
            raise BadInput("the image has values outside [0, 1]; divide levels of 255 by 255, and clip what is above white")
        pixels = np.rint(pixels.astype(np.float32) * DEEPEST).astype(np.uint16)
    return Photo(pixels, "", Space("L" if pixels.shape[2] <= 2 else "RGB"))


def array_of(photo: Photo, pixels: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Returns a photograph's new pixels in the type and shape of the array that it was made of."""
    if given.dtype.kind != "f":
        return pixels.reshape(given.shape)
    # The steps are added, so that an array keeps all of its digits: zero where a pixel was left alone.
    steps = (pixels.astype(np.float64) - photo.pixels).reshape(given.shape) / DEEPEST
    return np.clip(given + steps, 0, 1).astype(given.dtype)


def photo_of_picture(image: Image.Image) -> tuple[Photo, Image.Image]:
    """Returns a Pillow image as a photograph, and the image in the mode that it will have. Raises BadInput for other modes."""
    if image.mode == "P":
        image = in_mode(image, "RGBA" if "transparency" in image.info else "RGB")
    if image.mode not in MODES:
        raise BadInput(f"the image has {image.mode} pixels; convert it to RGB, or give the path of its file")
    pixels = np.asarray(image)
    space = Space(MODES[image.mode], image.info.get("icc_profile") or b"")
    return Photo(pixels.reshape(*pixels.shape[:2], -1), "", space, orientation=orientation_of(image)), image


def picture_of(pixels: np.ndarray, given: Image.Image) -> Image.Image:
    """Returns a photograph's new pixels as a Pillow image with the mode and `info` of the one that it was made of."""
    result = Image.frombytes(given.mode, given.size, np.ascontiguousarray(pixels).tobytes())
    result.info = dict(given.info)
    return result
