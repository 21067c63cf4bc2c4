"""Fit stitched difference maps: filters by least squares, then all of a map by descent on latents and pictures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from demo.autoencoders import Autoencoder, tiny_part
from demo.edits import blurred
from demo.train.bridges_fit import fit_filter
from demo.train.bridges_pictures import Array
from demo.train.bridges_stitch import RIDGE, averaged_with_others, copy_layers
from demo.train.bridges_styles import styled
from demo.train.common import Run, train
from lib_delta.bridges.int8_weights import pack
from lib_delta.bridges.latent_maps import Filter, StateMap
from lib_delta.bridges.learned import LearnedBridge
from lib_delta.bridges.stitched_difference import StitchedDifference
from lib_delta.diffusion.latent_spaces import Space
from lib_delta.models import taesd

EDITS = 3  # of each picture
SEEN = 256  # pictures that filters of least squares are fitted on
FLOOR = 0.004  # squared error of a picture in 0..1 that a tiny autoencoder makes
LOOK_BLOCKS = 2
CROP, MARGIN = 10, 1  # of the latents that are decoded in training, and what of them only surrounds


@dataclass(frozen=True)
class TinyPair:
    """The tiny autoencoders of a source and a target, in single precision."""

    source_encoder: nn.Sequential
    source_decoder: nn.Sequential
    target_encoder: nn.Sequential
    target_decoder: nn.Sequential

    @classmethod
    def of_folder(cls, folder: Path, source: Space, target: Space) -> TinyPair:
        """Read the files of two spaces."""
        return cls(*(tiny_part(folder, space, part) for space in (source, target) for part in taesd.PARTS))

    @classmethod
    def of_files(cls, paths: Sequence[Path]) -> TinyPair:
        """Read four files of any two spaces: the source's encoder and decoder, and the target's."""
        return cls(*(taesd.load_taesd(path, part) for path, part in zip(paths, taesd.PARTS * 2, strict=True)))

    @property
    def channels(self) -> tuple[int, int]:
        """The channels of the source's latents and of the target's."""
        encoders = self.source_encoder, self.target_encoder
        source, target = (taesd.latent_channels(encoder, "encoder") for encoder in encoders)
        return source, target


@dataclass(frozen=True)
class Size:
    """The layers of a map: blocks of the decoder and of the encoder, and channels that lead up from half the size."""

    reading: int = 2
    writing: int = 2
    raised: int = 32
    linear: int = 3


# As shipped for SDXL; for other targets; and for sources that have no state map of half the size.
LARGE, SMALL = Size(), Size(reading=1, raised=16, linear=1)
FULL_ONLY = Size(reading=1, writing=1, raised=0, linear=1)


@dataclass(frozen=True)
class Examples:
    """Latents ``(N, 1 + E, C, h, w)`` of pictures and E edits of each; ``half``: the source's at half the size.

    ``pictures`` are bytes, ``(N, 1 + E, 3, 8 * h, 8 * w)``.
    """

    source: Tensor
    half: Tensor
    target: Tensor
    pictures: Tensor

    @classmethod
    @torch.no_grad()
    def draw(cls, pair: TinyPair, count: int, picture_of: Callable[[Generator], Array], seed: int = 2) -> Examples:
        """Draw ``count`` pictures and their edits, and encode them."""
        to_source, to_target = (_quick(each) for each in (pair.source_encoder, pair.target_encoder))
        rng = np.random.default_rng(seed)
        before, rows = picture_of(rng), []
        for _ in tqdm(range(count), desc="drawing and encoding"):
            picture = picture_of(rng)
            shown = torch.from_numpy(np.stack([picture, *(styled(rng, picture, before) for _ in range(EDITS))]))
            before = picture
            source, half = (to_source(each).half() for each in (shown, F.avg_pool2d(shown, 2)))
            in_bytes = (shown * 255).round().clamp(0, 255).byte()
            rows.append((source, half, to_target(shown).half(), in_bytes))
        return cls(*(torch.stack(column) for column in zip(*rows)))


def _quick(encoder: nn.Sequential) -> Callable[[Tensor], Tensor]:
    """Return an encoder's copy in bfloat16, as the files store it."""
    quick = copy.deepcopy(encoder).bfloat16().to(memory_format=torch.channels_last)
    return Autoencoder(quick, quick, torch.bfloat16).encode


