"""Patchers of models."""
