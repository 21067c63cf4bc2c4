"""The forms of bridges between different latent spaces: a new one is a module and a line in :data:`FORMS`."""

from __future__ import annotations

from lib_delta.bridges.base import BridgeForm
from lib_delta.bridges.learned import LEARNED
from lib_delta.bridges.scale import PUBLISHED, SAME_SNR
from lib_delta.bridges.stitched_difference import STITCHED
from lib_delta.bridges.through_pixels import TAESD
from lib_delta.errors import SettingError

FORMS: tuple[BridgeForm, ...] = (STITCHED, LEARNED, TAESD, PUBLISHED, SAME_SNR)


def form_names() -> tuple[str, ...]:
    """Return the names of all forms, as requests give them."""
    return tuple(form.name for form in FORMS)


def bridge_form(name: str) -> BridgeForm:
    """Return the form of this name; raises :class:`SettingError` for an unknown one."""
    form = next((form for form in FORMS if form.name == name), None)
    if form is None:
        raise SettingError(f"the form of a bridge must be one of {', '.join(form_names())}, not {name!r}")
    return form
