"""Where the WebUI's folders are."""

models_path = "models"
