"""DyLoRA: a LoRA whose first ranks also work without the others (arXiv 2210.07558).

Trainers save it as an ordinary LoRA (see :meth:`lib_delta.adapters.algorithms.lora.Lora.truncated`).  Early versions of
LyCORIS stored the ranks in blocks, ``up_list.0``, ``down_list.0``, ...; this module reads these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from lib_delta.adapters.algorithms import lora
from lib_delta.adapters.algorithms.base import TensorName, named
from lib_delta.adapters.algorithms.lora import Lora
from lib_delta.errors import AdapterError

TENSORS = (TensorName(r"(?:up|down)_list\.\d+"), *named(lora.ALPHA))
_LIST_ENTRY = re.compile(r"(up|down)_list\.(\d+)$")


def match(tensors: Mapping[str, Tensor]) -> Lora | None:
    """Join blocks ``up_list.i`` ``(out, ranks)`` and ``down_list.i`` ``(ranks, in * k * k)`` into a LoRA."""
    blocks = {name: found for name in tensors if (found := _LIST_ENTRY.match(name))}
    if not blocks or tensors.keys() - blocks.keys() - {lora.ALPHA}:
        return None
    up, down = (
        [tensors[f"{side}_list.{i}"] for i in sorted(int(m[2]) for m in blocks.values() if m[1] == side)]
        for side in ("up", "down")
    )
    if len(up) != len(down) or any(
        u.ndim != 2 or d.ndim != 2 or u.shape[0] != up[0].shape[0] or d.shape[1] != down[0].shape[1]
        for u, d in zip(up, down)
    ):
        raise AdapterError("its blocks up_list and down_list do not fit each other, and pairs of matrices are needed")
    rest = {name: tensors[name] for name in tensors.keys() & {lora.ALPHA}}
    return lora.match({lora.UP: torch.cat(up, 1), lora.DOWN: torch.cat(down), **rest})
