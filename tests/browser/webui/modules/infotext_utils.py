"""Infotext: parsing it, pasting it into widgets, and sending widgets from tab to tab."""

import json
import re

import gradio as gr

PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def quote(text):
    """Quote a value that contains a separator."""
    return json.dumps(text, ensure_ascii=False) if any(c in str(text) for c in ",:\n") else text


def parse_generation_parameters(text):
    """Return the values by name; they are in the last line, after the prompt."""
    *prompt, last = text.strip().split("\n")
    parameters = PARAMETER.findall(last)
    if len(parameters) < 3:
        prompt, parameters = [*prompt, last], []
    values = {"Prompt": "\n".join(prompt)}
    for name, value in parameters:
        if value[:1] == '"' == value[-1:]:
            value = json.loads(value)
        size = re.fullmatch(r"(\d+)x(\d+)", value)
        values |= {f"{name}-1": size[1], f"{name}-2": size[2]} if size else {name: value}
    return values


def pasted(fields, text):
    """Return the update of each field for a pasted text; values have the type of the field's default."""
    values = parse_generation_parameters(text)
    updates = []
    for component, target in fields:
        value = target(values) if callable(target) else values.get(target)
        kind = type(getattr(component, "value", None))
        if value is None:
            updates.append(gr.update())
        elif isinstance(value, dict):
            updates.append(value)
        elif kind is bool:
            updates.append(gr.update(value=bool(value) and value != "False"))
        else:
            try:
                updates.append(gr.update(value=(float if kind is int else kind)(value)))
            except (TypeError, ValueError):
                updates.append(gr.update())
    return updates


def connect_paste(button, fields, text):
    """Make a button paste a text into fields."""
    button.click(lambda value: pasted(fields, value), inputs=[text], outputs=[component for component, _ in fields])


def connect_send(button, source, destination, names):
    """Make a button copy the named fields of one tab to another's."""
    button.click(
        lambda *values: values if len(values) > 1 else values[0],
        inputs=[component for component, name in source if name in names],
        outputs=[component for component, name in destination if name in names],
    )
