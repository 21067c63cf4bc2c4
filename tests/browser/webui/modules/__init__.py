"""A thin stand-in for the WebUI's modules: what the user-facing part of an extension touches, and no more."""
