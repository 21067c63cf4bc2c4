"""Model files: what they are, and their tensors, read without any loader that could run what is in them."""
