"""What other extensions have put into the main model, which the side model does without."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

FOLDERS = ("extensions", "extensions-builtin")
# Methods that models are run by: a module's own, and a whole checkpoint's in AUTOMATIC1111.
RUN_BY = ("forward", "apply_model")
# Of the WebUI's own files, those whose work the side model does as well, and the one that all its UNets go through:
# ControlNet's extension, when it leaves, puts that in the place of the UNet's own method.
FOLLOWED = ("tomesd", "sd_unet")


def extension_names(*holders: Any) -> set[str]:
    """Return the names of the extensions (of their folders) that have made the functions anywhere in some holders."""
    functions = {id(function): function for function in _functions(holders)}
    return {name for function in functions.values() if (name := _extension_name(function))}


def patched_forwards(model: Any) -> set[str]:
    """Return who has put a method of theirs in the place of one that a model, or a module within it, is run by.

    It looks at every module, some thousands: not for each step.
    """
    return replaced(*(model.modules() if isinstance(model, nn.Module) else ()))


def replaced(*modules: Any) -> set[str]:
    """Return who has put a method of theirs in the place of one of these modules' own, whatever is within these."""
    return extension_names([vars(module).get(name) for module in modules for name in RUN_BY])


def _functions(held: Any) -> Iterator[Any]:
    if isinstance(held, Mapping):
        held = tuple(held.values())
    if callable(held):
        yield held
    elif isinstance(held, (list, tuple, set)):
        for item in held:
            yield from _functions(item)


def _extension_name(function: Any) -> str:
    """Return the name of the extension, or of the WebUI's own file, that a function is from; empty if it is ours."""
    made_of = inspect.unwrap(function)
    made_of = getattr(made_of, "func", made_of)  # a partial's
    made_of = made_of if inspect.isroutine(made_of) or inspect.isclass(made_of) else type(made_of)
    try:
        file = Path(inspect.getfile(made_of))
    except TypeError:  # built in
        return ""
    if Path(__file__).parents[2] in file.parents or file.stem in FOLLOWED:
        return ""
    after = [part for folder, part in zip(file.parts, file.parts[1:]) if folder in FOLDERS]
    return after[0] if after else file.stem
