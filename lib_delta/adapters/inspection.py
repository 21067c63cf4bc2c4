"""Reports an adapter file's contents, and how much of it matches a base model."""

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

SHOWN = 8  # unmatched keys


@dataclass(frozen=True)
class Reference:
    """The model whose layers adapters are matched with."""

    unet: UNet
    towers: Sequence[nn.Module]

    @classmethod
    def sd15(cls) -> Reference:
        """Return the layout of Stable Diffusion 1.5, without weights."""
        with torch.device("meta"):
            return cls(UNet(UNetConfig.sd15()), [TextEncoder(TextConfig.sd15(), final_norm=True)])

    @classmethod
    def of_checkpoint(cls, path: Path) -> Reference:
        """Load a checkpoint; raises :class:`CheckpointError` for other files."""
        with WeightFile.open(path) as file:
            unet, report = load_unet(file, torch.float16)
            lacking = any(part.endswith("text encoder") for part in report.missing)
            towers = () if lacking else load_towers(file, report.family, torch.float16)
        return cls(unet, towers)


def coverage(path: Path, reference: Reference) -> dict[str, object]:
    """Report a file's algorithm and the parts that match the reference.

    Raises :class:`DeltaError` for a file that cannot be read, or used with the reference.
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
        report["embeddings"] = [f"{name} ({len(vectors[0])} vectors)" for name, vectors in adapter.embeddings.items()]
    return report
