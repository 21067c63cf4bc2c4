"""AUTOMATIC1111's prompt code, with textual inversions, around the side model's text encoder."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from modules import sd_hijack, sd_hijack_clip, shared
from modules.textual_inversion.textual_inversion import EmbeddingDatabase
from torch import Tensor

from lib_delta.devices import without_autocast
from lib_delta.hosts.prompts.bundled_embeddings import BundledEmbeddings
from lib_delta.hosts.prompts.pass_prompts import Texts
from lib_delta.hosts.prompts.schedules import Padding, insert_embeddings, pad_uncond, pad_with_empty
from lib_delta.hosts.prompts.text_engine import TextEngine
from lib_delta.models.text import load_tokenizer
from lib_delta.runtime.side_model import SideModel


class Embeddings(EmbeddingDatabase):  # type: ignore[misc]
    """The user's textual inversions of the side model's width; the WebUI's list has the main checkpoint's."""

    def __init__(self, engine: A1111TextEngine, width: int) -> None:
        super().__init__()
        self._tokenizer, self._width = SimpleNamespace(cond_stage_model=engine), width
        for folder in sd_hijack.model_hijack.embedding_db.embedding_dirs:
            self.add_embedding_dir(folder)

    def get_expected_shape(self) -> int:
        return self._width

    def register_embedding(self, embedding: Any, _model: object) -> Any:
        return super().register_embedding(embedding, self._tokenizer)


class A1111TextEngine(TextEngine, sd_hijack_clip.FrozenCLIPEmbedderWithCustomWords):  # type: ignore[misc]
    """The WebUI's prompt code, which calls the side model's text encoder as its last step."""

    def __init__(self, model: SideModel) -> None:
        hijack = SimpleNamespace(fixes=None, extra_generation_params={}, comments=[], embedding_db=None)
        wrapped = SimpleNamespace(tokenizer=load_tokenizer())
        sd_hijack_clip.FrozenCLIPEmbedderWithCustomWords.__init__(self, wrapped, hijack)
        self._base = weakref.ref(model.towers[0])
        hijack.embedding_db = Embeddings(self, model.towers[0].config.width)
        self._bundled = BundledEmbeddings(hijack.embedding_db, self.tokenize)
        insert_embeddings(model.towers[0], hijack)

    def use_embeddings(self, embeddings: Mapping[str, Tensor]) -> None:
        self._bundled.replace(embeddings)

    def padding(self) -> Padding | None:
        if shared.opts.pad_cond_uncond_v0:
            return pad_uncond
        if not shared.opts.pad_cond_uncond:
            return None
        # The WebUI encodes the empty prompt once, before it loads a LoRA: base and adapted get the same padding.
        base = self._base()
        assert base is not None, "prompts are encoded while their base is loaded"
        adapted, self.tower = self.tower, base
        try:
            return pad_with_empty(self.get_learned_conditioning([""]))
        finally:
            self.tower = adapted

    def get_learned_conditioning(self, texts: Texts) -> Tensor:
        self.hijack.embedding_db.load_textual_inversion_embeddings()
        encoded: Tensor = self(list(texts))
        return encoded

    def encode_with_transformers(self, tokens: Tensor) -> Tensor:
        """Encode ``(N, 77)`` tokens, and return the result on their device, the WebUI's."""
        device = next(self.tower.parameters()).device
        with without_autocast(device):
            hidden, _ = self.tower.encode(tokens.to(device), shared.opts.CLIP_stop_at_last_layers)
        return hidden.to(tokens.device)
