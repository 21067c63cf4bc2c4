"""Fit the maps of a bridge to pairs of latents: filters by least squares, networks for states by gradient descent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from lib_delta.bridges.int8_weights import pack
from lib_delta.bridges.latent_maps import DifferenceMap, Filter, FilteredState, regress_on_state
from lib_delta.bridges.learned import LearnedBridge

RIDGE = 1e-4  # relative to the mean variance, so that channels with little variance stay small


@torch.no_grad()
def fit_filter(
    pairs: Iterable[tuple[Tensor, Tensor]], width: int, bias: bool, ridge: float = RIDGE, stride: int = 1
) -> Filter:
    """Return the least-squares filter that maps ``(N, A, H, W)`` to ``(N, B, H, W)`` over all pairs.

    With a ``stride`` of 2 the latter have half the size along each side.
    """
    gram: Tensor | None = None
    moment: Tensor | None = None
    for a, b in pairs:
        around = F.pad(a.float(), [(width - stride + 1) // 2] * 4, mode="replicate")
        rows = F.unfold(around, width, stride=stride).transpose(1, 2).flatten(0, 1)
        rows = torch.cat((rows, torch.ones(len(rows), 1)), 1) if bias else rows
        wanted = b.float().flatten(2).transpose(1, 2).flatten(0, 1)
        gram = (rows.T @ rows).double() if gram is None else gram + (rows.T @ rows).double()
        moment = (rows.T @ wanted).double() if moment is None else moment + (rows.T @ wanted).double()
    if gram is None or moment is None:
        raise ValueError("a filter cannot be fitted to no pictures")
    solved = torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)).double(), moment).float()
    weight = solved[:-1] if bias else solved
    fitted = Filter(a.shape[1], b.shape[1], width, bias=bias, stride=stride)
    fitted.weight.copy_(weight.T.reshape(fitted.weight.shape))
    if fitted.bias is not None:
        fitted.bias.copy_(solved[-1])
    return fitted


def linear_bridge(source: Tensor, target: Tensor, width: int = 5) -> LearnedBridge:
    """Fit filters to the latents ``(N, 2, C, H, W)`` of the same pictures and their edits in two spaces.

    The map of states is fitted on pictures and edits, that of differences on edit minus picture.
    """
    states = [(t.flatten(0, 1), s.flatten(0, 1)) for s, t in zip(source.split(100), target.split(100))]
    changes = [
        ((s[:, 1].float() - s[:, 0]), (t[:, 1].float() - t[:, 0])) for s, t in zip(source.split(200), target.split(200))
    ]
    state = FilteredState(target.shape[2], source.shape[2], width)
    state.filter = fit_filter(states, width, bias=True)
    difference = DifferenceMap(source.shape[2], target.shape[2], width)
    difference.filter = fit_filter(changes, width, bias=False)
    return LearnedBridge(state.eval().requires_grad_(False), difference.eval().requires_grad_(False))


@torch.no_grad()
def detailed(linear: DifferenceMap, source: Tensor, target: Tensor) -> DifferenceMap:
    """Fit the part of a map of differences that reads the target's latent, on ``(N, 2, C, H, W)`` of both spaces."""

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for s, t in zip(source.split(100), target.split(100)):
            before, change = t[:, 0].float(), t[:, 1].float() - t[:, 0]
            carried = linear.filter(s[:, 1].float() - s[:, 0])
            yield torch.cat((carried, regress_on_state(carried, before)), 1), change

    channels_out, channels_in, width, _ = linear.filter.weight.shape
    fitted = DifferenceMap(channels_in, channels_out, width, detailed=True)
    fitted.filter = linear.filter
    fitted.detail = fit_filter(pairs(), width, bias=False)
    return fitted.eval().requires_grad_(False)


def with_half(state: FilteredState, target: Tensor, halves: Tensor, width: int = 6) -> FilteredState:
    """Return a state map that also predicts half the size: ``halves`` are the source's latents of smaller pictures.

    Both are ``(N, 2, C, H, W)``, of pictures and their edits.
    """
    pairs = [(t.flatten(0, 1), h.flatten(0, 1)) for t, h in zip(target.split(100), halves.split(100))]
    channels_in, channels_out = state.channels
    hidden = 0 if state.head is None else state.head.weight.shape[1]
    blocks = 0 if state.network is None else len(state.network) - 2
    fitted = FilteredState(
        channels_in, channels_out, state.filter.weight.shape[-1], hidden=hidden, blocks=blocks, half=width
    )
    fitted.load_state_dict(state.state_dict(), strict=False)
    fitted.halving = fit_filter(pairs, width, bias=True, stride=2)
    return fitted.eval().requires_grad_(False)


