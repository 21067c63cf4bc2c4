"""Drawing styles, light, weaves and pasted things: edits of generated pictures to fit stitched difference maps on.

Each draws its parameters anew, unlike the fixed edits that maps are judged by (``demo/edits.py``).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.random import Generator
from scipy import ndimage

from demo.train.bridges_pictures import EDITS, Array, Edit, noise, soft_mask
from demo.train.bridges_pictures import blurred as blur

WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)[:, None, None]


def _grey(picture: Array) -> Array:
    return (picture * WEIGHTS).sum(0, keepdims=True)


def _saturated(picture: Array, strength: float) -> Array:
    grey = _grey(picture)
    return grey + strength * (picture - grey)


def _median(picture: Array, reach: int) -> Array:
    return ndimage.median_filter(picture, size=(1, 2 * reach + 1, 2 * reach + 1), mode="nearest")


def _patches(picture: Array, reach: int) -> Array:
    """Return the mean of the calmest of four windows around every point (Kuwahara et al. 1976)."""
    size, step = reach + 1, (reach + 1) // 2 or 1
    grey = _grey(picture)[0]
    mean = ndimage.uniform_filter(picture, size=(1, size, size), mode="reflect")
    spread = ndimage.uniform_filter(grey**2, size) - ndimage.uniform_filter(grey, size) ** 2
    moves = [(down, across) for down in (-step, step) for across in (-step, step)]
    calmest = np.argmin(np.stack([np.roll(spread, move, (0, 1)) for move in moves]), 0)
    means = np.stack([np.roll(mean, move, (1, 2)) for move in moves])
    return np.take_along_axis(means, calmest[None, None], 0)[0]


def _smooth(rng: Generator, picture: Array) -> Array:
    if rng.random() < 0.4:
        return _median(picture, int(rng.integers(1, 5)))
    return _patches(picture, int(rng.integers(2, 7)))


def _lines(rng: Generator, picture: Array) -> Array:
    """Return lines along edges ``(1, H, W)``: 1 is ink, 0 is paper."""
    sigma, grey = float(np.exp(rng.uniform(np.log(0.5), np.log(2.5)))), _grey(picture)
    fine, coarse = blur(grey, sigma), blur(grey, sigma * rng.uniform(1.4, 2.2))
    gain, kind = float(np.exp(rng.uniform(np.log(4), np.log(40)))), rng.integers(4)
    if kind == 0:
        return np.clip(gain * (coarse - fine), 0, 1)
    if kind == 1:
        return np.clip(gain * np.abs(coarse - fine), 0, 1)
    if kind == 2:
        return _step(3 * gain * (coarse - rng.uniform(0.95, 1.02) * fine - rng.uniform(0, 0.02)))
    slope = np.hypot(ndimage.sobel(fine[0], 0), ndimage.sobel(fine[0], 1))[None]
    return np.clip(0.12 * gain * slope, 0, 1)


def _step(x: Array) -> Array:
    return 1 / (1 + np.exp(-np.clip(x, -60, 60)))


def _line(rng: Generator, picture: Array, other: Array) -> Array:
    """Draw lines in black or a dark colour, on white, coloured or softly painted paper."""
    kind = rng.integers(5)
    paper = np.ones_like(picture)
    if kind == 3:
        paper = paper * rng.uniform(0.7, 1, (3, 1, 1))
    elif kind == 4:
        paper = blur(picture, rng.uniform(1, 5))
    pen = rng.uniform(0, 0.35, (3, 1, 1)) if rng.random() < 0.3 else 0.0
    drawn = paper + _lines(rng, picture) * (pen - paper)
    return 1 - drawn if rng.random() < 0.1 else drawn


def _ink(rng: Generator, picture: Array, other: Array) -> Array:
    """Fill dark areas with black, and mostly draw lines; sometimes over soft colours."""
    grey = blur(_grey(picture), rng.uniform(0.4, 1.8))
    areas = _step(rng.uniform(15, 120) * (np.quantile(grey, rng.uniform(0.15, 0.7)) - grey))
    lines = _lines(rng, picture) if rng.random() < 0.7 else 0
    drawn = 1 - np.clip(areas + lines, 0, 1)
    ground = blur(picture, rng.uniform(0.5, 3)) if rng.random() < 0.2 else np.ones_like(picture)
    return ground * drawn


def _cel(rng: Generator, picture: Array, other: Array) -> Array:
    """Paint few tones in flat areas, mostly with dark lines."""
    flat, steps = _smooth(rng, picture), rng.uniform(2, 6)
    if rng.random() < 0.5:
        flat = np.round(flat * steps) / steps
    else:
        grey = _grey(flat)
        flat = flat * ((np.round(grey * steps) + 0.3) / steps / (grey + 0.05)).clip(0, 2.5)
    flat = _saturated(flat, rng.uniform(0.8, 1.6))
    return flat * (1 - rng.uniform(0.3, 1) * _lines(rng, picture)) if rng.random() < 0.75 else flat


def _oil(rng: Generator, picture: Array, other: Array) -> Array:
    """Paint in patches, sometimes with strokes in one direction."""
    painted = _saturated(_smooth(rng, picture), rng.uniform(0.9, 1.6))
    if rng.random() < 0.4:
        angle, grain = rng.uniform(0, math.pi), noise(rng, picture.shape[1], rng.uniform(0, 0.6))[0]
        kernel = np.zeros((11, 11), np.float32)
        for t in np.linspace(-5, 5, 23):
            kernel[round(5 + t * math.sin(angle)), round(5 + t * math.cos(angle))] = 1
        strokes = ndimage.convolve(grain, kernel / kernel.sum(), mode="nearest")[None]
        painted = painted * (1 + rng.uniform(0.1, 0.7) * strokes)
    return painted


def _watercolour(rng: Generator, picture: Array, other: Array) -> Array:
    """Lighten to washes of uneven strength, darker at their edges, on grainy paper."""
    soft, side = _smooth(rng, picture), picture.shape[1]
    edges = np.abs(blur(_grey(soft), rng.uniform(1.5, 3)) - _grey(soft))
    wash = 1 + rng.uniform(0.05, 0.4) * np.clip(blur(noise(rng, side, 1.5), 1.0), -1.6, 1.6)
    grain = rng.uniform(0, 0.06) * noise(rng, side, rng.uniform(0, 0.7))
    return 1 - (1 - soft) * rng.uniform(0.5, 0.95) * wash - rng.uniform(0.4, 2.5) * edges + grain


def _axes(rng: Generator, side: int) -> tuple[Array, Array]:
    """Return the coordinates of every pixel along two axes at right angles, turned."""
    down, across = np.mgrid[:side, :side].astype(np.float32)
    angle = rng.uniform(0, math.pi)
    return (
        across * math.cos(angle) + down * math.sin(angle),
        down * math.cos(angle) - across * math.sin(angle),
    )


def _halftone(rng: Generator, picture: Array, other: Array) -> Array:
    """Print dots on turned grids, their size by the tone: in black, or in each colour."""
    pitch, hard = rng.uniform(3.5, 11), rng.uniform(5, 20)

    def dots(tone: Array) -> Array:
        u, v = _axes(rng, picture.shape[1])
        wave = (np.cos(u * 2 * math.pi / pitch) + np.cos(v * 2 * math.pi / pitch)) / 4 + 0.5
        return _step(hard * (tone - wave))

    if rng.random() < 0.5:
        return np.broadcast_to(dots(_grey(picture)[0])[None], picture.shape)
    return np.stack([dots(channel) for channel in blur(picture, 0.7)])


def _pencil(rng: Generator, picture: Array, other: Array) -> Array:
    """Shade by the tone's local contrast, mostly with hatching in the dark."""
    grey, side = _grey(picture), picture.shape[1]
    drawn = np.clip(grey / (blur(grey, rng.uniform(1.5, 6)) + 0.02), 0, 1) ** rng.uniform(1, 5)
    if rng.random() < 0.6:
        along, _ = _axes(rng, side)
        hatch = 0.5 + 0.5 * np.sin(along * 2 * math.pi / rng.uniform(2.5, 7) + noise(rng, side, 2.0)[0])
        dark = np.clip(rng.uniform(0.5, 0.9) - blur(grey, 1.0), 0, 1)
        drawn = drawn * (1 - rng.uniform(0.2, 0.8) * hatch * dark)
    drawn = drawn + rng.uniform(0, 0.06) * noise(rng, side, rng.uniform(0, 0.5))
    return drawn * (1 - rng.uniform(0.2, 0.8) * (1 - picture)) if rng.random() < 0.3 else drawn + 0 * picture


