"""Block weights: a factor of an adapter's weight for each block of the UNet.

Layouts and presets are those of the WebUI extension "LoRA Block Weight" (``lbw=``): BASE is the text encoder;
IN00 to IN11, M00 and OUT00 to OUT11 are the UNet's blocks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lib_delta.errors import SettingError, shown

_ALL = ("BASE", *(f"IN{i:02}" for i in range(12)), "M00", *(f"OUT{i:02}" for i in range(12)))
_WITH_ATTENTION = tuple(f"IN{i:02}" for i in (1, 2, 4, 5, 7, 8))
# Blocks by the number of values; blocks that a shorter layout lacks get 0, as in that extension.
LAYOUTS: Mapping[int, tuple[str, ...]] = {
    26: _ALL,
    20: ("BASE", *(f"IN{i:02}" for i in range(9)), "M00", *(f"OUT{i:02}" for i in range(9))),
    17: ("BASE", *_WITH_ATTENTION, "M00", *(f"OUT{i:02}" for i in range(3, 12))),
    12: ("BASE", "IN04", "IN05", "IN07", "IN08", "M00", *(f"OUT{i:02}" for i in range(6))),
}
# In the layout of 17: BASE, six IN blocks, M00 and nine OUT blocks.
PRESETS: Mapping[str, str] = {
    "NONE": "0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "ALL": "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1",
    "INS": "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
    "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
    "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
    "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
    "ALL0.5": "0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5",
}
_BLOCK_PATH = re.compile(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.")
_SHORT_NAME = {"input_blocks": "IN", "output_blocks": "OUT"}


@dataclass(frozen=True)
class BlockWeights:
    """A factor for each block, by its short name; layers outside blocks (the timestep's, the last) have 1."""

    values: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, text: str) -> BlockWeights:
        """Read a preset's name, or 12, 17, 20 or 26 values; raises :class:`SettingError` for anything else."""
        stated = PRESETS.get(text.strip(), text).split(",")
        layout = LAYOUTS.get(len(stated))
        try:
            numbers = [float(value) for value in stated]
        except ValueError:
            numbers = []
        if layout is None or not numbers or not all(map(math.isfinite, numbers)):
            raise SettingError(
                f"block weights {shown(text)} cannot be read: {', '.join(PRESETS)},"
                " or 12, 17, 20 or 26 numbers are needed"
            )
        given = dict(zip(layout, numbers))
        return cls(tuple((block, given.get(block, 0.0)) for block in _ALL))

    @property
    def text(self) -> float:
        """The text encoder's factor."""
        return dict(self.values)["BASE"]

    def at(self, path: str) -> float:
        """Return the factor for a layer of the UNet, by its module path."""
        match = _BLOCK_PATH.match(path)
        if match is None:
            return 1.0
        block = "M00" if match[1] == "middle_block" else f"{_SHORT_NAME[match[1]]}{int(match[2]):02}"
        return dict(self.values).get(block, 1.0)