@dataclass(frozen=True)
class Batch:
    """Changes that a map is fitted to, at one size of the source; ``edited`` are pictures in 0..1."""

    change: Tensor
    state: Tensor
    known: Tensor
    features: Tensor
    target: Tensor
    true: Tensor
    edited: Tensor


class Lessons:
    """Batches of examples, with what the learned bridge makes of them."""

    def __init__(self, examples: Examples, bridge: LearnedBridge) -> None:
        assert isinstance(bridge.state, StateMap)
        self.examples, self.state, self.difference = examples, bridge.state, bridge.difference

    def __len__(self) -> int:
        return len(self.examples.target)

    @torch.no_grad()
    def batch(self, rows: Tensor, edits: Tensor, half: bool, soften: Callable[[Tensor, bool], Tensor]) -> Batch:
        """Return the examples ``rows`` with one edit each; ``soften(latents, is_half)`` makes them less sharp."""
        small = self.examples.half if half else self.examples.source
        before, after = ((each[rows, 0].float(), each[rows, edits].float()) for each in (small, self.examples.target))
        change = soften(before[1] - before[0], half)
        target, true = soften(after[0], False), soften(after[1] - after[0], False)
        known = self.state.known(target)
        state = self.state.mapped(known, (change.shape[-2], change.shape[-1]))
        enlarged = F.interpolate(change, target.shape[-2:], mode="bilinear", align_corners=False) if half else change
        edited = self.examples.pictures[rows, edits].float() / 255
        return Batch(change, state, known, self.difference.features(enlarged, target), target, true, edited)

    def parts(self, half: bool, count: int = 16) -> list[Batch]:
        """Return the first examples with every edit, as they are, in batches."""
        pairs = torch.cartesian_prod(torch.arange(min(SEEN, len(self))), torch.arange(1, EDITS + 1))
        return [self.batch(part[:, 0], part[:, 1], half, lambda x, _: x) for part in pairs.split(count)]


def _copied(layers: nn.Sequential) -> Callable[[Tensor], Tensor]:
    return lambda pictures: torch.cat([layers(part) for part in pictures.split(4)])


@torch.no_grad()
def stitched_difference(pair: TinyPair, lessons: Lessons, size: Size, known: int) -> StitchedDifference:
    """Return a map of the two autoencoders' layers and filters of least squares, without any training."""
    made = StitchedDifference(pair.channels, (size.reading, size.writing), known, 3, size.linear, size.raised)
    copy_layers(made.reading, pair.source_decoder[: len(made.reading)])
    copy_layers(made.writing, pair.target_encoder[-len(made.writing) :])
    first = _copied(pair.target_encoder[: len(pair.target_encoder) - len(made.writing)])
    plain = [first(each.float() / 255) for each in lessons.examples.pictures[:SEEN, 0].split(16)]
    full, half = lessons.parts(False), lessons.parts(True)
    seam = [first(batch.edited) for batch in full]
    base = torch.cat(plain).repeat_interleave(EDITS, 0).split(16)
    made.base = fit_filter([(b.known, s) for b, s in zip(full, base)], 3, bias=True, ridge=RIDGE)
    changes = [after - before for after, before in zip(seam, base)]
    read = [made.read(b.change, b.state) for b in full]
    made.seam = fit_filter(list(zip(read, changes)), 3, bias=False, ridge=RIDGE)
    rest = [c - made.seam(r) for c, r in zip(changes, read)]
    made.linear = fit_filter([(b.features, c) for b, c in zip(full, rest)], size.linear, bias=False, ridge=RIDGE)
    made.out = _last(made, full, half=False)
    if made.maps_half:
        read = [made.read(b.change, b.state) for b in half]
        packed = [(r, F.pixel_unshuffle(c, 2)) for r, c in zip(read, changes)]
        made.half_seam.weight.copy_(_factored(fit_filter(packed, 3, bias=False, ridge=RIDGE), made.half_mix))
        rest = [c - made.half_mix(F.pixel_shuffle(made.half_seam(r), 2)) for c, r in zip(changes, read)]
        pairs = [(b.features, c) for b, c in zip(half, rest)]
        made.half_linear = fit_filter(pairs, size.linear, bias=False, ridge=RIDGE)
        made.half_out = _last(made, half, half=True)
    return made


