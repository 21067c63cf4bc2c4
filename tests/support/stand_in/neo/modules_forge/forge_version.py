"""The version of Forge."""

version = "neo"
