"""The nineteen fixed edits that difference maps are judged by; maps are fitted on others (``demo/train``)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Edit = Callable[[Tensor], Tensor]
STICKERS = Path(__file__).with_name("examples") / "references"


def blurred(pictures: Tensor, sigma: float) -> Tensor:
    """Blur ``(N, C, H, W)`` by a Gaussian of ``sigma`` pixels, edges repeated."""
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    rows = F.pad(pictures.flatten(0, 1)[:, None], [reach] * 4, mode="replicate")
    return F.conv2d(F.conv2d(rows, kernel), kernel.transpose(2, 3)).reshape(pictures.shape)


def luma(pictures: Tensor) -> Tensor:
    """Return the brightness ``(N, 1, H, W)`` of pictures ``(N, 3, H, W)``."""
    return (pictures * _scales(0.299, 0.587, 0.114)).sum(1, keepdim=True)


def _scales(red: float, green: float, blue: float) -> Tensor:
    return torch.tensor([red, green, blue])[:, None, None]


def _boxed(pictures: Tensor, reach: int) -> Tensor:
    """Average over squares of ``2 * reach + 1`` pixels."""
    return F.avg_pool2d(F.pad(pictures, (reach,) * 4, mode="reflect"), 2 * reach + 1, 1)


def _median(pictures: Tensor, reach: int) -> Tensor:
    """Return the median over squares of ``2 * reach + 1`` pixels."""
    side = 2 * reach + 1
    around = F.pad(pictures, (reach,) * 4, mode="replicate")
    return around.unfold(2, side, 1).unfold(3, side, 1).flatten(-2).median(-1).values


def _noise(pictures: Tensor, sigma: float, seed: int) -> Tensor:
    """Return noise ``(N, 1, H, W)`` of deviation 1 as smooth as a Gaussian of ``sigma`` pixels; always the same."""
    drawn = torch.randn(len(pictures), 1, *pictures.shape[-2:], generator=torch.Generator().manual_seed(seed))
    smooth = blurred(drawn, sigma)
    return smooth / smooth.std()


def _grey(pictures: Tensor) -> Tensor:
    return luma(pictures).expand_as(pictures)


def _line_art(pictures: Tensor) -> Tensor:
    bands = blurred(luma(pictures), 2.4) - blurred(luma(pictures), 1.2)
    return (1 - (12 * bands).abs().clamp(0, 1)).expand_as(pictures)


def _outlines(pictures: Tensor) -> Tensor:
    """Draw dark sides of edges, in soft strokes."""
    grey = luma(pictures)
    return (1 - torch.sigmoid(-40 * (_boxed(grey, 2) - 1.02 * _boxed(grey, 5) + 0.02))).expand_as(pictures)


def _ink(pictures: Tensor) -> Tensor:
    """Fill the darkest two fifths with black, and draw lines."""
    grey = blurred(luma(pictures), 1.0)
    dark = grey.flatten(1).quantile(0.4, 1)[:, None, None, None]
    lines = (14 * (blurred(luma(pictures), 2.0) - grey)).clamp(0, 1)
    return (torch.sigmoid(60 * (grey - dark)) * (1 - lines)).expand_as(pictures)


def _cel(pictures: Tensor) -> Tensor:
    """Paint flat areas of few tones, with outlines."""
    grey = luma(pictures)
    lines = (10 * (blurred(grey, 2.0) - blurred(grey, 1.0))).clamp(0, 1)
    return (_median(pictures, 3) * 3.5).round() / 3.5 * (1 - lines)


def _oil(pictures: Tensor) -> Tensor:
    patches = _median(pictures, 4)
    return luma(patches) + 1.3 * (patches - luma(patches))


def _watercolour(pictures: Tensor) -> Tensor:
    """Lighten to washes of uneven strength, darker at their edges, on grainy paper."""
    soft = _median(pictures, 2)
    edges = (blurred(luma(soft), 2.0) - luma(soft)).abs()
    wash = 1 + 0.25 * _noise(pictures, 6.0, 5).clamp(-1.5, 1.5)
    return 1 - 0.75 * (1 - soft) * wash - 1.5 * edges + 0.03 * _noise(pictures, 0.7, 6)


def _texture(pictures: Tensor) -> Tensor:
    """Lay a weave of five pixels and grain over it."""
    wave = torch.sin(torch.arange(pictures.shape[-1]).float() * 2 * math.pi / 5)
    weave = 0.5 * (wave[:, None] + wave[None])
    return pictures * (1 + 0.18 * weave) + 0.05 * _noise(pictures, 0.8, 7)


def _vignette(pictures: Tensor) -> Tensor:
    across = torch.linspace(-1, 1, pictures.shape[-1])
    return pictures * (1 - 0.55 * (across[:, None] ** 2 + across[None] ** 2)).clamp(0, 1)


def _paste(pictures: Tensor) -> Tensor:
    """Put three emoji into each picture, where and which a fixed seed says."""
    stickers, rng, side = _stickers(), np.random.default_rng(3), pictures.shape[-1]
    pasted = pictures.clone()
    for picture in pasted:
        for _ in range(3):
            size = int(rng.integers(side // 8, side // 3))
            sticker = F.interpolate(stickers[rng.integers(len(stickers))][None], (size, size), mode="area")[0]
            y, x = rng.integers(0, side - size, 2)
            cover = (sticker.amin(0, keepdim=True) < 0.97).float()
            part = picture[:, y : y + size, x : x + size]
            picture[:, y : y + size, x : x + size] = torch.lerp(part, sticker, cover)
    return pasted


def _stickers() -> list[Tensor]:
    files = sorted(STICKERS.glob("*.png"))
    return [torch.from_numpy(np.array(Image.open(f).convert("RGB"))).permute(2, 0, 1).float() / 255 for f in files]


def _pixelate(pictures: Tensor) -> Tensor:
    side = pictures.shape[-1] // 6 * 6
    blocks = F.avg_pool2d(pictures[..., :side, :side], 6)
    return F.interpolate(blocks, pictures.shape[-2:], mode="nearest")


# "hue" turns colours by 120 degrees about the grey axis: red becomes green, green blue, blue red.
_EDITS: dict[str, Edit] = {
    "grey": _grey,
    "line_art": _line_art,
    "outlines": _outlines,
    "ink": _ink,
    "posterize": lambda pictures: (pictures * 4).round() / 4,
    "cel": _cel,
    "warm": lambda pictures: pictures * _scales(1.2, 1.0, 0.7),
    "hue": lambda pictures: pictures.roll(1, 1),
    "saturate": lambda pictures: luma(pictures) + 1.9 * (pictures - luma(pictures)),
    "blur": lambda pictures: blurred(pictures, 1.5),
    "sharpen": lambda pictures: pictures + 1.5 * (pictures - blurred(pictures, 1.5)),
    "pixelate": _pixelate,
    "vignette": _vignette,
    "oil": _oil,
    "watercolour": _watercolour,
    "night": lambda pictures: pictures**1.5 * _scales(0.35, 0.42, 0.65),
    "high_key": lambda pictures: 1 - 0.45 * (1 - pictures) ** 1.3,
    "texture": _texture,
    "paste": _paste,
}
NAMES = tuple(_EDITS)


def edited(pictures: Tensor, name: str) -> Tensor:
    """Return square pictures ``(N, 3, H, W)`` in 0..1 with one of the edits."""
    return _EDITS[name](pictures).clamp(0, 1)
