"""Loads a script file as a module with the file's name, which is not in sys.modules."""

import importlib.util
from pathlib import Path


def load_module(path):
    """Run a file as a new module."""
    spec = importlib.util.spec_from_file_location(Path(path).name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
