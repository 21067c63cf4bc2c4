"""The WebUI's paths."""

models_path = extensions_dir = ""
