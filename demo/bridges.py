"""Measure how well bridges map states and differences, on photos: ``python -m demo.evaluate --only bridges``.

States: the share of the source latent's variance that the map leaves unexplained, and the PSNR of the source decoder's
picture of it.  The ceiling is the decoder's picture of the source's encoding.  Both are also measured at half the size.

Differences: the cosine between an ideal source's delta, mapped, and the true change in the target's latent, for five
edits; at full detail, and averaged 2x2.  Pairs with a stitched map are also judged in decoded pictures
(:mod:`demo.bridge_judge`).
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from demo import bridge_judge as judge
from demo.autoencoders import Autoencoder
from demo.edits import blurred, edited
from demo.train import bridges as stage
from lib_delta.bridges import Bridge, LearnedBridge, ResolutionBridge, ScaleBridge, SideSize, choose_bridge
from lib_delta.bridges.learned import load_bridge, weights_path
from lib_delta.bridges.stitched_difference import load_stitched, stitched_path
from lib_delta.diffusion.latent_spaces import LATENT_STRIDE, Space

SIDE = 192
PUBLIC_DOMAIN = ("astronaut", "chelsea", "coffee", "rocket", "retina", "hubble_deep_field")  # scikit-image's names
SHOWN = (Space.SD1, Space.SDXL)
RATIOS = (1.0, 2.0, 1.5, 3.0)  # of the target's size to the source's
SIZES = {1.0: "full", 2.0: "half", 1.5: "1/1.5", 3.0: "1/3"}
STRIP_EDITS = ("line_art", "watercolour", "warm", "grey")
Figures = dict[str, Any]


def photos(folder: Path | None) -> Tensor:
    """Return square photos ``(N, 3, 192, 192)`` in 0..1 from a folder, or scikit-image's public-domain ones."""
    if folder is None:
        from skimage import data

        return torch.stack([_square(Image.fromarray(getattr(data, name)())) for name in PUBLIC_DOMAIN])
    paths = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")]
    if not paths:
        raise SystemExit(f"{folder} has no photos (.jpg, .png or .webp)")
    return torch.stack([_square(Image.open(path)) for path in paths])


def _square(picture: Image.Image) -> Tensor:
    picture = picture.convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


# The edits of the tables of differences.
EDITS: dict[str, Callable[[Tensor], Tensor]] = {
    name: partial(edited, name=name) for name in ("grey", "line_art", "warm", "hue", "blur")
}


class Latents:
    """Photos and their edits in every space, encoded once."""

    def __init__(self, pictures: Tensor, autoencoders: Mapping[Space, Autoencoder]) -> None:
        self.pictures, self.autoencoders = pictures, autoencoders
        self.ceiling: dict[Space, float] = {}
        self.clean = {space: each.encode(pictures) for space, each in autoencoders.items()}
        self.soft = {space: each.encode(blurred(pictures, 4.0)) for space, each in autoencoders.items()}
        self.halves = {space: each.encode(F.avg_pool2d(pictures, 2)) for space, each in autoencoders.items()}
        self.changes = {
            space: {name: each.encode(edit(pictures)) - self.clean[space] for name, edit in EDITS.items()}
            for space, each in autoencoders.items()
        }

    def state(self, bridge: Bridge, start: Space, end: Space) -> Figures:
        """Measure the state map of the bridge with target ``start`` and source ``end``.

        A denoising model's estimate at high noise is blurred, or an average of latents, so both are mapped as well.
        """
        own = self.autoencoders[end]
        mapped = to_source(bridge, self.clean[start])
        return {
            "state_unexplained": _unexplained(mapped, self.clean[end]),
            "state_unexplained_blurred": _unexplained(to_source(bridge, self.soft[start]), self.soft[end]),
            "state_unexplained_averaged": _unexplained(
                to_source(bridge, _averaged(self.clean[start])), _averaged(self.clean[end])
            ),
            "state_psnr": _psnr(own.decode(mapped), self.pictures),
            "state_psnr_ceiling": self._ceiling(end),
        }

    def half(self, bridge: LearnedBridge, start: Space, end: Space) -> Figures:
        """Measure the state map at half the size of the pictures."""
        own, wanted = self.autoencoders[end], self.halves[end]
        side = min(wanted.shape[-2:])
        mapped = to_source(replace(bridge, resolution=ResolutionBridge(side, side)), self.clean[start])
        smaller = F.avg_pool2d(self.pictures, 2)
        return {
            "half_unexplained": _unexplained(mapped, wanted),
            "half_psnr": _psnr(own.decode(mapped), smaller),
            "half_psnr_ceiling": _psnr(own.decode(wanted), smaller),
        }

    def _ceiling(self, space: Space) -> float:
        if space not in self.ceiling:
            made = self.autoencoders[space].decode(self.clean[space])
            self.ceiling[space] = _psnr(made, self.pictures)
        return self.ceiling[space]

    def differences(self, bridge: Bridge, start: Space, end: Space, average: int = 1) -> dict[str, float]:
        """Return the cosines for a bridge whose source is ``start`` and target ``end``, by edit."""
        return {
            name: _cosine(carried(bridge, change, self.clean[end]), self.changes[end][name], average)
            for name, change in self.changes[start].items()
        }