def with_twice(state: FilteredState, halves: Tensor, source: Tensor, width: int = 3) -> FilteredState:
    """Return a state map that also predicts twice the size: ``halves`` are the target's latents of smaller pictures.

    They are ``(N, 2, C, H, W)``, of pictures and their edits; the source's of the pictures are ``(N, 2, B, 2H, 2W)``.
    """
    pairs = [
        (h.flatten(0, 1), F.pixel_unshuffle(s.flatten(0, 1).float(), 2))
        for h, s in zip(halves.split(100), source.split(100))
    ]
    channels_in, channels_out = state.channels
    fitted = FilteredState(channels_in, channels_out, state.filter.weight.shape[-1], twice=width)
    fitted.load_state_dict(state.state_dict(), strict=False)
    fitted.doubling = fit_filter(pairs, width, bias=True)
    return fitted.eval().requires_grad_(False)


def save(bridge: LearnedBridge, path: Path, about: dict[str, str]) -> None:
    """Write a bridge's maps for :func:`lib_delta.bridges.learned.load_bridge`: large weights of states in 8 bits."""
    state, difference = (
        {f"{name}.{key}": value for key, value in module.state_dict().items()}
        for name, module in (("state", bridge.state), ("difference", bridge.difference))
    )
    halved = {key: value.half().contiguous() for key, value in difference.items()}
    save_file(pack(state) | halved, path, metadata={"format": "pt", **about})


@dataclass(frozen=True)
class Size:
    """The width and the number of blocks of a state map's network, and the length of its training."""

    hidden: int = 48
    blocks: int = 2
    steps: int = 700
    batch: int = 24
    rate: float = 2e-3


def train_state(bridge: LearnedBridge, source: Tensor, target: Tensor, size: Size, seed: int = 0) -> FilteredState:
    """Train a state map that starts from the bridge's, on latents ``(N, 2, C, H, W)``.

    Some are blurred, or averaged with others, in both spaces alike, because a denoising model's estimate at high noise
    is an average of latents.
    """
    fitted = FilteredState(
        target.shape[2], source.shape[2], bridge.state.filter.weight.shape[-1], hidden=size.hidden, blocks=size.blocks
    )
    _start(fitted, seed)
    # A trained bridge continues its training.
    fitted.load_state_dict(bridge.state.state_dict(), strict=False)
    states = target.flatten(0, 1), source.flatten(0, 1)

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(states[0]), (size.batch,), generator=generator)
        z, wanted = _averaged(torch.cat([s[rows].float() for s in states], 1), generator).split(
            [target.shape[2], source.shape[2]], 1
        )
        error = fitted(z) - wanted
        # Colours and light, the most visible features, are coarse.
        size_of = error.square().mean((1, 2, 3)) + 2 * F.avg_pool2d(error, 4).square().mean((1, 2, 3))
        # Grain and other detail that no map can predict must not dominate the loss.
        detail = wanted - F.avg_pool2d(F.pad(wanted, [1] * 4, mode="replicate"), 3, 1)
        return (size_of / (detail.square().mean((1, 2, 3)) + 0.1)).mean()

    return _minimised(fitted, loss, size, seed)


def _averaged(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Average a quarter of the latents with their neighbourhood, or with another latent."""
    chance = torch.rand(len(latents), 1, 1, 1, generator=generator)
    soft = F.avg_pool2d(F.pad(latents, [1] * 4, mode="replicate"), 3, 1)
    mixed = 0.6 * latents + 0.4 * latents.roll(1, 0)
    return torch.where(chance < 0.12, soft, torch.where(chance < 0.22, mixed, latents))


def _start(fitted: FilteredState, seed: int) -> None:
    """Initialise the network; its head is 0, so that at first only the filter acts."""
    torch.manual_seed(seed)
    for name, parameter in fitted.named_parameters():
        if name.startswith("network.") and parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")


def _minimised(
    fitted: FilteredState, loss: Callable[[torch.Generator], Tensor], size: Size, seed: int
) -> FilteredState:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(fitted.parameters(), lr=size.rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, size.rate, size.steps, pct_start=0.1)
    bar = tqdm(range(size.steps), mininterval=10)
    for _ in bar:
        value = loss(generator)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(fitted.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{value.item():.3f}", refresh=False)
    return fitted.eval().requires_grad_(False)
