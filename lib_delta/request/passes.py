"""What a batch asks for in each of its passes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lib_delta.request.lora_recipe import Pick
from lib_delta.request.request import Active, Request


@dataclass(frozen=True)
class Passes:
    """What a batch asks for in its first pass and in that of hires fix, whose prompt may have tags of its own."""

    first: Request
    hires: Request

    def of(self, hires: bool) -> Request:
        """Return what a pass asks for."""
        return self.hires if hires else self.first

    @property
    def wanted(self) -> bool:
        """Whether either pass wants a delta."""
        return self.first.wanted or self.hires.wanted

    def picks(self) -> tuple[Pick, ...]:
        """Return the LoRAs of both passes: those of the hires pass follow, where they are others."""
        return self._of_pass(False) + (() if self._same else self._of_pass(True))

    @property
    def _same(self) -> bool:
        return self.first.loras == self.hires.loras

    def _of_pass(self, hires: bool) -> tuple[Pick, ...]:
        return self.of(hires).picks() if self._same or self.of(hires).wanted else ()

    def active(self, progress: float, hires: bool) -> Active:
        """Tell which of :meth:`picks` count at a point of a pass."""
        return self._positioned(self.of(hires).active(progress) if self._of_pass(hires) else (), hires)

    def stages(self, hires: bool) -> set[Active]:
        """Return the sets of LoRAs that count together at some point of a pass."""
        stages = self.of(hires).stages() if self._of_pass(hires) else {()}
        return {self._positioned(stage, hires) for stage in stages}

    def _positioned(self, active: Active, hires: bool) -> Active:
        if self._same:
            return active
        before, after = len(self._of_pass(False)), len(self._of_pass(True))
        return (False,) * before + active if hires else active + (False,) * after

    def as_infotext(self, accordion: Request) -> Request:
        """Return what a picture says: pasted, with the tags in its prompts, it asks for the same again."""
        if self.first == self.hires:
            return self.first
        if not self.hires.wanted:
            return replace(self.first, hires="first pass")
        if not self.first.wanted:
            return replace(self.hires, hires="hires pass")
        loras = accordion.loras if accordion.enabled else ""
        return replace(self.first, strength=accordion.strength, loras=loras)
