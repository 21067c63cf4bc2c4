"""What trainers write beside an adapter's tensors, as far as the tensors' meaning depends on it.

peft keeps alpha out of the weights: in ``adapter_config.json`` beside them, or, where diffusers saved
them, in the header of the file (``lora_adapter_metadata``).  There, "rslora" (arXiv 2312.03732) divides
alpha by the square root of the rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib_delta.adapters import lora, oft
from lib_delta.errors import AdapterError

CONFIG = "adapter_config.json"
HEADER = "lora_adapter_metadata"
_LARGEST_CONFIG = 2**20  # bytes


@dataclass(frozen=True)
class Trained:
    """peft's configuration of the parts of a model, by the prefix of their layers' names (empty: of all)."""

    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def beside(cls, path: Path, metadata: Mapping[str, str]) -> Trained:
        """Read what belongs to an adapter's file; raises :class:`AdapterError` for JSON that cannot be read."""
        if HEADER in metadata:
            return cls(_by_part(_parsed(metadata[HEADER], f"{HEADER} in the header of {path.name}")))
        config = path.with_name(CONFIG)
        # The configuration is of the one file that peft saves, whatever else lies in its folder.
        if not path.stem.startswith(("adapter_model", "pytorch_model")) or not config.is_file():
            return cls()
        if config.stat().st_size > _LARGEST_CONFIG:
            raise AdapterError(f"{config.name} beside {path.name} is too large to be peft's configuration")
        return cls({"": _parsed(config.read_text(encoding="utf-8", errors="replace"), f"{CONFIG} beside {path.name}")})

    def complete(self, layer: str, tensors: dict[str, Tensor]) -> None:
        """Add to a layer's tensors what the configuration says of them: alpha, as it is over the plain rank."""
        config = self._of(layer)
        if config is None:
            return
        if oft.PEFT in tensors:
            terms = int(config.get("num_cayley_neumann_terms", 5)) if config.get("use_cayley_neumann", True) else 0
            tensors[oft.PEFT_TERMS] = torch.tensor(terms)
        rank = _rank(tensors)
        if rank is None or lora.ALPHA in tensors:
            return
        alpha = _by_pattern(config.get("alpha_pattern"), layer, config.get("lora_alpha", config.get("alpha")))
        if not isinstance(alpha, (int, float)):
            return
        stated = math.sqrt(rank) * alpha if config.get("use_rslora") else alpha
        tensors[lora.ALPHA] = torch.tensor(float(stated))

    def _of(self, layer: str) -> Mapping[str, Any] | None:
        return next((config for prefix, config in self.parts.items() if layer.startswith(prefix)), None)


def _rank(tensors: Mapping[str, Tensor]) -> int | None:
    named = (lora.DOWN, "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
    return next((tensors[name].shape[0] for name in named if name in tensors and tensors[name].ndim), None)


def _by_pattern(patterns: Any, layer: str, default: Any) -> Any:
    """Return the value of the pattern that ends the layer's name, as peft looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*_)?{re.escape(str(pattern).replace('.', '_'))}", layer):
            return value
    return default


def _by_part(stated: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    names = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
    parts: dict[str, dict[str, Any]] = {}
    for key, value in stated.items():
        part, _, setting = key.partition(".")
        if part in names:
            parts.setdefault(names[part], {})[setting] = value
    return parts


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{where} is no readable JSON ({error}): remove it, or save the adapter again") from error
    if not isinstance(parsed, dict):
        raise AdapterError(f"{where} holds no settings: remove it, or save the adapter again")
    return parsed