def _factored(whole: Filter, mix: Filter) -> Tensor:
    """Split a filter to four times 64 channels into ``mix``, which is set, and the returned weight before it."""
    rank, (_, channels, width, _) = mix.weight.shape[1], whole.weight.shape
    rows = whole.weight.reshape(taesd.CHANNELS, -1)  # the channels of one 2x2 block are neighbours
    left, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    roots = sizes[:rank].sqrt()
    mix.weight.copy_((left[:, :rank] * roots)[:, :, None, None])
    return (roots[:, None] * right[:rank]).reshape(4 * rank, channels, width, width)


def _last(made: StitchedDifference, batches: list[Batch], half: bool) -> Filter:
    written = (made.written(b.change, b.state, b.known, b.features, half) for b in batches)
    pairs = [(torch.cat((w, b.features), 1), b.true) for w, b in zip(written, batches)]
    return fit_filter(pairs, 3, bias=False, ridge=RIDGE)


class Look(nn.Module):
    """A target's latents as pictures ``(N, 3 * 64, h, w)``: the decoder's first layers, and one filter."""

    def __init__(self, decoder: nn.Sequential, examples: Examples) -> None:
        super().__init__()
        self.first = decoder[: 3 + LOOK_BLOCKS]
        self.requires_grad_(False)
        z, seen = (each[:SEEN, :2].flatten(0, 1) for each in (examples.target, examples.pictures))
        pairs = [(self.read(a.float()), _in_points(b)) for a, b in zip(z.split(16), seen.split(16))]
        self.head = fit_filter(pairs, 3, bias=True, ridge=RIDGE).requires_grad_(False)

    def read(self, z: Tensor) -> Tensor:
        return torch.cat((self.first(z), z), 1)

    def forward(self, z: Tensor) -> Tensor:
        seen: Tensor = self.head(self.read(z))
        return seen


def _in_points(pictures: Tensor) -> Tensor:
    return F.pixel_unshuffle(pictures.float() / 255, taesd.FACTOR)


def trained(
    made: StitchedDifference, pair: TinyPair, lessons: Lessons, run: Run, name: str, folder: Path
) -> StitchedDifference:
    """Train all of a map, half of the time at half the size; resumes from a save in ``folder``.

    The loss is the error of latents, that of pictures as :class:`Look` shows them, and that of crops as the whole
    decoder shows them. Latents that only the look takes for good ones would otherwise decode to a fine pattern.
    """
    look, decoder = Look(pair.target_decoder, lessons.examples), pair.target_decoder.requires_grad_(False)

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(lessons), (run.batch,), generator=generator)
        edits = torch.randint(1, EDITS + 1, (run.batch,), generator=generator)
        half = made.maps_half and bool(torch.rand((), generator=generator) < 0.5)
        soften, sharp = _softening(run.batch, generator)
        batch = lessons.batch(rows, edits, half, soften)
        carried = made(batch.change, batch.state, batch.known, batch.features)
        true, before = (look(each) for each in (batch.target + batch.true, batch.target))
        value = _latent_loss(carried, batch.true) + 0.6 * _seen_loss(look(batch.target + carried), true, before)
        if sharp:
            value = value + _decoded_loss(decoder, batch.target + carried, batch.edited, generator)
        return value

    fitted = train(name, made.requires_grad_(True), loss, folder, run)
    assert isinstance(fitted, StitchedDifference)
    return fitted.eval().requires_grad_(False)


