"""The JSON Schema of API calls, from the field table."""

from __future__ import annotations

from typing import Any

from lib_delta.request.fields import SETTINGS, UNIT_FIELDS, UNITS, Field

JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}
RECIPE = {"type": "string", "description": "preprocessor@MODEL:weight, with options"}


def schema() -> dict[str, Any]:
    """Return the JSON Schema of an API call's dictionary."""
    properties = {field.key: _property(field) for field in SETTINGS}
    properties["enabled"]["default"] = True
    properties["loras"] |= {"type": ["string", "array"], "items": {"type": "string"}}
    properties["size"] |= {"type": ["string", "integer"]}
    properties[UNITS.key] = {
        "type": "array",
        "default": [],
        "items": {"anyOf": [unit_schema(), RECIPE]},
        "description": UNITS.help,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Delta Sampling",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def unit_schema() -> dict[str, Any]:
    """Return the JSON Schema of a unit in an API call."""
    properties = {name: _property(field) for name, field in UNIT_FIELDS.items()}
    properties["enabled"]["default"] = True
    properties["image"] |= {"type": ["string", "array", "null"], "items": {"type": "string"}}
    properties["images"] |= {"type": "array", "items": {"type": "string"}, "default": []}
    properties["recipe"] = {**RECIPE, "default": ""}
    return {"type": "object", "properties": properties}


def _property(field: Field) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": JSON_TYPES.get(field.value_type, "string"), "default": field.default}
    if field.help:
        entry["description"] = field.help
    if field.is_number and field.unset is None:
        entry |= {"minimum": field.minimum, "maximum": field.maximum}
    if field.choices and field.minimum is None:
        entry["enum"] = list(field.choices)
    return entry
