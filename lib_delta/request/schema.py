"""The JSON Schema of what API calls give."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from lib_delta.request.control_unit import MAX_UNIT_WEIGHT, MODES, RESIZES, WEIGHT_TYPES, Unit
from lib_delta.request.request import SETTINGS, Request


def schema() -> dict[str, Any]:
    """Return the JSON Schema of the dictionary that API calls give."""
    properties = {}
    for f in SETTINGS:
        about: dict[str, Any] = {"type": {"bool": "boolean", "float": "number", "str": "string"}[str(f.type)]}
        about |= {"default": f.default, "description": f.metadata["help"]}
        about |= {k: f.metadata[k] for k in ("minimum", "maximum") if k in f.metadata}
        if "choices" in f.metadata:
            about["enum"] = list(f.metadata["choices"])
        properties[f.metadata["key"]] = about
    properties["loras"] |= {"type": ["string", "array"], "items": {"type": "string"}}
    properties["size"] |= {"type": ["string", "integer"]}
    recipe = {"type": "string", "description": "preprocessor@MODEL:weight, with options"}
    units = next(f for f in fields(Request) if f.name == "units").metadata
    properties["units"] = {
        "type": "array",
        "default": [],
        "items": {"anyOf": [unit_schema(), recipe]},
        "description": units["help"],
    }
    properties["enabled"]["default"] = True
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Delta Sampling",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def unit_schema() -> dict[str, Any]:
    """Return the JSON Schema of a unit in an API call."""
    texts = {"mode": MODES, "resize": RESIZES, "weight_type": WEIGHT_TYPES}
    properties: dict[str, Any] = {}
    for f in fields(Unit):
        kind = {"bool": "boolean", "float": "number", "int": "integer"}.get(str(f.type), "string")
        properties[f.name] = {"type": kind, "default": f.default}
        if f.name in texts:
            properties[f.name]["enum"] = list(texts[f.name])
    properties["enabled"]["default"] = True
    properties["image"] = {"type": ["string", "array", "null"], "items": {"type": "string"}, "default": None}
    properties["image"]["description"] = "base64 or a path on this machine; absent: img2img's own picture"
    properties["images"] = {"type": "array", "items": {"type": "string"}, "default": []}
    properties["images"]["description"] = "more of them: an image prompt's are seen together, maps go by image"
    properties["weight"] |= {"minimum": 0, "maximum": MAX_UNIT_WEIGHT}
    for name in ("start", "end"):
        properties[name] |= {"minimum": 0, "maximum": 1}
    properties["recipe"] = {"type": "string", "description": "preprocessor@MODEL:weight, with options", "default": ""}
    return {"type": "object", "properties": properties}
