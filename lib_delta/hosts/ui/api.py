"""API routes next to the WebUI's, and the entry in ADetailer's list of scripts."""

from __future__ import annotations

from typing import Any

from modules import shared

from lib_delta import __version__
from lib_delta.hosts import host
from lib_delta.request.schema import schema

GUARDED_ROUTE = "/sdapi/v1/options"  # a route of the WebUI's API, which exists only if the API is on


def add_routes(app: Any) -> None:
    """Add the schema and the status to the WebUI's API, behind the same password."""
    guarded = next((route for route in app.routes if getattr(route, "path", None) == GUARDED_ROUTE), None)
    if guarded is None:
        return
    for path, answer in (("schema", schema), ("status", status)):
        app.add_api_route(f"/delta-sampling/{path}", answer, methods=["GET"], dependencies=guarded.dependencies)


def status() -> dict[str, Any]:
    """Return the status for API callers."""
    return {"version": __version__, "host": host().name, "status": host().status().splitlines()}


def join_adetailer(script_name: str) -> None:
    """Add a script to those that ADetailer runs in its passes; the change is not saved with the settings.

    ``script_name`` is the stem of the script's file, by which ADetailer lists scripts.
    """
    names_setting = shared.opts.data_labels.get("ad_script_names")
    if names_setting is None or not getattr(shared.opts, "delta_sampling_adetailer", True):
        return
    names = str(shared.opts.data.get("ad_script_names", names_setting.default))
    if script_name not in [name.strip() for name in names.split(",")]:
        shared.opts.data["ad_script_names"] = ",".join(filter(None, (names, script_name)))
