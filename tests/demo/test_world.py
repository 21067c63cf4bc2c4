"""What the embedded models are taught, and how it is measured that two styles are there at once."""

from __future__ import annotations

import pytest
import torch

from demo.metrics import mosaic
from tests.support.tiny_unet import randn

pytest.importorskip("resvg_py")

from demo.train.data import pixelated
from demo.train.world import CONCEPTS, NAMES


def test_every_name_is_there_once_and_the_new_ones_are_new() -> None:
    assert len({*NAMES, *CONCEPTS}) == len(NAMES) + len(CONCEPTS) == 171
    assert sorted(NAMES) == NAMES and sorted(CONCEPTS) == CONCEPTS


def test_all_change_in_a_mosaic_is_between_its_blocks() -> None:
    pictures = randn(2, 3, 64, 64, seed=1)
    torch.testing.assert_close(mosaic(pixelated(pictures)), torch.ones(2))
    # 15 of the 63 borders between pixels are borders of blocks.
    torch.testing.assert_close(mosaic(pictures), torch.full((2,), 15 / 63), atol=0.02, rtol=0)
    torch.testing.assert_close(mosaic(torch.zeros(2, 3, 64, 64)), torch.zeros(2))
