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

from lib_delta.adapters import ia3, lokr, lora, oft
from lib_delta.errors import AdapterError

CONFIG = "adapter_config.json"
HEADER = "lora_adapter_metadata"
_LARGEST_CONFIG = 2**20  # bytes
_LARGEST_ALPHA, _MOST_TERMS = 1e12, 100  # far above what anybody trains with


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
            tensors[oft.PEFT_TERMS] = torch.tensor(_terms(config))
        endings = config.get("feedforward_modules")
        if ia3.PEFT in tensors and isinstance(endings, list):
            on_input = any(layer.endswith(str(ending).replace(".", "_")) for ending in endings)
            tensors[ia3.ON_INPUT] = torch.tensor(float(on_input))
        rank = _rank(tensors)
        alpha = _by_pattern(config.get("alpha_pattern"), layer, config.get("lora_alpha", config.get("alpha")))
        if lora.ALPHA in tensors or not isinstance(alpha, (int, float)):
            return
        if not abs(alpha) < _LARGEST_ALPHA:
            raise AdapterError(f"adapter_config says {alpha} for alpha of {layer}, and a finite number is needed")
        if rank is None:
            _scale_whole_factors(tensors, alpha, _by_pattern(config.get("rank_pattern"), layer, config.get("r")))
            return
        stated = math.sqrt(rank) * alpha if config.get("use_rslora") else alpha
        tensors[lora.ALPHA] = torch.tensor(float(stated))

    def _of(self, layer: str) -> Mapping[str, Any] | None:
        return next((config for prefix, config in self.parts.items() if layer.startswith(prefix)), None)


def _rank(tensors: Mapping[str, Tensor]) -> int | None:
    named = (lora.DOWN, "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
    return next((tensors[name].shape[0] for name in named if name in tensors and tensors[name].ndim), None)


def _terms(config: Mapping[str, Any]) -> int:
    """Return how many terms of the series stand for the inverse in peft's OFT; 0 for the inverse itself."""
    if not config.get("use_cayley_neumann", True):
        return 0
    terms = config.get("num_cayley_neumann_terms", 5)
    if not isinstance(terms, int) or not 0 < terms <= _MOST_TERMS:
        raise AdapterError(f"adapter_config says {terms!r} for num_cayley_neumann_terms, which is no number of terms")
    return terms


def _scale_whole_factors(tensors: dict[str, Tensor], alpha: float, rank: Any) -> None:
    """Scale a LoKr of two whole factors, whose rank the tensors do not tell, as peft does."""
    if lokr.W1 in tensors and lokr.W2 in tensors and isinstance(rank, int) and rank > 0:
        tensors[lokr.W1] = tensors[lokr.W1].float() * (alpha / rank)


def _by_pattern(patterns: Any, layer: str, default: Any) -> Any:
    """Return the value of the pattern that ends the layer's name, as peft looks it up."""
    for pattern, value in (patterns if isinstance(patterns, dict) else {}).items():
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
