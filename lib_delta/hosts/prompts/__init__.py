"""Prompts, parsed by the WebUI's code and encoded by the source's text encoder."""
