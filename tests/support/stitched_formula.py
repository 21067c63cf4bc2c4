"""Stitched difference maps by the weights of their files, in convolutions of torch alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from lib_delta.bridges.learned import WEIGHTS
from lib_delta.diffusion.latent_spaces import Space


class StitchedFormula:
    """The map of an ordered pair of spaces, and the linear map that it stands on."""

    def __init__(self, source: Space, target: Space) -> None:
        stored = load_file(WEIGHTS / f"{source.key}-{target.key}-stitched.safetensors")
        stored |= load_file(WEIGHTS / f"{source.key}-{target.key}.safetensors")
        self.weights = {
            key: value.float() * stored[f"{key}.scale"].reshape(-1, *[1] * (value.ndim - 1))
            if f"{key}.scale" in stored
            else value.float()
            for key, value in stored.items()
        }

    def filtered(self, key: str, x: Tensor) -> Tensor:
        """Filter with edges repeated."""
        weight = self.weights[f"{key}.weight"]
        around = F.pad(x, [weight.shape[-1] // 2] * 4, mode="replicate")
        return F.conv2d(around, weight, self.weights.get(f"{key}.bias"))

    def blocks(self, part: str, first: int, h: Tensor) -> Tensor:
        """Apply the residual blocks of a part, whose convolutions are continued by zeros."""
        names = [f"{part}.{n}.conv" for n in range(first, first + 3)]
        for name in (name for name in names if f"{name}.0.weight" in self.weights):
            inner = h
            for layer in (0, 2, 4):
                weight, bias = (self.weights[f"{name}.{layer}.{kind}"] for kind in ("weight", "bias"))
                inner = F.conv2d(inner if layer == 0 else inner.relu(), weight, bias, padding=1)
            h = (inner + h).relu()
        return h

    def read(self, part: str, z: Tensor) -> Tensor:
        weight, bias = (self.weights[f"{part}.1.{kind}"] for kind in ("weight", "bias"))
        return self.blocks(part, 3, F.conv2d(3 * (z / 3).tanh(), weight, bias, padding=1).relu())

    def written(self, h: Tensor) -> Tensor:
        last = max(int(key.split(".")[2]) for key in self.weights if key.startswith("stitched.writing."))
        weight, bias = (self.weights[f"stitched.writing.{last}.{kind}"] for kind in ("weight", "bias"))
        return F.conv2d(self.blocks("stitched.writing", 0, h), weight, bias, padding=1)

    def linear(self, delta: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the linear map's output, and the features that it is made of."""
        filtered = self.filtered("difference.filter", delta)
        follows = []
        for change, z in zip(filtered.double(), target.double()):
            soft = F.avg_pool2d(F.pad(z[None], (1,) * 4, mode="replicate"), 3, 1)[0]
            rows = torch.cat((z, soft)).flatten(1).T
            rows, wanted = rows - rows.mean(0), change.flatten(1).T
            gram = rows.T @ rows / len(rows) + 0.01 * torch.eye(rows.shape[1]).double()
            moment = rows.T @ (wanted - wanted.mean(0)) / len(rows)
            follows.append((rows @ torch.linalg.inv(gram) @ moment + wanted.mean(0)).T.reshape(change.shape))
        features = torch.cat((filtered, torch.stack(follows).float()), 1)
        detailed = "difference.detail.weight" in self.weights
        return self.filtered("difference.detail", features) if detailed else filtered, features

    def known(self, target: Tensor) -> Tensor:
        """Return the state map's reading of the target's latent; maps without networks read nothing."""
        read = "state.reading.1.weight" in self.weights
        return torch.cat((self.read("state.reading", target), target), 1) if read else target

    def state(self, target: Tensor, side: int) -> Tensor:
        """Return the source's square latent of a side, by the target's reading resized to twice that side."""
        known = _resized(self.known(target), 2 * side)
        weight, bias = (self.weights[f"state.halving.{kind}"] for kind in ("weight", "bias"))
        h = F.conv2d(F.pad(known, [1] * 4, mode="replicate"), weight, bias, stride=2)
        last = max(int(key.split(".")[2]) for key in self.weights if key.startswith("state.writing."))
        weight, bias = (self.weights[f"state.writing.{last}.{kind}"] for kind in ("weight", "bias"))
        return F.conv2d(self.blocks("state.writing", 0, h), weight, bias, padding=1)

    def of_another_size(self, delta: Tensor, target: Tensor) -> Tensor:
        """Return what becomes of a square delta whose size is neither the target's nor half of it."""
        full, half = target.shape[-1], -(-target.shape[-1] // 2)
        larger = delta.shape[-1] >= half
        known, shown = (_resized(each, 2 * half) for each in (self.known(target), target))
        carried = self(_resized(delta, half), self.state(target, half), shown, known, 0.5 if larger else 0.0)
        return _resized(carried, full)

    def __call__(
        self, delta: Tensor, source: Tensor, target: Tensor, known: Tensor | None = None, share: float = 0.5
    ) -> Tensor:
        """Return what becomes of a delta of the target's size, or of half of it.

        ``known`` is the reading of ``target``; ``share`` that of the linear map at half the size.
        """
        known = self.known(target) if known is None else known
        half = delta.shape[-1] != target.shape[-1]
        enlarged = F.interpolate(delta, target.shape[-2:], mode="bilinear", align_corners=False) if half else delta
        linear, features = self.linear(enlarged, target)
        changed = self.read("stitched.reading", source + delta) - self.read("stitched.reading", source)
        read = torch.cat((changed, delta), 1)
        base = self.filtered("stitched.base", known)
        if half:
            raised = F.pixel_shuffle(self.filtered("stitched.half_seam", read), 2)
            change = self.filtered("stitched.half_mix", raised) + self.filtered("stitched.half_linear", features)
        else:
            change = self.filtered("stitched.seam", read) + self.filtered("stitched.linear", features)
        written = self.written(base + change) - self.written(base)
        out = self.filtered("stitched.half_out" if half else "stitched.out", torch.cat((written, features), 1))
        return (1 - share) * out + share * linear if half else out


def _resized(x: Tensor, side: int) -> Tensor:
    """Resize as a WebUI's extension on any device must: areas where it shrinks, bilinear where it grows."""
    mode = "area" if side < x.shape[-1] else "bilinear"
    return F.interpolate(x, (side, side), mode=mode, **({} if mode == "area" else {"align_corners": False}))
