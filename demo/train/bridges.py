"""The stage ``bridges``: fit the extension's maps, by a folder of tiny autoencoders."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor, nn
from tqdm import tqdm

from demo.autoencoders import WHERE, Autoencoder, of_checkpoints, tiny, tiny_part
from demo.train.bridges_difference import (
    FULL_ONLY,
    LARGE,
    SMALL,
    Examples,
    TinyPair,
    fit_difference,
    save_difference,
)
from demo.train.bridges_difference import Size as DifferenceSize
from demo.train.bridges_fit import Size, detailed, linear_bridge, save, train_state, with_half, with_twice
from demo.train.bridges_pictures import Array, Sizes, draw, edited
from demo.train.bridges_pictures import blurred as blur
from demo.train.bridges_stitch import Layers, Seam, seen_through, stitched, tuned, until_seam
from demo.train.common import Run
from demo.train.data import Emoji
from lib_delta.bridges.latent_maps import FilteredState
from lib_delta.bridges.learned import WEIGHTS, LearnedBridge, load_bridge, weights_path
from lib_delta.bridges.stitched_difference import stitched_path
from lib_delta.diffusion.latent_spaces import Space
from lib_delta.errors import DeltaError
from lib_delta.models import taesd

BATCH = 16
HALVES = "halves"
SEEN = 128  # pictures, each with an edit, for fitting filters between tiny autoencoders
# Most pictures are made with SDXL.
LAYERS = {Space.SDXL: Layers(), **dict.fromkeys((Space.SD3, Space.FLUX1), Layers(reading=1, writing=2))}
TUNING = Run(steps=1500, batch=24, rate=4e-4, warmup=60, average=0.998)
DIFFERENCES = replace(TUNING, batch=20, rate=5e-4, warmup=40, average=0.996)
Key = TypeVar("Key")


def run(options: argparse.Namespace, load: Callable[[], Emoji]) -> None:
    """Draw the pictures, encode them, and write a file for every ordered pair of spaces.

    With ``--pair`` it writes those of this pair only.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    if options.pair:
        run_pair(options, generated(coloured(load())))
        return
    # FLUX.2's maps come from --pair, because filters are poor there.
    autoencoders = {space: each for space, each in read(options).items() if space is not Space.FLUX2}
    encoders: dict[Space | str, Autoencoder] = dict(autoencoders)
    if Space.SD1 in autoencoders:
        encoders[HALVES] = halved(autoencoders[Space.SD1])
    picture_of = generated(coloured(load()))
    latents = encode(encoders, options.pictures, picture_of)
    bench = (
        None
        if options.autoencoders
        else StitchBench(options, tiny_part(options.taesd, Space.SD1, "encoder"), picture_of)
    )
    for source, target in itertools.permutations(autoencoders, 2):
        # The side model is SD 1.x: pairs with it as the source have networks, the others only filters.
        if source is not Space.SD1:
            fitted = fit(latents[source], latents[target])
            if target is Space.SD1:  # whose pictures are often smaller than the source's
                assert isinstance(fitted.state, FilteredState)
                state = with_twice(fitted.state, latents[HALVES], latents[source])
                fitted = replace(fitted, state=state)
        elif bench is None:
            size = Size(steps=options.steps) if options.steps else None
            fitted = fit(latents[source], latents[target], size, latents[HALVES])
        else:
            fitted = bench.fit(target, latents)
        about = {"source": source.key, "target": target.key, "pictures": str(options.pictures)}
        save(fitted, options.out / weights_path(source, target).name, about)
        print(f"{source.key} and {target.key}: written")
    for name in options.stitch if bench is not None else ():
        source, target = (Space[key.upper()] for key in name.split("-"))
        pair = TinyPair.of_folder(options.taesd, source, target)
        bridge = load_bridge(options.out / weights_path(source, target).name)
        size = FULL_ONLY if source is not Space.SD1 else LARGE if target is Space.SDXL else SMALL
        stitch(options, pair, bridge, size, picture_of, options.out / stitched_path(source, target).name)


