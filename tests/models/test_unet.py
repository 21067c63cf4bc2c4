"""The UNet computes what diffusers' UNet2DConditionModel computes on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_delta.errors import CheckpointError
from lib_delta.files.checkpoint import UNET_PREFIX
from lib_delta.models.text import sdxl_label
from lib_delta.models.unet import UNet, UNetConfig
from tests.support.diffusers_unet import (
    CROSS,
    PLAIN,
    SD1,
    SD1_FULL,
    SD2,
    SDXL,
    blocks,
    convert,
    draw,
    empty_reference,
    ldm_config,
    narrow,
    pair,
)

REFINER = {
    **SDXL,
    "block_out_channels": (64, 128, 256, 256),
    "attention_head_dim": (1, 2, 4, 4),
    "transformer_layers_per_block": 4,
    "projection_class_embeddings_input_dim": 40 + 5 * 256,
    **blocks(PLAIN, CROSS, CROSS, PLAIN),
}
FULL = {
    "sd1-full": SD1_FULL,
    "sd2-full": {
        **SD2,
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
    },
    "sdxl-full": {
        **SDXL,
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "projection_class_embeddings_input_dim": 2816,
    },
}
LAYOUTS = {"sd1": SD1, "sd1-inpainting": {**SD1, "in_channels": 9}, "sd2": SD2, "sdxl": SDXL, "refiner": REFINER}


def unet_shapes(reference: nn.Module, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return a UNet's shapes by LDM names, from a UNet that diffusers accepts."""
    names = convert_names(ldm_config(config), config)
    state = reference.state_dict()
    assert set(names.values()) == set(state)
    return {ours: tuple(state[theirs].shape) for ours, theirs in names.items()}


def convert_names(ours: UNetConfig, config: Mapping[str, Any]) -> dict[str, str]:
    """Map LDM's key names to diffusers', by its conversion of a checkpoint whose values are its names."""
    with torch.device("meta"):
        names = {f"{UNET_PREFIX}{k}": v for k, v in UNet(ours).state_dict().items()}
    by_tensor = {id(v): k.removeprefix(UNET_PREFIX) for k, v in names.items()}
    converted = convert(dict(names), config)
    return {by_tensor[id(v)]: k for k, v in converted.items()}


def run_theirs(theirs: nn.Module, config: Mapping[str, Any], drawn: Mapping[str, Tensor]) -> Tensor:
    added = None
    if "pooled" in drawn:
        sizes = [512.0, 768.0, 8.0, 16.0, 1024.0, 640.0][: 6 if config is not REFINER else 5]
        added = {"text_embeds": drawn["pooled"], "time_ids": torch.tensor([sizes] * len(drawn["x"]))}
    with torch.no_grad():
        return theirs(drawn["x"], drawn["t"], drawn["context"], added_cond_kwargs=added).sample


def run_ours(ours: UNet, drawn: Mapping[str, Tensor]) -> Tensor:
    label = None
    if "pooled" in drawn:
        label = sdxl_label(drawn["pooled"], 512, 768, top=8, left=16, target_height=1024, target_width=640)
        label = label[None, :, : ours.config.label_width]
    return ours(drawn["x"][None], drawn["t"], drawn["context"][None], label)[0]


