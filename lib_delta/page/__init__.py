"""Parts of the page as HTML, without a WebUI."""
