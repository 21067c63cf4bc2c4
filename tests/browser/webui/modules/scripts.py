"""Scripts, and the runner that makes their widgets and calls their hooks."""

import inspect
import re
import sys
import traceback
from collections import namedtuple
from pathlib import Path

import gradio as gr

from modules import script_callbacks, script_loading

AlwaysVisible = object()
ScriptClassData = namedtuple("ScriptClassData", "script_class path basedir module")
scripts_data = []


class Script:
    """The base class of extensions' scripts."""

    filename = infotext_fields = paste_field_names = None
    args_from = args_to = 0
    is_img2img = False

    def show(self, is_img2img):
        """Return whether the script is shown in a tab."""
        return True

    def elem_id(self, item):
        """Return an element's id, which contains the tab if the script is in both tabs."""
        tab = ("img2img_" if self.is_img2img else "txt2img_") if self.show(True) == self.show(False) else ""
        title = re.sub(r"[^a-z_0-9]", "", re.sub(r"\s", "_", self.title().lower()))
        return f"script_{tab}{title}_{item}"


def load_scripts(paths):
    """Load script files; an extension's folder is in sys.path only while its file is loaded."""
    scripts_data.clear()
    script_callbacks.clear_callbacks()
    for path in paths:
        before, folder = list(sys.path), str(Path(path).parents[1])
        sys.path.insert(0, folder)
        try:
            module = script_loading.load_module(path)
        finally:
            sys.path[:] = before
        classes = filter(inspect.isclass, vars(module).values())
        scripts_data.extend(ScriptClassData(c, path, folder, module) for c in classes if issubclass(c, Script))


class ScriptRunner:
    """The scripts of one tab."""

    def __init__(self, is_img2img):
        self.alwayson_scripts, self.selectable_scripts = [], []
        self.inputs, self.infotext_fields, self.paste_field_names = [], [], []
        for data in scripts_data:
            script = data.script_class()
            script.filename, script.is_img2img = data.path, is_img2img
            shown = script.show(is_img2img)
            if shown:
                (self.alwayson_scripts if shown is AlwaysVisible else self.selectable_scripts).append(script)

    def setup_ui(self):
        """Make the widgets of the scripts that are always visible."""
        for script in self.alwayson_scripts:
            with gr.Group():
                controls = script.ui(script.is_img2img)
            script.args_from, script.args_to = len(self.inputs), len(self.inputs) + len(controls)
            self.inputs += controls
            self.infotext_fields += script.infotext_fields or []
            self.paste_field_names += script.paste_field_names or []

    def call(self, hook, p, *arguments, **named):
        """Call a hook of every script, and print and swallow its exceptions."""
        for script in self.alwayson_scripts:
            try:
                values = p.script_args[script.args_from : script.args_to]
                getattr(script, hook)(p, *arguments, *values, **named)
            except Exception:  # noqa: PERF203 - one script must not stop the next
                traceback.print_exc()
