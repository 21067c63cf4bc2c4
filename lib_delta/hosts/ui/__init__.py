"""The accordion and the other parts of the WebUI's page."""
