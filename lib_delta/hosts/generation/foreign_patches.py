"""Functions that other extensions have put into the main model, and that the side model does not run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

EXTENSION_FOLDERS = ("extensions", "extensions-builtin")
# The methods that run a model: each module's, and in AUTOMATIC1111 the whole checkpoint's.
RUN_METHODS = ("forward", "apply_model")
# Files of the WebUI whose patches are not reported: the side model merges tokens as well (tomesd), and every UNet
# runs through sd_unet, which ControlNet's extension leaves in place of the UNet's method.
NOT_REPORTED = ("tomesd", "sd_unet")
OUR_FOLDER = Path(__file__).parents[2]


def extension_names(*containers: Any) -> set[str]:
    """Return the names of the extensions, by folder, whose functions are anywhere in these containers."""
    functions = {id(function): function for function in _functions(containers)}
    return {name for function in functions.values() if (name := _extension_name(function))}


def patched_forwards(model: Any) -> set[str]:
    """Return the extensions that replaced a run method of a model or of any module in it.

    This visits some thousands of modules: do not call it in each step.
    """
    return replaced(*(model.modules() if isinstance(model, nn.Module) else ()))


def replaced(*modules: Any) -> set[str]:
    """Return the extensions that replaced a run method of these modules; does not look inside them."""
    return extension_names([vars(module).get(name) for module in modules for name in RUN_METHODS])


def _functions(container: Any) -> Iterator[Any]:
    """Yield all functions in nested containers."""
    if isinstance(container, Mapping):
        container = tuple(container.values())
    if callable(container):
        yield container
    elif isinstance(container, (list, tuple, set)):
        for item in container:
            yield from _functions(item)


def _extension_name(function: Any) -> str:
    """Return a function's extension, or the WebUI's file that it is from; empty if it is not to be reported."""
    definition = inspect.unwrap(function)
    definition = getattr(definition, "func", definition)  # of a partial
    if not (inspect.isroutine(definition) or inspect.isclass(definition)):
        definition = type(definition)  # of a callable object
    try:
        file = Path(inspect.getfile(definition))
    except TypeError:  # built in
        return ""
    if OUR_FOLDER in file.parents or file.stem in NOT_REPORTED:
        return ""
    names = [name for folder, name in zip(file.parts, file.parts[1:]) if folder in EXTENSION_FOLDERS]
    return names[0] if names else file.stem