def to_source(bridge: Bridge, target: Tensor) -> Tensor:
    """Map a clean latent of the target to the source's space."""
    return bridge.to_source(target, torch.ones(len(target)), target)[2].denoised


def carried(bridge: Bridge, change: Tensor, target: Tensor) -> Tensor:
    """Map a change of the source's latent to the target's space, at the target's latent ``target``."""
    return bridge.delta_to_target(change, bridge.to_source(target, torch.ones(len(target)), target)[2])


def _unexplained(mapped: Tensor, wanted: Tensor) -> float:
    """Return the residual variance over the variance of all photos together; a constant prediction would give 1."""
    about = wanted - wanted.mean((0, 2, 3), keepdim=True)
    return float((mapped - wanted).square().sum() / about.square().sum())


def _averaged(latents: Tensor) -> Tensor:
    """Return the average of each item and the two before it."""
    return (latents + latents.roll(1, 0) + latents.roll(2, 0)) / 3


def _psnr(made: Tensor, wanted: Tensor) -> float:
    return float((-10 * (made - wanted).square().mean((1, 2, 3)).log10()).mean())


def _cosine(made: Tensor, wanted: Tensor, average: int) -> float:
    return float(F.cosine_similarity(*(F.avg_pool2d(d, average).flatten(1) for d in (made, wanted))).mean())


def figures(latents: Latents, bridge: Callable[[Space, Space], LearnedBridge | None]) -> Figures:
    """Measure every ordered pair of spaces: ``a->b`` has the state map and the difference map from a to b."""
    table: Figures = {}
    for start, end in itertools.permutations(latents.autoencoders, 2):
        there, back = bridge(start, end), bridge(end, start)
        row: Figures = {}
        if back is not None:
            row |= latents.state(back, start, end) | latents.half(back, start, end)
        if there is not None:
            row |= latents.differences(there, start, end)
            row["averaged_2x2"] = latents.differences(there, start, end, 2)
        if start.channels == end.channels:
            scale = ScaleBridge(start.scale_factor / end.scale_factor)
            row["scale"] = latents.state(
                ScaleBridge(end.scale_factor / start.scale_factor), start, end
            ) | latents.differences(scale, start, end)
        if row:
            table[f"{start.key}->{end.key}"] = row
    return table


def shipped(source: Space, target: Space) -> LearnedBridge | None:
    """Return the extension's bridge for an ordered pair; None if it has none."""
    path = weights_path(source, target)
    return load_bridge(path) if path.exists() else None


