"""Every algorithm of LyCORIS: files written by its modules, compared with their computation in training.

The reference is a module's forward pass of impulses: LyCORIS' merged weights apply the scale of LoHa and LoKr twice.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lib_delta.adapters import key_names
from lib_delta.adapters.adapter_file import AdapterFile, load_adapter, read_adapter
from lib_delta.adapters.attach import attach
from lib_delta.models.unet import UNet
from tests.support.adapters import (
    KINDS,
    attached_weight,
    diffusers_twin,
    kohya_name,
    make_unet,
    relative_error,
    torch_twin,
    weight_of,
)

pytest.importorskip("lycoris")
import lycoris
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.dylora import DyLoraModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
BOUND = 1e-5  # relative to the change of the weight; for an effect as large as the weight, to both

# Name, class, settings and reported algorithm.  All dtypes can store the constraint, which has the weights' dtype.
DORA_ON_INPUT = {"weight_decompose": True, "wd_on_out": False}
DORA_ON_OUTPUT = {"weight_decompose": True, "wd_on_out": True}
CASES: dict[str, tuple[type[nn.Module], dict[str, Any], str]] = {
    "LoCon": (LoConModule, {}, "LoRA"),
    "LoCon, alpha 0": (LoConModule, {"alpha": 0}, "LoRA"),
    "LoCon, rank stabilised": (LoConModule, {"rs_lora": True}, "LoRA"),
    "LoCon, DoRA on inputs": (LoConModule, DORA_ON_INPUT, "DoRA on LoRA"),
    "LoCon, DoRA on outputs": (LoConModule, DORA_ON_OUTPUT, "DoRA on LoRA"),
    "LoHa": (LohaModule, {}, "LoHa"),
    "LoHa, rank stabilised": (LohaModule, {"rs_lora": True}, "LoHa"),
    "LoHa, DoRA on inputs": (LohaModule, DORA_ON_INPUT, "DoRA on LoHa"),
    "LoHa, DoRA on outputs": (LohaModule, DORA_ON_OUTPUT, "DoRA on LoHa"),
    "LoKr": (LokrModule, {"lora_dim": 2}, "LoKr"),
    "LoKr, factor 4": (LokrModule, {"lora_dim": 2, "factor": 4}, "LoKr"),
    "LoKr, factor 2": (LokrModule, {"lora_dim": 1, "factor": 2}, "LoKr"),
    "LoKr, unbalanced": (LokrModule, {"lora_dim": 1, "factor": 2, "unbalanced_factorization": True}, "LoKr"),
    "LoKr, both decomposed": (LokrModule, {"lora_dim": 1, "decompose_both": True}, "LoKr"),
    "LoKr, rank stabilised": (LokrModule, {"factor": 2, "rs_lora": True}, "LoKr"),
    "LoKr, rank too large": (LokrModule, {"lora_dim": 100}, "LoKr"),
    "LoKr, full matrix": (LokrModule, {"full_matrix": True}, "LoKr"),
    "LoKr, DoRA on inputs": (LokrModule, {"lora_dim": 2, **DORA_ON_INPUT}, "DoRA on LoKr"),
    "LoKr, DoRA on outputs": (LokrModule, {"lora_dim": 2, **DORA_ON_OUTPUT}, "DoRA on LoKr"),
    "(IA)^3 on outputs": (IA3Module, {}, "(IA)^3"),
    "(IA)^3 on inputs": (IA3Module, {"train_on_input": True}, "(IA)^3"),
    # A rank-stabilised GLoRA is missing: its files have only alpha, from which LyCORIS reads another scale.
    "GLoRA": (GLoRAModule, {}, "GLoRA"),
    "OFT": (DiagOFTModule, {"lora_dim": 8}, "OFT"),
    "OFT, blocks of 2": (DiagOFTModule, {"lora_dim": 2}, "OFT"),
    "OFT, constrained": (DiagOFTModule, {"lora_dim": 8, "constraint": 2**-6}, "OFT"),
    "OFT, constrained loosely": (DiagOFTModule, {"lora_dim": 8, "constraint": 8.0}, "OFT"),
    "OFT, rescaled": (DiagOFTModule, {"lora_dim": 8, "rescaled": True}, "OFT"),
    "OFT, constrained and rescaled": (DiagOFTModule, {"lora_dim": 8, "constraint": 2**-6, "rescaled": True}, "OFT"),
    "BOFT": (ButterflyOFTModule, {"lora_dim": 8}, "BOFT"),
    "BOFT, blocks of 4": (ButterflyOFTModule, {"lora_dim": 4}, "BOFT"),
    "BOFT, constrained": (ButterflyOFTModule, {"lora_dim": 4, "constraint": 2**-6}, "BOFT"),
    "BOFT, rescaled": (ButterflyOFTModule, {"lora_dim": 4, "rescaled": True}, "BOFT"),
    "BOFT, constrained and rescaled": (
        ButterflyOFTModule,
        {"lora_dim": 8, "constraint": 2**-6, "rescaled": True},
        "BOFT",
    ),
}
# A Tucker core is for kernels larger than 1x1.
TUCKER: dict[str, tuple[type[nn.Module], dict[str, Any], str]] = {
    "LoCon, Tucker": (LoConModule, {"use_tucker": True}, "LoRA"),
    "LoCon, Tucker, DoRA": (LoConModule, {"use_tucker": True, **DORA_ON_OUTPUT}, "DoRA on LoRA"),
    "LoHa, Tucker": (LohaModule, {"use_tucker": True}, "LoHa"),
    "LoHa, Tucker, DoRA": (LohaModule, {"use_tucker": True, **DORA_ON_INPUT}, "DoRA on LoHa"),
    "LoKr, Tucker": (LokrModule, {"use_tucker": True, "lora_dim": 2}, "LoKr"),
    "LoKr, Tucker, both decomposed": (
        LokrModule,
        {"use_tucker": True, "lora_dim": 1, "decompose_both": True},
        "LoKr",
    ),
    "LoKr, Tucker, DoRA": (LokrModule, {"use_tucker": True, "lora_dim": 2, **DORA_ON_OUTPUT}, "DoRA on LoKr"),
    "GLoRA, Tucker": (GLoRAModule, {"use_tucker": True}, "GLoRA"),
}
PRODUCT = [(case, kind) for case in CASES for kind in KINDS] + [
    (case, kind) for case in TUCKER for kind in KINDS if "3x3" in kind
]


@functools.cache
def base() -> UNet:
    return make_unet()


def trained(case: str, twin: nn.Module, dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    """Return the module on torch's layer, with random parameters of a noticeable size within the range of ``dtype``."""
    make, settings, _ = {**CASES, **TUCKER}[case]
    torch.manual_seed(hash_of(case))
    module = make("layer", twin, **{"lora_dim": 4, "alpha": 2.0, **settings, **more})
    for name, parameter in module.named_parameters():
        if name in ("dora_scale", "rescale"):
            parameter.data.mul_(1 + 0.3 * torch.rand_like(parameter))
        else:
            nn.init.normal_(parameter, std=0.5)
        parameter.data.copy_(parameter.data.to(dtype))
    return module.requires_grad_(False).eval()


