"""The demo's pictures: faces that the program draws, and freely licensed photographs that ship with installed packages.

A drawn face is no portrait, but it has what a retoucher must tell from blemishes: shaded skin with pores, eyes, lashes,
brows, nostrils, lips, hair over skin, cloth, and a background. Everything is a function of the seed. Images are uint8
`[H, W, 3]`.
"""

import matplotlib.cbook
import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from skimage import data as skimage_data

SIDE = 384  # of a drawn face, in pixels
SKIN_LIGHT, SKIN_DARK = np.array([238.0, 200.0, 178.0]), np.array([78.0, 50.0, 38.0])
PORTRAIT_BOX = (130, 0, 354, 224)  # left, top, right, bottom of the face in the portrait
PORTRAIT_CREDIT = "Eileen Collins, NASA, public domain (scikit-image's `astronaut`)"


# ---- photographs ------------------------------------------------------------------------------------------------------------
#
def training_photos() -> list[np.ndarray]:
    """Returns real skin, eyes, hair and fur to learn from: matplotlib's Grace Hopper and scikit-image's cat.

    The photo of Grace Hopper is the United States Navy's, in the public domain. That of Chelsea the cat is CC0.
    """
    path = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    return [np.asarray(Image.open(str(path)).convert("RGB")), skimage_data.chelsea()]


def restyled(photo: np.ndarray, seed: int) -> np.ndarray:
    """Returns the photo rotated, stretched and cropped, with other colours, as in another light or of another complexion."""
    # The drawn faces use the same seeds, so this stream of random numbers gets a second key.
    rng = np.random.default_rng([seed, 1])
    height, width = photo.shape[:2]
    angle, stretch, shear = rng.uniform(-0.35, 0.35), np.exp(rng.normal(0, 0.12)), rng.normal(0, 0.12)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[stretch, shear], [0, 1 / stretch]]) * rng.uniform(0.55, 0.8)
    centre = np.array([width, height]) / 2
    offset = centre + rng.uniform(-0.1, 0.1, 2) * (width, height) - matrix @ centre
    affine = (*matrix[0], offset[0], *matrix[1], offset[1])
    turned = Image.fromarray(photo).transform((width, height), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    # Gamma, saturation, white balance and exposure.
    x = (np.asarray(turned) / 255.0) ** np.exp(rng.uniform(-0.45, 0.45))
    grey = x.mean(-1, keepdims=True)
    x = (grey + rng.uniform(0.5, 1.25) * (x - grey)) * rng.uniform(0.85, 1.1, 3) * rng.uniform(0.65, 1.05)
    return np.clip(np.rint(x * 255), 0, 255).astype(np.uint8)


def portrait() -> np.ndarray:
    """Returns the head of scikit-image's `astronaut`, at twice its size: a real face to try the demo on."""
    left, top, right, bottom = PORTRAIT_BOX
    # Enlarged, because the blemishes are drawn for larger faces.
    head = Image.fromarray(skimage_data.astronaut()[top:bottom, left:right])
    return np.asarray(head.resize((head.width * 2, head.height * 2), Image.Resampling.LANCZOS))


# ---- drawn faces ------------------------------------------------------------------------------------------------------------
#
def draw_face(seed: int, side: int = SIDE) -> np.ndarray:
    """Returns a face of random complexion, light, hair and expression, `uint8[side, side, 3]`."""
    rng = np.random.default_rng([seed, side])
    grid = np.linspace(0, 1, side, dtype=np.float32)
    y, x = grid[:, None], grid[None, :]
    tone = rng.random() ** 1.3
    # A complexion between the lightest and the darkest, with a small random change of hue.
    skin = SKIN_LIGHT + tone * (SKIN_DARK - SKIN_LIGHT) + rng.normal(0, 7, 3)
    hair = rng.uniform(15, 70) * np.array([1.2, 1.0, 0.85]) * (3.0 if rng.random() < 0.2 else 1.0)
    centre, half = (0.5 + rng.normal(0, 0.02), 0.52 + rng.normal(0, 0.02)), (rng.uniform(0.24, 0.3), rng.uniform(0.33, 0.39))

    # Painted from the back to the front: hair, clothes, neck, face, features, fringe.
    image = _background(rng, side, y, x)
    _strands(rng, image, centre, half, hair, 1.22, 900)
    _blend(image, _ellipse(y, x, (centre[0], 1.12), (0.42, 0.22)), rng.uniform(20, 220, 3) * _texture(rng, side, 0.05))
    _blend(image, _ellipse(y, x, (centre[0], 0.9), (0.13, 0.22)), skin * 0.85)
    face = _ellipse(y, x, centre, half)
    _blend(image, face, _shaded_skin(rng, side, y, x, skin, centre))
    _features(rng, image, skin, hair, centre, half)
    _strands(rng, image, (centre[0], centre[1] - 0.03), half, hair, 1.06, 350, fringe=True)
    image += rng.normal(0, rng.uniform(0.3, 2.2), image.shape)  # the noise of a sensor
    # A little blur after the noise, as cameras remove noise.
    picture = Image.fromarray(np.clip(np.rint(image), 0, 255).astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7))))


