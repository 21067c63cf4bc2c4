"""Fit the maps of a bridge to pairs of latents: filters by least squares."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from lib_delta.bridges.learned import LearnedBridge
from lib_delta.bridges.maps import DifferenceMap, Filter, StateMap

RIDGE = 1e-4  # of the mean variance, so that channels that hardly vary stay small


@torch.no_grad()
def fit_filter(pairs: Iterable[tuple[Tensor, Tensor]], width: int, bias: bool, ridge: float = RIDGE) -> Filter:
    """Return the filter of least squares that maps ``(N, A, H, W)`` to ``(N, B, H, W)`` over all pairs."""
    gram: Tensor | None = None
    moment: Tensor | None = None
    for a, b in pairs:
        rows = F.unfold(F.pad(a.float(), [width // 2] * 4, mode="replicate"), width).transpose(1, 2).flatten(0, 1)
        rows = torch.cat((rows, torch.ones(len(rows), 1)), 1) if bias else rows
        wanted = b.float().flatten(2).transpose(1, 2).flatten(0, 1)
        gram = (rows.T @ rows).double() if gram is None else gram + (rows.T @ rows).double()
        moment = (rows.T @ wanted).double() if moment is None else moment + (rows.T @ wanted).double()
    if gram is None or moment is None:
        raise ValueError("a filter cannot be fitted to no pictures")
    solved = torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)).double(), moment).float()
    weight = solved[:-1] if bias else solved
    fitted = Filter(a.shape[1], b.shape[1], width, bias)
    fitted.weight.copy_(weight.T.reshape(fitted.weight.shape))
    if fitted.bias is not None:
        fitted.bias.copy_(solved[-1])
    return fitted


def linear_bridge(source: Tensor, target: Tensor, width: int = 5) -> LearnedBridge:
    """Fit filters to the latents ``(N, 2, C, H, W)`` of the same pictures and their edits in two spaces.

    The state's is fitted on pictures and edits alike, that of differences on edit minus picture.
    """
    states = [(t.flatten(0, 1), s.flatten(0, 1)) for s, t in zip(source.split(100), target.split(100))]
    changes = [
        ((s[:, 1].float() - s[:, 0]), (t[:, 1].float() - t[:, 0])) for s, t in zip(source.split(200), target.split(200))
    ]
    state = StateMap(target.shape[2], source.shape[2], width)
    state.filter = fit_filter(states, width, bias=True)
    difference = DifferenceMap(source.shape[2], target.shape[2], width)
    difference.filter = fit_filter(changes, width, bias=False)
    return LearnedBridge(state.eval().requires_grad_(False), difference.eval().requires_grad_(False))


def save(bridge: LearnedBridge, path: Path, about: dict[str, str]) -> None:
    """Write a bridge's maps, in half precision, for :func:`lib_delta.bridges.load`."""
    tensors = {
        f"{name}.{key}": value.half().contiguous()
        for name, module in (("state", bridge.state), ("difference", bridge.difference))
        for key, value in module.state_dict().items()
    }
    save_file(tensors, path, metadata={"format": "pt", **about})
