"""The adapters' algorithms, one file each."""
