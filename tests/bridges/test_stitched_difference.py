"""Stitched difference maps: by the formula alone, at every size, and where nothing may change."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lib_delta.bridges import Crossing, bridge_status, choose_bridge
from lib_delta.bridges.latent_maps import StateMap
from lib_delta.bridges.learned import WEIGHTS
from lib_delta.bridges.stitched_difference import (
    StitchedBridge,
    StitchedDifference,
    load_stitched,
    stitched_path,
)
from lib_delta.diffusion.families import Family
from lib_delta.diffusion.latent_spaces import Space
from lib_delta.errors import CheckpointError
from tests.support.stitched_formula import StitchedFormula
from tests.support.tiny_unet import randn

TAESD = os.environ.get("DELTA_TAESD", "")
PAIRS = [(a, b) for a in Space for b in Space if stitched_path(a, b).exists()]
OTHERS = [(a, b) for a in Space for b in Space if (WEIGHTS / f"{a.key}-{b.key}.safetensors").exists()]
OTHERS = [pair for pair in OTHERS if pair not in PAIRS]


def crossed(source: Space, target: Space, side: int, size: object, rows: int = 2) -> tuple[StitchedBridge, Crossing]:
    """Return the bridge and the crossing of a smooth latent of the target's."""
    bridge = choose_bridge(source, target, form="stitched", size=size)  # type: ignore[arg-type]
    assert isinstance(bridge, StitchedBridge)
    clean = F.interpolate(randn(rows, target.channels, side // 4, side // 4), scale_factor=4.0, mode="bilinear")
    return bridge, bridge.to_source(clean, torch.full((rows,), 2.0), clean)[2]


SIZES = [("picture", 16), (64, 16)]  # the side model's size, and the side of the target's latent


@pytest.mark.parametrize(("size", "side"), SIZES)
@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda space: space.key)
def test_a_stitched_map_is_its_formula(source: Space, target: Space, size: object, side: int) -> None:
    if size != "picture" and not load_stitched(stitched_path(source, target)).maps_half:
        pytest.skip("this map is for the full size only")
    bridge, crossing = crossed(source, target, side, size)
    assert crossing.target is not None
    delta = 0.3 * randn(*crossing.denoised.shape, seed=2)
    expected = StitchedFormula(source, target)(delta, crossing.denoised, crossing.target)
    torch.testing.assert_close(bridge.delta_to_target(delta, crossing), expected, atol=2e-4, rtol=1e-3)
    assert float(expected.std()) > 0.05


@pytest.mark.parametrize(("size", "side"), [*SIZES, (64, 24)])
def test_no_delta_stays_exactly_none(size: object, side: int) -> None:
    bridge, crossing = crossed(Space.SD1, Space.SDXL, side, size)
    delta = randn(*crossing.denoised.shape, seed=2)
    assert not bridge.delta_to_target(torch.zeros_like(delta), crossing).any()
    delta[0] = 0
    carried = bridge.delta_to_target(delta, crossing)
    assert not carried[0].any() and carried[1].any()


@pytest.mark.parametrize(("size", "side"), SIZES)
def test_a_delta_of_another_strength_is_carried_in_nearly_the_same_direction(size: object, side: int) -> None:
    """A smooth one, as the deltas of models are."""
    bridge, crossing = crossed(Space.SD1, Space.SDXL, side, size)
    channels, rows = crossing.denoised.shape[1], crossing.denoised.shape[2]
    delta = 0.3 * F.interpolate(randn(2, channels, rows // 4, rows // 4, seed=2), scale_factor=4.0, mode="bilinear")
    carried = bridge.delta_to_target(delta, crossing).flatten(1)
    for strength in (0.5, 2.0):
        other = bridge.delta_to_target(strength * delta, crossing).flatten(1)
        assert float(F.cosine_similarity(other, carried).min()) > 0.97
        ratio = other.norm(dim=1) / (strength * carried.norm(dim=1))
        assert float((ratio - 1).abs().max()) < 0.15


# Sides of the source's latent between the target's and its half, and below it; a target of an odd side.
OTHER_SIZES = [(128, 24), (64, 20), (64, 24), (64, 17)]


@pytest.mark.parametrize(("size", "side"), OTHER_SIZES)
def test_deltas_of_other_sizes_are_carried_as_those_of_half_the_size(size: int, side: int) -> None:
    bridge = choose_bridge(Space.SD1, Space.SDXL, size=size)
    clean = randn(2, 4, side, side)
    x, _, crossing = bridge.to_source(clean, torch.full((2,), 2.0), clean)
    assert x.shape[-1] not in (side, side / 2)
    formula = StitchedFormula(Space.SD1, Space.SDXL)
    torch.testing.assert_close(crossing.denoised, formula.state(clean, x.shape[-1]), atol=2e-4, rtol=1e-3)
    delta = 0.3 * randn(*x.shape, seed=2)
    expected = formula.of_another_size(delta, clean)
    torch.testing.assert_close(bridge.delta_to_target(delta, crossing), expected, atol=2e-4, rtol=1e-3)
    assert float(expected.std()) > 0.05 and expected.shape == clean.shape


@pytest.mark.parametrize(("size", "side"), SIZES)
def test_the_state_is_that_of_the_learned_bridge(size: object, side: int) -> None:
    clean, sigma = randn(2, 4, side, side), torch.tensor([2.0, 0.5])
    x = clean + sigma[:, None, None, None] * randn(2, 4, side, side, seed=1)
    found, wanted = (
        choose_bridge(Space.SD1, Space.SDXL, form=form, size=size).to_source(x, sigma, clean)  # type: ignore[arg-type]
        for form in ("stitched", "learned")
    )
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@pytest.mark.parametrize(
    ("width", "height", "stitched", "learned"),
    [
        (1024, 1024, (64, 64), (64, 64)),
        (832, 1216, (52, 76), (52, 76)),
        (1536, 1024, (96, 64), (80, 56)),
        (1536, 1536, (96, 96), (64, 64)),
        (2048, 2048, (64, 64), (64, 64)),
        (1000, 1000, (64, 64), (64, 64)),
        (768, 768, (96, 96), (96, 96)),
    ],
)
def test_the_automatic_size_is_half_the_pictures_where_the_side_model_can_work_at_it(
    width: int, height: int, stitched: tuple[int, int], learned: tuple[int, int]
) -> None:
    """Pictures made with the learned bridge keep the size that they were made with."""
    for form, size in (("stitched", stitched), ("learned", learned)):
        bridge = choose_bridge(Space.SD1, Space.SDXL, form=form)
        assert bridge.source_size(height // 8, width // 8) == size[::-1]


def test_each_delta_crosses_by_its_image() -> None:
    bridge, crossing = crossed(Space.SD1, Space.SDXL, 16, 64, rows=3)
    delta = randn(4, 4, 8, 8, seed=2)
    images = torch.tensor([2, 0, 2, 1])
    together = bridge.delta_to_target(delta, crossing.of(images))
    for row, image in enumerate(images.tolist()):
        alone = bridge.delta_to_target(delta[row : row + 1], crossing.of(torch.tensor([image])))
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-4)


def test_the_targets_latent_is_read_once_a_step() -> None:
    bridge = choose_bridge(Space.SD1, Space.SDXL)
    assert isinstance(bridge, StitchedBridge)
    state = bridge.state
    reads = []
    handle = state.reading.register_forward_hook(lambda *_: reads.append(1))  # type: ignore[union-attr, operator]
    try:
        clean = randn(1, 4, 8, 8)
        x, _, crossing = bridge.to_source(clean, torch.ones(1), clean)
        for _ in range(3):
            bridge.delta_to_target(x, crossing)
    finally:
        handle.remove()
    assert isinstance(state, StateMap) and len(reads) == 1


@pytest.mark.parametrize(("size", "side"), SIZES)
def test_autocast_and_inference_mode_do_not_touch_a_stitched_map(size: object, side: int) -> None:
    bridge, crossing = crossed(Space.SD1, Space.SDXL, side, size)
    delta = randn(*crossing.denoised.shape, seed=2)
    plain = bridge.delta_to_target(delta, crossing)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        _, inside = crossed(Space.SD1, Space.SDXL, side, size)
        assert torch.equal(bridge.delta_to_target(delta, inside), plain)
    halved = bridge.delta_to_target(delta.half(), crossing)
    assert halved.dtype == torch.float32
    torch.testing.assert_close(halved, plain, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(("source", "target"), OTHERS, ids=lambda space: space.key)
def test_pairs_without_a_stitched_map_cross_as_before(source: Space, target: Space) -> None:
    clean, sigma = randn(2, target.channels, 16, 16), torch.tensor([2.0, 0.5])
    x = clean + randn(2, target.channels, 16, 16, seed=1)
    made = []
    for form in ("stitched", "learned"):
        bridge = choose_bridge(source, target, form=form)
        x_s, _, crossing = bridge.to_source(x, sigma, clean)
        made.append((x_s, bridge.delta_to_target(x_s, crossing)))
        assert bridge.label == "learned bridge"
    assert all(torch.equal(a, b) for a, b in zip(*made))


def test_the_status_line_names_the_map_in_use() -> None:
    assert bridge_status(Family.SD1, Family.SDXL, 128, 128) == "SDXL latents: stitched bridge, 64 x 64"
    assert bridge_status(Family.SD1, Family.SDXL, 128, 128, form="learned") == "SDXL latents: learned bridge, 64 x 64"
    source, target = OTHERS[0]
    assert "learned bridge" in bridge_status(source, target, 64, 64, form="stitched")


def test_stitched_maps_are_small() -> None:
    assert PAIRS and all(stitched_path(*pair).stat().st_size <= 550_000 for pair in PAIRS)
    others = [path for path in WEIGHTS.glob("*.safetensors") if "flux2" not in path.name]
    assert sum(path.stat().st_size for path in others) <= 6_000_000


@pytest.mark.parametrize(("channels", "raised", "base"), [((4, 16), 0, 5), ((16, 4), 8, 3)])
def test_a_stitched_map_is_known_by_its_shapes(
    tmp_path: Path, channels: tuple[int, int], raised: int, base: int
) -> None:
    made = StitchedDifference(channels, (1, 2), 20, base, 1, raised)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    save_file({f"stitched.{key}": value for key, value in made.state_dict().items()}, tmp_path / "a.safetensors")
    read = load_stitched(tmp_path / "a.safetensors")
    assert read.maps_half == (raised > 0)
    d, source, known, features = (randn(1, n, 8, 8) for n in (channels[0], channels[0], 20, 2 * channels[1]))
    assert torch.equal(read(d, source, known, features), made(d, source, known, features))
    save_file({"other": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"b\.safetensors holds no bridge"):
        load_stitched(tmp_path / "b.safetensors")


def test_a_map_of_the_full_size_only_leaves_half_to_the_learned_map() -> None:
    bridge, crossing = crossed(Space.SD1, Space.SDXL, 16, 64)
    full_only = StitchedDifference((4, 4), (1, 1), 68)
    learned = choose_bridge(Space.SD1, Space.SDXL, form="learned", size=64)
    delta = randn(*crossing.denoised.shape, seed=2)
    carried = replace(bridge, stitched=full_only).delta_to_target(delta, crossing)
    assert torch.equal(carried, learned.delta_to_target(delta, crossing))
