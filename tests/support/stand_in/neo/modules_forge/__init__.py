"""The package that identifies Forge."""
