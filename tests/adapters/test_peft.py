"""peft's formats: adapters that peft makes, saves and evaluates, read here.

The pinned peft is as old as the pinned diffusers, with torch 2.1.  The newest one, in a separate environment, has other
parametrisations of OFT, and BOFT.  Tests skip a peft that lacks their format.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lib_delta.adapters import key_names
from lib_delta.adapters.adapter_file import load_adapter
from lib_delta.adapters.attach import adapted_text_parameters, attach
from lib_delta.errors import AdapterError
from lib_delta.models.text import TextConfig, TextEncoder
from lib_delta.models.unet import UNet
from tests.support.adapters import KINDS, make_unet, relative_error, torch_twin, weight_of

peft = pytest.importorskip("peft")

BOUND = 1e-5
NEWEST = tuple(map(int, peft.__version__.split(".")[:2])) >= (0, 16)
newest = pytest.mark.skipif(not NEWEST, reason="needs the newest peft")
oldest = pytest.mark.skipif(NEWEST, reason="needs the peft of 2024")


@functools.cache
def base() -> UNet:
    return make_unet()


def tree(layers: Mapping[str, nn.Module]) -> nn.Module:
    """Return a module with the given modules at their dotted paths."""
    root = nn.Module()
    for path, layer in layers.items():
        *parents, name = path.split(".")
        node = root
        for parent in parents:
            if parent not in dict(node.named_children()):
                node.add_module(parent, nn.Module())
            node = node.get_submodule(parent)
        node.add_module(name, layer)
    return root


def unet_tree() -> tuple[nn.Module, dict[str, str]]:
    """Return torch's layers at diffusers' paths, and these paths by the UNet's."""
    places = {path: key_names.diffusers_paths(base())[path] for path in KINDS.values()}
    return tree({place: torch_twin(base().get_submodule(path)) for path, place in places.items()}), places


def trained(config: Any, model: nn.Module) -> nn.Module:
    """Return peft's model with random numbers in the adapter's parameters."""
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if not parameter.requires_grad:
            continue
        if "magnitude" in name or "ia3" in name or "boft_s" in name:
            parameter.data.mul_(1 + 0.4 * torch.rand_like(parameter))
        else:
            parameter.data.normal_(std=0.6)
    return wrapped.requires_grad_(False).eval()


def config(kind: str, **settings: Any) -> Any:
    targets = [key_names.diffusers_paths(base())[path] for path in KINDS.values()]
    return getattr(peft, f"{kind}Config")(**{"target_modules": targets, **settings})


def saved(wrapped: nn.Module, folder: Path) -> Path:
    wrapped.save_pretrained(str(folder))
    return folder / "adapter_model.safetensors"


def check(wrapped: nn.Module, file: Path, algorithm: str, kinds: tuple[str, ...] = tuple(KINDS)) -> None:
    """Compare every layer's merged weight and bias with the outputs of peft's layers for impulses."""
    adapter = load_adapter(file, base())
    assert set(adapter.unet) == {KINDS[kind] for kind in kinds} and not adapter.unmatched
    assert list(adapter.algorithms()) == [algorithm]
    attach(base(), [(adapter, 1.0)])
    for path, place in unet_tree()[1].items():
        if path not in adapter.unet:
            continue
        layer, theirs = base().get_submodule(path), wrapped.base_model.model.get_submodule(place)
        expected = weight_of(theirs, layer) - layer.weight
        assert expected.norm() > 0.02 * layer.weight.norm()
        assert relative_error(layer.adaptation.weight - layer.weight, expected) < BOUND, path
        bias = layer.bias if layer.adaptation.bias is None else layer.adaptation.bias
        x = torch.randn(
            2, *((5,) if layer.weight.ndim == 2 else ()), layer.weight.shape[1], *(9, 7)[: layer.weight.ndim - 2]
        )
        expected = theirs(x)
        assert relative_error(layer.apply_weights(x, layer.adaptation.weight, bias), expected) < BOUND
        part = adapter.unet[path].map(lambda tensor: tensor.float())
        if part.bypasses:
            y = layer.base(x)
            assert relative_error(y + part.bypass(layer, x, y), expected) < BOUND


LORAS: dict[str, dict[str, Any]] = {
    "plain": {"lora_alpha": 8},
    "rank stabilised": {"lora_alpha": 3, "use_rslora": True},
    "with patterns": {
        "lora_alpha": 8,
        "alpha_pattern": {"time_embedding.linear_1": 2, "conv_shortcut": 16},
        "rank_pattern": {"conv1": 3},
    },
}