def hash_of(text: str) -> int:
    return sum(ord(letter) * (i + 1) for i, letter in enumerate(text))


def read_back(module: nn.Module, path: str, file: Path, dtype: torch.dtype = torch.float32) -> AdapterFile:
    """Write the module's tensors as LyCORIS' scripts do, and read the file for the UNet's layer ``path``."""
    tensors = {f"{kohya_name(path)}.{key}": value.detach().to(dtype) for key, value in module.state_dict().items()}
    save_file(tensors, file)
    adapter = load_adapter(file, base())
    assert set(adapter.unet) == {path} and not adapter.unmatched and adapter.total == len(tensors)
    return adapter


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("case", "kind"), PRODUCT)
def test_merged_weights_and_bypass_are_those_of_training(
    case: str, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    path = KINDS[kind]
    layer = base().get_submodule(path)
    module = trained(case, torch_twin(layer), dtype)
    assert not module.bypass_mode
    expected = weight_of(module, layer) - layer.weight
    assert expected.norm() > 0.05 * layer.weight.norm()
    adapter = read_back(module, path, tmp_path / "x.safetensors", dtype)
    assert list(adapter.algorithms()) == [{**CASES, **TUCKER}[case][2]]
    attach(base(), [(adapter, 1.0)])
    merged = attached_weight(layer) - layer.weight
    assert layer.adaptation.bias is None
    assert relative_error(merged, expected) < BOUND
    part = adapter.unet[path].map(lambda tensor: tensor.float())
    if part.bypasses:
        effect = weight_of(lambda x: part.bypass(layer, x, layer.base(x)), layer)
        assert relative_error(effect, expected) < BOUND


@pytest.mark.parametrize("case", ["LoCon", "LoHa", "LoKr", "LoKr, full matrix", "LoKr, both decomposed", "GLoRA"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_learned_scalar_is_part_of_the_stored_factors(case: str, kind: str, tmp_path: Path) -> None:
    layer = base().get_submodule(KINDS[kind])
    module = trained(case, torch_twin(layer), use_scalar=True)
    assert module.scalar != 1
    adapter = read_back(module, KINDS[kind], tmp_path / "x.safetensors")
    difference = adapter.unet[KINDS[kind]].merged_difference(layer.weight)
    assert relative_error(difference, weight_of(module, layer) - layer.weight) < BOUND


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("kind", KINDS)
def test_whole_differences_with_biases(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """A full module trains the sum, and stores the difference from the original."""
    path = KINDS[kind]
    layer = base().get_submodule(path)
    torch.manual_seed(5)
    module = FullModule("layer", torch_twin(layer)).requires_grad_(False)
    module.apply_to()
    module.weight += (0.3 * torch.randn_like(module.weight)).to(dtype).float()
    module.bias += (0.3 * torch.randn_like(module.bias)).to(dtype).float()
    adapter = read_back(module, path, tmp_path / "x.safetensors", dtype)
    assert list(adapter.algorithms()) == ["Full"]
    attach(base(), [(adapter, 1.0)], "bypass")
    assert relative_error(layer.adaptation.weight - layer.weight, module.weight - layer.weight) < BOUND
    assert relative_error(layer.adaptation.bias - layer.bias, module.bias - layer.bias) < BOUND


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("path", ["input_blocks.3.0.in_layers.0", "input_blocks.1.1.transformer_blocks.0.norm2"])
def test_norms(path: str, dtype: torch.dtype, tmp_path: Path) -> None:
    layer = base().get_submodule(path)
    groups = getattr(layer, "groups", None)
    channels = len(layer.weight)
    twin = nn.GroupNorm(groups, channels, layer.eps) if groups else nn.LayerNorm(channels, layer.eps)
    twin.load_state_dict(layer.state_dict())
    module = NormModule("layer", twin.requires_grad_(False)).requires_grad_(False)
    torch.manual_seed(6)
    for parameter in module.parameters():
        parameter.copy_(torch.randn_like(parameter).to(dtype))
    adapter = read_back(module, path, tmp_path / "x.safetensors", dtype)
    assert list(adapter.algorithms()) == ["Norm"]
    attach(base(), [(adapter, 1.0)])
    x = torch.randn(2, channels, 5, 4) if groups else torch.randn(2, 5, channels)
    torch.testing.assert_close(layer.adaptation(layer, x), module(x), rtol=1e-5, atol=1e-5)
    assert relative_error(layer.adaptation.weight, module.get_merged_weight()[0]) < BOUND
    assert relative_error(layer.adaptation.bias, module.get_merged_weight()[1]) < BOUND


def dylora(layer: nn.Module, dtype: torch.dtype, block_size: int) -> nn.Module:
    torch.manual_seed(7)
    module = DyLoraModule("layer", torch_twin(layer), lora_dim=4, alpha=2.0, block_size=block_size)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
        parameter.data.copy_(parameter.data.to(dtype))
    return module.requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("kind", KINDS)
def test_a_dylora_is_stored_as_a_lora(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In blocks of 1, LyCORIS trains the last rank with the stored scale; in larger blocks with another."""
    path = KINDS[kind]
    layer = base().get_submodule(path)
    module = dylora(layer, dtype, block_size=1)
    expected = module.get_diff_weight(rank=3)[0]
    adapter = read_back(module, path, tmp_path / "x.safetensors", dtype)
    assert adapter.ranks() == (4,)
    assert relative_error(adapter.unet[path].merged_difference(layer.weight), expected) < BOUND


@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dyloras_blocks_are_read_in_the_order_of_their_numbers(kind: str, block_size: int) -> None:
    path = KINDS[kind]
    layer = base().get_submodule(path)
    module = dylora(layer, torch.float32, block_size)
    stored = {f"{kohya_name(path)}.{key}": value for key, value in module.state_dict().items()}
    blocks = dict(nn.Module.named_parameters(module))
    reverse = {f"{kohya_name(path)}.{key}": blocks[key] for key in sorted(blocks, reverse=True)}
    reverse[f"{kohya_name(path)}.alpha"] = module.alpha
    joined, apart = (read_adapter("x", tensors, base()).unet[path] for tensors in (stored, reverse))
    assert torch.equal(joined.merged_difference(layer.weight), apart.merged_difference(layer.weight))


def test_a_dylora_truncated_to_a_rank_is_what_was_trained_for_it() -> None:
    """All but the scale match: LyCORIS divides it by the ranks in use, the file by all ranks."""
    layer = base().get_submodule("time_embed.0")
    module = dylora(layer, torch.float32, block_size=1)
    adapter = read_adapter("x", {f"lora_unet_time_embed_0.{k}": v for k, v in module.state_dict().items()}, base())
    for rank in (1, 2, 3, 4, 9):
        truncated = adapter.unet["time_embed.0"].truncated(rank)
        assert truncated.rank == min(rank, 4)
        trained_ = module.get_diff_weight(rank=truncated.rank - 1)[0] * truncated.rank / 4
        assert relative_error(truncated.merged_difference(layer.weight), trained_) < BOUND


def test_rotations_of_kohyas_parametrisation_from_its_definition() -> None:
    """``R = (I + Q) (I - Q)^-1`` of ``Q = B - B^T``, and block by block ``W' = R^T W``."""
    layer = base().get_submodule("time_embed.0")
    torch.manual_seed(9)
    blocks = 0.3 * torch.randn(16, 8, 8)
    for constraint in (0.0, 0.01, 10.0):
        skew = blocks - blocks.mT
        limit = constraint * len(layer.weight)
        shorter = skew * min(1.0, limit / float(skew.norm())) if constraint else skew
        rows = []
        for q, weight in zip(shorter.double(), layer.weight.double().split(8)):
            rotation = (torch.eye(8) + q) @ torch.linalg.inv(torch.eye(8) - q)
            torch.testing.assert_close(rotation @ rotation.T, torch.eye(8).double(), rtol=0, atol=1e-12)
            rows.append(rotation.T @ weight)
        tensors = {"oft_blocks": blocks, "alpha": torch.tensor(constraint)}
        adapter = read_adapter("x", {f"lora_unet_time_embed_0.{k}": v for k, v in tensors.items()}, base())
        attach(base(), [(adapter, 1.0)])
        assert relative_error(attached_weight(layer).double(), torch.cat(rows)) < 1e-6


NETWORKS: dict[str, dict[str, Any]] = {
    "lora": {"use_tucker": True, "dora_wd": True},
    "loha": {"use_tucker": True},
    "lokr": {"factor": 4, "linear_dim": 1, "conv_dim": 1},
    "lokr full": {"algo": "lokr", "full_matrix": True, "dora_wd": True},
    "glora": {},
    "dylora": {"block_size": 1},
    "full": {},
    "diag-oft": {"linear_dim": 8, "conv_dim": 8, "constraint": 2**-6, "rescaled": True},
    "boft": {"linear_dim": 4, "conv_dim": 4},
}


# Names and containers do not depend on the algorithm: each is tested once.
@pytest.mark.parametrize(
    ("network", "prefix", "suffix"),
    [
        *((network, "lora_unet", "safetensors") for network in NETWORKS),
        ("lora", "lycoris", "safetensors"),
        ("lora", "lycoris_unet", "safetensors"),
        ("lora", "lora_unet", "pt"),
    ],
)
def test_whole_networks(
    network: str, prefix: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = make_unet()
    twin = diffusers_twin(unet)
    monkeypatch.setattr(lycoris.LycorisNetwork, "LORA_PREFIX", prefix)
    settings = {
        "algo": network,
        "linear_dim": 4,
        "linear_alpha": 2,
        "conv_dim": 3,
        "conv_alpha": 1,
        **NETWORKS[network],
    }
    theirs = lycoris.create_lycoris(twin, 1.0, train_norm=True, **settings)
    torch.manual_seed(12)
    theirs.apply_to()
    theirs.requires_grad_(False).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith(("dora_scale", "rescale")):
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
        else:
            parameter += 0.1 * torch.randn_like(parameter)
    file = tmp_path / f"net.{suffix}"
    theirs.save_weights(str(file), torch.float32, {"ss_network_module": "lycoris.kohya"})

    adapter = load_adapter(file, unet)
    assert not adapter.unmatched and len(adapter.unet) == len(theirs.loras) > 40
    assert adapter.algorithms()["Norm"] > 10 and len(adapter.algorithms()) == 2
    attach(unet, [(adapter, 1.0)])
    places = {f"{prefix}_{other.replace('.', '_')}": path for path, other in key_names.diffusers_paths(unet).items()}
    for module in theirs.loras:
        layer = unet.get_submodule(places[module.lora_name])
        assert relative_error(attached_weight(layer), in_training(module, layer)) < BOUND, module.lora_name
        if isinstance(module, (FullModule, NormModule)):
            bias = module.bias if isinstance(module, FullModule) else module.get_merged_weight()[1]
            assert bias is None or relative_error(layer.adaptation.bias, bias) < BOUND


def in_training(module: nn.Module, layer: nn.Module) -> Tensor:
    """Return the weight that the module trains with; a full module and a norm return it themselves."""
    if isinstance(module, (FullModule, NormModule)):
        return module.get_merged_weight()[0]
    if isinstance(module, DyLoraModule):
        return module.get_merged_weight(rank=module.lora_dim - 1)[0]
    return weight_of(module, layer)
