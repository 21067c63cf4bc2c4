"""The algorithms of adapters, one file each."""
