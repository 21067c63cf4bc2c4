"""The extension's part of the infotext: a picture's delta, or why it has none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from modules import sd_models

from lib_delta.errors import DeltaError, SettingError
from lib_delta.hosts.control_units.units import MAP_HASHES, UNIT_HASHES, Units, plotted
from lib_delta.hosts.files.catalog import Catalog
from lib_delta.hosts.generation.state import axes_of, request_of
from lib_delta.hosts.generation.xyz_cell import is_xyz_cell, write_infotext_of_grid
from lib_delta.request.control_unit import format_units
from lib_delta.request.infotext import LORA_HASHES, NOT_APPLIED, VERSION, infotext_labels
from lib_delta.request.passes import Passes
from lib_delta.request.request import Request


class Infotext:
    """Writes requests into infotexts, with names by which the WebUI finds the same files again."""

    def __init__(self, catalog: Catalog, units: Units) -> None:
        self._catalog, self._units = catalog, units

    def write(self, p: Any, passes: Passes, accordion: Request) -> None:
        """Write a batch's request, and comment on settings of the accordion that its tags override."""
        if passes.wanted:
            p.extra_generation_params.update(self._entries(passes.as_infotext(accordion)))
            # An XYZ plot sets these itself.
            overridden = accordion.overridden_by(passes.first) if accordion.enabled and not axes_of(p) else ""
            if overridden:
                p.comment(f"Delta Sampling: the prompt's <delta:...> overrides the accordion: {overridden}.")
        self.write_for_grid(p, passes)

    def write_for_grid(self, p: Any, passes: Passes) -> None:
        """Write a plot's whole request into its grid's infotext, whatever this cell leaves out."""
        accordion = request_of(p)
        if not (is_xyz_cell(p) and passes.first.enabled and isinstance(accordion, Request)):
            return
        request = passes.as_infotext(accordion) if passes.wanted else passes.first
        units = plotted(request.units, accordion.units)
        entries = self._entries(replace(request, units=units))
        if any(unit.enabled for unit in units):  # only the grid names units of weight 0
            entries.setdefault(infotext_labels()["units"], format_units(units))
        write_infotext_of_grid(p, entries)

    def _entries(self, request: Request) -> dict[str, str]:
        """Return a request's infotext by label."""
        unique = self._catalog.unique
        try:
            request = replace(request, base=unique(request.base), adapted=unique(request.adapted))
            request = self._units.with_listed_names(request)
            unit_hashes = self._units.hashes(request, sd_models.model_hash)
        except SettingError:
            return request.infotext()  # sampling raises the same error
        return request.infotext(self._catalog.hashes(request)) | unit_hashes


def clear_infotext(p: Any) -> None:
    """Remove everything that the extension has written into a generation's infotext."""
    for label in (*infotext_labels().values(), LORA_HASHES, UNIT_HASHES, MAP_HASHES, NOT_APPLIED, VERSION):
        p.extra_generation_params.pop(label, None)


def write_not_applied(p: Any, fault: DeltaError) -> None:
    """Write why a picture got no delta: callers of the API see no comments."""
    clear_infotext(p)
    p.extra_generation_params[NOT_APPLIED] = str(fault)