def _flat_print(rng: Generator, picture: Array, other: Array) -> Array:
    """Print in few inks, chosen by tone or by the nearest colour."""
    soft, count = _smooth(rng, picture), int(rng.integers(2, 6))
    if rng.random() < 0.5:
        tones = _grey(soft)[0]
        index = np.digitize(tones, np.quantile(tones, np.sort(rng.uniform(0.05, 0.95, count - 1))))
        inks = np.sort(rng.uniform(0, 1, (count, 3)), 0)
    else:
        flat = soft.reshape(3, -1).T
        inks = flat[rng.choice(len(flat), count)]
        index = ((flat[:, None] - inks[None]) ** 2).sum(2).argmin(1).reshape(soft.shape[1:])
    return blur(inks[index].transpose(2, 0, 1).astype(np.float32), rng.uniform(0.4, 0.9))


def _blocks(rng: Generator, picture: Array, other: Array) -> Array:
    """Average over squares."""
    count, side = int(rng.integers(3, 11)), picture.shape[1]
    whole = -(-side // count) * count
    wide = np.pad(picture, ((0, 0), (0, whole - side), (0, whole - side)), mode="edge")
    small = wide.reshape(3, whole // count, count, whole // count, count).mean((2, 4))
    return small.repeat(count, 1).repeat(count, 2)[:, :side, :side]


def _light(rng: Generator, picture: Array, other: Array) -> Array:
    """Make it night, high key, darker towards the corners, or lit by a lamp."""
    kind = rng.integers(4)
    if kind == 0:
        return picture ** rng.uniform(1, 2) * rng.uniform(0.25, 0.9, (3, 1, 1))
    if kind == 1:
        return 1 - rng.uniform(0.3, 0.8) * (1 - picture) ** rng.uniform(0.9, 1.6)
    down, across = np.mgrid[-1 : 1 : picture.shape[1] * 1j, -1 : 1 : picture.shape[1] * 1j]
    far = (across - rng.normal() * 0.4) ** 2 + (down - rng.normal() * 0.4) ** 2
    if kind == 2:
        return picture * np.clip(1 - rng.uniform(0.2, 0.8) * far, 0, 1)[None]
    lamp = np.exp(-far / rng.uniform(0.05, 0.8))[None] * rng.uniform(0.3, 1, (3, 1, 1))
    return picture + rng.uniform(0.1, 0.7) * lamp


def _weave(rng: Generator, picture: Array, other: Array) -> Array:
    """Lay waves across it, and grain."""
    u, v = _axes(rng, picture.shape[1])
    waves = 0.5 * np.sin(u * 2 * math.pi / rng.uniform(3, 14)) + 0.5 * np.sin(v * 2 * math.pi / rng.uniform(3, 14))
    grain = rng.uniform(0, 0.08) * noise(rng, picture.shape[1], rng.uniform(0, 1.0))
    return picture * (1 + rng.uniform(0.08, 0.4) * waves) + grain


def _paste(rng: Generator, picture: Array, other: Array) -> Array:
    """Put hard-edged pieces of another picture down."""
    pasted, side = picture.copy(), picture.shape[1]
    for _ in range(rng.integers(1, 5)):
        size = int(rng.integers(side // 8, side // 2))
        to_y, to_x, y, x = rng.integers(0, side - size, 4)
        down, across = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
        inside = np.abs(across) ** 3 + np.abs(down) ** 3 < 1 if rng.random() < 0.6 else np.ones((size, size), bool)
        part = pasted[:, to_y : to_y + size, to_x : to_x + size]
        part[:] = np.where(inside[None], other[:, y : y + size, x : x + size], part)
    return pasted


STYLES: dict[str, Edit] = {
    "line": _line,
    "ink": _ink,
    "cel": _cel,
    "oil": _oil,
    "watercolour": _watercolour,
    "halftone": _halftone,
    "pencil": _pencil,
    "flat print": _flat_print,
    "blocks": _blocks,
    "light": _light,
    "weave": _weave,
    "paste": _paste,
}
ALL = EDITS | STYLES
# How often an edit is drawn, if not once.
SHARES = {"colours": 3.0, "tones": 1.5, "line": 1.7, "ink": 1.2, "cel": 1.5, "oil": 1.2, "watercolour": 1.2}
SHARES |= {"light": 1.5, "focus": 1.3}


def styled(rng: Generator, picture: Array, other: Array) -> Array:
    """Edit a picture ``(3, H, W)`` in one way or two, everywhere or in places, fully or at strengths of .15 to .9."""
    names = tuple(ALL)
    weights = np.array([SHARES.get(name, 1.0) for name in names])
    first, second = rng.choice(len(names), 2, p=weights / weights.sum())
    result = np.clip(ALL[names[first]](rng, picture, other), 0, 1).astype(np.float32)
    if rng.random() < 0.2:
        result = np.clip(ALL[names[second]](rng, result, other), 0, 1).astype(np.float32)
    if rng.random() < 0.18:
        result = picture + soft_mask(rng, picture.shape[1]) * (result - picture)
    if rng.random() < 0.25:
        result = picture + rng.uniform(0.15, 0.9) * (result - picture)
    return result.astype(np.float32)
