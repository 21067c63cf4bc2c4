"""Prompt code of reForge and Forge Classic: AUTOMATIC1111's without its padding."""

from __future__ import annotations

from lib_delta.hosts.a1111 import text_engine as text_a1111


class ReForgeTextEngine(text_a1111.A1111TextEngine):
    """The WebUI's prompt code around the side model's text encoder."""

    def padding(self) -> None:
        """Return nothing: whatever the settings are, prompts of different lengths are not padded."""
