"""One generation in a WebUI."""
