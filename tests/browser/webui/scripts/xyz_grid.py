"""The XYZ plot with one axis; its cells are shallow copies."""

import csv
import re
from copy import copy

import modules.scripts as scripts

STEPS = re.compile(r"\s*([\d.]+)\s*-\s*([\d.]+)\s*(?:\[(\d+)\])?\s*")


class AxisOption:
    """One kind of axis."""

    def __init__(self, label, type, apply, format_value=None, confirm=None, cost=0.0, choices=None, prepare=None):
        self.label, self.type, self.apply, self.confirm = label, type, apply, confirm
        self.cost, self.choices = cost, choices


axis_options = [AxisOption("Nothing", str, lambda p, x, xs: None)]


class Script(scripts.Script):
    """The selectable script."""

    def title(self):
        """Return the script's name."""
        return "X/Y/Z plot"

    def cells(self, p, label, text):
        """Return copies of ``p`` with the axis' values applied."""
        option = next(option for option in axis_options if option.label == label)
        values = [value.strip() for value in next(csv.reader([text], skipinitialspace=True))]
        if option.type is float:
            values = [number for value in values for number in _numbers(value)]
        values = [option.type(value) for value in values]
        if option.confirm:
            option.confirm(p, values)
        cells = []
        for value in values:
            cell = copy(p)
            option.apply(cell, value, values)
            cells.append(cell)
        return cells


def _numbers(text):
    steps = STEPS.fullmatch(text)
    if not steps or not steps[3]:
        return [text]
    low, high, count = float(steps[1]), float(steps[2]), int(steps[3])
    return [low + (high - low) * i / max(count - 1, 1) for i in range(count)]
