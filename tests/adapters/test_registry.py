"""Adding an algorithm: one module, and one entry in the registry."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lib_delta.adapters import key_names
from lib_delta.adapters.adapter_file import load_adapter
from lib_delta.adapters.algorithms import registry
from lib_delta.adapters.algorithms.base import Algorithm
from lib_delta.errors import AdapterError
from lib_delta.models.unet import UNet
from tests.support.tiny_unet import TINY

# W' = gain * W.
SCALED = """
from dataclasses import dataclass

from torch import Tensor

from lib_delta.adapters.algorithms.base import LayerAdapter, TensorName, named

GAIN = "weight_gain"
TENSORS = (*named(GAIN), TensorName(r"log_gain(?:\\.\\w+)?", GAIN, Tensor.exp))


@dataclass(frozen=True)
class Scaled(LayerAdapter):
    gain: Tensor

    @property
    def algorithm(self):
        return "Scaled"

    def fit(self, shape):
        return self

    def merged_difference(self, weight):
        return weight.float() * (self.gain - 1)


def match(tensors):
    return Scaled(tensors[GAIN]) if tensors.keys() == {GAIN} else None
"""
LAYER = "input_blocks.1.0.in_layers.2"


@pytest.mark.parametrize(("stored", "number"), [("weight_gain", 3.0), ("log_gain.default", 3.0)])
def test_a_new_algorithm_is_one_module_and_one_entry(
    stored: str, number: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = UNet(TINY)
    gain = torch.tensor(number)
    path = tmp_path / "x.safetensors"
    save_file({f"diffusion_model.{LAYER}.{stored}": gain.log() if stored.startswith("log") else gain}, path)
    with pytest.raises(AdapterError):
        load_adapter(path, unet)

    (tmp_path / "scaled.py").write_text(SCALED, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    scaled: Algorithm = importlib.import_module("scaled")  # type: ignore[assignment]
    monkeypatch.setattr(registry, "ALGORITHMS", (*registry.ALGORITHMS, scaled))
    file = load_adapter(path, unet)
    assert file.algorithms() == {"Scaled": 1} and not file.unmatched
    weight = torch.randn(2, 2)
    torch.testing.assert_close(file.unet[LAYER].merged_difference(weight), weight * 2)


def test_every_declared_name_is_parsed() -> None:
    names = [
        tensor.pattern.replace("\\", "")
        for module in (*registry.ALGORITHMS, *registry.WRAPPERS)
        for tensor in module.TENSORS
        if tensor.name is None and "(" not in tensor.pattern
    ]
    for name in names:
        parsed = key_names.parse_key(f"lora_unet_conv_in.{name}")
        assert parsed is not None and parsed.tensor == name
