"""What holds for adapters of any weight."""

from __future__ import annotations

import pytest
import torch
from adapters_helpers import locon, make_unet

from lib_delta.adapters.apply import attach
from lib_delta.adapters.load import read_adapter

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

PATHS = ("input_blocks.1.0.in_layers.2", "middle_block.1.proj_in", "time_embed.0")


@settings(max_examples=25, deadline=None)
@given(st.floats(-8, 8), st.sampled_from(PATHS))
def test_the_merged_difference_is_linear_in_the_weight(weight: float, path: str) -> None:
    unet = make_unet()
    adapter = read_adapter("x", locon(unet, [path]), unet)
    layer = unet.get_submodule(path)
    unit = adapter.unet[path].merged_difference(layer.weight)
    attach(unet, [(adapter, weight)])
    second = layer.weight if layer.adaptation is None else layer.adaptation.weight
    torch.testing.assert_close(second - layer.weight, weight * unit, rtol=1e-5, atol=1e-5)