def _ellipse(y, x, centre, half, soft: float = 0.006) -> np.ndarray:
    """Coverage in [0, 1] of an ellipse with a soft edge. The unit is the image's side."""
    distance = np.sqrt(((x - centre[0]) / half[0]) ** 2 + ((y - centre[1]) / half[1]) ** 2)
    return np.clip((1 - distance) * min(half) / soft + 0.5, 0, 1)


def _bump(y, x, cx: float, cy: float, sx: float, sy: float) -> np.ndarray:
    return np.exp(-0.5 * (((x - cx) / sx) ** 2 + ((y - cy) / sy) ** 2))


def _blend(image: np.ndarray, cover: np.ndarray, colour: np.ndarray) -> None:
    image += cover[..., None] * (colour - image)


def _noise(rng: np.random.Generator, side: int, cells: int) -> np.ndarray:
    """Smooth noise with features of side / cells pixels, about [-1, 1]."""
    coarse = Image.fromarray(rng.normal(0, 0.6, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))


def _texture(rng: np.random.Generator, side: int, amount: float) -> np.ndarray:
    """A factor around 1 with structure at several scales, `[side, side, 1]`."""
    # Structure from 64 pixels down to 3, as skin and cloth have.
    octaves = [_noise(rng, side, max(2, int(side / size))) * weight for size, weight in ((64, 1.0), (12, 0.5), (3, 0.6))]
    return 1 + amount * np.sum(octaves, 0)[..., None]


def _background(rng: np.random.Generator, side: int, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    # A gradient between two colours at a random angle.
    a, b = rng.uniform(20, 245, (2, 3))
    angle = rng.uniform(0, 6.3)
    ramp = (np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5) + 0.7) / 1.4
    return (a + ramp[..., None] * (b - a)) * _texture(rng, side, rng.uniform(0, 0.12))


def _shaded_skin(rng: np.random.Generator, side: int, y, x, skin: np.ndarray, centre) -> np.ndarray:
    """Draws skin with light from one side, flushed cheeks and nose, highlights, uneven tone and pores."""
    cx, cy = centre
    light = rng.uniform(-0.9, 0.9)
    shade = 1 + light * (x - cx) - rng.uniform(0, 0.5) * (y - cy) ** 2 * 4
    # Highlights on forehead, nose and cheeks.
    for dx, dy, sx, sy in ((0, -0.2, 0.1, 0.05), (0, 0.0, 0.02, 0.07), (0.11, 0.05, 0.05, 0.04), (-0.11, 0.05, 0.05, 0.04)):
        shade = shade + rng.uniform(0, 0.16) * _bump(y, x, cx + dx, cy + dy, sx, sy)
    shade = shade - rng.uniform(0.05, 0.2) * _bump(y, x, cx, cy + 0.16, 0.05, 0.012)
    colour = skin * shade[..., None] * _texture(rng, side, rng.uniform(0.01, 0.035))
    colour *= _folds(rng, side, centre)
    # Redness of cheeks and nose, which is no blemish and must stay.
    flush = np.sum([_bump(y, x, cx + dx, cy + dy, 0.06, 0.05) for dx, dy in ((-0.12, 0.09), (0.12, 0.09), (0, 0.08))], 0)
    colour += rng.uniform(0, 12) * flush[..., None] * np.array([0.6, -0.6, -0.5])
    # Dark pores are stronger than light ones.
    pores = rng.normal(0, 1, (side, side)).astype(np.float32)
    return colour + rng.uniform(1, 4) * (pores * (0.4 + 0.6 * (pores < -0.8)))[..., None]


