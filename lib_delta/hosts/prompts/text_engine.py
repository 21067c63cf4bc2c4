"""A WebUI's prompt code around the source's text encoders."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from modules import prompt_parser, shared

from lib_delta.hosts.prompts.pass_prompts import PassPrompts, Texts

if TYPE_CHECKING:
    from torch import Tensor

    from lib_delta.hosts.prompts.bundled_embeddings import Vectors
    from lib_delta.hosts.prompts.schedules import Padding
    from lib_delta.models.text import TextEncoder

# SD 2.x and XL were trained on the layer before the last of their text encoders.
PENULTIMATE = 2
# WebUIs' names of SDXL's text encoders in embeddings.
SDXL_ENCODERS = ("clip_l", "clip_g")


def is_clip_l(tower: TextEncoder) -> bool:
    """Return whether a text encoder is CLIP-L (of SD 1.x and XL), and not an OpenCLIP model."""
    return tower.config.activation == "quick_gelu"


class TextSlot:
    """The place of one text encoder in the WebUI's prompt code, which calls the encoder that is in it."""

    def __init__(self) -> None:
        self._tower: TextEncoder | None = None

    @contextmanager
    def filled(self, tower: TextEncoder) -> Iterator[None]:
        """Place an encoder for the duration of the context; no longer, because slots outlive bases."""
        before, self._tower = self._tower, tower
        try:
            yield
        finally:
            self._tower = before

    def encode(self, tokens: Tensor, layer: int) -> Tensor:
        """Encode ``(N, 77)`` tokens; return a layer's output, counted from the last, on the encoder's device.

        The output has the pooled text, if the encoder projects it, as the attribute ``pooled``, as in WebUIs.
        """
        from lib_delta.devices import without_autocast

        assert self._tower is not None, "prompts are encoded only within TextEngine.encode"
        device = next(self._tower.parameters()).device
        with without_autocast(device):
            hidden, pooled = self._tower.encode(tokens.to(device), layer)
        if pooled is not None:
            hidden.pooled = pooled  # type: ignore[attr-defined]
        return hidden


class TextEngine(ABC):
    """A WebUI's prompt code around the source's text encoders, in the role of a model for the prompt parser."""

    def __init__(self, count: int) -> None:
        """Make slots for ``count`` text encoders."""
        self.slots = tuple(TextSlot() for _ in range(count))

    def encode(self, towers: Sequence[TextEncoder], prompts: Texts, pass_prompts: PassPrompts) -> Any:
        """Return the conditioning over a pass for a model with these text encoders (:class:`Schedules`)."""
        from lib_delta.hosts.prompts.schedules import Schedules

        limits = _limits(pass_prompts)
        with self.filled(towers):
            cond = prompt_parser.get_multicond_learned_conditioning(self, _sized(prompts, pass_prompts), *limits)
            negative = _sized(pass_prompts.negative, pass_prompts, is_negative_prompt=True)
            uncond = prompt_parser.get_learned_conditioning(self, negative, *limits)
            return Schedules(cond.batch, uncond, self.padding())

    @contextmanager
    def filled(self, towers: Sequence[TextEncoder]) -> Iterator[None]:
        """Place text encoders in the slots for the duration of the context."""
        with ExitStack() as stack:
            for slot, tower in zip(self.slots, towers, strict=True):
                stack.enter_context(slot.filled(tower))
            yield

    def use_embeddings(self, embeddings: Mapping[str, Sequence[Tensor]]) -> None:
        """Replace the embeddings that prompts can name in addition to the user's.

        Each has vectors ``(vectors, width)`` for every text encoder.
        """
        self.replace_embeddings({name: _by_encoder(vectors) for name, vectors in embeddings.items()})

    @abstractmethod
    def replace_embeddings(self, embeddings: Mapping[str, Vectors]) -> None:
        """Replace the bundled embeddings, in the form that WebUIs use."""

    @abstractmethod
    def padding(self) -> Padding | None:
        """Return the WebUI's way to pad prompt and negative prompt to one length; None if it does not."""

    @abstractmethod
    def encode_texts(self, texts: Texts) -> list[tuple[Tensor, Tensor | None]]:
        """Return each text encoder's hidden states ``(N, T, C)`` and its pooled texts ``(N, P)``, if it has them."""

    def get_learned_conditioning(self, texts: Texts) -> Tensor | dict[str, Tensor]:
        """Encode texts without AND and prompt editing; the prompt parser calls this."""
        encoded = self.encode_texts(texts)
        pooled = next((pooled for _, pooled in encoded if pooled is not None), None)
        return encoded[0][0] if pooled is None else _with_label(texts, [hidden for hidden, _ in encoded], pooled)


def _by_encoder(vectors: Sequence[Tensor]) -> Vectors:
    return vectors[0] if len(vectors) == 1 else dict(zip(SDXL_ENCODERS, vectors))


def _sized(prompts: Texts, pass_prompts: PassPrompts, is_negative_prompt: bool = False) -> Any:
    height, width = pass_prompts.size or (None, None)
    return prompt_parser.SdConditioning(prompts, is_negative_prompt=is_negative_prompt, width=width, height=height)


def _with_label(texts: Texts, hidden: Sequence[Tensor], pooled: Tensor) -> dict[str, Tensor]:
    """Join SDXL's encoders, and condition on the size of the image and the crop of the WebUI's settings."""
    import torch

    from lib_delta.hosts.prompts.schedules import LABEL, TEXT
    from lib_delta.models.text import sdxl_label

    # An embedding may have more vectors for one encoder than for the other.
    length = max(states.shape[1] for states in hidden)
    text = torch.cat([torch.nn.functional.pad(h, (0, 0, 0, length - h.shape[1])) for h in hidden], -1)
    # Forge Neo made it an option; all others do so.
    zeroed = getattr(texts, "is_negative_prompt", False) and getattr(shared.opts, "sdxl_zero_neg", True)
    if zeroed and not any(texts):
        text, pooled = torch.zeros_like(text), torch.zeros_like(pooled)
    height, width = (getattr(texts, name, None) or 1024 for name in ("height", "width"))
    crop = {side: int(getattr(shared.opts, f"sdxl_crop_{side}", 0)) for side in ("top", "left")}
    return {TEXT: text, LABEL: sdxl_label(pooled, height, width, **crop)}


def _limits(pass_prompts: PassPrompts) -> tuple[Any, ...]:
    """Return the arguments of the WebUI's prompt parser after model and prompts; Forge Neo has no old scheduling."""
    limits = pass_prompts.steps, pass_prompts.hires_steps
    if "use_old_scheduling" not in inspect.signature(prompt_parser.get_learned_conditioning).parameters:
        return limits
    return *limits, getattr(shared.opts, "use_old_scheduling", False)
