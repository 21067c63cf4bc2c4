"""What an adapter file holds, and how much of it finds a place in a base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lib_delta.adapters.adapter_file import load_adapter
from lib_delta.adapters.compatibility import unet_family
from lib_delta.files.checkpoint import detect_family, unet_prefix
from lib_delta.files.weight_file import WeightFile
from lib_delta.models.loading import load_unet
from lib_delta.models.text import TextConfig, TextEncoder, load_towers
from lib_delta.models.unet import UNet, UNetConfig

SHOWN = 8  # keys without a layer


@dataclass(frozen=True)
class Reference:
    """The layers that adapters are looked up in."""

    unet: UNet
    towers: Sequence[nn.Module]

    @classmethod
    def sd15(cls) -> Reference:
        """Return Stable Diffusion 1.5 as it was released, without weights."""
        unet = UNetConfig(
            in_channels=4,
            out_channels=4,
            model_channels=320,
            levels=(320, 640, 1280, 1280),
            res_blocks=(2, 2, 2, 2),
            depth_in=(1, 1, 1, 1, 1, 1, 0, 0),
            depth_middle=1,
            depth_out=(0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1),
            context_width=768,
            linear_projection=False,
        )
        text = TextConfig(
            width=768, inner_width=3072, layers=12, positions=77, vocabulary=49408, heads=12, activation="quick_gelu"
        )
        with torch.device("meta"):
            return cls(UNet(unet), [TextEncoder(text, final_norm=True)])

    @classmethod
    def of_checkpoint(cls, path: Path) -> Reference:
        """Read a checkpoint; raises :class:`CheckpointError` for a file that is none."""
        with WeightFile.open(path) as file:
            unet, report = load_unet(file, torch.float16)
            towers = () if "text encoder" in report.missing else load_towers(file, report.family, torch.float16)
        return cls(unet, towers)


def coverage(path: Path, reference: Reference) -> dict[str, object]:
    """Say what a file is, and what of it matches the reference.

    Raises :class:`DeltaError` for a file that cannot be read or used with it.
    """
    with WeightFile.open(path) as file:
        if unet_prefix(file.shapes) is not None:
            return {"checkpoint": f"a model of {detect_family(file.shapes, file.name).label}"}
    adapter = load_adapter(path, reference.unet, reference.towers)
    matched = adapter.total - len(adapter.unmatched)
    report: dict[str, object] = {
        "algorithm": adapter.algorithms(),
        "rank": list(adapter.ranks()) or "none",
        "made for": unet_family(reference.unet).label + (f" (header: {adapter.stated})" if adapter.stated else ""),
        "layers": f"{len(adapter.unet)} of the UNet, {sum(map(len, adapter.text))} of the text encoder",
        "keys": f"{matched} of {adapter.total} match",
    }
    if adapter.unmatched:
        more = len(adapter.unmatched) - SHOWN
        report["no layer for"] = [*adapter.unmatched[:SHOWN], *([f"and {more} more"] if more > 0 else [])]
    if adapter.embeddings:
        report["embeddings"] = [f"{name} ({len(vectors)} vectors)" for name, vectors in adapter.embeddings.items()]
    return report
