"""Modules that all stand-ins for the WebUIs share; each WebUI's folder adds those that differ."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
