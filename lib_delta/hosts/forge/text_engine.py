"""Forge's prompt code, which also reads textual inversions, with the source's text encoder."""

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
    """The WebUI's prompt code; its last step, the text encoder, is ours."""

    def __init__(self, model: SideModel) -> None:
        # The WebUI's class wraps the token embedding of what it is given: a bare frame, not our encoder.
        frame = SimpleNamespace(token_embedding=nn.Embedding(1, 1))
        encoder = SimpleNamespace(transformer=SimpleNamespace(text_model=SimpleNamespace(embeddings=frame)))
        about: dict[str, Any] = {
            "text_encoder": encoder,
            "tokenizer": load_tokenizer(Path(backend.__path__[0], TOKENIZER)),
            "embedding_dir": dynamic_args["embedding_dir"],
            "embedding_key": "clip_l",
            "embedding_expected_shape": model.tower.config.width,
        }
        if "emphasis_name" in inspect.signature(ClassicTextProcessingEngine.__init__).parameters:
            about["emphasis_name"] = shared.opts.emphasis  # elsewhere (Forge Neo) it is read at every call
        ClassicTextProcessingEngine.__init__(self, **about)
        self._bundled = BundledEmbeddings(self.embeddings, self.tokenize)
        insert_embeddings(model.tower, self.embeddings)

    def use_embeddings(self, embeddings: Mapping[str, Tensor]) -> None:
        self._bundled.replace(embeddings)

    def padding(self) -> None:
        """Return nothing: Forge evaluates prompts of different lengths each by itself."""

    def get_learned_conditioning(self, texts: Texts) -> Tensor:
        with _notes_kept():
            encoded: Tensor = self(list(texts))
        return encoded

    def encode_with_transformers(self, tokens: Tensor) -> Tensor:
        """Encode ``(N, 77)`` tokens."""
        device = next(self.tower.parameters()).device
        with without_autocast(device):
            hidden, _ = self.tower.encode(tokens.to(device), max(1, int(shared.opts.CLIP_stop_at_last_layers)))
        return hidden


@contextmanager
def _notes_kept() -> Iterator[None]:
    """Leave what the WebUI has noted of its own prompts as it is.

    It goes into the infotext of the next picture, whose prompts are none of those encoded in between.
    """
    # Forge has a dictionary that it replaces, Forge Neo one that it empties.
    keeper: Any = dynamic_args if hasattr(dynamic_args, NOTES) else classic_engine
    notes = dict(getattr(keeper, NOTES, {}))
    try:
        yield
    finally:
        held = getattr(keeper, NOTES, {})
        held.clear()
        held.update(notes)
