"""The names of extensions whose functions are in the main model."""

from __future__ import annotations

import functools
from typing import Any

import torch

from lib_delta.hosts.generation.foreign_patches import extension_names, patched_forwards, replaced


def made_in(path: str) -> Any:
    return eval(compile("lambda *_: None", path, "eval"))


FREEU = made_in("/webui/extensions-builtin/sd_forge_freeu/scripts/forge_freeu.py")
TILES = made_in("/webui/extensions/multidiffusion/tile_methods/multidiffusion.py")
MERGING = made_in("/webui/backend/misc/tomesd.py")
CFG = made_in("/webui/modules/processing_scripts/mahiro.py")


def test_extensions_are_named_by_their_folders_wherever_their_functions_are() -> None:
    options = {"patches": {"output_block_patch": [FREEU, MERGING]}, "patches_replace": {"attn2": {("input", 1): TILES}}}
    assert extension_names(options) == {"sd_forge_freeu", "multidiffusion"}
    assert extension_names(functools.partial(TILES), [None, {"sigmas": torch.ones(2), "ratio": 0.5, "name": "x"}]) == {
        "multidiffusion"
    }
    assert extension_names(None, {}, [MERGING, len]) == set()


def test_the_webuis_own_files_are_named_as_well() -> None:
    assert extension_names([CFG]) == {"mahiro"}


def test_our_own_functions_are_nobodys() -> None:
    assert extension_names([extension_names, patched_forwards]) == set()


def test_a_forward_that_took_the_place_of_a_modules_own() -> None:
    module, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    other.forward = TILES
    assert replaced(module) == set()
    assert replaced(module, other) == {"multidiffusion"}


def test_methods_are_looked_for_in_every_module_of_a_model() -> None:
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(1, 1)))
    assert patched_forwards(model) == patched_forwards(None) == set()
    model[0][0].forward = FREEU
    model[0].apply_model = TILES
    assert patched_forwards(model) == {"multidiffusion", "sd_forge_freeu"}
    assert replaced(model) == set()
