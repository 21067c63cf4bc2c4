"""Find files by the WebUI's names for them."""