def strip(latents: Latents, start: Space, end: Space) -> Image.Image:
    """Draw photo, edited photo, and photo with the delta mapped by scale and by the default bridge, for some edits.

    The source sees the photo at half the size, as SD 1.x sees a picture of 1024 x 1024.
    """
    size: SideSize = LATENT_STRIDE * (latents.clean[end].shape[-1] // 2)
    ways = [choose_bridge(start, end, form=form, size=size) for form in ("same_snr", "stitched")]
    source, own = latents.autoencoders[start], latents.autoencoders[end]
    columns = ("photo", "edited photo", "photo + delta, scaled", "photo + delta, stitched bridge")
    rows = list(enumerate(STRIP_EDITS[: len(latents.pictures)]))
    sheet = Image.new("RGB", (len(columns) * SIDE, len(rows) * SIDE + 18), "white")
    for column, title in enumerate(columns):
        ImageDraw.Draw(sheet).text((column * SIDE + 4, 3), title, fill="black")
    for row, (i, name) in enumerate(rows):
        photo, target = latents.pictures[i : i + 1], latents.clean[end][i : i + 1]
        shown = [photo, edited(photo, name)]
        change = source.encode(F.avg_pool2d(shown[1], 2)) - latents.halves[start][i : i + 1]
        shown += [own.decode(target + carried(way, change, target)) for way in ways]
        for column, picture in enumerate(shown):
            pixels = (picture[0].permute(1, 2, 0) * 255).round().byte().numpy()
            sheet.paste(Image.fromarray(pixels), (column * SIDE, 18 + row * SIDE))
    return sheet


def measure(options: argparse.Namespace) -> None:
    """Measure the extension's bridges and, with checkpoints' autoencoders, filters fitted to these.

    Figures go to ``--bridges-out``, with the strip next to it.
    """
    torch.set_num_threads(1)
    autoencoders = stage.read(options)
    latents = Latents(photos(options.photos), autoencoders)
    table = figures(latents, shipped)
    shown = [] if options.autoencoders else judged(latents.pictures, autoencoders, table)
    if options.autoencoders:
        fitted = stage.encode(autoencoders, options.pictures, stage.generated(None))
        refitted = figures(latents, lambda source, target: stage.fit(fitted[source], fitted[target]))
        for pair, row in refitted.items():
            table[pair]["refitted"] = row
    drawn = all(space in autoencoders for space in SHOWN)
    write(options.bridges_out, table, strip(latents, *SHOWN) if drawn else None)
    print(markdown(table), *shown, f"written to {options.bridges_out}", sep="\n\n")
    if options.autoencoders:
        print("\nfilters fitted anew to these autoencoders:", markdown(refitted), sep="\n\n")


def judged(pictures: Tensor, autoencoders: Mapping[Space, Autoencoder], table: Figures) -> list[str]:
    """Judge the pairs that have a stitched map in pictures; add figures, and return Markdown tables.

    Maps that know sources of half the size are judged at both sizes, and the pair that is drawn at two more.
    """
    shown = []
    for source, target in judge.judged_pairs(tuple(autoencoders)):
        row = table.setdefault(f"{source.key}->{target.key}", {})
        ratios = RATIOS if (source, target) == SHOWN else RATIOS[:2]
        maps_half = load_stitched(stitched_path(source, target)).maps_half
        for ratio in ratios if maps_half else (1.0,):
            scores = judge.PictureJudge(pictures, autoencoders, (source, target), ratio).measure()
            row.setdefault("pictures", {})[SIZES[ratio]] = judge.figures(scores)
            shown.append(judge.markdown(scores, f"{source.key}->{target.key}, source at {SIZES[ratio]} size"))
    return shown


def write(out: Path, table: Figures, sheet: Image.Image | None) -> None:
    """Write the figures, rounded, and the strip next to them."""
    out.write_text(json.dumps(_rounded(table), indent=1) + "\n", "utf-8")
    if sheet is not None:
        sheet.quantize(256).save(out.with_suffix(".png"), optimize=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return round(value, 3) if isinstance(value, float) else value


def markdown(table: Figures) -> str:
    """Format the figures as two Markdown tables."""
    titles = "state", "unexplained", "blurred", "averaged", "PSNR decoded (ceiling)", "half the size", "PSNR (ceiling)"
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for pair, row in table.items():
        if "state_psnr" not in row:
            continue
        shares = [f"{row[f'state_unexplained{kind}']:.2f}" for kind in ("", "_blurred", "_averaged")]
        same, half = (f"{row[f'{kind}_psnr']:.1f} ({row[f'{kind}_psnr_ceiling']:.1f})" for kind in ("state", "half"))
        lines.append(f"| {' | '.join((pair, *shares, same, format(row['half_unexplained'], '.2f'), half))} |")
    lines += [
        "",
        "| difference, full detail / averaged 2x2 | " + " | ".join(EDITS) + " |",
        "|---" * (len(EDITS) + 1) + "|",
    ]
    for pair, row in table.items():
        if "averaged_2x2" not in row:
            continue
        cells = [f"{row[name]:.2f} / {row['averaged_2x2'][name]:.2f}" for name in EDITS]
        lines.append(f"| {pair} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