def _folds(rng: np.random.Generator, side: int, centre) -> np.ndarray:
    """Random shadows and lights, like those of eye sockets, nose and wrinkles, as a factor `[side, side, 1]`."""
    factor = np.ones((side, side), np.float32)
    # Soft, medium and sharp: eye sockets, the folds beside the nose, wrinkles.
    for softness, count in ((0.04, 8), (0.015, 10), (0.005, 8)):
        layer = Image.new("L", (side, side), 128)
        draw = ImageDraw.Draw(layer)
        for _ in range(count):
            start = np.array(centre) + rng.normal(0, 0.14, 2)
            # A random walk whose direction changes slowly.
            headings = rng.uniform(0, 6.3) + rng.normal(0, 0.35) * np.arange(8)
            steps = rng.uniform(0.005, 0.02) * np.stack([np.cos(headings), np.sin(headings)], 1)
            line = [(float(x) * side, float(y) * side) for x, y in start + np.cumsum(steps, 0)]
            shade = int(np.clip(128 + rng.normal(-12, 30), 0, 255))
            draw.line(line, fill=shade, width=max(1, int(rng.uniform(0.6, 2.5) * softness * side)), joint="curve")
        blurred = layer.filter(ImageFilter.GaussianBlur(softness * side * rng.uniform(0.4, 1.0)))
        factor *= 1 + (np.asarray(blurred, np.float32) - 128) / 128 * rng.uniform(0.3, 0.8)
    return factor[..., None]


class _Pencil:
    """Draws ovals and strokes on a layer of twice the size, which is scaled down for smooth edges.

    Coordinates are fractions of the side.
    """

    SCALE = 2

    def __init__(self, side: int):
        self.side = side
        self._layer = Image.new("RGBA", (side * self.SCALE,) * 2)
        self._draw = ImageDraw.Draw(self._layer)

    def oval(self, x: float, y: float, rx: float, ry: float, colour, alpha: int = 255) -> None:
        box = np.array([x - rx, y - ry, x + rx, y + ry]) * self.side * self.SCALE
        self._draw.ellipse(box.tolist(), fill=self._fill(colour, alpha))

    def stroke(self, points, width: float, colour, alpha: int = 255) -> None:
        size = self.side * self.SCALE
        line = [(float(x) * size, float(y) * size) for x, y in points]
        self._draw.line(line, fill=self._fill(colour, alpha), width=max(1, round(width * size)), joint="curve")

    def onto(self, image: np.ndarray) -> None:
        soft = self._layer.filter(ImageFilter.GaussianBlur(self.SCALE * 0.5)).resize((self.side,) * 2, Image.Resampling.BOX)
        drawn = np.asarray(soft, np.float32)
        _blend(image, drawn[..., 3] / 255, drawn[..., :3])

    @staticmethod
    def _fill(colour, alpha: int) -> tuple[int, ...]:
        return (*(int(np.clip(c, 0, 255)) for c in colour), alpha)


