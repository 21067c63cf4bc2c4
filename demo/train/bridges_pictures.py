"""Synthetic pictures for fitting bridges: dead leaves, textures and emoji, and edits of them.

None is a photo, so that photos remain for the evaluation.  Dead leaves (Lee, Mumford & Huang 2001) share with photos
the power law of their spectrum, and occlusion.  Their colours, light, texture and focus vary from one to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor

Array = np.ndarray


@dataclass(frozen=True)
class Sizes:
    """Pictures are drawn ``over`` times larger, and averaged down to ``side`` pixels."""

    side: int = 128
    over: int = 2

    @property
    def drawn(self) -> int:
        """The side in pixels while drawing."""
        return self.side * self.over


def noise(rng: Generator, side: int, slope: float, channels: int = 1) -> Array:
    """Return ``(channels, side, side)`` of mean 0 and deviation 1, with amplitudes proportional to frequency^slope."""
    fy, fx = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]
    radius = np.hypot(fx, fy)
    radius[0, 0] = np.inf
    spectrum = rng.normal(size=(2, channels, side, side // 2 + 1))
    field = np.fft.irfft2((spectrum[0] + 1j * spectrum[1]) * radius**-slope, s=(side, side))
    return (field / field.std((1, 2), keepdims=True)).astype(np.float32)


@dataclass(frozen=True)
class Palette:
    """Colours that match: near a few hues, as saturated as the picture's mood."""

    hues: Array
    saturation: float

    @classmethod
    def draw(cls, rng: Generator) -> Palette:
        """Draw two to six hues; half of all palettes are faint."""
        return cls(rng.uniform(0, 1, rng.integers(2, 7)), rng.beta(1.2, 2.0) if rng.random() < 0.5 else rng.uniform())

    def colour(self, rng: Generator) -> Array:
        """Draw one colour ``(3, 1, 1)`` in 0..1."""
        hue = rng.choice(self.hues) + rng.normal() * 0.04
        strength = float(np.clip(self.saturation * rng.uniform(0.3, 1.5), 0, 1))
        value = rng.uniform(0.03, 1.0)
        wheel = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
        return (value * (1 - strength * (1 - wheel))).reshape(3, 1, 1).astype(np.float32)


def dead_leaves(rng: Generator, side: int) -> Array:
    """Draw shapes that occlude each other, with sizes by a power law, ``(3, side, side)``."""
    palette, ys = Palette.draw(rng), np.linspace(-1, 1, side, dtype=np.float32)
    xs, ys = np.meshgrid(ys, ys)
    picture = _filled(rng, palette, xs, ys)
    smallest = rng.uniform(0.02, 0.12)
    radii = smallest * (1 - rng.uniform(0, 1, rng.integers(20, 160)) * (1 - (smallest / 0.9) ** 2)) ** -0.5
    for radius in np.sort(radii)[::-1] if rng.random() < 0.5 else radii:
        x, y, angle = *rng.uniform(-1.1, 1.1, 2), rng.uniform(0, 2 * math.pi)
        # Draw only within the leaf's bounding box.
        reach = 1.5 * radius
        low = [max(0, int((centre - reach + 1) / 2 * side)) for centre in (y, x)]
        high = [min(side, int((centre + reach + 1) / 2 * side) + 1) for centre in (y, x)]
        if high[0] - low[0] < 1 or high[1] - low[1] < 1:
            continue
        box = (slice(low[0], high[0]), slice(low[1], high[1]))
        u, v = (xs[box] - x) / radius, (ys[box] - y) / radius
        u, v = math.cos(angle) * u + math.sin(angle) * v, math.cos(angle) * v - math.sin(angle) * u
        inside = _shape(rng, u, v)
        part = picture[:, box[0], box[1]]
        picture[:, box[0], box[1]] = np.where(inside, _filled(rng, palette, u, v), part)
    return picture


