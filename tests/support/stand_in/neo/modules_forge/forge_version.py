"""Which Forge it is."""

version = "neo"
