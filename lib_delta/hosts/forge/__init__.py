"""Forge and its relatives."""
