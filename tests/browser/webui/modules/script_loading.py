"""Loads a script's file: the module has the name of the file, and is not in sys.modules."""

import importlib.util
from pathlib import Path


def load_module(path):
    """Run a file as a module of its own."""
    spec = importlib.util.spec_from_file_location(Path(path).name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
