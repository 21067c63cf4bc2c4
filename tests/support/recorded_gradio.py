"""A stand-in for gradio, which is not installed here: widgets record their arguments, events and containers."""

import sys
import types

made, said = [], []
open_containers = []
WIDGETS = (
    *("Accordion", "Button", "Checkbox", "Column", "Dropdown", "File", "Group", "HTML"),
    *("Image", "Number", "Radio", "Row", "SelectData", "Slider", "State", "Tab", "Tabs", "Textbox"),
)


class Block:
    """A widget or a container."""

    def __init__(self, *values, **given):
        self.value = values[0] if values else given.get("value")
        self.__dict__.update(given)
        self.given, self.triggers = given, []
        self.parent = open_containers[-1] if open_containers else None  # as in gradio: set when it is constructed
        made.append(self)

    def __getattr__(self, event):
        if event not in ("change", "click", "select", "release", "input", "upload"):
            raise AttributeError(event)
        return lambda fn=None, **about: self.triggers.append((event, fn, about))

    def __enter__(self):
        open_containers.append(self)
        return self

    def __exit__(self, *exception):
        open_containers.pop()


def update(**changes):
    """Return an update, as gradio does."""
    return {"__type__": "update", **changes}


def use_recorded_gradio():
    """Install the stand-in as the module ``gradio``."""
    module = types.ModuleType("gradio")
    module.__version__ = "3.41.2"
    for name in WIDGETS:
        setattr(module, name, type(name, (Block,), {}))
    module.Warning = said.append
    module.update, module.components = update, types.SimpleNamespace(Form=Block)
    sys.modules["gradio"] = module