def run_pair(options: argparse.Namespace, picture_of: Callable[[Generator], Array]) -> None:
    """Fit a learned bridge and a stitched map between two tiny autoencoders of any spaces, and write both."""
    pair = TinyPair.of_files(options.pair)
    source, target = (
        Autoencoder(*each)
        for each in ((pair.source_encoder, pair.source_decoder), (pair.target_encoder, pair.target_decoder))
    )
    latents = encode({"source": source, "target": target, HALVES: halved(source)}, options.pictures, picture_of)
    bench = StitchBench(options, pair.source_encoder, picture_of)
    bridge = bench.fit_pair(pair.target_decoder, latents["source"], latents["target"], latents[HALVES], Layers(1, 2))
    about = {"pictures": str(options.pictures)}
    save(bridge, options.out / f"{options.name}.safetensors", about)
    stitch(options, pair, bridge, SMALL, picture_of, options.out / f"{options.name}-stitched.safetensors")


def stitch(
    options: argparse.Namespace,
    pair: TinyPair,
    bridge: LearnedBridge,
    size: DifferenceSize,
    picture_of: Callable[[Generator], Array],
    path: Path,
) -> None:
    """Fit a stitched difference map that stands on a learned bridge, and write it."""
    examples, training = Examples.draw(pair, options.pictures, picture_of), replace(DIFFERENCES, steps=options.steps)
    name = f"{path.stem}-{options.pictures}-{options.steps}"
    made = fit_difference(pair, examples, bridge, size, training, name, options.cache)
    save_difference(made, path, {"pictures": str(options.pictures), "steps": str(options.steps)})
    print(f"{path.name}: written")


class StitchBench:
    """The inputs for fitting bridges from SD 1.x, if there are tiny autoencoders to stitch."""

    def __init__(
        self, options: argparse.Namespace, encoder: nn.Sequential, picture_of: Callable[[Generator], Array]
    ) -> None:
        self.options, self.encoder = options, encoder
        self.seam = seam(self.encoder, min(SEEN, options.pictures), picture_of)

    def fit(self, target: Space, latents: Mapping[Space | str, Tensor]) -> LearnedBridge:
        """Fit the bridge to a target, on the latents of every space and those of half the size."""
        decoder = tiny_part(self.options.taesd, target, "decoder")
        return self.fit_pair(decoder, latents[Space.SD1], latents[target], latents[HALVES], LAYERS[target], target.key)

    def fit_pair(
        self,
        decoder: nn.Sequential,
        source: Tensor,
        wanted: Tensor,
        halves: Tensor,
        layers: Layers,
        key: str = "pair",
    ) -> LearnedBridge:
        """Fit the bridge to a target, on latents ``(N, 2, C, h, w)`` of both spaces and of half the size."""
        linear = linear_bridge(source, wanted)
        z, same, half = (each.flatten(0, 1) for each in (wanted, source, halves))
        seen = len(self.seam.same)
        state = stitched(decoder, self.encoder, layers, z[:seen], self.seam)
        if self.options.steps:
            run, look = replace(TUNING, steps=self.options.steps), seen_through(same[:seen], self.seam.pixels)
            name = f"bridge-{key}-{self.options.pictures}-{run.steps}"
            state = tuned(state, z, (same, half), look, run, name, self.options.cache)
        difference = detailed(linear.difference, source, wanted)
        return LearnedBridge(state.requires_grad_(False), difference)


def seam(encoder: nn.Sequential, count: int, picture_of: Callable[[Generator], Array]) -> Seam:
    """Return an encoder's intermediate features for the first ``count`` pictures and their edits."""
    first = until_seam(encoder)
    same = Autoencoder(first, first)
    pixels = Autoencoder(partial(F.pixel_unshuffle, downscale_factor=taesd.FACTOR), first)
    seen = encode({"same": same, "half": halved(same), "pixels": pixels}, count, picture_of)
    return Seam(**{key: each.flatten(0, 1).float() for key, each in seen.items()})


def coloured(emoji: Emoji) -> Tensor:
    """Return the coloured sets, uint8 ``(N, 3, 64, 64)``."""
    return torch.cat([emoji.pictures[name] for name in ("flat", "noto")])


