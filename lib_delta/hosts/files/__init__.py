"""Files, found by the names that the WebUI has for them."""