@pytest.mark.parametrize(
    ("settings", "algorithms"),
    [
        ({"bias": "all"}, ["LoRA", "bias"]),
        ({"modules_to_save": ["conv", "linear_1"]}, ["LoRA", "full fine-tune"]),
        ({"modules_to_save": ["conv"], "bias": "all"}, ["LoRA", "bias", "full fine-tune"]),
    ],
    ids=str,
)
def test_whole_weights_beside_factors(settings: dict[str, Any], algorithms: list[str], tmp_path: Path) -> None:
    """The file has whole new weights or biases of layers without factors, by the layers' names."""
    targets = [key_names.diffusers_paths(base())[KINDS[kind]] for kind in ("conv 1x1", "conv 3x3")]
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=targets, **settings)
    wrapped = trained(config, unet_tree()[0])
    adapter = load_adapter(saved(wrapped, tmp_path), base())
    assert set(adapter.unet) == set(KINDS.values()) and not adapter.unmatched
    assert sorted(adapter.algorithms()) == sorted(algorithms)
    attach(base(), [(adapter, 1.0)])
    for path, place in unet_tree()[1].items():
        layer, theirs = base().get_submodule(path), wrapped.base_model.model.get_submodule(place)
        x = torch.randn(2, layer.weight.shape[1], *(9, 7)[: layer.weight.ndim - 2])
        bias = layer.bias if layer.adaptation.bias is None else layer.adaptation.bias
        assert relative_error(layer.apply_weights(x, layer.adaptation.weight, bias), theirs(x)) < BOUND, path
        assert relative_error(layer.base(x), theirs(x)) > 0.1


@pytest.mark.parametrize("settings", LORAS)
def test_lora(settings: str, tmp_path: Path) -> None:
    wrapped = trained(config("Lora", r=4, init_lora_weights=False, **LORAS[settings]), unet_tree()[0])
    check(wrapped, saved(wrapped, tmp_path), "LoRA")


def test_a_pattern_of_ranks_is_told_by_the_tensors(tmp_path: Path) -> None:
    wrapped = trained(config("Lora", r=4, init_lora_weights=False, **LORAS["with patterns"]), unet_tree()[0])
    assert load_adapter(saved(wrapped, tmp_path), base()).ranks() == (3, 4)


def test_dora(tmp_path: Path) -> None:
    kinds = tuple(KINDS) if NEWEST else ("linear",)
    targets = [key_names.diffusers_paths(base())[KINDS[kind]] for kind in kinds]
    made = config("Lora", r=4, lora_alpha=8, init_lora_weights=False, use_dora=True, target_modules=targets)
    wrapped = trained(made, unet_tree()[0])
    check(wrapped, saved(wrapped, tmp_path), "DoRA on LoRA", kinds)


@pytest.mark.parametrize("core", [False, True])
def test_loha(core: bool, tmp_path: Path) -> None:
    made = config("LoHa", r=4, alpha=2, init_weights=False, use_effective_conv2d=core)
    wrapped = trained(made, unet_tree()[0])
    check(wrapped, saved(wrapped, tmp_path), "LoHa")


# The old peft omits alpha over the rank in LoKr; newer ones, which read its files, apply it.
LOKRS: dict[str, dict[str, Any]] = {
    "plain": {"r": 2},
    "with a core": {"r": 2, "use_effective_conv2d": True},
    "both decomposed": {"r": 1, "decompose_both": True},
    "factor 4": {"r": 2, "decompose_factor": 4},
    "rank too large": {"r": 100},
}


@pytest.mark.parametrize("settings", LOKRS)
def test_lokr(settings: str, tmp_path: Path) -> None:
    alpha = 3 if NEWEST else LOKRS[settings]["r"]
    wrapped = trained(config("LoKr", alpha=alpha, init_weights=False, **LOKRS[settings]), unet_tree()[0])
    check(wrapped, saved(wrapped, tmp_path), "LoKr")


@pytest.mark.parametrize("feedforward", [(), ("time_embedding.linear_1", "conv"), ("conv1", "conv_shortcut")])
def test_ia3(feedforward: tuple[str, ...], tmp_path: Path) -> None:
    """Scaled outputs include the bias; the configuration states the side of a square convolution."""
    feed = [place for place in unet_tree()[1].values() if place.endswith(feedforward)] if feedforward else []
    wrapped = trained(config("IA3", feedforward_modules=feed), unet_tree()[0])
    check(wrapped, saved(wrapped, tmp_path), "(IA)^3")


