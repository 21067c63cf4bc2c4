"""Adapters in training: the tensors of an adapter file, for each algorithm, and the resulting weights.

``lib_delta.adapters`` defines the tensors' names and their effect on a layer, so a file is trained through the same
mathematics that later reads it.  Initial values are those of kohya's sd-scripts and LyCORIS: before the first step, no
adapter changes the base.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor, nn

from lib_delta.adapters.algorithms import ia3, loha, lokr, lora, oft
from lib_delta.models.forked_layers import Conv2d, Linear
from lib_delta.models.unet import UNetEncoder

LORA_RANK = 8
LOHA_RANK = 4  # as many numbers as a LoRA of rank 8 has
LOKR_FACTOR = 4
OFT_BLOCK = 16

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """An algorithm: its reader, and the initial tensors for a layer of a given shape.

    Scalars (``alpha``) are settings and are not trained.
    """

    match: Callable[[Mapping[str, Tensor]], Any]
    start: Callable[[Size], Tensors]
    metadata: dict[str, str]


class Adapter(nn.Module):
    """One adapter for every linear and convolution weight of a UNet, or of the half that ControlNets copy."""

    def __init__(self, unet: UNetEncoder, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.names: list[tuple[str, str]] = []  # names of layer and tensor
        self.tensors = nn.ParameterList()
        for path, layer in unet.named_modules():
            if not isinstance(layer, (Linear, Conv2d)):
                continue
            for name, tensor in kind.start(layer.weight.shape).items():
                self.names.append((path, name))
                self.tensors.append(nn.Parameter(tensor, requires_grad=tensor.ndim > 0))

    def merged(self, unet: UNetEncoder) -> Tensors:
        """Return the adapted weights by parameter name; gradients reach the adapter's tensors."""
        out = {}
        # Single precision for small products, and for OFT's inverses, as bfloat16 has no solver.
        with torch.autocast("cpu", enabled=False):
            for path, tensors in self._layers().items():
                weight = unet.get_parameter(f"{path}.weight")
                fitted = self.kind.match(tensors).fit(weight.shape)
                out[f"{path}.weight"] = weight + fitted.merged_difference(weight)
        return out

    def _layers(self) -> dict[str, Tensors]:
        layers: dict[str, Tensors] = defaultdict(dict)
        for (path, name), tensor in zip(self.names, self.tensors):
            layers[path][name] = tensor
        return layers

    def export(self) -> Tensors:
        """Return the tensors under kohya's names, which LyCORIS uses as well."""
        return {
            f"lora_unet_{path.replace('.', '_')}.{name}": tensor.detach()
            for (path, name), tensor in zip(self.names, self.tensors)
        }


def low_rank(rank: int) -> Kind:
    """Return LoRA for linear layers and convolutions (LoCon); the scale is 1."""

    def start(shape: Size) -> Tensors:
        inner = min(rank, shape[0], shape[1:].numel())
        return {
            lora.DOWN: _uniform(inner, *shape[1:]),
            lora.UP: torch.zeros(shape[0], inner, *(1,) * len(shape[2:])),
            lora.ALPHA: torch.tensor(float(inner)),
        }

    return Kind(lora.match, start, _metadata("networks.lora", rank, conv_dim=rank, conv_alpha=rank))


def hadamard(rank: int) -> Kind:
    """Return LoHa without cores; the scale is 1."""

    def start(shape: Size) -> Tensors:
        inputs = shape[1:].numel()
        return {
            loha.HADA_W1_A: 0.1 * torch.randn(shape[0], rank),
            loha.HADA_W1_B: torch.randn(rank, inputs),
            loha.HADA_W2_A: torch.zeros(shape[0], rank),
            loha.HADA_W2_B: torch.randn(rank, inputs),
            "alpha": torch.tensor(float(rank)),
        }

    return Kind(loha.match, start, _metadata("lycoris.kohya", rank, algo="loha", conv_dim=rank, conv_alpha=rank))


def kronecker(factor: int) -> Kind:
    """Return LoKr of two whole factors, the left one square; ``factor`` has to divide every side."""

    def start(shape: Size) -> Tensors:
        right = (shape[0] // factor, shape[1] // factor, *shape[2:])
        return {lokr.LOKR_W1: _uniform(factor, factor), lokr.LOKR_W2: torch.zeros(right)}

    return Kind(lokr.match, start, _metadata("lycoris.kohya", 1, algo="lokr", factor=factor, full_matrix=True))


def multiplied() -> Kind:
    """Return (IA)^3 on every layer's outputs."""

    def start(shape: Size) -> Tensors:
        change = torch.zeros(shape[0], 1, *(1,) * len(shape[2:]))
        return {ia3.IA3_WEIGHT: change, ia3.ON_INPUT: torch.tensor(0.0)}

    return Kind(ia3.match, start, _metadata("lycoris.kohya", 1, algo="ia3"))


def rotated(block: int) -> Kind:
    """Return OFT in blocks of ``block`` outputs (all, if there are fewer), with a scale for each output."""

    def start(shape: Size) -> Tensors:
        side = min(block, shape[0])
        return {
            oft.OFT_BLOCKS: torch.zeros(shape[0] // side, side, side),
            oft.RESCALE: torch.ones(shape[0], *(1,) * len(shape[1:])),
        }

    return Kind(oft.match, start, _metadata("lycoris.kohya", block, algo="diag-oft", rescaled=True))


def _uniform(*shape: int) -> Tensor:
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))


def _metadata(module: str, rank: int, **arguments: object) -> dict[str, str]:
    return {
        "ss_base_model_version": "sd_v1",
        "ss_network_module": module,
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_network_args": json.dumps(arguments),
    }
