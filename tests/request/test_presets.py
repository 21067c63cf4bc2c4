"""Presets: they are read as they were written, people can edit them, and a damaged file stays as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lib_delta.errors import SettingError
from lib_delta.request.presets import Presets
from lib_delta.request.request import Request

INK = Request(True, 2.5, 0.1, 0.9, "cosine", 0.2, 0.7, "v1-5", "", 'moxin:0.8, "a, b":1', prompt="{prompt}, \u00e4")


@pytest.fixture
def presets(tmp_path: Path) -> Presets:
    return Presets(tmp_path / "presets.json")


def test_presets_are_saved_replaced_loaded_and_deleted(presets: Presets) -> None:
    assert presets.names() == []
    assert presets.save(" ink ", INK) == "ink" and presets.load("ink") == INK
    presets.save("Alt", Request(enabled=True))
    presets.save("ink", Request(enabled=True, strength=3.0))
    assert presets.names() == ["Alt", "ink"] and presets.load("ink").strength == 3.0
    presets.delete("ink")
    assert presets.names() == ["Alt"]
    assert [file.name for file in presets.path.parent.iterdir()] == ["presets.json"]


def test_the_file_has_the_keys_of_the_api_and_may_be_edited_by_hand(presets: Presets) -> None:
    presets.save("ink", INK)
    written = json.loads(presets.path.read_text("utf-8"))["ink"]
    assert written["lambda"] == 2.5 and written["prompt"] == "{prompt}, \u00e4" and "enabled" not in written
    presets.path.write_text('\ufeff{"short": {"lambda": 2, "loras": ["moxin:1"]}}', "utf-8")
    assert presets.load("short") == Request(enabled=True, strength=2.0, loras="moxin")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"ink": {"lamda": 1}}', "no argument 'lamda': is 'lambda' meant"),
        ('{"ink": {"start": 7}}', "'start' must be a number from 0 to 1"),
        ('{"ink": 3}', "is not a list of named settings"),
        ('{"inky": {}}', "no preset 'ink': is 'inky' meant"),
        ('{"ink', "cannot be read"),
        ("[1]", "cannot be read"),
    ],
)
def test_errors_of_the_file_are_one_sentence(presets: Presets, text: str, sentence: str) -> None:
    presets.path.write_text(text, "utf-8")
    with pytest.raises(SettingError, match=sentence):
        presets.load("ink")


def test_a_damaged_file_is_not_overwritten(presets: Presets) -> None:
    presets.path.write_text('{"ink": {"lambda": 2},', "utf-8")
    assert presets.names() == []
    with pytest.raises(SettingError, match="cannot be read"):
        presets.save("new", INK)
    assert presets.path.read_text("utf-8") == '{"ink": {"lambda": 2},'


def test_a_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="cannot be written to .*presets"):
        Presets(tmp_path / "gone" / "presets.json").save("ink", INK)


def test_a_preset_needs_a_name(presets: Presets) -> None:
    with pytest.raises(SettingError, match="needs a name"):
        presets.save("  ", INK)
