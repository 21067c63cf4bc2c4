"""Model files as they lie on disk, read without any loader that could run what is in them."""
