"""The accordion's drawing of lambda over the run: an SVG with the page's colours."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from lib_delta.core.strength import MAX_LAMBDA, Strength
from lib_delta.errors import SettingError

WIDTH, HEIGHT = 240, 110
LEFT, RIGHT, TOP, BOTTOM = 24, 234, 8, 90  # positions of the axes in the SVG
SAMPLES = 60
SCALES = (1, 2, 5, MAX_LAMBDA)  # possible ends of the vertical axis


def draw_lambda(
    value: float | None,
    start: float | None,
    end: float | None,
    curve: str,
    first: float | None,
    last: float | None,
) -> str:
    """Return lambda over the steps as SVG, or the error that prevents it, as HTML.

    gradio passes the widgets' values while somebody types: None for an empty box, and numbers beyond the limits, which
    are clamped, as the box clamps them when it loses the focus.  ``data-drawn`` holds the values: the page compares
    them with its latest.
    """
    values = [value, start, end, curve, first, last]
    try:
        content = svg(_clamped(value=value, start=start, end=end, curve=curve, first=first, last=last))
    except SettingError as error:
        content = f'<p class="delta-sampling-wrong">{escape(str(error))}</p>'
    return f'<div data-drawn="{escape(json.dumps(values))}">{content}</div>'


def svg(strength: Strength) -> str:
    """Return an SVG of lambda from the first to the last step."""
    scale = next(s for s in SCALES if strength.value <= s)
    points = [(_x(t), _y(strength.at(t) / scale)) for t in _samples(strength)]
    line = " ".join(f"{x:g},{y:g}" for x, y in points)
    first, last = points[0][0], points[-1][0]
    area = f"{first:g},{BOTTOM} {line} {last:g},{BOTTOM}"
    outside_range = [(x0, x1) for x0, x1 in ((LEFT, first), (last, RIGHT)) if x0 < x1]
    return "".join(
        [
            f'<svg class="delta-sampling-curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" ',
            f'aria-label="{escape(_description(strength))}">',
            *(_gridline(level, scale) for level in (0, 0.5, 1)),
            f'<polygon class="area" points="{area}"/>',
            *(f'<line class="off" x1="{x0:g}" y1="{BOTTOM}" x2="{x1:g}" y2="{BOTTOM}"/>' for x0, x1 in outside_range),
            f'<polyline class="line" points="{area if strength.start > 0 or strength.end < 1 else line}"/>',
            f'<text x="{LEFT}" y="{HEIGHT - 8}">first step</text>',
            f'<text x="{RIGHT}" y="{HEIGHT - 8}" text-anchor="end">last step</text>',
            "</svg>",
        ]
    )


def _clamped(*, value: Any, curve: Any, **shares: Any) -> Strength:
    """Return a strength with lambda from 0 to its maximum and every share of the run or of lambda from 0 to 1."""
    if None in (value, *shares.values()):
        raise SettingError("a number is missing")
    clamped = {name: min(max(share, 0.0), 1.0) for name, share in shares.items()}
    return Strength(value=min(max(value, 0.0), MAX_LAMBDA), curve=curve, **clamped)


def _samples(strength: Strength) -> list[float]:
    """Return evenly spaced points of the run from start to end."""
    length = strength.end - strength.start
    return [strength.start + length * i / SAMPLES for i in range(SAMPLES + 1)]


def _gridline(level: float, scale: float) -> str:
    """Return the line at a share of the vertical axis, with its number."""
    y = _y(level)
    return (
        f'<line class="grid" x1="{LEFT}" y1="{y:g}" x2="{RIGHT}" y2="{y:g}"/>'
        f'<text x="{LEFT - 5}" y="{y + 3.5:g}" text-anchor="end">{level * scale:g}</text>'
    )


def _description(strength: Strength) -> str:
    """Return the drawing in words, for screen readers."""
    if strength.curve == "constant":
        values = f"{strength.value:g}"
    else:
        values = f"{strength.first * strength.value:g} to {strength.last * strength.value:g}, {strength.curve},"
    return f"lambda {values} from {strength.start:.0%} to {strength.end:.0%} of the steps"


def _x(progress: float) -> float:
    return round(LEFT + (RIGHT - LEFT) * progress, 1)


def _y(share: float) -> float:
    return round(BOTTOM - (BOTTOM - TOP) * share, 1)