@oldest
@pytest.mark.parametrize(
    "settings",
    [{}, {"block_share": True}, {"coft": True, "eps": 0.1}, {"r": 5}, {"r": 5, "block_share": True}],
    ids=str,
)
def test_oft_of_2024(settings: dict[str, Any], tmp_path: Path) -> None:
    wrapped = trained(config("OFT", **{"r": 8, "init_weights": False, **settings}), unet_tree()[0])
    for place in unet_tree()[1].values():
        wrapped.base_model.model.get_submodule(place).get_delta_weight("default")  # shortens constrained rotations
    check(wrapped, saved(wrapped, tmp_path), "OFT")


@newest
@pytest.mark.parametrize(
    "settings",
    [
        {"oft_block_size": 4},
        {"oft_block_size": 8, "use_cayley_neumann": False},
        {"oft_block_size": 4, "num_cayley_neumann_terms": 3},
        {"oft_block_size": 4, "num_cayley_neumann_terms": 8},
        {"oft_block_size": 4, "block_share": True},
        {"oft_block_size": 4, "coft": True, "eps": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("kinds", [("linear", "conv 1x1"), tuple(KINDS)], ids=["in training", "merged"])
def test_oft_of_today(settings: dict[str, Any], kinds: tuple[str, ...], tmp_path: Path) -> None:
    """peft's merge is the reference for kernels larger than 1x1: its forward pass adds up their overlaps."""
    targets = [key_names.diffusers_paths(base())[KINDS[kind]] for kind in kinds]
    common = {"r": 0, "use_cayley_neumann": True, "init_weights": False, "target_modules": targets}
    wrapped = trained(config("OFT", **{**common, **settings}), unet_tree()[0])
    file = saved(wrapped, tmp_path)
    if "conv 3x3" in kinds:
        wrapped.merge_adapter()
    check(wrapped, file, "OFT", kinds)


@newest
@pytest.mark.parametrize("factors", [1, 2, 3])
@pytest.mark.parametrize("side", [2, 4])
def test_boft(factors: int, side: int, tmp_path: Path) -> None:
    made = config("BOFT", boft_block_size=side, boft_n_butterfly_factor=factors, init_weights=False)
    wrapped = trained(made, unet_tree()[0])
    check(wrapped, saved(wrapped, tmp_path), "BOFT")


def text_tower() -> TextEncoder:
    torch.manual_seed(5)
    made = TextConfig(16, 32, layers=2, positions=8, vocabulary=99, heads=2, activation="quick_gelu")
    return TextEncoder(made, final_norm=True).requires_grad_(False).eval()


def test_embeddings_and_linear_layers_of_a_text_encoder(tmp_path: Path) -> None:
    tower = text_tower()
    table = tower.transformer.text_model.embeddings.token_embedding
    layer = tower.transformer.text_model.encoder.layers[1].mlp.fc1
    paths = ("text_model.embeddings.token_embedding", "text_model.encoder.layers.1.mlp.fc1")
    twins = (nn.Embedding.from_pretrained(table.weight.clone()), torch_twin(layer))
    made = peft.LoraConfig(r=4, lora_alpha=2, init_lora_weights=False, target_modules=list(paths))
    wrapped = trained(made, tree(dict(zip(paths, twins))))
    adapter = load_adapter(saved(wrapped, tmp_path), base(), [tower])
    assert len(adapter.text[0]) == 2 and not adapter.unet and not adapter.unmatched
    changed = adapted_text_parameters(tower, [(adapter, 1.0)])
    theirs = wrapped.base_model.model.get_submodule(paths[0])(torch.arange(99))
    assert relative_error(changed[f"transformer.{paths[0]}.weight"] - table.weight, theirs - table.weight) < BOUND
    theirs = weight_of(wrapped.base_model.model.get_submodule(paths[1]), layer)
    assert relative_error(changed[f"transformer.{paths[1]}.weight"], theirs) < BOUND


def as_diffusers_saves(wrapped: nn.Module, file: Path, header: bool) -> None:
    """Write the tensors below ``unet.`` and, as newer versions do, the configuration into the header."""
    tensors = {f"unet.{key.removeprefix('base_model.model.')}": value for key, value in state(wrapped).items()}
    stated = {f"unet.{key}": value for key, value in wrapped.peft_config["default"].to_dict().items()}
    text = json.dumps(stated, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    save_file(tensors, file, {"lora_adapter_metadata": text} if header else {})


def state(wrapped: nn.Module) -> dict[str, Tensor]:
    return {key: value.contiguous() for key, value in peft.get_peft_model_state_dict(wrapped).items()}


@pytest.mark.parametrize("settings", LORAS)
def test_the_header_of_diffusers_serves_as_the_configuration(settings: str, tmp_path: Path) -> None:
    wrapped = trained(config("Lora", r=4, init_lora_weights=False, **LORAS[settings]), unet_tree()[0])
    as_diffusers_saves(wrapped, tmp_path / "pytorch_lora_weights.safetensors", header=True)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as opened:
        assert "unet.lora_alpha" in json.loads(opened.metadata()["lora_adapter_metadata"])
    check(wrapped, tmp_path / "pytorch_lora_weights.safetensors", "LoRA")


def test_without_a_configuration_alpha_counts_as_the_rank(tmp_path: Path) -> None:
    wrapped = trained(config("Lora", r=4, lora_alpha=4, init_lora_weights=False), unet_tree()[0])
    as_diffusers_saves(wrapped, tmp_path / "bare.safetensors", header=False)
    check(wrapped, tmp_path / "bare.safetensors", "LoRA")


def test_the_configuration_is_of_the_file_that_peft_saved_alone(tmp_path: Path) -> None:
    wrapped = trained(config("Lora", r=4, lora_alpha=8, init_lora_weights=False), unet_tree()[0])
    file = saved(wrapped, tmp_path)
    other = file.rename(tmp_path / "style.safetensors")
    layer = base().get_submodule("time_embed.0")
    tensors = load_file(other)
    name = "base_model.model.time_embedding.linear_1.lora_{}.weight"
    product = tensors[name.format("B")] @ tensors[name.format("A")]
    difference = load_adapter(other, base()).unet["time_embed.0"].merged_difference(layer.weight)
    assert relative_error(difference, product) < BOUND
    other.rename(file)
    difference = load_adapter(file, base()).unet["time_embed.0"].merged_difference(layer.weight)
    assert relative_error(difference, 2 * product) < BOUND


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100000, "\x00", '{"lora_alpha": 1' + "0" * 400 + "}"])
def test_configurations_that_cannot_be_read_are_told(text: str, tmp_path: Path) -> None:
    wrapped = trained(config("Lora", r=4, init_lora_weights=False), unet_tree()[0])
    file = saved(wrapped, tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError):
        load_adapter(file, base())


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": None},
        {"lora_alpha": "8"},
        {"lora_alpha": {"a": 1}},
        {"lora_alpha": float("inf")},
        {"lora_alpha": True},
        {"alpha_pattern": [1, 2]},
        {"alpha_pattern": {"(.*)*": "x"}},
        {"alpha_pattern": 5},
        {"rank_pattern": 5},
        {"use_rslora": "yes"},
        {"feedforward_modules": 7},
        {"r": -1},
        {"num_cayley_neumann_terms": "many"},
        {"num_cayley_neumann_terms": 10**12},
        {"num_cayley_neumann_terms": -4},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["Lora", "LoKr", "IA3", "new OFT"])
def test_configurations_of_the_wrong_types_load_or_are_told(kind: str, change: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    tensors = {
        "Lora": {"lora_A.weight": torch.randn(4, 32), "lora_B.weight": torch.randn(128, 4)},
        "LoKr": {"lokr_w1": torch.randn(8, 4), "lokr_w2": torch.randn(16, 8)},
        "IA3": {"ia3_l": torch.randn(128, 1)},
        "new OFT": {"oft_R.weight": torch.randn(8, 6)},
    }[kind]
    save_file({f"base_model.model.time_embedding.linear_1.{key}": value for key, value in tensors.items()}, file)
    stated = {"r": 4, "lora_alpha": 8, **change}
    (tmp_path / "adapter_config.json").write_text(json.dumps(stated))
    layer, message = base().get_submodule("time_embed.0"), "adapter_"
    try:
        difference = load_adapter(file, base()).unet["time_embed.0"].merged_difference(layer.weight)
    except AdapterError as error:
        message, difference = str(error), torch.zeros(1)
    assert "adapter_" in message and torch.isfinite(difference).all()
