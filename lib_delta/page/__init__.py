"""HTML for the accordion.  Nothing here needs a WebUI or torch."""
