"""Where the WebUI keeps things."""

models_path = extensions_dir = ""
