"""Tiny base models and adapter files for the tests of adapters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lib_delta.adapters import key_names
from lib_delta.models.forked_layers import Conv2d, Linear
from lib_delta.models.unet import UNet, UNetConfig


def config(family: str = "SD1", context_width: int = 24) -> UNetConfig:
    """Return a narrow UNet of the family's layout: two levels, attention in the first."""
    xl = family == "SDXL"
    return UNetConfig(
        in_channels=4,
        out_channels=4,
        model_channels=32,
        levels=(32, 64),
        res_blocks=(1, 1),
        depth_in=(0, 2) if xl else (1, 0),
        depth_middle=2 if xl else 1,
        depth_out=(2, 2, 0, 0) if xl else (0, 0, 1, 1),
        context_width=context_width,
        linear_projection=family != "SD1",
        label_width=40 if xl else 0,
        head_width=None if family == "SD1" else 16,
    )


def make_unet(family: str = "SD1", seed: int = 0, context_width: int = 24) -> UNet:
    """Return a UNet with random weights of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    unet = UNet(config(family, context_width)).requires_grad_(False).eval()
    for parameter in unet.parameters():
        fan_in = max(1, parameter[0].numel())
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return unet


def inputs(batch: int = 2, context_width: int = 24, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents ``(1, N, 4, 8, 8)``, timesteps ``(N,)`` and a context ``(1, N, 5, width)``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, batch, 4, 8, 8, generator=generator)
    t = torch.linspace(100.0, 900.0, batch)
    return x, t, torch.randn(1, batch, 5, context_width, generator=generator)


def adapted_layers(unet: UNet) -> dict[str, nn.Module]:
    """Return the layers that a LoCon can have: linear maps and convolutions."""
    return {path: layer for path, layer in key_names.named_layers(unet).items() if isinstance(layer, (Linear, Conv2d))}


def locon(
    unet: UNet, paths: list[str] | None = None, rank: int = 3, tucker: bool = False, seed: int = 2
) -> dict[str, Tensor]:
    """Return the tensors of a kohya file that adapts ``paths`` (all linear and convolution layers)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path in adapted_layers(unet) if paths is None else paths:
        name = f"lora_unet_{path.replace('.', '_')}"
        out, inner, *kernel = unet.get_submodule(path).weight.shape
        ones = [1] * len(kernel)
        core = tucker and kernel[:1] == [3]
        shapes = {"down": (rank, inner, *(ones if core else kernel)), "up": (out, rank, *ones)}
        if core:
            shapes["mid"] = (rank, rank, *kernel)
        for part, shape in shapes.items():
            fan_in = torch.Size(shape[1:]).numel()
            tensors[f"{name}.lora_{part}.weight"] = torch.randn(shape, generator=generator) / fan_in**0.5
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return tensors


# A layer of each kind in the UNet of :func:`config`, none of them square.
KINDS = {
    "linear": "time_embed.0",
    "conv 1x1": "input_blocks.3.0.skip_connection",
    "conv 3x3": "input_blocks.3.0.in_layers.2",
    "conv 3x3 stride 2": "input_blocks.2.0.op",
}


def kohya_name(path: str) -> str:
    """Return the name that kohya's scripts give to a layer of the UNet."""
    return f"lora_unet_{path.replace('.', '_')}"


def torch_twin(layer: nn.Module) -> nn.Module:
    """Return torch's own layer with the weights of one of ours."""
    out, inner, *kernel = layer.weight.shape
    twin: nn.Module = nn.Linear(inner, out, layer.bias is not None)
    if kernel:
        twin = nn.Conv2d(inner, out, kernel[0], layer.stride, layer.padding)
    twin.load_state_dict(layer.state_dict())
    return twin.requires_grad_(False)


def weight_of(function: Callable[[Tensor], Tensor], layer: nn.Module) -> Tensor:
    """Return the weight of a map that is linear but for a bias, as its answers to impulses tell it.

    The map takes and gives what ``layer`` does, whose weight's shape it has.
    """
    inner, *kernel = layer.weight.shape[1:]
    if not kernel:
        return (function(torch.eye(inner)) - function(torch.zeros(1, inner))).T
    side, first = kernel[0], layer.stride - layer.padding  # the output at (1, 1) sees inputs from there on
    impulses = torch.zeros(inner, side, side, inner, first + side + 1, first + side + 1)
    for i in range(inner):
        for row in range(side):
            for column in range(side):
                impulses[i, row, column, i, first + row, first + column] = 1
    answers = function(impulses.flatten(0, 2))[:, :, 1, 1] - function(impulses[:1, 0, 0] * 0)[:, :, 1, 1]
    return answers.unflatten(0, (inner, side, side)).permute(3, 0, 1, 2)


