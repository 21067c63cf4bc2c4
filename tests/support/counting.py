"""A tiny LoRA and inputs for it, and counts of what layers are called with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lib_delta.adapters.adapter_file import AdapterFile, read_adapter
from lib_delta.core.conditioning import Conditioning
from lib_delta.diffusion.parameterization import Parameterization
from lib_delta.models.forked_layers import Conv2d, ForkedLayer, Linear
from lib_delta.models.unet import UNet
from tests.support.tiny_unet import randn

EPS = Parameterization("eps")
X, SIGMA = 5 * randn(2, 4, 8, 8), torch.tensor([0.7, 6.0])
TOLD = Conditioning(randn(1, 7, 16, seed=1), randn(1, 7, 16, seed=2))


def lora(unet: UNet, only: str = "", seed: int = 0) -> AdapterFile:
    tensors = {}
    for path, layer in unet.named_modules():
        if isinstance(layer, (Linear, Conv2d)) and only in path:
            key = "lora_unet_" + path.replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = 0.2 * randn(4, *layer.weight.shape[1:], seed=seed)
            tail = (1, 1) if layer.weight.ndim == 4 else ()
            tensors[f"{key}.lora_up.weight"] = 0.2 * randn(layer.weight.shape[0], 4, *tail, seed=seed + 1)
    return read_adapter("test", tensors, unet)


@contextmanager
def counted(unet: UNet) -> Iterator[dict[str, list[tuple[int, ...]]]]:
    """Note the shapes of what every layer is called with."""
    calls: dict[str, list[tuple[int, ...]]] = {}
    hooks = []
    for path, layer in unet.named_modules():
        if isinstance(layer, ForkedLayer):

            def note(_module: Any, inputs: tuple[Tensor, ...], path: str = path) -> None:
                calls.setdefault(path, []).append(tuple(inputs[0].shape))

            hooks.append(layer.register_forward_pre_hook(note))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
