"""What the stand-ins for the WebUIs share; each WebUI's own folder adds the modules that differ."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
