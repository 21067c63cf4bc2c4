"""The WebUI's notes on prompts."""

from types import SimpleNamespace

from modules.textual_inversion.textual_inversion import EmbeddingDatabase

model_hijack = SimpleNamespace(fixes=None, comments=[], extra_generation_params={}, embedding_db=EmbeddingDatabase())