def _shape(rng: Generator, u: Array, v: Array) -> Array:
    """Return the points of an ellipse, a rectangle, a triangle, a stroke or a ring of radius 1."""
    kind, ratio = rng.integers(5), rng.uniform(0.3, 1.0)
    if kind == 0:
        return u**2 + (v / ratio) ** 2 < 1
    if kind == 1:
        return (np.abs(u) < 0.9) & (np.abs(v) < 0.9 * ratio)
    if kind == 2:
        return (v > -0.5) & (v < 0.9 - 2 * np.abs(u))
    if kind == 3:
        return (np.abs(u) < 1.3) & (np.abs(v - ratio * np.sin(2 * u) * 0.5) < 0.06 + 0.1 * ratio)
    distance = np.hypot(u, v)
    return (distance < 1) & (distance > ratio)


def _filled(rng: Generator, palette: Palette, u: Array, v: Array) -> Array:
    """Return a surface ``(3, ...)``: one colour, or shaded, striped, chequered or rough."""
    first, second = palette.colour(rng), palette.colour(rng)
    kind = rng.integers(6)
    if kind == 0:
        return np.broadcast_to(first, (3, *u.shape)).copy()
    if kind in (1, 2):
        share = np.clip(0.5 + 0.5 * (u * rng.normal() + v * rng.normal()), 0, 1)
        second = first * rng.uniform(0.3, 1.2) if kind == 1 else second
    elif kind == 3:
        share = 0.5 + 0.5 * np.sin(u * rng.uniform(3, 40) + v * rng.normal() * 6)
    elif kind == 4:
        count = rng.uniform(2, 12)
        share = ((np.floor(u * count) + np.floor(v * count)) % 2).astype(np.float32)
    else:
        side = max(u.shape)
        rough = noise(rng, side + side % 2, rng.uniform(0.3, 1.8))[0][: u.shape[0], : u.shape[1]]
        share = np.clip(0.5 + rng.uniform(0.1, 0.5) * rough, 0, 1)
    return np.clip(first + (second - first) * share.astype(np.float32), 0, 1)


def texture(rng: Generator, side: int) -> Array:
    """Draw clouds of coloured noise, soft or hard, ``(3, side, side)``."""
    fields, mix = noise(rng, side, rng.uniform(0.6, 2.0), 3), rng.normal(size=(3, 3))
    # The channels of natural colours are correlated.
    mix = rng.uniform(0, 1) * mix + rng.uniform(0.5, 1.5) * np.array([[1.0, 0, 0]] * 3)
    clouds = np.einsum("ij,jhw->ihw", mix, fields)
    clouds /= clouds.std()
    if rng.random() < 0.3:
        clouds = np.tanh(clouds * rng.uniform(1, 6))
    return np.clip(rng.uniform(0.25, 0.75) + rng.uniform(0.08, 0.35) * clouds, 0, 1).astype(np.float32)


def landscape(rng: Generator, side: int) -> Array:
    """Draw ridges of rough ground under a sky, ``(3, side, side)``."""
    palette = Palette.draw(rng)
    ys, xs = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j].astype(np.float32)
    picture = _filled(rng, palette, xs * 0.3, ys)
    for height in np.sort(rng.uniform(-0.8, 0.9, rng.integers(1, 5))):
        ridge = height + rng.uniform(0.02, 0.2) * noise(rng, side, rng.uniform(1.0, 2.0))[0][0]
        ground = palette.colour(rng) * (1 + rng.uniform(0.05, 0.5) * noise(rng, side, rng.uniform(0.3, 1.5)))
        picture = np.where(ys > ridge[None, None], ground, picture)
    return np.clip(picture, 0, 1)


