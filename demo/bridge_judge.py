"""Judge ways of carrying a change in decoded pictures: part of ``python -m demo.evaluate --only bridges``.

Every way gets the source's true change, at the target's size or a smaller one, and the target's clean latent. The
target's decoder then shows the edit. Its PSNR against the edited photo lies between that of no change and that of the
true change, which loses what the autoencoder loses.

``latent_rgb_factors.json`` has a second judge: the linear estimates of colour that WebUIs use for previews, ``(C, 3)``
for each space. They were made from the released autoencoders, and no tiny one had a part in them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.autoencoders import Autoencoder
from demo.edits import NAMES, edited, luma
from lib_delta.bridges import Bridge, Crossing, SideSize, choose_bridge
from lib_delta.bridges.stitched_difference import stitched_path
from lib_delta.diffusion.latent_spaces import Space

# Forms of bridges; "taesd" shows what the tiny autoencoders make of a change (the bridge of that name carries states
# only), and "scale" is the form "same_snr".
FORMS = {"learned": "learned", "stitched": "stitched", "scale": "same_snr"}
WAYS = ("learned", "stitched", "taesd", "scale")
NONE, TRUE = "none", "true"
RGB_FACTORS = Path(__file__).with_name("latent_rgb_factors.json")


@dataclass(frozen=True)
class Score:
    """How well an edit is carried: means over photos.

    ``cosine`` and ``size`` compare the latent's change with the true one (size: the median ratio of norms). ``psnr``
    compares the decoded edit with the edited photo, in decibels. ``edges`` and ``colours`` are cosines of the decoded
    change with the photo's: of the gradient's size, and of averages over 8x8 pixels. ``factors`` is that of colours by
    the published linear estimates, without a decoder.
    """

    cosine: float
    size: float
    psnr: float
    edges: float
    colours: float
    factors: float


Scores = dict[str, dict[str, Score]]  # by edit, then by way


def judged_pairs(spaces: Sequence[Space]) -> list[tuple[Space, Space]]:
    """Return the pairs of spaces that have a stitched map."""
    return [(a, b) for a in spaces for b in spaces if a is not b and stitched_path(a, b).exists()]


class PictureJudge:
    """Photos ``(N, 3, H, H)``, and the ways of one pair of spaces, with the source at 1 / ``ratio`` of the size."""

    def __init__(
        self, photos: Tensor, autoencoders: Mapping[Space, Autoencoder], pair: tuple[Space, Space], ratio: float = 1
    ) -> None:
        self.photos, self.factors = photos, rgb_factors(pair[1])
        self.side = round(photos.shape[-1] / ratio)
        self.start, self.end = (autoencoders[space] for space in pair)
        self.target = self.end.encode(photos)
        self.bridges = self._bridges(*pair)

    def _bridges(self, source: Space, target: Space) -> dict[str, Bridge]:
        size: SideSize = "picture" if self.side == self.photos.shape[-1] else self.side
        ways = [way for way in FORMS if way != "scale" or source.channels == target.channels]
        return {way: choose_bridge(source, target, form=FORMS[way], size=size) for way in ways}

    @cached_property
    def shown(self) -> Tensor:
        """The photos as the target's decoder shows them."""
        return self.end.decode(self.target)

    def measure(self, edits: Sequence[str] = NAMES) -> Scores:
        """Score every way at every edit."""
        return {name: self._scores(edited(self.photos, name)) for name in edits}

    def _scores(self, goal: Tensor) -> dict[str, Score]:
        true = self.end.encode(goal) - self.target
        change = self._of_source(goal) - self._of_source(self.photos)
        carried = {NONE: torch.zeros_like(true), TRUE: true}
        for way in WAYS:
            if way == "taesd":
                carried[way] = self._over_pictures(change)
            elif way in self.bridges:
                bridge = self.bridges[way]
                carried[way] = bridge.delta_to_target(change, _crossing(bridge, self.target))
        return {way: self._score(each, true, goal) for way, each in carried.items()}

    def _of_source(self, pictures: Tensor) -> Tensor:
        return self.start.encode(F.interpolate(pictures, (self.side, self.side), mode="area"))

    def _over_pictures(self, change: Tensor) -> Tensor:
        """Return the change of the target's picture that the source's decoder shows, encoded."""
        bridge = self.bridges["learned"]
        state = _crossing(bridge, self.target).denoised
        seen = self.start.decode(state + change) - self.start.decode(state)
        seen = F.interpolate(seen, self.photos.shape[-2:], mode="bilinear", align_corners=False)
        return self.end.encode((self.shown + seen).clamp(0, 1)) - self.end.encode(self.shown)

    def _score(self, change: Tensor, true: Tensor, goal: Tensor) -> Score:
        made = self.end.decode(self.target + change)
        sizes = change.flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1).clamp(min=1e-6)
        return Score(
            _cosine(change, true),
            float(sizes.median()),
            psnr(made, goal),
            _cosine(_edges(made) - _edges(self.shown), _edges(goal) - _edges(self.photos)),
            _cosine(F.avg_pool2d(made - self.shown, 8), F.avg_pool2d(goal - self.photos, 8)),
            _cosine(torch.einsum("nchw,ck->nkhw", change, self.factors), F.avg_pool2d(goal - self.photos, 8)),
        )


