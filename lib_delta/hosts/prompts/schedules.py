"""Prompts in a WebUI's syntax, parsed by the WebUI's code and encoded by the source's text encoder.

The WebUI parses emphasis, BREAK, AND, prompt editing and textual inversions, and returns schedules of encoded prompts.
:class:`Schedules` returns the conditioning of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lib_delta.core.conditioning import Conditioning
from lib_delta.models.text import TextEncoder


class ScheduleEntry(Protocol):
    """A part of a WebUI's prompt schedule: ``cond`` applies up to and including ``end_at_step``.

    ``cond`` is the encoded text ``(T, C)``; for SDXL a dictionary of it (``crossattn``) and of the label ``(L,)``
    (``vector``).
    """

    end_at_step: int
    cond: Tensor | Mapping[str, Tensor]


class PromptPart(Protocol):
    """One of the prompts that AND joins."""

    schedules: Sequence[ScheduleEntry]
    weight: float


HOOK = "delta_sampling_hook"
# WebUIs' names of SDXL's conditioning.
TEXT, LABEL = "crossattn", "vector"

# Maps cond and uncond ``(N, T, C)`` to the same pair with one length.
Padding = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def pad_with_empty(empty: Tensor) -> Padding:
    """Return a padding that extends the shorter of the two by the encoded empty prompt ``(1, 77, C)``."""

    def pad(cond: Tensor, uncond: Tensor) -> tuple[Tensor, Tensor]:
        length = max(cond.shape[1], uncond.shape[1])
        return _fill(cond, empty, length), _fill(uncond, empty, length)

    return pad


def _fill(conds: Tensor, empty: Tensor, length: int) -> Tensor:
    missing = (length - conds.shape[1]) // empty.shape[1]
    return torch.cat((conds, empty.to(conds).repeat(len(conds), missing, 1)), 1)


def pad_uncond(cond: Tensor, uncond: Tensor) -> tuple[Tensor, Tensor]:
    """Cut the negative prompt to the prompt's length, or repeat its last vector (WebUI before 1.6)."""
    missing = max(0, cond.shape[1] - uncond.shape[1])
    longer = torch.cat((uncond, uncond[:, -1:].expand(-1, missing, -1)), 1)
    return cond, longer[:, : cond.shape[1]]


class Schedules:
    """One model's conditioning over a pass: a :data:`lib_delta.core.conditioning.PromptSchedule`."""

    def __init__(
        self,
        cond: Sequence[Sequence[PromptPart]],
        uncond: Sequence[Sequence[ScheduleEntry]],
        pad: Padding | None = None,
    ) -> None:
        """Take each image's parts joined by AND, and the schedule of its negative prompt.

        ``pad`` is the WebUI's way to pad prompt and negative prompt to one length, if it does so.
        """
        self._pad = pad
        self._parts = [part for image in cond for part in image]
        self._weights = tuple(tuple(float(part.weight) for part in image) for image in cond)
        self._uncond = uncond
        self._conditionings: dict[tuple[int, ...], Conditioning] = {}

    def __call__(self, step: int) -> Conditioning:
        """Return the conditioning at a step; equal conditionings are the same object."""
        schedules = [*(part.schedules for part in self._parts), *self._uncond]
        entries = tuple(_entry_at(schedule, step) for schedule in schedules)
        if entries not in self._conditionings:
            encoded = [schedule[i].cond for schedule, i in zip(schedules, entries)]
            count = len(self._parts)
            cond, uncond = (_stack([text_of(c) for c in part]) for part in (encoded[:count], encoded[count:]))
            if self._pad is not None:
                cond, uncond = self._pad(cond, uncond)
            labels = _labels(encoded[:count]), _labels(encoded[count:])
            self._conditionings[entries] = Conditioning(cond, uncond, *labels, weights=self._weights)
        return self._conditionings[entries]


def _entry_at(schedule: Sequence[ScheduleEntry], step: int) -> int:
    """Return the number of the entry for a step; WebUIs return to the first entry after the end of the last."""
    return next((i for i, entry in enumerate(schedule) if step <= entry.end_at_step), 0)


def text_of(cond: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Return the encoded text of a conditioning, which may be SDXL's dictionary."""
    return cond if isinstance(cond, Tensor) else cond[TEXT]


def _labels(conds: Sequence[Tensor | Mapping[str, Tensor]]) -> Tensor | None:
    labels = [cond[LABEL] for cond in conds if not isinstance(cond, Tensor)]
    return torch.stack(labels) if labels else None


def _stack(conds: Sequence[Tensor]) -> Tensor:
    """Stack texts ``(T, C)``; shorter ones are padded by their last vector, as WebUIs do."""
    longest = max(len(c) for c in conds)
    return torch.stack([torch.cat([c, c[-1:].expand(longest - len(c), -1)]) for c in conds])


class TokenizerFixes(Protocol):
    """The WebUI tokenizer's result: for each row of tokens, its embeddings as ``(offset, embedding)``."""

    fixes: Sequence[Sequence[tuple[int, Any]]] | None


def insert_embeddings(tower: TextEncoder, tokenized: TokenizerFixes, key: str = "clip_l") -> None:
    """Make textual inversions replace tokens in a text encoder of the source, from now on.

    Uses a hook instead of a wrapper, because an adapted encoder finds parameters by their names.  Replaces the hook of
    an earlier engine.
    """

    def insert(_module: nn.Module, _inputs: object, embedded: Tensor) -> Tensor:
        fixes, tokenized.fixes = tokenized.fixes, None
        if not fixes or not any(fixes):
            return embedded
        embedded = embedded.clone()
        for row, embeddings in zip(embedded, fixes):
            for offset, embedding in embeddings:
                vectors = embedding.vec[key] if isinstance(embedding.vec, dict) else embedding.vec
                # A chunk starts with the start token, which offsets do not include.
                room = row[offset + 1 :]
                room[: len(vectors)] = vectors[: len(room)].to(row)
        return embedded

    embedding = tower.transformer.text_model.embeddings.token_embedding
    earlier = getattr(embedding, HOOK, None)
    if earlier is not None:
        earlier.remove()
    setattr(embedding, HOOK, embedding.register_forward_hook(insert))