def _features(rng: np.random.Generator, image: np.ndarray, skin, hair, centre, half) -> None:
    """Draws eyes, brows, nostrils and lips."""
    pencil, unit, (cx, cy) = _Pencil(image.shape[0]), half[0], centre
    # Both eyes share their colour.
    iris = rng.uniform(20, 140, 3)
    for sign in (-1, 1):
        _eye(rng, pencil, (cx + sign * 0.43 * unit, cy - 0.16 * unit), unit, sign, skin, hair, iris)
        pencil.oval(cx + sign * 0.13 * unit, cy + 0.33 * unit, 0.06 * unit, 0.03 * unit, skin * 0.35, 220)
    lips = skin * (0.95, 0.62, 0.62) + rng.uniform(-15, 15, 3)
    width, mouth = rng.uniform(0.34, 0.44) * unit, cy + 0.68 * unit
    pencil.oval(cx, mouth - 0.03 * unit, width * 0.9, 0.07 * unit, lips * 0.92)
    pencil.oval(cx, mouth + 0.06 * unit, width * 0.8, 0.09 * unit, lips)
    pencil.stroke([(cx - width, mouth), (cx, mouth + 0.02 * unit), (cx + width, mouth)], 0.025 * unit, lips * 0.45)
    pencil.onto(image)


def _eye(rng: np.random.Generator, pencil: _Pencil, centre, unit: float, sign: int, skin, hair, iris) -> None:
    """Draws one eye with lid, lashes and brow."""
    x, y = centre
    width, height = rng.uniform(0.19, 0.23) * unit, rng.uniform(0.08, 0.11) * unit
    pencil.oval(x, y - 0.3 * height, 1.3 * width, 1.6 * height, skin * 0.8, 90)
    pencil.oval(x, y, width, height, (232, 228, 224))
    pencil.oval(x, y, height, height, iris)
    pencil.oval(x, y, height * 0.45, height * 0.45, (12, 10, 10))
    pencil.oval(x + height * 0.3, y - height * 0.3, height * 0.16, height * 0.16, (250, 250, 250))
    t = np.linspace(0, np.pi, 16)
    lid = np.stack([x + width * np.cos(t), y - height * np.sin(t)], 1)
    pencil.stroke(lid, 0.03 * unit, skin * 0.3)
    # Lashes along the lid: thin dark lines that a retoucher must keep.
    for point in lid[1:-1]:
        pencil.stroke([point, point + (point - centre) * (0.15, 0.45)], 0.012 * unit, (20, 15, 12))
    # The brow, as single hairs.
    for _ in range(70):
        hx = x + rng.uniform(-1.2, 1.2) * width
        hy = y - 0.25 * unit - 0.25 * height * np.cos((hx - x) / width) + rng.normal(0, 0.018 * unit)
        tip = (hx + sign * 0.06 * unit, hy - rng.uniform(-0.01, 0.03) * unit)
        pencil.stroke([(hx, hy), tip], 0.014 * unit, hair, 190)


def _strands(rng: np.random.Generator, image, centre, half, hair, reach: float, count: int, fringe: bool = False) -> None:
    """Draws hair as single strands over the upper half of an ellipse around the face. A fringe falls onto the forehead."""
    side = image.shape[0]
    layer = Image.new("RGBA", (side, side))
    draw = ImageDraw.Draw(layer)
    # A fringe is short, so that the forehead stays visible.
    length = rng.uniform(0.05, 0.18) if fringe else rng.uniform(0.1, 0.6)
    for _ in range(count):
        angle = rng.uniform(np.pi * 1.0, np.pi * 2.0)
        radius = reach * (1 + rng.normal(0, 0.05))
        px = (centre[0] + radius * half[0] * np.cos(angle)) * side
        py = (centre[1] + radius * half[1] * np.sin(angle)) * side
        bend = rng.normal(0, 0.05) * side
        points = [
            (px + bend * t * t + np.cos(angle) * 0.1 * side * t * (1 - t), py + length * side * t) for t in (0, 0.35, 0.7, 1)
        ]
        colour = np.clip(hair * rng.uniform(0.6, 1.5), 0, 255).astype(int)
        draw.line(points, fill=(*colour, 210), width=int(rng.integers(1, 3 if fringe else 6)))
    drawn = np.asarray(layer, np.float32)
    _blend(image, drawn[..., 3] / 255, drawn[..., :3])