@pytest.mark.parametrize("size", [(16, 16), (11, 9)], ids=["even", "odd"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_diffusers(layout: str, size: tuple[int, int]) -> None:
    config = LAYOUTS[layout]
    ours, theirs = pair(config)
    drawn = draw(config, size)
    expected = run_theirs(theirs, config, drawn)
    error = (run_ours(ours, drawn) - expected).abs().max().item()
    print(f"{layout} {size}: max abs error {error:.2e}, output std {expected.std():.2f}")
    assert expected.std() > 0.1
    assert error < 1e-4


def test_full_width_sd1_equals_diffusers() -> None:
    ours, theirs = pair(SD1_FULL)
    assert sum(p.numel() for p in ours.parameters()) == 859_520_964
    drawn = draw(SD1_FULL, (16, 16), batch=1)
    expected = run_theirs(theirs, SD1_FULL, drawn)
    error = (run_ours(ours, drawn) - expected).abs().max().item()
    print(f"full-width SD 1.5: max abs error {error:.2e}")
    assert error < 1e-4


@pytest.mark.parametrize("layout", [*LAYOUTS, *FULL])
def test_configuration_is_read_off_the_shapes(layout: str) -> None:
    config = {**LAYOUTS, **FULL}[layout]
    assert UNetConfig.from_shapes(unet_shapes(empty_reference(config), config)) == ldm_config(config)


def test_head_width_can_be_given() -> None:
    shapes = {k: tuple(v.shape) for k, v in narrow(SD2).state_dict().items()}
    assert UNetConfig.from_shapes(shapes, head_width=16).heads_for(128) == 8


def damage(*, drop: str = "", **changed: tuple[int, ...]) -> Callable[[dict[str, tuple[int, ...]]], None]:
    def apply(shapes: dict[str, tuple[int, ...]]) -> None:
        for key in [k for k in shapes if drop and k.startswith(drop)]:
            del shapes[key]
        shapes.update({k.replace("__", "."): v for k, v in changed.items()})

    return apply


@pytest.mark.parametrize(
    "change",
    [
        damage(drop="input_blocks.0."),
        damage(drop="output_blocks."),
        damage(drop="input_blocks.4.0.out_layers"),
        damage(drop="out."),
        damage(input_blocks__0__0__weight=()),
        damage(input_blocks__999999999__0__x=(1,)),
        damage(input_blocks__1__1__proj_in__weight=(3,)),
        damage(input_blocks__0__0__weight=(30, 4, 3, 3)),
    ],
)
def test_shapes_that_are_no_unet_are_refused(change: Callable[[dict[str, tuple[int, ...]]], None]) -> None:
    shapes = {k: tuple(v.shape) for k, v in narrow(SD1).state_dict().items()}
    change(shapes)
    with pytest.raises(CheckpointError):
        UNetConfig.from_shapes(shapes)


def test_absurd_transformer_index_builds_nothing_huge() -> None:
    shapes = {k: tuple(v.shape) for k, v in narrow(SD1).state_dict().items()}
    shapes["input_blocks.1.1.transformer_blocks.999999999.norm1.weight"] = (32,)
    assert UNetConfig.from_shapes(shapes).depth_in[0] == 2


@pytest.mark.parametrize("layout", ["sd1", "sd2", "sdxl"])
def test_two_branches_equal_two_runs(layout: str) -> None:
    config = LAYOUTS[layout]
    unet, drawn = narrow(config), draw(config, (8, 8))
    label = torch.randn(2, 2, unet.config.label_width) if unet.config.label_width else None
    x = torch.stack((drawn["x"], drawn["x"].flip(0)))
    context = torch.stack((drawn["context"], drawn["context"] * 0.5))
    together = unet(x, drawn["t"], context, label)
    apart = [
        unet(x[r : r + 1], drawn["t"], context[r : r + 1], None if label is None else label[r : r + 1]) for r in (0, 1)
    ]
    assert torch.allclose(together, torch.cat(apart), atol=1e-5)


def test_contexts_that_differ_fork_a_shared_latent() -> None:
    unet, drawn = narrow(SD1), draw(SD1, (8, 8))
    context = torch.stack((drawn["context"], drawn["context"] * 0.5))
    forked = unet(drawn["x"][None], drawn["t"], context)
    apart = [unet(drawn["x"][None], drawn["t"], c[None]) for c in context]
    assert forked.shape[0] == 2
    assert torch.allclose(forked, torch.cat(apart), atol=1e-5)


def test_one_branch_stays_one() -> None:
    unet, drawn = narrow(SD1), draw(SD1, (8, 8))
    assert unet(drawn["x"][None], drawn["t"], drawn["context"][None]).shape == (1, 2, 4, 8, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_follows_full_precision(dtype: torch.dtype) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == torch.float16 and device == "cpu" and not half_runs_on_cpu():
        pytest.skip("this torch has no fp16 convolution for the CPU")
    unet, drawn = narrow(SD2), draw(SD2, (8, 8))
    full = run_ours(unet, drawn)
    unet = unet.to(device, dtype)
    low = unet(drawn["x"][None].to(device, dtype), drawn["t"].to(device), drawn["context"][None].to(device, dtype))[0]
    assert low.dtype == dtype
    assert (low.cpu().float() - full).norm() < 0.05 * full.norm()


def half_runs_on_cpu() -> bool:
    try:
        torch.nn.functional.conv2d(torch.ones(1, 1, 3, 3).half(), torch.ones(1, 1, 3, 3).half())
    except RuntimeError:
        return False
    return True
