"""A thin stand-in for the WebUI's modules: only the parts that the extension's user interface uses."""
