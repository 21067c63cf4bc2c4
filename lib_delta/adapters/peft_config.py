"""Reads peft's configuration of an adapter, on which the meaning of its tensors depends.

peft does not store alpha with the weights.  It is in ``adapter_config.json`` next to the file or, if diffusers saved
the weights, in the file's header (``lora_adapter_metadata``).  "rslora" (arXiv 2312.03732) divides alpha by the
square root of the rank instead.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib_delta.adapters.algorithms import ia3, lokr, lora, oft
from lib_delta.errors import AdapterError
from lib_delta.files import file_kinds, sidecar_config

CONFIG = sidecar_config.PEFT
HEADER = "lora_adapter_metadata"
_SUPPORTED_TYPES = ("LORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT")
_LONGEST_PATTERN, _MOST_REPEATS = 300, 3
# Initialisations of peft's LoRA that subtract a part from the base's weights.
_PARTS_OF_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_LARGEST_ALPHA, _MOST_TERMS = 1e12, 100  # far above any real training


@dataclass(frozen=True)
class PeftConfig:
    """peft's configurations by the prefix of the layers' names (empty: all layers)."""

    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def beside(cls, path: Path, metadata: Mapping[str, str]) -> PeftConfig:
        """Read the configuration of an adapter's file.

        Raises :class:`CheckpointError` for unreadable JSON, and :class:`AdapterError` for a ``peft_type`` that is not
        supported.
        """
        if HEADER in metadata:
            return cls(_by_part(sidecar_config.json_object(metadata[HEADER], f"{HEADER} in the header of {path.name}")))
        # The configuration belongs only to the file that peft saves, not to others in its folder.
        if not path.stem.startswith(("adapter_model", "pytorch_model")):
            return cls()
        config = sidecar_config.settings(path, sidecar_config.PEFT)
        _refuse_other_type(path.name, config.get("peft_type"))
        return cls({"": config} if config else {})

    def complete(self, layer: str, stored: str, tensors: dict[str, Tensor]) -> None:
        """Add the configuration's settings to a layer's tensors: alpha (over the plain rank), and OFT's and (IA)^3's.

        ``layer`` is the name of :mod:`lib_delta.adapters.key_names`, ``stored`` one of its keys in the file.
        """
        config = self._config_of(layer)
        if config is None:
            return
        path = _module_path(stored)
        _refuse_changed_base(config, tensors)
        if oft.OFT_R in tensors:
            tensors[oft.PEFT_TERMS] = torch.tensor(_terms(config))
            if config.get("coft") is True:
                tensors[oft.PEFT_LIMIT] = torch.tensor(_limit(config), dtype=torch.float64)
        endings = config.get("feedforward_modules")
        if ia3.IA3_L in tensors and isinstance(endings, list):
            on_input = any(path.endswith(str(ending)) for ending in endings)
            tensors[ia3.ON_INPUT] = torch.tensor(float(on_input))
        rank = rank_of(tensors)
        alpha = _by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", config.get("alpha")))
        if lora.ALPHA in tensors or not isinstance(alpha, (int, float)):
            return
        if not abs(alpha) < _LARGEST_ALPHA:
            raise AdapterError(f"adapter_config says {alpha} for alpha of {layer}, and a finite number is needed")
        if rank is None:
            _scale_whole_factors(tensors, alpha, _by_pattern(config.get("rank_pattern"), path, config.get("r")))
            return
        stated = math.sqrt(rank) * alpha if config.get("use_rslora") else alpha
        tensors[lora.ALPHA] = torch.tensor(float(stated))

    def _config_of(self, layer: str) -> Mapping[str, Any] | None:
        return next((config for prefix, config in self.parts.items() if layer.startswith(prefix)), None)


def rank_of(tensors: Mapping[str, Tensor]) -> int | None:
    """Return the rank of a layer's factors; None if they have none, or do not show it."""
    named = (lora.DOWN, "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
    return next((tensors[name].shape[0] for name in named if name in tensors and tensors[name].ndim), None)


def _terms(config: Mapping[str, Any]) -> int:
    """Return the number of terms of the series that replaces the inverse in peft's OFT; 0 for the inverse itself."""
    if not config.get("use_cayley_neumann", True):
        return 0
    terms = config.get("num_cayley_neumann_terms", 5)
    if not isinstance(terms, int) or not 0 < terms <= _MOST_TERMS:
        raise AdapterError(f"adapter_config says {terms!r} for num_cayley_neumann_terms, which is no number of terms")
    return terms


def _scale_whole_factors(tensors: dict[str, Tensor], alpha: float, rank: Any) -> None:
    """Scale a LoKr of two whole factors as peft does; its tensors do not show the rank."""
    if lokr.LOKR_W1 in tensors and lokr.LOKR_W2 in tensors and isinstance(rank, int) and rank > 0:
        tensors[lokr.LOKR_W1] = tensors[lokr.LOKR_W1].float() * (alpha / rank)


def _by_pattern(patterns: Any, path: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of the module's path, as in peft."""
    for pattern, value in (patterns if isinstance(patterns, dict) else {}).items():
        if _simple_expression(str(pattern)).match(path):
            return value
    return default


@functools.lru_cache(maxsize=4096)
def _simple_expression(pattern: str) -> re.Pattern[str]:
    """Compile a pattern from an untrusted file, unless it could take forever to match."""
    repeats = re.findall(r"(?<!\\)[*+{]", pattern)
    if len(pattern) > _LONGEST_PATTERN or len(repeats) > _MOST_REPEATS or re.search(r"\)[*+{]|\\\d|\(\?P=", pattern):
        raise AdapterError(
            f"adapter_config has the pattern {pattern[:60]!r}, which is too complicated to be read safely"
        )
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(
            f"adapter_config has the pattern {pattern[:60]!r}, which is no regular expression ({error})"
        ) from error


def _module_path(stored: str) -> str:
    """Return peft's path of a module, by the key of one of its tensors."""
    path = re.sub(r"^(unet\.|text_encoder(_2)?\.)?(base_model\.model\.)?(unet\.|text_encoder(_2)?\.)?", "", stored)
    return re.sub(r"\.(lora|hada|lokr|oft|boft|ia3|base_layer|alpha|dora)(_|\.|$).*$", "", path)


def _refuse_changed_base(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuse factors that started as a part of the base: without their initial values they are no difference."""
    start = config.get("init_lora_weights")
    if lora.DOWN in tensors and isinstance(start, str) and start.lower().startswith(_PARTS_OF_THE_BASE):
        raise AdapterError(
            f"adapter_config says that its factors started as a part of the base ({start[:40]}), so they are no"
            " change of it by themselves: save it as an ordinary LoRA (peft's path_initial_model_for_weight_conversion)"
        )


def _refuse_other_type(name: str, stated: object) -> None:
    if isinstance(stated, str) and stated.upper() not in _SUPPORTED_TYPES:
        raise AdapterError(
            f"{name} is {file_kinds.peft_sentence(stated)}, as {CONFIG} beside it says: "
            "a LoRA, a LyCORIS file or a fine-tuned checkpoint is needed"
        )


def _limit(config: Mapping[str, Any]) -> float:
    limit = config.get("eps", 6e-5)
    if not isinstance(limit, (int, float)) or not 0 <= limit < _LARGEST_ALPHA:
        raise AdapterError(f"adapter_config says {limit!r} for eps, and a finite number is needed")
    return float(limit)


def _by_part(stated: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    names = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
    parts: dict[str, dict[str, Any]] = {}
    for key, value in stated.items():
        part, _, setting = key.partition(".")
        if part in names:
            parts.setdefault(names[part], {})[setting] = value
    return parts
