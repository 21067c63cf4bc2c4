"""The package by which Forge is known."""