def attached_weight(layer: nn.Module) -> Tensor:
    """Return the second branch's weight of a layer of the UNet."""
    return layer.weight if layer.adaptation is None else layer.adaptation.weight


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the L2 norm of the error over that of what is expected."""
    return float((found - expected).norm() / expected.norm())


def diffusers_twin(unet: UNet) -> nn.Module:
    """Return diffusers' UNet with the same weights as a tiny SD-1.x one."""
    twin = pytest.importorskip("diffusers").UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=8,
    )
    paths = key_names.diffusers_paths(unet)
    state = {f"{paths[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v for k, v in unet.state_dict().items()}
    twin.load_state_dict(state)
    return twin.requires_grad_(False).eval()


LINEAR, CONV = "time_embed.0", "input_blocks.3.0.in_layers.2"  # (128, 32) and (64, 32, 3, 3)


def every_algorithm(seed: int = 4) -> dict[str, dict[str, Tensor]]:
    """Return a small file of each algorithm and parametrisation, by name: it adapts ``LINEAR`` and ``CONV``."""
    generator = torch.Generator().manual_seed(seed)

    def r(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    def near_one(*shape: int) -> Tensor:
        return 1 + 0.3 * torch.rand(shape, generator=generator)

    alpha = {"alpha": torch.tensor(2.0)}
    lora = ({"lora_down.weight": r(3, 32), "lora_up.weight": r(128, 3), **alpha},)
    locon = {"lora_down.weight": r(3, 32, 3, 3), "lora_up.weight": r(64, 3, 1, 1), **alpha}
    tucker = {
        "lora_down.weight": r(3, 32, 1, 1),
        "lora_mid.weight": r(3, 3, 3, 3),
        "lora_up.weight": r(64, 3, 1, 1),
        **alpha,
    }
    loha = {f"hada_w{i}_{side}": r(*shape) for i in (1, 2) for side, shape in (("a", (128, 3)), ("b", (3, 32)))} | alpha
    loha_core = {f"hada_w{i}_a": r(3, 64) for i in (1, 2)} | {f"hada_w{i}_b": r(3, 32) for i in (1, 2)}
    loha_core |= {f"hada_t{i}": r(3, 3, 3, 3) for i in (1, 2)} | alpha
    parts: dict[str, tuple[dict[str, Tensor], ...]] = {
        "LoRA": (*lora, locon),
        "LoCon with a core": (*lora, tucker),
        "LoHa": (loha, loha_core),
        "LoKr": (
            {"lokr_w1": r(8, 4), "lokr_w2_a": r(16, 2), "lokr_w2_b": r(2, 8), **alpha},
            {"lokr_w1": r(8, 4), "lokr_w2": r(8, 8, 3, 3), **alpha},
        ),
        "LoKr with a core": (
            {"lokr_w1_a": r(8, 2), "lokr_w1_b": r(2, 4), "lokr_w2": r(16, 8), **alpha},
            {"lokr_w1": r(8, 4), "lokr_t2": r(2, 2, 3, 3), "lokr_w2_a": r(2, 8), "lokr_w2_b": r(2, 8), **alpha},
        ),
        "(IA)^3": (
            {"weight": r(128, 1), "on_input": torch.tensor(0.0)},
            {"weight": r(1, 32, 1, 1), "on_input": torch.tensor(1.0)},
        ),
        "(IA)^3 of peft": ({"ia3_l": near_one(128, 1)}, {"ia3_l": near_one(1, 32, 1, 1)}),
        "GLoRA": (
            {"a1.weight": r(32, 2), "a2.weight": r(2, 32), "b1.weight": r(128, 2), "b2.weight": r(2, 32), **alpha},
            {
                "a1.weight": r(32, 2, 1, 1),
                "a2.weight": r(2, 32, 1, 1),
                "b1.weight": r(64, 2, 1, 1),
                "b2.weight": r(2, 32, 3, 3),
                **alpha,
            },
        ),
        "DyLoRA": (
            {f"{side}_list.{i}": r(*s) for side, s in (("up", (128, 1)), ("down", (1, 32))) for i in range(3)} | alpha,
            {f"{side}_list.{i}": r(*s) for side, s in (("up", (64, 2)), ("down", (2, 288))) for i in range(2)} | alpha,
        ),
        "OFT": (
            {"oft_blocks": r(16, 8, 8), "alpha": torch.tensor(0.0)},
            {"oft_blocks": r(8, 8, 8), "alpha": torch.tensor(0.01), "rescale": near_one(64, 1, 1, 1)},
        ),
        "OFT as matrices": (
            {"oft_diag": torch.linalg.qr(r(16, 8, 8))[0].contiguous()},
            {"oft_diag": torch.linalg.qr(r(8, 8, 8))[0].contiguous()},
        ),
        "OFT of old peft": ({"oft_r": r(16, 8, 8)}, {"oft_r": r(1, 8, 8)}),
        "OFT of peft": ({"oft_R.weight": r(8, 6)}, {"oft_R.weight": r(72, 6)}),
        "BOFT": (
            {"oft_blocks": r(3, 16, 8, 8), "alpha": torch.tensor(0.0)},
            {"oft_blocks": r(2, 16, 4, 4), "alpha": torch.tensor(0.01), "rescale": near_one(64, 1, 1, 1)},
        ),
        "BOFT of peft": ({"boft_R": r(2, 8, 4, 4), "boft_s": near_one(128, 1)}, {"boft_R": r(2, 72, 4, 4)}),
        "full": ({"diff": r(128, 32), "diff_b": r(128)}, {"diff": r(64, 32, 3, 3)}),
        "DoRA on LoRA": ({**lora[0], "dora_scale": near_one(1, 32)}, {**locon, "dora_scale": near_one(64, 1, 1, 1)}),
        "DoRA on LoHa": ({**loha, "dora_scale": near_one(128, 1)}, {**loha_core, "dora_scale": near_one(1, 32, 1, 1)}),
    }
    files = {}
    for name, (linear, conv) in parts.items():
        files[name] = {f"{kohya_name(LINEAR)}.{key}": value for key, value in linear.items()}
        files[name] |= {f"{kohya_name(CONV)}.{key}": value.clone() for key, value in conv.items()}
    norm = {"w_norm": r(32), "b_norm": r(32)}
    files["Norm"] = {f"lora_unet_input_blocks_3_0_in_layers_0.{key}": value for key, value in norm.items()}
    return files
