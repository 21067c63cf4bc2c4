"""A WebUI's prompt code around the source's text encoder."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from modules import prompt_parser, shared

from lib_delta.hosts.prompts.pass_prompts import PassPrompts, Texts

if TYPE_CHECKING:
    from torch import Tensor

    from lib_delta.hosts.prompts.schedules import Padding
    from lib_delta.models.text import TextEncoder


class TextEngine(ABC):
    """A WebUI's prompt code around the source's text encoder, in the role of a model for the prompt parser."""

    def encode(self, tower: TextEncoder, prompts: Texts, pass_prompts: PassPrompts) -> Any:
        """Return the conditioning over a pass for a model with this text encoder (:class:`Schedules`)."""
        from lib_delta.hosts.prompts.schedules import Schedules

        self.tower = tower
        try:
            limits = _limits(pass_prompts)
            cond = prompt_parser.get_multicond_learned_conditioning(self, list(prompts), *limits)
            uncond = prompt_parser.get_learned_conditioning(self, list(pass_prompts.negative), *limits)
            return Schedules(cond.batch, uncond, self.padding())
        finally:
            del self.tower  # it refers back to this engine, which would then outlive the base

    @abstractmethod
    def use_embeddings(self, embeddings: Mapping[str, Tensor]) -> None:
        """Replace the embeddings, ``(vectors, width)`` each, that prompts can name in addition to the user's."""

    @abstractmethod
    def padding(self) -> Padding | None:
        """Return the WebUI's way to pad prompt and negative prompt to one length; None if it does not."""

    @abstractmethod
    def get_learned_conditioning(self, texts: Texts) -> Tensor:
        """Encode texts without AND and prompt editing; the prompt parser calls this."""


def _limits(pass_prompts: PassPrompts) -> tuple[Any, ...]:
    """Return the arguments of the WebUI's prompt parser after model and prompts; Forge Neo has no old scheduling."""
    limits = pass_prompts.steps, pass_prompts.hires_steps
    if "use_old_scheduling" not in inspect.signature(prompt_parser.get_learned_conditioning).parameters:
        return limits
    return *limits, getattr(shared.opts, "use_old_scheduling", False)
