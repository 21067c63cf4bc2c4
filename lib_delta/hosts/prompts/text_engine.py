"""A WebUI's prompt code around our text encoder."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modules import prompt_parser, shared

from lib_delta.hosts.prompts.pass_prompts import PassPrompts, Texts

if TYPE_CHECKING:
    from torch import Tensor

    from lib_delta.hosts.prompts.schedules import Padding
    from lib_delta.models.text import TextEncoder
    from lib_delta.runtime.side_model import SideModel


class TextEngine(ABC):
    """A WebUI's prompt code around our text encoder, in the role of a model for its prompt parser."""

    def encode(self, tower: TextEncoder, prompts: Texts, pass_prompts: PassPrompts) -> Any:
        """Return what a model with this text encoder is told over a run."""
        from lib_delta.hosts.prompts.schedules import Schedules

        self.tower = tower
        try:
            limits = _limits(pass_prompts)
            cond = prompt_parser.get_multicond_learned_conditioning(self, list(prompts), *limits)
            uncond = prompt_parser.get_learned_conditioning(self, list(pass_prompts.negative), *limits)
            return Schedules(cond.batch, uncond, self.padding())
        finally:
            del self.tower  # it refers back to this engine, and would outlive its base

    @abstractmethod
    def use_embeddings(self, embeddings: Mapping[str, Tensor]) -> None:
        """Let prompts name these embeddings, ``(vectors, width)`` each, besides the user's own, and no others."""

    @abstractmethod
    def padding(self) -> Padding | None:
        """Return how the WebUI brings prompt and negative prompt to one length, None where it does not."""

    @abstractmethod
    def get_learned_conditioning(self, texts: Texts) -> Tensor:
        """Encode texts without AND and prompt editing, as the prompt parser asks for it."""


class TextEngineCache:
    """Makes text engines, and caches the one of the side model that was used last."""

    def __init__(self, make: Callable[[SideModel], TextEngine]) -> None:
        self._make = make
        self._cached: tuple[SideModel, TextEngine] | None = None

    def get(self, model: SideModel) -> TextEngine:
        """Return the side model's text engine."""
        if self._cached is None or self._cached[0] is not model:
            self._cached = model, self._make(model)
        return self._cached[1]

    def forget(self, dropped: Sequence[SideModel]) -> None:
        """Drop the text engine of a side model that is about to leave memory."""
        if self._cached is not None and any(self._cached[0] is model for model in dropped):
            self._cached = None


def _limits(pass_prompts: PassPrompts) -> tuple[Any, ...]:
    """Return what the WebUI's prompt parser takes besides model and prompts; Forge Neo has no old scheduling."""
    limits = pass_prompts.steps, pass_prompts.hires_steps
    if "use_old_scheduling" not in inspect.signature(prompt_parser.get_learned_conditioning).parameters:
        return limits
    return *limits, getattr(shared.opts, "use_old_scheduling", False)
