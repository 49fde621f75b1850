"""Curves as small inline SVG: the numbers of a chart. `chart.html` draws them."""

import importlib.resources
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jinja2

from autoretouch_jax.training.history import Points

MOST_POINTS = 400  # of a curve on a page; a screen shows no more
# The drawing in SVG units. On a telephone a unit is a little less than a pixel.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 210, 50, 20, 8, 24
COLORS = 8  # in the pages' style sheet
TICKS = 4  # about as many on each axis


class Curve(NamedTuple):
    """A line of a chart. A dashed one is something to compare with: doing nothing, or chance."""

    name: str
    points: Points
    dashed: bool = False


class Axis(NamedTuple):
    """One axis: its range, whether it is logarithmic, and where its range lies in the drawing."""

    low: float
    high: float
    log: bool
    start: float
    end: float

    def place(self, value: float) -> float:
        """Where a value lies in the drawing, in SVG units."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Round values in the range: powers of ten on a logarithmic axis that covers more than one."""
        if self.log and math.log10(self.high / self.low) >= 2:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**power for power in range(first, last + 1, math.ceil((last - first + 1) / (TICKS + 1)))]
        rough = (self.high - self.low) / TICKS
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
        return [step * i for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def chart(
    title: str,
    curves: Iterable[Curve],
    unit: str = "",
    log: bool = False,
    marks: Sequence[tuple[float, str, str]] = (),
    hint: str = "",
) -> dict[str, Any] | None:
    """Returns what `chart.html` draws, or None where no curve has a value.

    `log` asks for a logarithmic axis, `marks` are vertical lines (step, level, text), `hint` says what to look for.
    """
    thinned = [curve._replace(points=thin(curve.points)) for curve in curves]
    shown = [curve for curve in thinned if any(value is not None for _, value in curve.points)]
    if not shown:
        return None
    steps = [step for curve in shown for step, _ in curve.points]
    values = [value for curve in shown for _, value in curve.points if value is not None]
    # The smallest magnitudes of a logarithmic axis would be zero, which it cannot show.
    log = log and min(values) > 0
    x = Axis(*_wide(min(steps), max(steps), 0), False, LEFT, WIDTH - RIGHT)
    y = Axis(*_wide(min(values), max(values), 0 if log else 0.04), log, HEIGHT - BOTTOM, TOP)
    # Dashed lines have the colour of the text, so the colours are counted over the others.
    solid = iter(range(len(shown)))
    return {
        "title": title,
        "unit": unit,
        "hint": hint,
        "x": x,
        "y": y,
        "x_ticks": [(x.place(tick), short(tick)) for tick in x.ticks()],
        "y_ticks": [(y.place(tick), short(tick)) for tick in y.ticks()],
        "lines": [_line(curve, x, y, "d" if curve.dashed else f"c{next(solid) % COLORS}") for curve in shown],
        "marks": [(x.place(step), level, text) for step, level, text in marks if x.low <= step <= x.high],
        "width": WIDTH,
        "height": HEIGHT,
    }


def thin(points: Points, most: int = MOST_POINTS) -> Points:
    """Returns at most so many points: the means of equal blocks. A block without a finite value is None."""
    size = math.ceil(len(points) / most) if points else 1
    blocks = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(step for step, _ in block) / len(block), _mean([value for _, value in block])) for block in blocks]


def short(value: float) -> str:
    """A number in a few characters: `0.25`, `20k`, `1.5M`, `1e-5`."""
    for unit, name in ((1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.4g}{name}"
    text = f"{value:.4g}" if abs(value) >= 1 else f"{value:.3g}"
    return text.replace("e-0", "e-").replace("e+0", "e")


def environment(package: str) -> jinja2.Environment:
    """Returns the templates of a package, and those that all pages share: `page.html` and `chart.html`."""

    def template(name: str) -> str | None:
        for folder in (package, "autoretouch_jax.training"):
            if (file := importlib.resources.files(folder).joinpath(name)).is_file():
                return file.read_text()
        return None

    loader = jinja2.FunctionLoader(template)
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def _mean(values: list[float | None]) -> float | None:
    finite = [value for value in values if value is not None]
    return sum(finite) / len(finite) if finite else None


def _wide(low: float, high: float, margin: float) -> tuple[float, float]:
    """A range with a margin on both sides, and never an empty one."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        spread = abs(low) * 0.1 or 0.5
        return low - spread, high + spread
    spread = (high - low) * margin
    return low - spread, high + spread


def _line(curve: Curve, x: Axis, y: Axis, style: str) -> dict[str, Any]:
    """The polylines of a curve, broken where it has no value. A point without neighbours is a dot."""
    pieces: list[list[str]] = [[]]
    for step, value in curve.points:
        if value is None:
            pieces.append([])
        else:
            pieces[-1].append(f"{x.place(step):g},{y.place(value):g}")
    # Single measurements are visible where there are few of them.
    few = len(curve.points) <= 30 and not curve.dashed
    known = [value for _, value in curve.points if value is not None]
    return {
        "name": curve.name,
        "style": style,
        "paths": [" ".join(piece) for piece in pieces if len(piece) > 1],
        "dots": [point.split(",") for piece in pieces for point in piece if few or len(piece) == 1],
        "first": short(known[0]),
        "last": short(known[-1]),
    }
