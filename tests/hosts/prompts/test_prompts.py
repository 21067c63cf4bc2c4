"""Prompt schedules: the entry for a step, padding to one length, and textual inversions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_delta.hosts.prompts.schedules import Schedules, insert_embeddings, pad_uncond, pad_with_empty


def text(value: float, length: int = 3) -> Tensor:
    """An encoded text that differs from token to token."""
    return value + torch.arange(length * 2.0).reshape(length, 2) / 100


def entry(end: int, value: float, length: int = 3) -> Any:
    return SimpleNamespace(end_at_step=end, cond=text(value, length))


def part(*entries: Any, weight: float = 1.0) -> Any:
    return SimpleNamespace(schedules=entries, weight=weight)


def test_an_entry_holds_up_to_and_including_its_last_step() -> None:
    schedules = Schedules([[part(entry(2, 1.0), entry(5, 2.0))]], [[entry(1, -1.0), entry(5, -2.0)]])
    values = [(int(schedules(step).cond[0, 0, 0]), int(schedules(step).uncond[0, 0, 0])) for step in range(6)]
    assert values == [(1, -1), (1, -1), (1, -2), (2, -2), (2, -2), (2, -2)]


def test_after_the_last_entry_the_first_holds_again() -> None:
    schedules = Schedules([[part(entry(1, 1.0), entry(2, 2.0))]], [[entry(2, 0.0)]])
    assert schedules(7).cond[0, 0, 0] == 1


def test_the_same_object_is_returned_for_as_long_as_nothing_changes() -> None:
    schedules = Schedules([[part(entry(2, 1.0), entry(5, 2.0))]], [[entry(5, 0.0)]])
    assert schedules(0) is schedules(1) is schedules(2)
    assert schedules(3) is not schedules(2) and schedules(3) is schedules(3)


def test_parts_joined_by_and_are_rows_with_the_images_weights() -> None:
    images = [[part(entry(5, 1.0), weight=0.5), part(entry(5, 2.0), weight=-1)], [part(entry(5, 3.0))]]
    conditioning = Schedules(images, [[entry(5, 0.0)], [entry(5, 0.5)]])(0)
    assert conditioning.weights == ((0.5, -1.0), (1.0,))
    assert conditioning.cond[:, 0, 0].tolist() == [1, 2, 3] and conditioning.uncond.shape == (2, 3, 2)


def test_shorter_texts_of_a_batch_repeat_their_last_vector() -> None:
    conditioning = Schedules([[part(entry(5, 1.0, 2))], [part(entry(5, 2.0, 4))]], [[entry(5, 0.0)], [entry(5, 0.0)]])(
        0
    )
    short = text(1.0, 2)
    assert torch.equal(conditioning.cond[0], torch.stack((short[0], short[1], short[1], short[1])))
    assert torch.equal(conditioning.cond[1], text(2.0, 4)) and conditioning.uncond.shape == (2, 3, 2)


EMPTY = text(9.0)[None]


@pytest.mark.parametrize(("lengths", "filled"), [((3, 9), 0), ((9, 3), 1), ((6, 6), None)])
def test_the_shorter_of_prompt_and_negative_prompt_is_filled_up_with_empty_ones(
    lengths: tuple[int, int], filled: int | None
) -> None:
    given = [torch.stack([text(i, length), text(i + 1, length)]) for i, length in enumerate(lengths)]
    got = pad_with_empty(EMPTY)(given[0], given[1])
    assert got[0].shape == got[1].shape == (2, max(lengths), 2)
    for i, (before, after) in enumerate(zip(given, got)):
        assert torch.equal(after[:, : lengths[i]], before)
        if i == filled:
            assert torch.equal(after[:, lengths[i] :], EMPTY.repeat(2, 2, 1))


def test_before_1_6_the_negative_prompt_alone_is_cut_or_drawn_out() -> None:
    short, long = text(1.0, 2)[None], text(2.0, 4)[None]
    cond, uncond = pad_uncond(short, long)
    assert torch.equal(cond, short) and torch.equal(uncond, long[:, :2])
    cond, uncond = pad_uncond(long, short)
    assert torch.equal(cond, long) and torch.equal(uncond[0], short[0, [0, 1, 1, 1]])


def test_a_schedule_is_padded_as_it_is_told_to() -> None:
    conditioning = Schedules([[part(entry(5, 1.0, 6))]], [[entry(5, 2.0, 3)]], pad_with_empty(EMPTY))(0)
    assert torch.equal(conditioning.uncond[0], torch.cat((text(2.0, 3), EMPTY[0])))


# Textual inversions: token numbers are the vectors' first component here.


def embedded(tokens: list[list[int]], fixes: Any) -> tuple[Tensor, Any]:
    embedding = nn.Embedding(10, 2).requires_grad_(False)
    embedding.weight.data.copy_(torch.stack((torch.arange(10.0), torch.zeros(10)), 1))
    model = SimpleNamespace(embeddings=SimpleNamespace(token_embedding=embedding))
    tokenized = SimpleNamespace(fixes=fixes)
    tower: Any = SimpleNamespace(transformer=SimpleNamespace(text_model=model))
    insert_embeddings(tower, tokenized)
    return embedding(torch.tensor(tokens)), tokenized


def inversion(*values: float) -> Any:
    return SimpleNamespace(vec=torch.tensor([[v, 1.0] for v in values]))


def test_vectors_take_the_places_that_the_prompt_code_has_kept_for_them() -> None:
    """Offsets do not include the start token."""
    rows, tokenized = embedded([[8, 1, 0, 0, 2, 9], [8, 0, 3, 3, 0, 9]], [[(1, inversion(70, 71))], []])
    assert rows[0].tolist() == [[8, 0], [1, 0], [70, 1], [71, 1], [2, 0], [9, 0]]
    assert rows[1, :, 0].tolist() == [8, 0, 3, 3, 0, 9]
    assert tokenized.fixes is None


def test_several_in_a_row_and_one_that_is_kept_by_encoder() -> None:
    both = SimpleNamespace(vec={"clip_l": torch.tensor([[50.0, 1.0]]), "clip_g": torch.zeros(1, 3)})
    rows, _ = embedded([[8, 0, 5, 0, 9]], [[(0, inversion(40)), (2, both)]])
    assert rows[0, :, 0].tolist() == [8, 40, 5, 50, 9]


def test_an_inversion_that_is_longer_than_the_room_left_is_cut() -> None:
    rows, _ = embedded([[8, 1, 0, 0]], [[(1, inversion(1, 2, 3, 4))]])
    assert rows[0, :, 0].tolist() == [8, 1, 1, 2]


@pytest.mark.parametrize("fixes", [None, [], [[], []]])
def test_without_inversions_nothing_is_replaced(fixes: Any) -> None:
    rows, _ = embedded([[8, 1], [8, 2]], fixes)
    assert rows[..., 0].tolist() == [[8, 1], [8, 2]]


def test_the_vocabulary_itself_is_left_alone() -> None:
    embedding = nn.Embedding(4, 2).requires_grad_(False)
    before = embedding.weight.clone()
    tokenized = SimpleNamespace(fixes=[[(0, inversion(9))]])
    model = SimpleNamespace(embeddings=SimpleNamespace(token_embedding=embedding))
    tower: Any = SimpleNamespace(transformer=SimpleNamespace(text_model=model))
    insert_embeddings(tower, tokenized)
    embedding(torch.tensor([[1, 2]]))
    assert torch.equal(embedding.weight, before) and dict(embedding.named_parameters()).keys() == {"weight"}
