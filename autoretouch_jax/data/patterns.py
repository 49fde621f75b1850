"""Draws patterns that look like blemishes but are none: cloth, strands, dots, leaves, text, lights out of focus.

They need no files, so that every run with synthetic blemishes has something to leave alone. All randomness comes from the
generator passed in.
"""

import string

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Colour = tuple[int, int, int]


def draw_pattern(rng: np.random.Generator, side: int) -> np.ndarray:
    """Returns one picture of a random kind, `uint8[side, side, 3]`."""
    painter = PATTERNS[str(rng.choice(list(PATTERNS)))]
    image = painter(rng, side)
    # Uneven light, as on everything real.
    shade = np.asarray(
        Image.fromarray(rng.uniform(0.6, 1.1, (3, 3)).astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
    )
    image = image.filter(ImageFilter.GaussianBlur(float(rng.choice([0.3, 0.6, 1.2]))))
    return np.clip(np.rint(np.asarray(image, np.float32) * shade[..., None]), 0, 255).astype(np.uint8)


def _colour(rng: np.random.Generator) -> Colour:
    """Any colour. Vivid ones and greys are equally likely."""
    value = rng.uniform(20, 245, 3)
    value = value.mean() + rng.uniform(0, 1.3) * (value - value.mean())
    r, g, b = (int(channel) for channel in np.clip(value, 0, 255))
    return r, g, b


def _varied(rng: np.random.Generator, colour: Colour, amount: float = 25) -> Colour:
    r, g, b = (
        int(channel) for channel in np.clip(np.array(colour) + rng.normal(0, amount) + rng.normal(0, amount / 4, 3), 0, 255)
    )
    return r, g, b


def _picture(rng: np.random.Generator, side: int) -> tuple[Image.Image, ImageDraw.ImageDraw, Colour]:
    colour = _colour(rng)
    image = Image.new("RGB", (side, side), colour)
    return image, ImageDraw.Draw(image), colour


def _cloth(rng: np.random.Generator, side: int) -> Image.Image:
    """Threads over and under each other, in stripes or checks."""
    pitch = int(rng.integers(2, 9))
    y, x = np.mgrid[:side, :side]
    angle = rng.uniform(0, np.pi)
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    weave = np.sin(2 * np.pi * u / pitch) * np.sin(2 * np.pi * v / pitch)
    stripe = np.sin(2 * np.pi * u / (pitch * rng.uniform(3, 12))) > rng.uniform(-0.8, 0.8)
    if rng.random() < 0.5:
        stripe ^= np.sin(2 * np.pi * v / (pitch * rng.uniform(3, 12))) > 0
    a, b = np.array(_colour(rng)), np.array(_colour(rng))
    image = np.where(stripe[..., None], a, b) * (1 + rng.uniform(0.02, 0.3) * weave[..., None])
    image = image + rng.normal(0, rng.uniform(0, 8), (side, side, 1))
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))


def _strands(rng: np.random.Generator, side: int) -> Image.Image:
    """Hair, fur, grass: many bent lines of similar colours that run one way."""
    image, draw, colour = _picture(rng, side)
    angle, bend = rng.uniform(0, np.pi), rng.normal(0, 0.4)
    along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    steps = np.linspace(-1, 1, 5)
    for _ in range(int(rng.integers(30, 160))):
        start, own = rng.uniform(0, side, 2), bend + rng.normal(0, 0.15)
        points = [tuple(start + 0.6 * side * (t * along + own * t * t * across)) for t in steps]
        draw.line(points, fill=_varied(rng, colour, 35), width=int(rng.integers(1, 4)))
    return image


def _dots(rng: np.random.Generator, side: int) -> Image.Image:
    """Spotted cloth, seeds, sequins: dots of one size and two colours, in rows or scattered, many of them."""
    image, draw, _ = _picture(rng, side)
    radius = float(np.exp(rng.uniform(np.log(1.2), np.log(9))))
    pitch, colours = radius * rng.uniform(2.4, 5), (_colour(rng), _colour(rng))
    jitter = float(rng.choice([0.0, 0.25])) * pitch
    for row, y in enumerate(np.arange(0, side + pitch, pitch)):
        for x in np.arange(-(row % 2) * pitch / 2, side + pitch, pitch):
            cx, cy = x + rng.normal(0, jitter), y + rng.normal(0, jitter)
            draw.ellipse(
                (cx - radius, cy - radius, cx + radius, cy + radius), fill=_varied(rng, colours[int(rng.random() < 0.2)], 12)
            )
    return image


def _leaves(rng: np.random.Generator, side: int) -> Image.Image:
    """Leaves and petals over each other, each with a vein."""
    image, draw, colour = _picture(rng, side)
    t = np.linspace(0, 2 * np.pi, 14)
    for _ in range(int(rng.integers(10, 45))):
        length, slim, angle = rng.uniform(0.05, 0.3) * side, rng.uniform(0.2, 0.6), rng.uniform(0, 2 * np.pi)
        centre = rng.uniform(0, side, 2)
        outline = length * np.stack([np.cos(t), slim * np.sin(t) * np.abs(np.sin(t / 2))], 1)
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        own = _varied(rng, colour, 40)
        draw.polygon([tuple(point) for point in outline @ turn + centre], fill=own)
        draw.line([tuple(point) for point in np.array([[-length, 0], [length, 0]]) @ turn + centre], fill=_varied(rng, own, 20))
    return image


def _text(rng: np.random.Generator, side: int) -> Image.Image:
    """Lines of letters on paper or a sign."""
    image, draw, _ = _picture(rng, side)
    size, ink = int(rng.integers(7, 30)), _colour(rng)
    font = ImageFont.load_default(size)
    letters = np.array(list(string.ascii_letters + string.digits + " .,;"))
    for y in range(int(rng.integers(-size, 0)), side, int(size * rng.uniform(1.1, 1.6))):
        draw.text((int(rng.integers(-size, 1)), y), "".join(rng.choice(letters, 2 * side // size + 2)), fill=ink, font=font)
    return image.rotate(float(rng.normal(0, 8)), Image.Resampling.BILINEAR, fillcolor=image.getpixel((0, side - 1)))


def _lights(rng: np.random.Generator, side: int) -> Image.Image:
    """Lights out of focus, and reflections in them: bright discs, some with an edge."""
    image, _, _ = _picture(rng, side)
    image = image.point(lambda level: int(0.4 * level))
    for _ in range(int(rng.integers(4, 24))):
        layer, radius, (x, y) = Image.new("L", (side, side)), rng.uniform(2, 0.16 * side), rng.uniform(0, side, 2)
        box = (x - radius, y - radius, x + radius, y + radius)
        edge = int(rng.integers(40, 220))
        ImageDraw.Draw(layer).ellipse(box, fill=int(rng.integers(40, 220)), outline=edge)
        image.paste(_colour(rng), (0, 0), layer)
    return image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 2))))


# By name, because tests draw each of them.
PATTERNS = {"cloth": _cloth, "strands": _strands, "dots": _dots, "leaves": _leaves, "text": _text, "lights": _lights}
