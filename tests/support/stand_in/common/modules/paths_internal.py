"""The WebUI's folders."""

models_path = "models"
