"""What the user asks for.  Nothing here imports torch."""