def read(options: argparse.Namespace) -> dict[Space, Autoencoder]:
    """Return the autoencoders that the command line names; exit with a sentence if there are none."""
    try:
        if options.autoencoders:
            return of_checkpoints(options.autoencoders)
        if options.taesd is None:
            raise SystemExit(f"no autoencoders were given: {WHERE}, or checkpoints with --autoencoders A B")
        return tiny(options.taesd)
    except DeltaError as error:
        raise SystemExit(str(error)) from error


def halved(autoencoder: Autoencoder) -> Autoencoder:
    """Return an autoencoder that encodes pictures at half the size."""
    return replace(autoencoder, encoder=lambda pictures: autoencoder.encoder(F.avg_pool2d(pictures, 2)))


def fit(source: Tensor, target: Tensor, size: Size | None = None, halves: Tensor | None = None) -> LearnedBridge:
    """Fit a bridge to the latents ``(N, 2, C, H, W)`` of pictures and their edits in two spaces.

    Without a ``size`` it consists of filters.  With one, the map of states also has a network, and that of differences
    takes detail from the target's latent.  ``halves``, the source's latents of the pictures at half the size, train the
    map of states to predict these.  Both spaces must have as many latent pixels per picture.
    """
    bridge = linear_bridge(source, target)
    if size is not None:
        difference = detailed(bridge.difference, source, target)
        bridge = replace(bridge, state=train_state(bridge, source, target, size), difference=difference)
    return bridge if halves is None else replace(bridge, state=with_half(bridge.state, target, halves))


def generated(emoji: Tensor | None) -> Callable[[Generator], Array]:
    """Return a function that draws a random picture ``(3, 128, 128)``, with or without emoji ``(N, 3, 64, 64)``."""
    return lambda rng: draw(rng, Sizes(), emoji)


def encode(
    autoencoders: Mapping[Key, Autoencoder], count: int, picture_of: Callable[[Generator], Array], seed: int = 1
) -> dict[Key, Tensor]:
    """Draw ``count`` pictures and an edit of each, and return their latents ``(N, 2, C, H, W)`` in every space."""
    rng = np.random.default_rng(seed)
    latents: dict[Key, list[Tensor]] = {space: [] for space in autoencoders}
    before = picture_of(rng)
    for _ in tqdm(range(0, count, BATCH), desc="drawing and encoding"):
        pairs = []
        for _ in range(BATCH):
            picture = picture_of(rng)
            change, _ = edited(rng, picture, before)
            before = picture
            if rng.random() < 0.2:  # like an estimate at high noise
                sigma = float(np.exp(rng.uniform(0, np.log(12))))
                picture, change = blur(picture, sigma), blur(change, sigma)
            pairs.append(np.stack((picture, change)))
        pictures = torch.from_numpy(np.stack(pairs))
        for space, autoencoder in autoencoders.items():
            latents[space].append(autoencoder.encode(pictures.flatten(0, 1)).unflatten(0, (BATCH, 2)).half())
    return {space: torch.cat(parts) for space, parts in latents.items()}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that this stage and the evaluation of bridges share."""
    parser.add_argument("--taesd", type=Path, help="bridges: a folder of tiny autoencoders (TAESD)")
    parser.add_argument(
        "--autoencoders",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="bridges: checkpoints with autoencoders to use",
    )
    parser.add_argument("--pictures", type=int, default=2400, help="bridges: how many pictures to fit on")


def add_stage_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of only this stage."""
    add_options(parser)
    parser.add_argument(
        "--steps",
        type=int,
        default=TUNING.steps,
        help="bridges: steps of each network that maps states to SD 1.x (0: what least squares alone give)",
    )
    parser.add_argument(
        "--stitch",
        nargs="*",
        default=["sd1-sdxl"],
        metavar="SOURCE-TARGET",
        help="bridges: pairs of spaces whose stitched difference map is fitted as well (sd1, sdxl, sd3, flux1)",
    )
    parser.add_argument(
        "--pair",
        type=Path,
        nargs=4,
        metavar=("SOURCE_ENCODER", "SOURCE_DECODER", "TARGET_ENCODER", "TARGET_DECODER"),
        help="bridges: fit only the maps between these two tiny autoencoders, of any spaces",
    )
    parser.add_argument("--name", default="pair", help="bridges: the name of the files that --pair writes")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="bridges: the folder to write to")
