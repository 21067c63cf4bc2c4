"""What each function of deltas is given, and when kinds of change are one object."""

from __future__ import annotations

import torch
from torch import Tensor

from lib_delta.core.deltas import Deltas, PromptParts, map_changes

GUIDED, UNCOND = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])


def total(_images: Tensor | None, *changes: Tensor) -> Tensor:
    return sum(changes, torch.zeros(2))


def test_what_is_one_object_stays_one_only_where_it_is_in_all() -> None:
    one, two = Deltas(GUIDED, GUIDED), Deltas(GUIDED, UNCOND)
    alike = map_changes(total, one, one)
    assert alike.uncond is alike.guided
    for pair in ((one, two), (two, one)):
        mixed = map_changes(total, *pair)
        assert mixed.guided.tolist() == [2, 4] and mixed.uncond.tolist() == [4, 6]


def test_parts_are_there_only_where_all_have_them() -> None:
    parts = PromptParts(UNCOND, ((0.5, 0.5),), torch.tensor([0, 0]))
    with_parts, without = Deltas(GUIDED, UNCOND, parts), Deltas(GUIDED, UNCOND)
    both = map_changes(total, with_parts, with_parts).parts
    assert both is not None and both.change.tolist() == [6, 8] and both.weights == parts.weights
    assert (
        map_changes(total, with_parts, without).parts is None and map_changes(total, without, with_parts).parts is None
    )
