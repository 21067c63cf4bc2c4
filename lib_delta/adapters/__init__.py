"""Reads adapters: files that turn the base model into the adapted one."""
