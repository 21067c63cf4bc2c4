"""Train the networks that judge the pictures."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.metrics import Judges
from demo.train.common import Run, train
from demo.train.data import Emoji, augment, to_float


def train_metrics(emoji: Emoji, folder: Path, run: Run) -> Judges:
    """Train the content encoder (classification over all names) and the style judge (share of a blend)."""
    torch.manual_seed(run.seed)
    judges = Judges(len(emoji.prompts))
    colour = torch.stack([emoji.pictures["flat"], emoji.pictures["noto"]])
    lineart = emoji.pictures["lineart"]

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(lineart), (run.batch,), generator=generator)
        which = torch.randint(2, (run.batch,), generator=generator)
        share = (torch.rand(run.batch, generator=generator) * 1.5 - 0.25).clamp(0, 1)
        # The same augmentation for both, so that a blend shows one drawing.
        seed = int(torch.randint(2**31, (1,), generator=generator))
        pair = [
            augment(to_float(p), torch.Generator().manual_seed(seed)) for p in (colour[which, index], lineart[index])
        ]
        blend = torch.lerp(pair[0], pair[1], share[:, None, None, None])
        style = (judges.style(_damage(blend, generator)) - share).square().mean()
        drawn = torch.cat([_restyle(p, generator) for p in pair])
        logits = 16 * judges.content.similarity(_damage(drawn, generator))
        return F.cross_entropy(logits, index.repeat(2)) + style

    trained = train("metrics", judges, loss, folder, run)
    assert isinstance(trained, Judges)
    return trained


def _restyle(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Leave a picture as it is, outline it, or reduce it to black and white; mixed at random."""
    count = len(pictures)
    grey = pictures.mean(1, keepdim=True)
    spread = F.max_pool2d(grey, 3, 1, 1) + F.max_pool2d(-grey, 3, 1, 1)
    outline = 1 - 2 * (spread * 1.5).clamp(0, 1)
    threshold = torch.rand(count, 1, 1, 1, generator=generator) * 1.2 - 0.4
    two_tone = torch.tanh(6 * (grey - threshold))
    # Cubing makes one of the three dominate most mixtures.
    weights = torch.rand(3, count, 1, 1, 1, generator=generator) ** 3 + 1e-3
    weights = weights / weights.sum(0)
    return weights[0] * pictures + weights[1] * outline + weights[2] * two_tone


def _damage(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Blur and add noise at random by a little, because generated pictures are not clean."""
    count = len(pictures)
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    mixed = torch.lerp(pictures, blurred, torch.rand(count, 1, 1, 1, generator=generator))
    level = 0.15 * torch.rand(count, 1, 1, 1, generator=generator)
    return mixed + level * torch.randn(pictures.shape, generator=generator)