def with_emoji(rng: Generator, side: int, emoji: Tensor) -> Array:
    """Draw emoji ``(M, 3, h, w)`` uint8 on white, rotated and enlarged, over a background."""
    picture = torch.from_numpy((texture if rng.random() < 0.5 else dead_leaves)(rng, side))
    for _ in range(rng.integers(1, 5)):
        drawn = emoji[int(rng.integers(len(emoji)))][None].float() / 255
        angle, scale = rng.uniform(-0.5, 0.5), rng.uniform(1.0, 3.0)
        cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
        affine = torch.tensor(
            [[[cos, -sin, rng.uniform(-1, 1) * (scale - 1)], [sin, cos, rng.uniform(-1, 1) * (scale - 1)]]]
        )
        grid = F.affine_grid(affine.float(), [1, 3, side, side], align_corners=False)
        moved = F.grid_sample(drawn - 1, grid, mode="bicubic", align_corners=False)[0] + 1
        # White is the emoji's paper: it is transparent, or remains as a card.
        paper = (moved.amin(0) > 0.97).float()
        inside = (grid[0].abs().amax(-1) < 0.98).float()
        cover = inside * (1 - paper) if rng.random() < 0.7 else inside
        picture = torch.lerp(picture, moved.clamp(0, 1), cover)
    return picture.numpy()


def draw(rng: Generator, sizes: Sizes, emoji: Tensor | None) -> Array:
    """Draw one picture ``(3, side, side)`` in 0..1, of random kind, light, focus and grain."""
    makers: list[Callable[[Generator, int], Array]] = [dead_leaves] * 5 + [texture, landscape]
    if emoji is not None:
        makers += [lambda rng, side: with_emoji(rng, side, emoji)] * 2
    picture = makers[rng.integers(len(makers))](rng, sizes.drawn)
    if rng.random() < 0.6:
        light = 1 + rng.uniform(0.1, 0.5) * np.tanh(noise(rng, sizes.drawn, rng.uniform(1.5, 2.5))[0])
        picture = picture * light
    if rng.random() < 0.5:
        picture = picture + rng.uniform(0.01, 0.1) * noise(rng, sizes.drawn, rng.uniform(0.0, 1.2), 1)
    picture = np.clip(picture, 0, 1) ** rng.uniform(0.6, 1.6)
    small = picture.reshape(3, sizes.side, sizes.over, sizes.side, sizes.over).mean((2, 4))
    if rng.random() < 0.3:
        soft = blurred(small, rng.uniform(0.5, 4.0))
        share = soft_mask(rng, sizes.side) if rng.random() < 0.5 else 1.0
        small = small + share * (soft - small)
    return np.clip(small, 0, 1).astype(np.float32)


