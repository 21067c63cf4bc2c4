"""Forge's prompt code, with textual inversions, around the side model's text encoder."""

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

from lib_delta.devices import without_autocast
from lib_delta.hosts.prompts.bundled_embeddings import BundledEmbeddings
from lib_delta.hosts.prompts.pass_prompts import Texts
from lib_delta.hosts.prompts.schedules import insert_embeddings
from lib_delta.hosts.prompts.text_engine import TextEngine
from lib_delta.models.text import load_tokenizer
from lib_delta.runtime.side_model import SideModel

NOTES = "last_extra_generation_params"
TOKENIZER = Path("huggingface", "runwayml", "stable-diffusion-v1-5", "tokenizer")


class ForgeTextEngine(TextEngine, ClassicTextProcessingEngine):  # type: ignore[misc]
    """The WebUI's prompt code, which calls the side model's text encoder as its last step."""

    def __init__(self, model: SideModel) -> None:
        # The WebUI's class wraps the token embedding of its text encoder: it gets an empty one, not the side model's.
        embeddings = SimpleNamespace(token_embedding=nn.Embedding(1, 1))
        encoder = SimpleNamespace(transformer=SimpleNamespace(text_model=SimpleNamespace(embeddings=embeddings)))
        arguments: dict[str, Any] = {
            "text_encoder": encoder,
            "tokenizer": load_tokenizer(Path(backend.__path__[0], TOKENIZER)),
            "embedding_dir": dynamic_args["embedding_dir"],
            "embedding_key": "clip_l",
            "embedding_expected_shape": model.towers[0].config.width,
        }
        if "emphasis_name" in inspect.signature(ClassicTextProcessingEngine.__init__).parameters:
            arguments["emphasis_name"] = shared.opts.emphasis  # Forge Neo reads it at every call
        ClassicTextProcessingEngine.__init__(self, **arguments)
        self._bundled = BundledEmbeddings(self.embeddings, self.tokenize)
        insert_embeddings(model.towers[0], self.embeddings)

    def use_embeddings(self, embeddings: Mapping[str, Tensor]) -> None:
        self._bundled.replace(embeddings)

    def padding(self) -> None:
        """Return nothing: Forge evaluates prompts of different lengths one by one."""

    def get_learned_conditioning(self, texts: Texts) -> Tensor:
        with _unchanged_notes():
            encoded: Tensor = self(list(texts))
        return encoded

    def encode_with_transformers(self, tokens: Tensor) -> Tensor:
        """Encode ``(N, 77)`` tokens."""
        device = next(self.tower.parameters()).device
        with without_autocast(device):
            hidden, _ = self.tower.encode(tokens.to(device), max(1, int(shared.opts.CLIP_stop_at_last_layers)))
        return hidden


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
