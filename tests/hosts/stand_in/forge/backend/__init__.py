"""Forge's engine."""
