"""The pictures: three emoji sets that share 1,563 names, their augmentation, and styles made from them.

Sources (npm packages, versions pinned below): Fluent Emoji Flat and Fluent Emoji High Contrast (Microsoft, MIT), Noto
Emoji (Google, Apache-2.0).
"""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

SIZE = 64
PACKAGES = {
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "lineart": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
    "noto": "@iconify-json/noto@1.2.9",
}


@dataclass(frozen=True)
class Emoji:
    """``prompts[i]`` is the name of picture ``i`` of every set; ``pictures[set]`` is uint8 ``(1563, 3, 64, 64)``."""

    prompts: list[str]
    pictures: dict[str, Tensor]

    def only(self, names: Sequence[str]) -> Emoji:
        """Return the pictures of some names, in their order."""
        index = torch.tensor([self.prompts.index(name) for name in names])
        return Emoji(list(names), {key: pictures[index] for key, pictures in self.pictures.items()})


def load(cache: Path) -> Emoji:
    """Return the pictures; the first call fetches them with npm and draws them into ``cache``."""
    stored = cache / "emoji.pt"
    if not stored.exists():
        cache.mkdir(parents=True, exist_ok=True)
        prompts, pictures = _draw(_fetch(cache / "npm"))
        torch.save({"prompts": prompts, "pictures": pictures}, stored)
    return Emoji(**torch.load(stored, weights_only=True))


def load_large(cache: Path, names: Sequence[str], look: str) -> Tensor:
    """Return one set's pictures at twice the size, uint8 ``(N, 3, 128, 128)``, drawn on the first call."""
    stored = cache / f"emoji-{look}-large.pt"
    if not stored.exists():
        icons = _fetch(cache / "npm")[look]
        torch.save(_drawn(icons, [name.replace(" ", "-") for name in names], 2 * SIZE, look), stored)
    return torch.load(stored, weights_only=True)


def _fetch(folder: Path) -> dict[str, dict]:
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit("training needs npm (Node.js) to fetch the emoji sets: install it and try again")
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [npm, "install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund", *PACKAGES.values()],
        check=True,
    )
    return {
        name: json.loads((folder / "node_modules" / package.rsplit("@", 1)[0] / "icons.json").read_text("utf-8"))
        for name, package in PACKAGES.items()
    }


def _draw(sets: dict[str, dict]) -> tuple[list[str], dict[str, Tensor]]:
    names = sorted(set.intersection(*(set(s["icons"]) for s in sets.values())))
    pictures = {key: _drawn(icons, names, SIZE, key) for key, icons in sets.items()}
    return [name.replace("-", " ") for name in names], pictures


def _drawn(icons: dict, names: Sequence[str], side: int, title: str) -> Tensor:
    drawn = [_rasterise(icons, name, side) for name in tqdm(names, desc=f"drawing {title}")]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


def _rasterise(icons: dict, name: str, side: int) -> np.ndarray:
    """Draw one icon on white at four times the size, and average it down."""
    import resvg_py

    icon = icons["icons"][name]
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" color="black">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=4 * side, height=4 * side))
    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    picture = Image.new("RGBA", drawing.size, "white")
    picture.alpha_composite(drawing)
    return np.asarray(picture.convert("RGB").resize((side, side), Image.Resampling.BOX))


def to_float(pictures: Tensor) -> Tensor:
    """Turn uint8 pictures into floats in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def augment(pictures: Tensor, generator: torch.Generator, strong: bool = True) -> Tensor:
    """Shift, scale and rotate float pictures ``(N, 3, H, W)`` a little; ``strong``: more, mirrored, other colours."""
    count, reach = len(pictures), 1.0 if strong else 0.25

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    angle, scale = reach * uniform(-0.26, 0.26), 1 + reach * uniform(-0.15, 0.3)
    mirror = (torch.rand(count, generator=generator) < 0.5).float() * 2 - 1 if strong else torch.ones(count)
    across, down = reach * uniform(-0.15, 0.15), reach * uniform(-0.15, 0.15)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    affine = torch.stack((torch.stack((cos * mirror, -sin, across), 1), torch.stack((sin * mirror, cos, down), 1)), 1)
    grid = F.affine_grid(affine, list(pictures.shape), align_corners=False)
    # Sampling outside the picture returns 0: shift the values so that 0 is white.
    moved = F.grid_sample(pictures - 1, grid, mode="bilinear", align_corners=False) + 1
    return recolour(moved, uniform(0, 2 * math.pi), uniform(0, 1)) if strong else moved


def recolour(pictures: Tensor, hue: Tensor, saturation: Tensor) -> Tensor:
    """Rotate colours ``(N, 3, H, W)`` about the grey axis by ``hue`` radians and scale their distance to it."""
    cos, sin = (saturation * f for f in (hue.cos(), hue.sin()))
    skew = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    grey = torch.full((3, 3), 1 / 3)
    matrix = grey + cos[:, None, None] * (torch.eye(3) - grey) + sin[:, None, None] * skew
    return torch.einsum("nij,njhw->nihw", matrix, pictures).clamp(-1, 1)


def pixelated(pictures: Tensor) -> Tensor:
    """Return pictures ``(N, 3, H, W)`` as mosaics of 4x4 pixels, the size of a latent's pixel."""
    return F.interpolate(F.avg_pool2d(pictures, 4), scale_factor=4.0, mode="nearest")
