"""The files next to a model's: a checkpoint's configuration, and diffusers' folders and settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from lib_delta.adapters.adapter_file import load_adapter
from lib_delta.errors import AdapterError, CheckpointError
from lib_delta.files import sidecar_config
from lib_delta.files.checkpoint import describe, why_not_base
from lib_delta.files.sidecar_config import ModelConfig
from lib_delta.files.weight_file import FileState, WeightFile
from lib_delta.models.loading import load_unet
from tests.support.tiny_unet import tiny_unet

LDM = """\
model:
  base_learning_rate: 1.0e-04
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    {line}
    linear_start: 0.00085
    unet_config:
      params: {{parameterization: "other"}}
"""
SGM = (
    "model: {{target: x, params: {{denoiser_config: {{params: {{scaling_config: {{target: sgm.modules.{name}}}}}}}}}}}"
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tensors = {f"model.diffusion_model.{key}": tensor for key, tensor in tiny_unet().state_dict().items()}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "my.v2.safetensors")
    return tmp_path / "my.v2.safetensors"


def write(checkpoint: Path, text: str) -> None:
    (checkpoint.parent / "my.v2.yaml").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "prediction"),
    [
        (LDM.format(line='parameterization: "v"'), "v"),
        (LDM.format(line="parameterization: 'v'  # EasyFluff"), "v"),
        (LDM.format(line="parameterization:   v"), "v"),
        ("\ufeff" + LDM.format(line="parameterization: v").replace("\n", "\r\n"), "v"),
        ('{"model": {"params": {"parameterization": "v"}}}', "v"),
        ("model: {params: {parameterization: v, timesteps: 1000}}", "v"),
        (SGM.format(name="diffusionmodules.denoiser_scaling.VScaling"), "v"),
        (SGM.format(name="diffusionmodules.denoiser_scaling.EpsScaling"), "eps"),
        (LDM.format(line="parameterization: eps"), "eps"),
        (LDM.format(line="# parameterization: v"), "eps"),
        ("parameterization: v", "eps"),  # has no meaning at this level
        ("network: {dim: 4}\nsteps: [1, 2]", "eps"),  # a trainer's settings
        ("- a list", "eps"),
        ("", "eps"),
    ],
)
def test_a_checkpoint_predicts_what_its_yaml_says(text: str, prediction: str, checkpoint: Path) -> None:
    write(checkpoint, text)
    assert describe(checkpoint).prediction == prediction
    with WeightFile.open(checkpoint) as file:
        assert load_unet(file)[1].prediction == prediction


def test_the_yaml_counts_before_the_header(checkpoint: Path) -> None:
    with WeightFile.open(checkpoint) as file:
        tensors = file.tensors(file.keys)
    save_file(tensors, checkpoint, {"modelspec.prediction_type": "v"})
    assert describe(checkpoint).prediction == "v"
    write(checkpoint, LDM.format(line="parameterization: eps"))
    assert describe(checkpoint).prediction == "eps"
    write(checkpoint, LDM.format(line="timesteps: 1000"))
    assert describe(checkpoint).prediction == "v"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (LDM.format(line="parameterization: x0"), "predicts 'x0', as my.v2.yaml beside my.v2.safetensors says"),
        ("model: {params: [", "my.v2.yaml beside my.v2.safetensors is no readable YAML"),
        ("model: \0", "is no readable YAML"),
        ("model: !!python/object:os.system {", "is no readable YAML"),
        ("[" * 5000, "is no readable YAML"),
        ("# " + "x" * 2**17, "too large"),
    ],
    ids=["x0", "cut off", "not text", "an object", "deep", "large"],
)
def test_a_yaml_that_cannot_be_followed_is_told(text: str, told: str, checkpoint: Path) -> None:
    write(checkpoint, text)
    assert told in why_not_base(checkpoint)
    with pytest.raises(AdapterError, match=told.partition(",")[0]):
        load_adapter(checkpoint, tiny_unet(), prediction="eps")


def test_a_yaml_that_repeats_itself_without_end_takes_no_memory(checkpoint: Path) -> None:
    merges = "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 200))
    write(checkpoint, f"a0: &a0 {{x: 1}}\n{merges}model: {{params: {{parameterization: v, deep: *a199}}}}\n")
    assert describe(checkpoint).prediction == "v"  # a reader that follows the merges would never end


def test_a_tag_in_a_yaml_makes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    gone = tmp_path / "ran"
    write(checkpoint, f"evil: !!python/object/apply:pathlib.Path.touch [{gone}]\n" + LDM.format(line="n: 1"))
    assert describe(checkpoint).prediction == "eps" and not gone.exists()


def test_an_adapted_checkpoint_whose_yaml_says_otherwise_than_the_base_is_refused(checkpoint: Path) -> None:
    write(checkpoint, LDM.format(line="parameterization: v"))
    with pytest.raises(AdapterError, match="predicts v where the base predicts eps"):
        load_adapter(checkpoint, tiny_unet(), prediction="eps")
    assert load_adapter(checkpoint, tiny_unet(), prediction="v").name == "my.v2.safetensors"


@pytest.mark.parametrize("name", ["my.v2.yaml", "adapter_config.json", "config.json"])
def test_what_lies_beside_a_file_is_part_of_its_state(name: str, checkpoint: Path) -> None:
    states = [FileState.of(checkpoint)]
    for text in ("{}", "{ }"):
        (checkpoint.parent / name).write_text(text)
        states.append(FileState.of(checkpoint))
    (checkpoint.parent / "other.yaml").write_text("{}")
    assert len(set(states)) == 3 and FileState.of(checkpoint) == states[-1]
    (checkpoint.parent / name).unlink()
    assert FileState.of(checkpoint) == states[0]


def test_only_a_models_configuration_is_one(tmp_path: Path) -> None:
    assert ModelConfig.beside(tmp_path / "x.safetensors") is None
    (tmp_path / "x.yaml").write_text("model: {params: {a: {b: [1]}, c: true}}")
    config = ModelConfig.beside(tmp_path / "x.safetensors")
    assert config is not None and config.text("c") == "true"
    assert config.text("a", "b") == config.text("a") == config.text("a", "b", "c") == config.text("d") == ""


# Names.


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("control_v11e_sd15_shuffle.pth", "control_v11e_sd15_shuffle"),
        ("style.v2.safetensors", "style.v2"),
        ("control_v11e_sd15_shuffle/diffusion_pytorch_model.safetensors", "control_v11e_sd15_shuffle"),
        ("lineart/diffusion_pytorch_model.fp16.bin", "lineart"),
        ("pipeline/controlnet/diffusion_pytorch_model.safetensors", "pipeline"),
        (f"models--a--tile/snapshots/{'0' * 40}/diffusion_pytorch_model.safetensors", "models--a--tile"),
        ("models/ControlNet/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model"),
        ("shuffle/canny.safetensors", "canny"),
    ],
)
def test_a_model_is_known_by_its_own_name(path: str, name: str) -> None:
    assert sidecar_config.known_as(Path("/drive") / path) == name


def test_names_are_read_as_words() -> None:
    assert "shuffle" in sidecar_config.words_of("control_v11e_sd15_shuffle.fp16")
    assert "shuffle" in sidecar_config.words_of("ControlNetShuffle") and "inpaint" in sidecar_config.words_of(
        "sd15-Inpaint2"
    )
    assert "shuffle" not in sidecar_config.words_of("reshuffled_canny") and "inpaint" not in sidecar_config.words_of(
        "inpainted"
    )


@pytest.mark.parametrize(
    ("name", "rest"),
    [
        ("style.v2", "style.v2"),
        ("style.v2.safetensors", "style.v2"),
        ("a/b/style.PT", "style"),
        ("style.json", "style.json"),
        ("style", "style"),
        ("", ""),
    ],
)
def test_only_a_model_files_ending_is_no_part_of_a_name(name: str, rest: str) -> None:
    assert sidecar_config.without_ending(name) == rest


def test_settings_that_are_none_are_told(tmp_path: Path) -> None:
    assert sidecar_config.settings(tmp_path / "x.bin", sidecar_config.DIFFUSERS) == {}
    for text, told in (("{", "no readable JSON"), ("[]", "holds no settings"), (" " * (2**20 + 1), "too large")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=f"config.json beside x.bin .*{told}"):
            sidecar_config.settings(tmp_path / "x.bin", sidecar_config.DIFFUSERS)
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
    assert sidecar_config.settings(tmp_path / "x.bin", sidecar_config.DIFFUSERS) == {"a": 1}
