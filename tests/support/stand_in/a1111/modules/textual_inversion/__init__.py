"""Textual inversions."""
