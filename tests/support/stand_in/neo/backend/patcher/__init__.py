"""Patchers of models, where they differ from Forge's."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
