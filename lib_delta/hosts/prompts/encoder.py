"""Encoded prompts, cached while everything they depend on stays the same."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from modules import shared

if TYPE_CHECKING:
    import torch

    from lib_delta.hosts.prompts.pass_prompts import PassPrompts, Texts
    from lib_delta.hosts.prompts.text_engine import TextEngine
    from lib_delta.request.lora_recipe import Active
    from lib_delta.runtime.side_model import SideModel

# The WebUIs' settings that affect how prompts are parsed and encoded.
ENCODING_OPTIONS = (
    *("CLIP_stop_at_last_layers", "emphasis", "enable_emphasis", "use_old_emphasis_implementation"),
    *("comma_padding_backtrack", "pad_cond_uncond", "pad_cond_uncond_v0", "use_old_scheduling"),
    *("sdxl_clip_l_skip", "sdxl_crop_top", "sdxl_crop_left", "sdxl_zero_neg"),
)


class CachedEncoder(ExitStack):
    """Encodes prompts for a side model; moves its text encoders to ``device`` from the first cache miss until exit."""

    def __init__(self, model: SideModel, engine: TextEngine, device: torch.device) -> None:
        super().__init__()
        self._model, self._engine, self._device = model, engine, device

    def __call__(self, active: Active | None, prompts: Texts, pass_prompts: PassPrompts) -> Any:
        """Return the base's conditioning (``active`` None), or the adapted model's with the active adapters."""
        model = self._model
        state = None if active is None else model.text_state(active)
        options = tuple(getattr(shared.opts, name, None) for name in ENCODING_OPTIONS)
        key = (
            state,
            tuple(prompts),
            tuple(pass_prompts.negative),
            pass_prompts.steps,
            pass_prompts.hires_steps,
            pass_prompts.size,
            model.embedding_files,
            options,
        )
        encoded = model.prompt_cache.get(key)
        if encoded is None:
            self._engine.use_embeddings(model.embeddings)
            base = self.enter_context(model.text_on(self._device))
            towers = base if active is None else model.adapted_towers(active)
            encoded = self._engine.encode(towers, prompts, pass_prompts)
            model.prompt_cache.put(key, encoded)
        return encoded
