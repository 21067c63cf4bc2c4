"""Detects model files and reads their tensors, without any loader that could run code in them."""
