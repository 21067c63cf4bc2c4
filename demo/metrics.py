"""How the pictures are judged: style, content and diversity.

- *style*: a small network rates pictures from 0 (colour) to 1 (line art).  It was trained on pixel blends
  of the same emoji in both looks, so its scale is the blend's share.
- *ink*: the same without a network: how close every pixel is to pure black or pure white.
- *content*: a small network, trained to ignore the style, embeds the picture; the nearest of all
  names should be the prompt's; *near*: it should be among the ten nearest.
- *mosaic*: the share of the change between neighbouring pixels that lies on the borders of 4x4 blocks.
- *diversity*: the root mean square difference between pictures of one prompt and different seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

EMBEDDING = 96


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(8, outputs), nn.SiLU())


class ContentEncoder(nn.Module):
    """Embed the drawing of pictures ``(N, 3, 64, 64)`` in [-1, 1], by luminance only, as unit vectors."""

    def __init__(self, names: int) -> None:
        super().__init__()
        self.features = nn.Sequential(_stage(1, 24, 1), _stage(24, 48, 2), _stage(48, 96, 2), _stage(96, 96, 2))
        self.head = nn.Linear(96 * 4, EMBEDDING)
        self.gallery = nn.Parameter(torch.randn(names, EMBEDDING))

    def forward(self, pictures: Tensor) -> Tensor:
        """Return unit embeddings ``(N, 96)``."""
        grey = F.avg_pool2d(pictures.mean(1, keepdim=True), 2)
        return F.normalize(self.head(F.adaptive_avg_pool2d(self.features(grey), 2).flatten(1)), dim=-1)

    def similarity(self, pictures: Tensor) -> Tensor:
        """Return the cosine of each picture with each emoji of the gallery, ``(N, names)``."""
        return self(pictures) @ F.normalize(self.gallery, dim=-1).T


class StyleJudge(nn.Module):
    """Rate pictures ``(N, 3, 64, 64)`` in [-1, 1] as ``(N,)``, from 0 (colour) to 1 (line art)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(_stage(3, 16, 2), _stage(16, 32, 2), _stage(32, 48, 2))
        self.head = nn.Linear(48, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        return torch.sigmoid(self.head(self.features(pictures).mean((2, 3))))[:, 0]


class Judges(nn.Module):
    """The judges of pictures: of content, among all names, and of style."""

    def __init__(self, names: int) -> None:
        super().__init__()
        self.content, self.style = ContentEncoder(names), StyleJudge()


@dataclass(frozen=True)
class Scores:
    """Means over a set of pictures; ``content`` is the share whose emoji is retrieved first, ``near`` among ten."""

    style: float
    ink: float
    content: float
    near: float
    diversity: float
    mosaic: float = 0.0


def load_judges(path: Path) -> Judges:
    """Load the trained networks."""
    weights = load_file(str(path))
    judges = Judges(len(weights["content.gallery"]))
    judges.load_state_dict(weights)
    return judges.float().eval().requires_grad_(False)


def ink(pictures: Tensor) -> Tensor:
    """Return how close the pixels of ``(N, 3, H, W)`` are to pure black or white, ``(N,)``: 1 is pure."""
    to_black, to_white = (pictures + 1).square().mean(1), (pictures - 1).square().mean(1)
    return 1 - torch.minimum(to_black, to_white).sqrt().mean((1, 2))


def mosaic(pictures: Tensor) -> Tensor:
    """Return the share of the change between pixels of ``(N, 3, H, W)`` that is between 4x4 blocks, ``(N,)``.

    A quarter or less without blocks, 1 in a mosaic of them.
    """
    across, down = pictures.diff(dim=-1).abs(), pictures.diff(dim=-2).abs()
    between = across[..., 3::4].sum((1, 2, 3)) + down[..., 3::4, :].sum((1, 2, 3))
    return between / (across.sum((1, 2, 3)) + down.sum((1, 2, 3))).clamp(min=1e-6)


def diversity(pictures: Tensor) -> float:
    """Return the mean RMS difference, in [0, 2], between the seeds of ``(prompts, seeds, 3, H, W)`` at half size."""
    prompts, seeds = pictures.shape[:2]
    if seeds < 2:
        return 0.0
    small = F.avg_pool2d(pictures.flatten(0, 1), 2).unflatten(0, (prompts, seeds))
    pairs = torch.combinations(torch.arange(seeds))
    return float((small[:, pairs[:, 0]] - small[:, pairs[:, 1]]).square().mean((2, 3, 4)).sqrt().mean())


@torch.no_grad()
def judge(judges: Judges, pictures: Tensor, names: Tensor) -> Scores:
    """Judge ``(prompts, seeds, 3, 64, 64)`` pictures of the emoji numbered ``names`` ``(prompts,)``."""
    flat = pictures.flatten(0, 1).clamp(-1, 1)
    found = judges.content.similarity(flat).topk(10).indices
    right = found == names.repeat_interleave(pictures.shape[1])[:, None]
    return Scores(
        style=float(judges.style(flat).mean()),
        ink=float(ink(flat).mean()),
        content=float(right[:, 0].float().mean()),
        near=float(right.any(1).float().mean()),
        diversity=diversity(pictures),
        mosaic=float(mosaic(flat).mean()),
    )