def _softening(count: int, generator: torch.Generator) -> tuple[Callable[[Tensor, bool], Tensor], bool]:
    """Return what a quarter of the batches are blurred by and a quarter averaged, and whether this one is neither.

    A model's estimates at high noise are averages of latents.
    """
    kind, size = torch.rand(2, generator=generator).tolist()
    if kind < 0.25:
        sigma = 0.6 * (5 / 0.6) ** size
        return (lambda x, is_half: blurred(x, max(0.2, sigma / 2) if is_half else sigma)), False
    if kind < 0.5:
        share = 0.67 * torch.rand(count, 1, 1, 1, generator=generator)
        return (lambda x, _: averaged_with_others(x, share)), False
    return (lambda x, _: x), True


def _latent_loss(carried: Tensor, true: Tensor) -> Tensor:
    """Return the squared error over the true change's size, and how far the direction is off; also averaged 2x2."""
    total = torch.zeros(())
    for share, average in ((1.0, 1), (0.7, 2)):
        a, b = (F.avg_pool2d(each, average) for each in (carried, true))
        error = (a - b).square().mean((1, 2, 3)) / (b.square().mean((1, 2, 3)) + 0.01)
        off = 1 - F.cosine_similarity(a.flatten(1), b.flatten(1))
        total = total + share * (error + 0.5 * off).mean()
    return total


def _seen_loss(made: Tensor, true: Tensor, before: Tensor) -> Tensor:
    """Return the seen error against the true change: its log, in units of 4.3 dB, and relative to the change."""
    error, size = ((each - true).square().mean((1, 2, 3)) for each in (made, before))
    return torch.log1p(error / FLOOR).mean() + 0.25 * (error / (size + 0.002)).mean()


def _decoded_loss(decoder: nn.Module, z: Tensor, edited: Tensor, generator: torch.Generator, count: int = 4) -> Tensor:
    """Return the log of the error of a crop that the decoder makes, against the edited pictures."""
    crop = min(CROP, z.shape[-1])
    y, x = torch.randint(0, z.shape[-1] - crop + 1, (2,), generator=generator).tolist()
    inner = slice(MARGIN * taesd.FACTOR, (crop - MARGIN) * taesd.FACTOR)
    made = decoder(z[:count, :, y : y + crop, x : x + crop])[..., inner, inner].clamp(-0.03, 1.03)
    rows, columns = (slice(taesd.FACTOR * at + inner.start, taesd.FACTOR * at + inner.stop) for at in (y, x))
    error = (made - edited[:count, :, rows, columns]).square().mean((1, 2, 3))
    return ((error + 2e-4) / FLOOR).log().mean()


def fit_difference(
    pair: TinyPair, examples: Examples, bridge: LearnedBridge, size: Size, run: Run, name: str, folder: Path
) -> StitchedDifference:
    """Fit a stitched map that stands on a learned bridge; with 0 steps, by least squares only."""
    lessons = Lessons(examples, bridge)
    known = lessons.batch(torch.zeros(1).long(), torch.ones(1).long(), False, lambda x, _: x).known.shape[1]
    made = stitched_difference(pair, lessons, size, known)
    return trained(made, pair, lessons, run, name, folder) if run.steps else made


def save_difference(made: StitchedDifference, path: Path, about: dict[str, str]) -> None:
    """Write a map for :func:`lib_delta.bridges.stitched_difference.load_stitched`: its large weights in 8 bits."""
    tensors = {f"stitched.{key}": value for key, value in made.state_dict().items()}
    save_file(pack(tensors), path, metadata={"format": "pt", **about})
