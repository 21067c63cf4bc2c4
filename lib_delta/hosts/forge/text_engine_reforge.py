"""Prompt code as reForge and Forge Classic have it: AUTOMATIC1111's, without its padding."""

from __future__ import annotations

from lib_delta.hosts.a1111 import text_engine as text_a1111


class ReForgeTextEngine(text_a1111.A1111TextEngine):
    """The WebUI's prompt code; its last step, the text encoder, is ours."""

    def padding(self) -> None:
        """Return nothing: prompts of different lengths are evaluated as they are, whatever the settings say."""
