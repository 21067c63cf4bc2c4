"""Prompts, read by the WebUI's code with our text encoder."""
