"""Units in a generation: their models, pictures and maps."""
