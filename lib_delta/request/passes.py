"""A batch's requests, one for each pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from lib_delta.request.lora_recipe import Active, LoraTimeline, Pick
from lib_delta.request.request import Request


@dataclass(frozen=True)
class Passes:
    """The requests of the first pass and of the hires pass, whose prompt may have other tags.

    The side model holds the LoRAs of both passes.  Passes with the same LoRAs share them; otherwise those of the hires
    pass follow those of the first pass, and a pass that requests no delta adds none.
    """

    first: Request
    hires: Request

    def of(self, hires: bool) -> Request:
        """Return the request of a pass."""
        return self.hires if hires else self.first

    @property
    def wanted(self) -> bool:
        """Whether either pass requests a delta."""
        return self.first.wanted or self.hires.wanted

    def picks(self) -> tuple[Pick, ...]:
        """Return the LoRAs of both passes."""
        first, hires = self._timelines
        return first.picks if self._shared else first.picks + hires.picks

    def active(self, progress: float, hires: bool) -> Active:
        """Return which of :meth:`picks` are active at a point of a pass."""
        return self._among_picks(self._timelines[hires].active(progress), hires)

    def stages(self, hires: bool) -> set[Active]:
        """Return every combination of :meth:`picks` that is active at some point of a pass."""
        return {self._among_picks(stage, hires) for stage in self._timelines[hires].stages()}

    @property
    def _shared(self) -> bool:
        return self.first.loras == self.hires.loras

    @cached_property
    def _timelines(self) -> tuple[LoraTimeline, LoraTimeline]:
        """The LoRAs of the first and of the hires pass."""
        if self._shared:
            return self.first.timeline, self.hires.timeline
        first, hires = (request.timeline if request.wanted else LoraTimeline() for request in (self.first, self.hires))
        return first, hires

    def _among_picks(self, active: Active, hires: bool) -> Active:
        """Return one pass's active LoRAs in the order of :meth:`picks`, with the other pass's LoRAs inactive."""
        if self._shared:
            return active
        first, second = (len(timeline.picks) for timeline in self._timelines)
        return (False,) * first + active if hires else active + (False,) * second

    def as_infotext(self, accordion: Request) -> Request:
        """Return the request for a picture's text: pasted, it and the tags in the prompts request the same again."""
        if self.first == self.hires:
            return self.first
        if not self.hires.wanted:
            return replace(self.first, hires="first pass")
        if not self.first.wanted:
            return replace(self.hires, hires="hires pass")
        loras = accordion.loras if accordion.enabled else ""
        return replace(self.first, strength=accordion.strength, loras=loras)
