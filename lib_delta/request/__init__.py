"""The user's request: its fields, parsing, checks and infotext.  Nothing here imports torch."""
