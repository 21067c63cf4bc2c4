"""The command that inspects adapter files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("transformers", reason="transformers is not installed, whose text encoder is looked up")

from lib_delta.__main__ import main
from lib_delta.adapters import key_names
from lib_delta.adapters.inspection import Reference
from lib_delta.models.forked_layers import Conv2d, Linear

MODELS = Path(__file__).parents[2] / "demo" / "models"


@pytest.fixture(scope="module")
def sd15_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of rank 2 for every attention layer of SD 1.5's UNet and every layer of its text encoder."""
    reference = Reference.sd15()
    tensors = {}
    names = {place: name for name, place in key_names.layer_names(reference.unet, reference.towers).items()}
    for place, name in names.items():
        model = reference.unet if place.tower is None else reference.towers[0]
        layer = model.get_submodule(place.path)
        attention = place.tower is None and ".attn" in place.path and isinstance(layer, (Linear, Conv2d))
        if attention or (place.tower == 0 and isinstance(layer, torch.nn.Linear)):
            out, inner = layer.weight.shape[:2]
            tensors[f"{name}.lora_down.weight"] = torch.zeros(2, inner, dtype=torch.float16)
            tensors[f"{name}.lora_up.weight"] = torch.zeros(out, 2, dtype=torch.float16)
    path = tmp_path_factory.mktemp("lora") / "wide.safetensors"
    save_file({**tensors, "something.else": torch.zeros(1)}, path, {"ss_base_model_version": "sd_v1"})
    return path


def test_a_lora_of_full_size_is_looked_up_without_any_checkpoint(
    sd15_lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "--json", str(sd15_lora)]) == 0
    (report,) = json.loads(capsys.readouterr().out).values()
    # 16 transformer blocks with 8 projections each, 12 text layers with 6 linear maps each.
    assert report == {
        "algorithm": {"LoRA": 200},
        "rank": [2],
        "made for": "SD 1.x (header: SD 1.x)",
        "layers": "128 of the UNet, 72 of the text encoder",
        "keys": "400 of 401 match",
        "no layer for": ["something.else"],
    }


def test_a_small_base_is_looked_up_in_its_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(MODELS / "lineart.safetensors"), "--base", str(MODELS / "base.safetensors")]) == 0
    told = capsys.readouterr().out
    assert "LoRA (83 layers)" in told and "249 of 249 match" in told


def test_what_cannot_be_used_is_told_and_the_rest_goes_on(
    sd15_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(sd15_lora.read_bytes()[:-10])
    files = [broken, MODELS / "base.safetensors", tmp_path / "missing.safetensors", sd15_lora]
    assert main(["inspect", "--json", *map(str, files)]) == 1
    reports = list(json.loads(capsys.readouterr().out).values())
    assert "broken.safetensors is a truncated or damaged" in reports[0]["error"]
    assert reports[1] == {"checkpoint": "a model of SD 1.x"}
    assert "missing.safetensors cannot be read" in reports[2]["error"]
    assert "algorithm" in reports[3]


def test_a_base_that_cannot_be_read_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "x", "--base", "no-such-file"]) == 1
    assert "no-such-file cannot be read" in capsys.readouterr().err


def test_help_comes_without_models() -> None:
    code = "import sys, lib_delta.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=MODELS.parents[1]).returncode == 0


@pytest.mark.parametrize("encoding", ["cp1252", "cp932", "utf-8"])
def test_names_of_every_alphabet_are_told_where_output_goes_to_a_file(encoding: str, tmp_path: Path) -> None:
    names = ["caf\u00e9.safetensors", "\u6c34\u5f69.safetensors", "\U0001f3a8.safetensors"]
    command = [sys.executable, "-m", "lib_delta", "inspect", *(str(tmp_path / name) for name in names)]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}

    def told(*options: str) -> str:
        done = subprocess.run([*command, *options], cwd=MODELS.parents[1], env=environment, capture_output=True)
        assert done.returncode == 1 and b"Traceback" not in done.stderr, done.stderr.decode()
        return done.stdout.decode(encoding)

    assert told().count("cannot be read") == len(names)
    assert [Path(path).name for path in json.loads(told("--json"))] == names
