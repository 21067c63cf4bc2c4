"""Prompts in a WebUI's own grammar, read by the WebUI's own code with the source's text encoder.

The WebUI parses emphasis, BREAK, AND, prompt editing and textual inversions and gives back schedules
of encoded prompts; what of a schedule holds at a step is told here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lib_delta.core.conditioning import Conditioning
from lib_delta.models.text import TextEncoder


class ScheduleEntry(Protocol):
    """A part of a WebUI's prompt schedule: ``cond`` ``(T, C)`` holds up to and including ``end_at_step``."""

    end_at_step: int
    cond: Tensor


class PromptPart(Protocol):
    """One of the prompts joined by AND."""

    schedules: Sequence[ScheduleEntry]
    weight: float


HOOK = "delta_sampling_hook"

# From cond and uncond ``(N, T, C)`` to the same two of one length.
Padding = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def pad_with_empty(empty: Tensor) -> Padding:
    """Fill the shorter of the two up with the empty prompt ``(1, 77, C)``."""

    def pad(cond: Tensor, uncond: Tensor) -> tuple[Tensor, Tensor]:
        length = max(cond.shape[1], uncond.shape[1])
        return _fill(cond, empty, length), _fill(uncond, empty, length)

    return pad


def _fill(conds: Tensor, empty: Tensor, length: int) -> Tensor:
    missing = (length - conds.shape[1]) // empty.shape[1]
    return torch.cat((conds, empty.to(conds).repeat(len(conds), missing, 1)), 1)


def pad_uncond(cond: Tensor, uncond: Tensor) -> tuple[Tensor, Tensor]:
    """Bring the negative prompt to the prompt's length: cut it, or repeat its last vector (WebUI before 1.6)."""
    missing = max(0, cond.shape[1] - uncond.shape[1])
    longer = torch.cat((uncond, uncond[:, -1:].expand(-1, missing, -1)), 1)
    return cond, longer[:, : cond.shape[1]]


class Schedules:
    """What one model is told over a run: one of :data:`lib_delta.core.conditioning.PromptSchedule`."""

    def __init__(
        self,
        cond: Sequence[Sequence[PromptPart]],
        uncond: Sequence[Sequence[ScheduleEntry]],
        pad: Padding | None = None,
    ) -> None:
        """Take, for each image, its parts joined by AND, and its negative prompt's schedule.

        ``pad`` is how the WebUI brings prompt and negative prompt to one length, where it does.
        """
        self._pad = pad
        self._parts = [part for image in cond for part in image]
        self._weights = tuple(tuple(float(part.weight) for part in image) for image in cond)
        self._uncond = uncond
        self._known: dict[tuple[int, ...], Conditioning] = {}

    def __call__(self, step: int) -> Conditioning:
        """Return what holds at a step: the same object for as long as nothing changes, and again when it returns."""
        schedules = [*(part.schedules for part in self._parts), *self._uncond]
        holding = tuple(_entry_at(schedule, step) for schedule in schedules)
        if holding not in self._known:
            encoded = [schedule[i].cond for schedule, i in zip(schedules, holding)]
            count = len(self._parts)
            halves = _stack(encoded[:count]), _stack(encoded[count:])
            cond, uncond = halves if self._pad is None else self._pad(*halves)
            self._known[holding] = Conditioning(cond, uncond, weights=self._weights)
        return self._known[holding]


def _entry_at(schedule: Sequence[ScheduleEntry], step: int) -> int:
    """Return the number of the entry that holds; after the last one's end WebUIs return to the first."""
    return next((i for i, entry in enumerate(schedule) if step <= entry.end_at_step), 0)


def _stack(conds: Sequence[Tensor]) -> Tensor:
    """Stack ``(T, C)`` texts; shorter ones are filled up with their last vector, as WebUIs do."""
    longest = max(len(c) for c in conds)
    return torch.stack([torch.cat([c, c[-1:].expand(longest - len(c), -1)]) for c in conds])


class TokenizerFixes(Protocol):
    """What a WebUI's tokeniser leaves behind: for each row of tokens, its ``(offset, embedding)``."""

    fixes: Sequence[Sequence[tuple[int, Any]]] | None


def insert_embeddings(tower: TextEncoder, found: TokenizerFixes, key: str = "clip_l") -> None:
    """Let textual inversions take the place of tokens in a text encoder of ours, from now on.

    A hook, not a wrapper: parameters keep their names, by which an adapted encoder's are exchanged.  It takes the
    place of the one that an earlier engine had put there.
    """

    def insert(_module: nn.Module, _inputs: object, embedded: Tensor) -> Tensor:
        fixes, found.fixes = found.fixes, None
        if not fixes or not any(fixes):
            return embedded
        embedded = embedded.clone()
        for row, embeddings in zip(embedded, fixes):
            for offset, embedding in embeddings:
                vectors = embedding.vec[key] if isinstance(embedding.vec, dict) else embedding.vec
                # A chunk begins with its start mark, which offsets do not count.
                room = row[offset + 1 :]
                room[: len(vectors)] = vectors[: len(room)].to(row)
        return embedded

    embedding = tower.transformer.text_model.embeddings.token_embedding
    earlier = getattr(embedding, HOOK, None)
    if earlier is not None:
        earlier.remove()
    setattr(embedding, HOOK, embedding.register_forward_hook(insert))