def blurred(picture: Array, sigma: float) -> Array:
    """Blur ``(C, H, W)`` by a Gaussian of that many pixels, with replicated edges."""
    reach = max(1, math.ceil(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    rows = F.pad(torch.from_numpy(np.ascontiguousarray(picture, np.float32))[:, None], [reach] * 4, mode="replicate")
    return F.conv2d(F.conv2d(rows, kernel), kernel.transpose(2, 3))[:, 0].numpy()


def soft_mask(rng: Generator, side: int) -> Array:
    """Return a weight in 0..1 that varies over the picture ``(1, side, side)``."""
    return (1 / (1 + np.exp(-rng.uniform(2, 8) * (noise(rng, side, 2.0) + rng.normal() * 0.5)))).astype(np.float32)


Edit = Callable[[Generator, Array, Array], Array]


def _colours(rng: Generator, picture: Array, other: Array) -> Array:
    """Mix the channels: towards grey, more saturated, with rotated hues, warmer, cooler, or at random."""
    grey, skew = np.full((3, 3), 1 / 3), np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    angle, strength = rng.uniform(-math.pi, math.pi), rng.uniform(0, 1.8)
    kind = rng.integers(4)
    matrix = np.eye(3)
    if kind == 0:
        matrix = grey + rng.uniform(0, 0.7) * (np.eye(3) - grey)
    elif kind == 1:
        matrix = grey + strength * (math.cos(angle) * (np.eye(3) - grey) + math.sin(angle) * skew)
    elif kind == 2:
        matrix = np.diag(np.exp(rng.normal(size=3) * 0.25))
    else:
        matrix = matrix + rng.normal(size=(3, 3)) * 0.25
    offset = rng.normal(size=(3, 1, 1)) * 0.06
    return np.einsum("ij,jhw->ihw", matrix, picture) + offset


def _tones(rng: Generator, picture: Array, other: Array) -> Array:
    """Change brightness, contrast and the tone curve; sometimes to a negative, or to few steps."""
    if rng.random() < 0.15:
        return 1 - picture
    if rng.random() < 0.2:
        steps = rng.integers(3, 8)
        return np.round(picture * steps) / steps
    middle = rng.uniform(0.2, 0.8)
    return (picture ** rng.uniform(0.5, 2.0) - middle) * rng.uniform(0.3, 2.0) + middle + rng.normal() * 0.08


def _focus(rng: Generator, picture: Array, other: Array) -> Array:
    """Blur or sharpen."""
    soft = blurred(picture, rng.uniform(0.5, 5.0))
    return soft if rng.random() < 0.6 else picture + rng.uniform(0.3, 2.0) * (picture - soft)


def _lines(rng: Generator, picture: Array, other: Array) -> Array:
    """Draw only the edges, on paper, or over the picture's coarse colours."""
    sigma = rng.uniform(0.5, 2.0)
    grey = picture.mean(0, keepdims=True)
    bands = blurred(grey, 1.6 * sigma) - rng.uniform(0.9, 1.0) * blurred(grey, sigma)
    ink = np.clip(rng.uniform(4, 40) * (bands if rng.random() < 0.6 else np.abs(bands)), 0, 1)
    paper = np.ones_like(picture) if rng.random() < 0.6 else blurred(picture, rng.uniform(1, 4))
    lined = paper * (1 - ink)
    return 1 - lined if rng.random() < 0.2 else lined


def _material(rng: Generator, picture: Array, other: Array) -> Array:
    """Overlay grain, canvas or another picture's detail."""
    if rng.random() < 0.5:
        return picture + rng.uniform(0.03, 0.25) * noise(
            rng, picture.shape[1], rng.uniform(0, 1.5), 3 if rng.random() < 0.3 else 1
        )
    return picture + rng.uniform(0.3, 1.0) * (other - blurred(other, rng.uniform(1, 6)))


def _content(rng: Generator, picture: Array, other: Array) -> Array:
    """Insert another picture in some places, opaque or blended."""
    return picture + rng.uniform(0.2, 1.0) * soft_mask(rng, picture.shape[1]) * (other - picture)


def _warp(rng: Generator, picture: Array, other: Array) -> Array:
    """Displace the content by a few pixels."""
    side = picture.shape[1]
    flow = torch.from_numpy(noise(rng, side, rng.uniform(2.0, 3.0), 2)) * float(rng.uniform(0.005, 0.05))
    still = F.affine_grid(torch.eye(2, 3)[None], [1, 3, side, side], align_corners=False)
    grid = still + flow.permute(1, 2, 0)[None]
    return F.grid_sample(torch.from_numpy(picture)[None], grid, padding_mode="border", align_corners=False)[0].numpy()


EDITS: dict[str, Edit] = {
    "colours": _colours,
    "tones": _tones,
    "focus": _focus,
    "lines": _lines,
    "material": _material,
    "content": _content,
    "warp": _warp,
}


def edited(rng: Generator, picture: Array, other: Array, kinds: Sequence[str] = tuple(EDITS)) -> tuple[Array, str]:
    """Edit a picture in one way or two, everywhere or in places; return it and the name of the first way."""
    weights = np.array([3.0 if kind in ("colours", "lines") else 1.0 for kind in kinds])
    first, second = rng.choice(len(kinds), 2, p=weights / weights.sum())
    result = np.clip(EDITS[kinds[first]](rng, picture, other), 0, 1)
    if rng.random() < 0.25:
        result = np.clip(EDITS[kinds[second]](rng, result.astype(np.float32), other), 0, 1)
    if rng.random() < 0.2:
        result = picture + soft_mask(rng, picture.shape[1]) * (result - picture)
    return result.astype(np.float32), kinds[first]
