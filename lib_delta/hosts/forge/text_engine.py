"""Forge's prompt code, with textual inversions, around the side model's text encoders."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import backend
from backend.args import dynamic_args
from backend.text_processing import classic_engine
from backend.text_processing.classic_engine import ClassicTextProcessingEngine
from modules import shared
from torch import Tensor, nn

from lib_delta.diffusion.families import Family
from lib_delta.hosts.prompts.bundled_embeddings import BundledEmbeddings, Vectors
from lib_delta.hosts.prompts.pass_prompts import Texts
from lib_delta.hosts.prompts.schedules import insert_embeddings
from lib_delta.hosts.prompts.text_engine import PENULTIMATE, TextEngine, TextSlot, is_clip_l
from lib_delta.models.text import TextEncoder, load_tokenizer
from lib_delta.runtime.side_model import SideModel

NOTES = "last_extra_generation_params"
# All CLIP models have this vocabulary.
TOKENIZER = Path("huggingface", "runwayml", "stable-diffusion-v1-5", "tokenizer")


class EncoderEngine(ClassicTextProcessingEngine):  # type: ignore[misc]
    """The WebUI's prompt code for one text encoder, which calls the source's as its last step."""

    def __init__(self, slot: TextSlot, tower: TextEncoder, family: Family, shape: int) -> None:
        """Take the ``shape`` of embeddings, which is the width of all encoders of the model together."""
        # The WebUI's class wraps the token embedding of its text encoder: it gets an empty one, not the side model's.
        embeddings = SimpleNamespace(token_embedding=nn.Embedding(1, 1))
        encoder = SimpleNamespace(transformer=SimpleNamespace(text_model=SimpleNamespace(embeddings=embeddings)))
        key = "clip_l" if is_clip_l(tower) else "clip_h" if family is Family.SD2 else "clip_g"
        arguments: dict[str, Any] = {
            "text_encoder": encoder,
            "tokenizer": load_tokenizer(Path(backend.__path__[0], TOKENIZER)),
            "embedding_dir": dynamic_args["embedding_dir"],
            "embedding_key": key,
            "embedding_expected_shape": shape,
            "return_pooled": tower.config.projection is not None,
        }
        if "emphasis_name" in inspect.signature(ClassicTextProcessingEngine.__init__).parameters:
            arguments["emphasis_name"] = shared.opts.emphasis  # Forge Neo reads it at every call
        super().__init__(**arguments)
        if not is_clip_l(tower):
            self.id_pad = 0  # CLIP was trained with end-of-text as padding, OpenCLIP with 0
        self._slot, self._family = slot, family
        self.bundled = BundledEmbeddings(self.embeddings, self.tokenize)
        insert_embeddings(tower, self.embeddings, key)

    def encode_with_transformers(self, tokens: Tensor) -> Tensor:
        """Encode ``(N, 77)`` tokens."""
        skip = max(1, int(shared.opts.CLIP_stop_at_last_layers))
        # Forge's OpenCLIP-H lacks the last layer, and SDXL's encoders never return theirs.
        layers = {Family.SD2: skip + 1, Family.SDXL: max(PENULTIMATE, skip)}
        return self._slot.encode(tokens, layers.get(self._family, skip))


class ForgeTextEngine(TextEngine):
    """The WebUI's prompt code, which calls the side model's text encoders as its last step."""

    def __init__(self, model: SideModel) -> None:
        super().__init__(len(model.towers))
        shape = sum(tower.config.width for tower in model.towers)
        self._encoders = [
            EncoderEngine(slot, tower, model.report.family, shape) for slot, tower in zip(self.slots, model.towers)
        ]

    def replace_embeddings(self, embeddings: Mapping[str, Vectors]) -> None:
        for encoder in self._encoders:
            encoder.bundled.replace(embeddings)

    def padding(self) -> None:
        """Return nothing: Forge evaluates prompts of different lengths one by one."""

    def encode_texts(self, texts: Texts) -> list[tuple[Tensor, Tensor | None]]:
        with _unchanged_notes():
            encoded = [encoder(list(texts)) for encoder in self._encoders]
        return [result if isinstance(result, tuple) else (result, None) for result in encoded]


@contextmanager
def _unchanged_notes() -> Iterator[None]:
    """Restore the WebUI's notes on its prompts, which go into the next infotext, after encoding others."""
    # Forge replaces its dictionary, Forge Neo empties it.
    holder: Any = dynamic_args if hasattr(dynamic_args, NOTES) else classic_engine
    notes = dict(getattr(holder, NOTES, {}))
    try:
        yield
    finally:
        current = getattr(holder, NOTES, {})
        current.clear()
        current.update(notes)
