"""Resized binary maps, compared with OpenCV's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lib_delta.controls.control_map import ControlMap
from lib_delta.controls.line_art import is_binary, otsu_threshold, thinned

cv2: Any = pytest.importorskip("cv2")
SIDE = np.array([[-1, -1, -1], [0, 1, 0], [1, 1, 1]])
CORNER = np.array([[0, -1, -1], [1, 1, -1], [0, 1, 0]])
SPURS = np.array([[[-1, -1, -1], [-1, 1, -1], [0, 0, -1]], [[-1, -1, -1], [-1, 1, -1], [-1, 0, 0]]])
Pixels = Any


def edges(height: int = 60, width: int = 90) -> Pixels:
    """Edges as canny draws them: of a circle, a square and a slanted line."""
    drawn = np.zeros((height, width, 3), np.uint8)
    cv2.circle(drawn, (30, 28), 17, (200, 80, 40), -1)
    cv2.rectangle(drawn, (52, 10), (80, 48), (90, 200, 120), -1)
    cv2.line(drawn, (2, 55), (88, 50), (255, 255, 255), 3)
    return cv2.Canny(drawn, 100, 200)


def without(drawn: Pixels, patterns: Any) -> Pixels:
    for turn in range(4):
        for pattern in patterns:
            found = cv2.morphologyEx(drawn, cv2.MORPH_HITMISS, np.rot90(pattern, turn).astype(np.int32))
            drawn = np.where(found > 127, 0, drawn).astype(np.uint8)
    return drawn


def thin(drawn: Pixels, larger: bool) -> Pixels:
    for _ in range(32):
        drawn = without(drawn, (SIDE, CORNER))
    return without(drawn, SPURS) if larger else drawn


def as_map(drawn: Pixels) -> torch.Tensor:
    return torch.from_numpy(drawn.copy())[None, None].expand(-1, 3, -1, -1) / 255


def test_the_threshold_is_otsus() -> None:
    generator = np.random.default_rng(1)
    for dark, light in ((20, 200), (60, 130), (0, 255)):
        levels = generator.normal(np.where(generator.random((40, 50)) < 0.8, dark, light), 12)
        grey = levels.clip(0, 255).astype(np.uint8)
        assert otsu_threshold(torch.from_numpy(grey).float()) == cv2.threshold(grey, 0, 255, cv2.THRESH_OTSU)[0]


@pytest.mark.parametrize("larger", [False, True])
def test_lines_are_thinned_as_by_opencv(larger: bool) -> None:
    thick = cv2.dilate(edges(), np.ones((4, 3), np.uint8))
    made = thinned(torch.from_numpy(thick) > 127, enlarged=larger).byte().numpy() * 255
    assert np.array_equal(made, thin(thick, larger)) and 0 < made.sum() < thick.sum()


def by_opencv(drawn: Pixels, size: tuple[int, int]) -> Pixels:
    """What the ControlNet extension makes of edges that are one pixel wide."""
    larger = size[0] * size[1] > drawn.size
    grey = cv2.resize(drawn, size[::-1], interpolation=cv2.INTER_CUBIC if larger else cv2.INTER_AREA)
    ridges = np.zeros_like(grey)
    across = np.eye(3)
    for line in (across, across[::-1], np.eye(3)[[1, 1, 1]], np.eye(3)[[1, 1, 1]].T):
        highest = cv2.dilate(grey, np.ascontiguousarray(line, np.uint8))
        ridges = np.where(highest == grey, grey, ridges)
    return thin(cv2.threshold(ridges, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[1], larger)


@pytest.mark.parametrize("size", [(30, 45), (97, 141), (40, 150), (120, 180)])
def test_edges_of_one_pixel_stay_edges_of_one_pixel(size: tuple[int, int]) -> None:
    made = ControlMap(as_map(edges())).at(*size, 3)
    assert set(made.unique().tolist()) == {0.0, 1.0}
    wanted = by_opencv(edges(), size)
    assert np.array_equal(made[0, 0].byte().numpy() * 255, wanted) and wanted.any()


def test_areas_of_two_levels_stay_two_levels_and_all_else_is_as_it_was() -> None:
    filled = np.zeros((60, 90), np.uint8)
    cv2.circle(filled, (40, 30), 20, 255, -1)
    made = ControlMap(as_map(filled)).at(97, 140, 3)
    assert set(made.unique().tolist()) == {0.0, 1.0}
    assert float(made.mean()) == pytest.approx(filled.mean() / 255, abs=0.01)
    soft = as_map(cv2.GaussianBlur(filled, (9, 9), 3))
    assert not is_binary(soft[0]) and len(ControlMap(soft).at(97, 140, 3).unique()) > 50
    assert not is_binary(as_map(np.zeros((4, 4), np.uint8))[0])
