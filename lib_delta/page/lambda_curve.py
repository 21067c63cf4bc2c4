"""A drawing of lambda over the run, for the accordion: SVG whose colours are the page's."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from lib_delta.core.strength import MAX_LAMBDA, Strength
from lib_delta.errors import SettingError

WIDTH, HEIGHT = 240, 110
LEFT, RIGHT, TOP, BOTTOM = 24, 234, 8, 90  # where the axes are
SAMPLES = 60
SCALES = (1, 2, 5, MAX_LAMBDA)  # what the vertical axis may end at


def draw_lambda(
    value: float | None,
    start: float | None,
    end: float | None,
    curve: str,
    first: float | None,
    last: float | None,
) -> str:
    """Return lambda over the steps as SVG, or the sentence that says why there is none.

    Numbers are as the widgets give them while somebody types: None where a box is empty, and beyond
    the limits, at which the box ends them as soon as it is left.  ``data-drawn`` has them, for the page
    to see whether its latest values are drawn.
    """
    try:
        inside = svg(_limited(value, start, end, curve, first, last))
    except SettingError as error:
        inside = f'<p class="delta-sampling-wrong">{escape(str(error))}</p>'
    return f'<div data-drawn="{escape(json.dumps([value, start, end, curve, first, last]))}">{inside}</div>'


def svg(strength: Strength) -> str:
    """Return an SVG picture of lambda from the first to the last step."""
    scale = next(s for s in SCALES if strength.value <= s)
    points = [(_x(t), _y(strength.at(t) / scale)) for t in _samples(strength)]
    line = " ".join(f"{x:g},{y:g}" for x, y in points)
    area = f"{points[0][0]:g},{BOTTOM} {line} {points[-1][0]:g},{BOTTOM}"
    outside = [(LEFT, points[0][0]), (points[-1][0], RIGHT)]
    return "".join(
        [
            f'<svg class="delta-sampling-curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" ',
            f'aria-label="{escape(_in_words(strength))}">',
            *(_level(level, scale) for level in (0, 0.5, 1)),
            f'<polygon class="area" points="{area}"/>',
            *(
                f'<line class="off" x1="{x0:g}" y1="{BOTTOM}" x2="{x1:g}" y2="{BOTTOM}"/>'
                for x0, x1 in outside
                if x1 > x0
            ),
            f'<polyline class="line" points="{area if _in_part(strength) else line}"/>',
            f'<text x="{LEFT}" y="{HEIGHT - 8}">first step</text>',
            f'<text x="{RIGHT}" y="{HEIGHT - 8}" text-anchor="end">last step</text>',
            "</svg>",
        ]
    )


def _in_part(strength: Strength) -> bool:
    return strength.start > 0 or strength.end < 1


def _limited(value: Any, start: Any, end: Any, curve: Any, first: Any, last: Any) -> Strength:
    if None in (value, start, end, first, last):
        raise SettingError("a number is missing")
    start, end, first, last = (min(max(share, 0.0), 1.0) for share in (start, end, first, last))
    return Strength(min(max(value, 0.0), MAX_LAMBDA), start, end, curve, first, last)


def _samples(strength: Strength) -> list[float]:
    length = strength.end - strength.start
    return [strength.start + length * i / SAMPLES for i in range(SAMPLES + 1)]


def _level(level: float, scale: float) -> str:
    y = _y(level)
    return (
        f'<line class="grid" x1="{LEFT}" y1="{y:g}" x2="{RIGHT}" y2="{y:g}"/>'
        f'<text x="{LEFT - 5}" y="{y + 3.5:g}" text-anchor="end">{level * scale:g}</text>'
    )


def _in_words(strength: Strength) -> str:
    if strength.curve == "constant":
        values = f"{strength.value:g}"
    else:
        values = f"{strength.first * strength.value:g} to {strength.last * strength.value:g}, {strength.curve},"
    return f"lambda {values} from {strength.start:.0%} to {strength.end:.0%} of the steps"


def _x(progress: float) -> float:
    return round(LEFT + (RIGHT - LEFT) * progress, 1)


def _y(share: float) -> float:
    return round(BOTTOM - (BOTTOM - TOP) * share, 1)
