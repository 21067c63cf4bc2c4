"""AUTOMATIC1111's prompt code, with textual inversions, around the side model's text encoders."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from modules import sd_hijack, sd_hijack_clip, shared
from modules.textual_inversion.textual_inversion import EmbeddingDatabase
from torch import Tensor

from lib_delta.diffusion.families import Family
from lib_delta.hosts.prompts.bundled_embeddings import BundledEmbeddings, Vectors
from lib_delta.hosts.prompts.pass_prompts import Texts
from lib_delta.hosts.prompts.schedules import Padding, insert_embeddings, pad_uncond, pad_with_empty, text_of
from lib_delta.hosts.prompts.text_engine import PENULTIMATE, TextEngine, TextSlot, is_clip_l
from lib_delta.models.text import TextEncoder, load_tokenizer
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


class ClipL(sd_hijack_clip.FrozenCLIPEmbedderWithCustomWords):  # type: ignore[misc]
    """The WebUI's prompt code for CLIP-L, which calls the source's encoder as its last step."""

    def __init__(self, slot: TextSlot, hijack: Any, family: Family) -> None:
        super().__init__(SimpleNamespace(tokenizer=load_tokenizer()), hijack)
        self._slot, self._family = slot, family

    def encode_with_transformers(self, tokens: Tensor) -> Tensor:
        """Encode ``(N, 77)`` tokens, and return the result on their device, the WebUI's."""
        sd1 = self._family is Family.SD1
        skips = sd1 or getattr(shared.opts, "sdxl_clip_l_skip", False)
        layer = shared.opts.CLIP_stop_at_last_layers if skips else PENULTIMATE
        return self._slot.encode(tokens, layer).to(tokens.device)


def open_clip(slot: TextSlot, hijack: Any, tower: TextEncoder) -> Any:
    """Return the WebUI's prompt code for OpenCLIP-H (SD 2.x) or -G (SDXL) around the source's encoder."""
    # Late: open_clip takes seconds to import, and WebUIs need it only for these families.
    from modules import sd_hijack_open_clip

    class OpenClip(sd_hijack_open_clip.FrozenOpenCLIPEmbedderWithCustomWords):  # type: ignore[misc]
        """The WebUI's prompt code for an OpenCLIP encoder, which calls the source's as its last step."""

        def encode_with_transformers(self, tokens: Tensor) -> Tensor:
            encoded = slot.encode(tokens, PENULTIMATE)
            moved = encoded.to(tokens.device)
            if hasattr(encoded, "pooled"):
                moved.pooled = encoded.pooled.to(tokens.device)  # type: ignore[attr-defined]
            return moved

    return OpenClip(SimpleNamespace(return_pooled=tower.config.projection is not None), hijack)


class A1111TextEngine(TextEngine):
    """The WebUI's prompt code, which calls the side model's text encoders as its last step."""

    def __init__(self, model: SideModel) -> None:
        super().__init__(len(model.towers))
        family = model.report.family
        self._hijack = SimpleNamespace(fixes=None, extra_generation_params={}, comments=[], embedding_db=None)
        self._encoders = [
            ClipL(slot, self._hijack, family) if is_clip_l(tower) else open_clip(slot, self._hijack, tower)
            for slot, tower in zip(self.slots, model.towers)
        ]
        self._base = [weakref.ref(tower) for tower in model.towers]
        # The embeddings' shape is the width of all encoders together.
        self._hijack.embedding_db = Embeddings(self, sum(tower.config.width for tower in model.towers))
        self._bundled = BundledEmbeddings(self._hijack.embedding_db, self.tokenize)
        for tower in model.towers:
            insert_embeddings(tower, self._hijack, "clip_l" if is_clip_l(tower) else "clip_g")

    def tokenize(self, texts: list[str]) -> Sequence[Sequence[int]]:
        """Return the tokens of texts, which all CLIP models share."""
        tokens: Sequence[Sequence[int]] = self._encoders[0].tokenize(texts)
        return tokens

    def replace_embeddings(self, embeddings: Mapping[str, Vectors]) -> None:
        self._bundled.replace(embeddings)

    def padding(self) -> Padding | None:
        if shared.opts.pad_cond_uncond_v0:
            return pad_uncond
        if not shared.opts.pad_cond_uncond:
            return None
        # The WebUI encodes the empty prompt once, before it loads a LoRA: base and adapted get the same padding.
        towers = [tower for ref in self._base if (tower := ref()) is not None]
        with self.filled(towers):
            return pad_with_empty(text_of(self.get_learned_conditioning([""])))

    def encode_texts(self, texts: Texts) -> list[tuple[Tensor, Tensor | None]]:
        self._hijack.embedding_db.load_textual_inversion_embeddings()
        encoded = [encoder(list(texts)) for encoder in self._encoders]
        return [result if isinstance(result, tuple) else (result, None) for result in encoded]
