"""The heat map of a run's deltas: the mean of their sizes, and its colours."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lib_delta.core.heatmap import COLOURS, HeatMap, colour_map


def test_the_map_is_the_mean_over_the_steps_of_each_pixels_share_of_the_estimate() -> None:
    generator = torch.Generator().manual_seed(3)
    steps = [[torch.randn(2, 4, 6, 5, generator=generator) for _ in range(2)] for _ in range(3)]
    heat = HeatMap()
    for change, denoised in steps:
        heat.add(change.half(), denoised)
    wanted = np.zeros((2, 6, 5))
    for change, denoised in steps:
        for image in range(2):
            whole = np.sqrt(np.mean(denoised[image].numpy() ** 2))
            wanted[image] += np.sqrt(np.mean(change[image].half().float().numpy() ** 2, axis=0)) / whole / 3
    assert heat.mean() == pytest.approx(wanted, rel=1e-5)
    assert heat.steps == 3


def test_the_first_passs_map_is_enlarged_to_that_of_the_hires_pass() -> None:
    heat, ones = HeatMap(), torch.ones(1, 4, 4, 4)
    heat.add(2 * ones, ones)
    heat.add(torch.zeros(1, 4, 8, 6), torch.ones(1, 4, 8, 6))
    assert heat.mean() == pytest.approx(np.ones((1, 8, 6)))


def test_frames_are_seen_as_one() -> None:
    heat = HeatMap()
    heat.add(torch.ones(1, 4, 3, 5, 6), torch.ones(1, 4, 3, 5, 6))
    assert heat.mean() == pytest.approx(np.ones((1, 5, 6)))


def test_the_largest_change_is_the_brightest_and_nothing_is_black() -> None:
    sizes = np.zeros((8, 8), np.float32)
    sizes[:, 4:] = 0.02
    picture = colour_map(sizes, 64, 64)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    assert (picture[:, 0] == COLOURS[0]).all() and (picture[:, -1] == COLOURS[-1]).all()
    brightness = picture.astype(int).sum(-1)[0]
    assert (np.diff(brightness) >= 0).all() and len(set(brightness)) > 4, "smooth between the two"
    assert (colour_map(np.zeros((4, 4), np.float32), 8, 8) == COLOURS[0]).all()
