"""A picture's text: reading it, pasting it into widgets, and sending widgets from tab to tab."""

import json
import re

import gradio as gr

PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def quote(text):
    """Quote a value that holds what separates values."""
    return json.dumps(text, ensure_ascii=False) if any(c in str(text) for c in ",:\n") else text


def parse_generation_parameters(text):
    """Return the values by their names; the last line has them, the lines before are the prompt."""
    *prompt, last = text.strip().split("\n")
    found = PARAMETER.findall(last)
    if len(found) < 3:
        prompt, found = [*prompt, last], []
    values = {"Prompt": "\n".join(prompt)}
    for name, value in found:
        if value[:1] == '"' == value[-1:]:
            value = json.loads(value)
        size = re.fullmatch(r"(\d+)x(\d+)", value)
        values |= {f"{name}-1": size[1], f"{name}-2": size[2]} if size else {name: value}
    return values


def pasted(fields, text):
    """Return what pasting a text updates each field with, converted to the type of the field's default."""
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
    """Let a button paste a text into fields."""
    button.click(lambda given: pasted(fields, given), inputs=[text], outputs=[component for component, _ in fields])


def connect_send(button, source, destination, names):
    """Let a button copy the named fields of one tab to another's."""
    button.click(
        lambda *values: values if len(values) > 1 else values[0],
        inputs=[component for component, name in source if name in names],
        outputs=[component for component, name in destination if name in names],
    )
