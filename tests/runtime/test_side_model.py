"""The source's models in memory: what loads when, what is attached, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed, whose text encoder a base needs")

from lib_delta.adapters.attach import AdapterForm
from lib_delta.controls.active_controls import ControlPick
from lib_delta.devices import out_of_memory
from lib_delta.errors import AdapterError, CheckpointError, DeltaError, SettingError
from lib_delta.files.weight_file import FileState
from lib_delta.models.controlnet import ControlNet
from lib_delta.runtime import side_model
from lib_delta.runtime.side_model import AdapterPick, SideModel, SideModels, user_error
from tests.support.small_files import (
    TEXT_PREFIX,
    UNET_PREFIX,
    Files,
    checkpoint,
    lora_factors,
    make_files,
    write,
    write_lora,
)

FP32 = torch.float32


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("models"))


@pytest.fixture
def model(files: Files) -> SideModel:
    return SideModel(files.checkpoint(files.base), FP32)


X, T = torch.randn(1, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0])
CONTEXT = torch.randn(1, 1, 77, 32, generator=torch.Generator().manual_seed(1))
TOKENS = torch.arange(77)[None] + 100


@torch.no_grad()
def branches(model: SideModel) -> torch.Tensor:
    output: torch.Tensor = model.unet(X, T, CONTEXT)
    return output


@torch.no_grad()
def texts(model: SideModel) -> list[torch.Tensor]:
    with model.text_on(torch.device("cpu")) as base:
        return [tower.encode(TOKENS)[0] for (tower,) in (base, model.adapted_towers())]


@pytest.mark.parametrize("form", ["merged", "bypass"])
@pytest.mark.parametrize(("weight", "checkpoint_name"), [(1.0, "tuned"), (0.5, "half")])
def test_an_adapted_model_is_the_checkpoint_with_the_lora_merged(
    files: Files, model: SideModel, form: AdapterForm, weight: float, checkpoint_name: str
) -> None:
    tuned = SideModel(files.checkpoint(checkpoint_name), FP32)
    model.adapt([AdapterPick(files.lora_file(), weight, weight)], form)
    base, adapted = branches(model)
    torch.testing.assert_close(adapted, branches(tuned)[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(base, adapted, atol=1e-2)
    torch.testing.assert_close(texts(model)[1], texts(tuned)[0], rtol=1e-4, atol=1e-4)


def test_the_base_itself_stays_as_it_is(files: Files, model: SideModel) -> None:
    plain, said = branches(model), texts(model)
    assert len(plain) == 1 and said[0] is not None and torch.equal(said[0], said[1])
    model.adapt([AdapterPick(files.lora_file())], "merged")
    torch.testing.assert_close(branches(model)[0], plain[0])
    assert torch.equal(texts(model)[0], said[0])
    model.adapt([], "merged")
    assert torch.equal(branches(model), plain) and model.adapters == ()


def test_one_text_encoder_serves_both_where_it_is_not_adapted(files: Files, model: SideModel) -> None:
    model.adapt([AdapterPick(files.lora_file(), 1.0, 0.0)], "merged")
    with model.text_on(torch.device("cpu")) as base:
        assert base == model.adapted_towers()


def test_the_text_encoder_has_no_layers_that_webuis_patch(
    files: Files, model: SideModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AUTOMATIC1111's manual_cast replaces these functions, and casts weights there and back in them."""
    model.adapt([AdapterPick(files.lora_file())], "merged")
    wanted = texts(model)

    def patched(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError(f"{type(self).__name__} is patched")

    for kind in (torch.nn.Linear, torch.nn.LayerNorm):
        monkeypatch.setattr(kind, "forward", patched)
    assert all(torch.equal(a, b) for a, b in zip(texts(model), wanted))


def test_files_that_stay_are_not_read_again(files: Files, model: SideModel) -> None:
    model.adapt([AdapterPick(files.lora_file())], "merged")
    (read,) = model.adapters
    model.adapt([AdapterPick(files.lora_file(), 0.5, 0.5)], "merged")
    assert model.adapters == (read,)


def test_a_file_that_was_used_lately_is_not_read_again(
    files: Files, model: SideModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.adapt([AdapterPick(files.lora_file())], "bypass")
    (read,) = model.adapters
    wanted = branches(model)
    model.adapt([], "bypass")
    model.adapt([AdapterPick(files.lora_file())], "bypass")
    assert model.adapters == (read,) and torch.equal(branches(model), wanted)
    monkeypatch.setattr(side_model, "ADAPTER_CACHE_BYTES", read.memory() - 1)
    model.adapt([], "bypass")
    model.adapt([AdapterPick(files.lora_file())], "bypass")
    assert model.adapters[0] is not read


def test_layers_that_stay_adapted_as_they_were_are_left_alone(files: Files, model: SideModel) -> None:
    middle = {name: factors for name, factors in lora_factors(checkpoint()).items() if "middle_block" in name}
    write_lora(middle, files.lora_file("middle"))
    picks = [AdapterPick(files.lora_file()), AdapterPick(files.lora_file("middle"))]
    model.adapt(picks[:1], "merged")
    before = {path: layer.adaptation for path, layer in model.unet.named_modules() if hasattr(layer, "adaptation")}
    model.adapt(picks, "merged")
    changed = [path for path, was in before.items() if model.unet.get_submodule(path).adaptation is not was]
    assert changed and all("middle_block" in path for path in changed)


def test_weights_can_be_stored_in_fp8(files: Files) -> None:
    model = SideModel(files.checkpoint(files.base), torch.bfloat16, torch.float8_e4m3fn)
    assert model.dtype is torch.bfloat16
    whole = SideModel(files.checkpoint(files.base), torch.bfloat16)
    assert model.memory < 0.75 * whole.memory


def test_a_file_that_cannot_be_used_leaves_the_base_alone(files: Files, model: SideModel, tmp_path: Path) -> None:
    model.adapt([AdapterPick(files.lora_file())], "merged")
    (tmp_path / "bad.safetensors").write_bytes(b"no adapter")
    with pytest.raises(AdapterError, match="bad"):
        model.adapt([AdapterPick(tmp_path / "bad.safetensors")], "merged")
    assert len(branches(model)) == 1 and model.adapters == () and len({*map(id, texts(model))}) == 2
    model.adapt([AdapterPick(files.lora_file())], "merged")
    assert len(branches(model)) == 2


def test_a_file_that_is_not_there_is_named(files: Files, model: SideModel) -> None:
    with pytest.raises(CheckpointError, match="missing.safetensors cannot be read"):
        model.adapt([AdapterPick(files.lora_file("missing"))], "merged")


def test_merged_weights_count_as_memory_and_low_rank_ones_for_less(files: Files, model: SideModel) -> None:
    alone = model.memory
    model.adapt([AdapterPick(files.lora_file())], "merged")
    merged = model.memory
    model.adapt([AdapterPick(files.lora_file())], "bypass")
    assert alone <= model.memory < merged


def test_the_networks_of_controls_go_where_the_unet_goes_and_count_as_memory(
    files: Files, model: SideModel, tmp_path: Path
) -> None:
    control = ControlNet(model.unet.config, (3, 16, 16, 32, 32, 96, 96, 256, model.unet.config.model_channels))
    path = tmp_path / "edges.safetensors"
    write({k: torch.zeros_like(v) for k, v in control.state_dict().items()}, path)
    picks = [ControlPick(path, [torch.ones(1, 3, 64, 64)])]
    alone = model.memory
    assert model.network is model.unet
    model.set_controls(picks)
    loaded = model.network
    assert model.memory - alone == sum(weight.nbytes for weight in control.parameters())
    assert {*model.network.parameters()} > {*model.unet.parameters()}
    model.set_controls(picks)
    assert model.network is loaded, "a host has it on its device already"
    with pytest.raises(CheckpointError, match="cannot be read"):
        model.set_controls([ControlPick(tmp_path / "gone.safetensors", [])])
    assert model.network is model.unet and model.memory == alone and model.controls.guides == ()


def test_the_type_is_the_one_asked_for(files: Files) -> None:
    model = SideModel(files.checkpoint(files.base), torch.bfloat16)
    model.adapt([AdapterPick(files.lora_file())], "merged")
    assert model.dtype is torch.bfloat16 and model.device.type == "cpu"
    assert {weight.dtype for weight in model.towers[0].parameters()} == {torch.bfloat16}


def test_a_checkpoint_without_text_encoder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "unet.safetensors"
    write({k: v for k, v in checkpoint().items() if k.startswith(UNET_PREFIX)}, path)
    with pytest.raises(CheckpointError, match="unet.safetensors has no text encoder"):
        SideModel(path, FP32)


def test_an_inpainting_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "inpainting.safetensors"
    weights = checkpoint()
    first = f"{UNET_PREFIX}input_blocks.0.0.weight"
    weights[first] = torch.cat((weights[first], torch.zeros(32, 5, 3, 3)), 1)
    write(weights, path)
    with pytest.raises(CheckpointError, match="inpainting.safetensors is an inpainting model"):
        SideModel(path, FP32)


# Files next to a base.


V_MODEL = """model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: "v"
"""


@pytest.mark.parametrize("sigma", [14.6, 5.0, 1.0, 0.1])
def test_a_base_whose_yaml_says_v_is_a_model_of_v(sigma: float, tmp_path: Path) -> None:
    """Of two outputs o, o' the difference of x0 is -s / sqrt(s^2 + 1) (o' - o) for v, and -s (o' - o) for eps."""
    write(checkpoint(), tmp_path / "x.safetensors")
    (tmp_path / "x.yaml").write_text(V_MODEL)
    kind = SideModel(tmp_path / "x.safetensors", FP32).parameterization
    one, other, x = torch.randn(3, 1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    level = torch.tensor([sigma])
    found = kind.denoised(other, sigma * x, level) - kind.denoised(one, sigma * x, level)
    torch.testing.assert_close(found, -(other - one) * sigma / (sigma**2 + 1) ** 0.5, rtol=1e-4, atol=1e-5)


def test_a_yaml_that_comes_or_goes_makes_another_base(tmp_path: Path) -> None:
    write(checkpoint(), tmp_path / "x.safetensors")
    models, predictions = SideModels(), []
    for text in ("", V_MODEL, ""):
        (tmp_path / "x.yaml").write_text(text) if text else (tmp_path / "x.yaml").unlink(missing_ok=True)
        predictions.append(models.get(tmp_path / "x.safetensors", FP32).report.prediction)
    assert predictions == ["eps", "v", "eps"]


# Several bases.


def test_a_base_is_loaded_once(files: Files) -> None:
    models = SideModels()
    path = files.checkpoint(files.base)
    assert models.get(path, FP32, limit=2) is models.get(path, FP32, limit=2)
    assert models.get(path, torch.bfloat16, limit=2) is not models.get(path, FP32, limit=2)


def test_the_one_longest_unused_goes_first(files: Files) -> None:
    models = SideModels()
    for name in ("base", "copy", "base", "half"):
        models.get(files.checkpoint(name), FP32, limit=2)
    assert [model.name for model in models] == ["base.safetensors", "half.safetensors"]
    models.get(files.checkpoint("half"), FP32, limit=1)
    assert [model.name for model in models] == ["half.safetensors"]
    models.clear()
    assert list(models) == []


def test_bases_that_take_more_than_there_is_room_for_go(files: Files) -> None:
    models = SideModels()
    size = models.get(files.checkpoint("base"), FP32, limit=4).memory
    models.get(files.checkpoint("copy"), FP32, limit=4, room=2.5 * size)
    models.get(files.checkpoint("half"), FP32, limit=4, room=2.5 * size)
    assert [model.name for model in models] == ["copy.safetensors", "half.safetensors"]
    models.get(files.checkpoint("half"), FP32, limit=4, room=0)
    assert [model.name for model in models] == ["half.safetensors"]


def test_room_is_made_before_a_base_is_loaded(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    models, held = SideModels(), []
    models.get(files.checkpoint("base"), FP32)
    load = SideModel.__init__

    def note(self: SideModel, path: Path, *types: Any) -> None:
        held.append(len(list(models)))
        load(self, path, *types)

    monkeypatch.setattr(SideModel, "__init__", note)
    models.get(files.checkpoint("copy"), FP32)
    assert held == [0]


def test_a_changed_file_is_another(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "changing.safetensors"
    path.write_bytes(files.checkpoint(files.base).read_bytes())
    models = SideModels()
    before = models.get(path, FP32)
    write(checkpoint(seed=3), path)
    os.utime(path, ns=(0, 10**18))
    after = models.get(path, FP32)
    assert after is not before and list(models) == [after]
    assert not torch.allclose(branches(after), branches(before))


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone.safetensors cannot be read .*: a model file is needed"):
        FileState.of(tmp_path / "gone.safetensors")


# Errors for users.


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:80] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB)"), True),
        (RuntimeError("Invalid buffer size: 16.00 GB"), True),
        (RuntimeError("Could not allocate tensor with 4294967296 bytes. There is not enough GPU video memory"), True),
        (RuntimeError("Allocation is out of device memory on current platform."), True),
        (RuntimeError("index 5 is out of bounds for the memory format"), False),
        (RuntimeError("shapes do not match"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_memory_that_ran_out_is_told_from_other_errors(error: BaseException, short: bool) -> None:
    assert out_of_memory(error) is short
    assert ("out of memory while trying" in str(user_error(error, "trying"))) is short


def test_errors_of_our_own_are_told_as_they_are_and_others_with_their_class() -> None:
    own = SettingError("lambda is wrong")
    assert user_error(own, "trying") is own
    told = user_error(KeyError("x"), "trying")
    assert type(told) is DeltaError and "trying failed (KeyError: 'x')" in str(told)


def test_prefixes_of_the_small_checkpoint_are_those_of_sd1(files: Files, model: SideModel) -> None:
    assert model.report.family.name == "SD1" and model.parameterization.prediction == "eps"
    assert {key.split(".")[0] for key in checkpoint()} == {UNET_PREFIX.split(".")[0], TEXT_PREFIX.split(".")[0]}