@cache
def rgb_factors(space: Space) -> Tensor:
    """Return the published linear estimate of colour by the channels of a space, ``(C, 3)``."""
    return torch.tensor(json.loads(RGB_FACTORS.read_text("utf-8"))[space.key])


def psnr(made: Tensor, goal: Tensor) -> float:
    """Return the mean PSNR of pictures in 0..1."""
    return float((-10 * (made - goal).square().mean((1, 2, 3)).log10()).mean())


def _crossing(bridge: Bridge, target: Tensor) -> Crossing:
    return bridge.to_source(target, torch.ones(len(target)), target)[2]


def _cosine(made: Tensor, true: Tensor) -> float:
    return float(F.cosine_similarity(made.flatten(1), true.flatten(1)).mean())


def _edges(pictures: Tensor) -> Tensor:
    grey = luma(pictures)
    down, across = (grey[..., 1:, :-1] - grey[..., :-1, :-1], grey[..., :-1, 1:] - grey[..., :-1, :-1])
    return (down.square() + across.square() + 1e-6).sqrt()


def summary(scores: Scores) -> dict[str, dict[str, float]]:
    """Return the means over edits by way, and ``worst``: the least gain in PSNR over "learned" at any edit."""
    ways = next(iter(scores.values()))
    rows = {}
    for way in ways:
        each = [row[way] for row in scores.values()]
        means = {field.name: sum(getattr(s, field.name) for s in each) / len(each) for field in fields(Score)}
        rows[way] = means | {"worst": min(row[way].psnr - row["learned"].psnr for row in scores.values())}
    return rows


def figures(scores: Scores) -> dict[str, object]:
    """Return what ``bridges.json`` stores: the summary, and the PSNR by edit and way."""
    by_edit = {name: {way: score.psnr for way, score in row.items()} for name, row in scores.items()}
    return {"mean": summary(scores), "by_edit": by_edit}


def markdown(scores: Scores, title: str) -> str:
    """Format the summary as a Markdown table, and the PSNR by edit as a second one."""
    columns = ("cosine", "size", "psnr", "edges", "colours", "factors", "worst")
    lines = [f"| {title} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for way, row in summary(scores).items():
        lines.append(f"| {way} | " + " | ".join(f"{row[column]:.2f}" for column in columns) + " |")
    ways = list(next(iter(scores.values())))
    lines += ["", "| PSNR | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(f"{row[way].psnr:.1f}" for way in ways) + " |" for name, row in scores.items()
    ]
    return "\n".join(lines)
