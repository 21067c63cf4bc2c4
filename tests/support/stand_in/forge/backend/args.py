"""Forge's command line arguments."""

dynamic_args = {"embedding_dir": None}
