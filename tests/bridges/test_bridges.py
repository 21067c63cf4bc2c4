"""Bridges carry the target's state to the source and the delta back."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lib_delta.bridges import (
    BridgeForm,
    BridgeSettings,
    Composed,
    IdentityBridge,
    NoiseLimitBridge,
    ResolutionBridge,
    ScaleBridge,
    bridge_status,
    choose_bridge,
    describe_bridge,
    form_names,
    registry,
)
from lib_delta.bridges.int8_weights import pack, unpacked
from lib_delta.bridges.latent_maps import FilteredState, StitchedState, state_map
from lib_delta.bridges.learned import WEIGHTS, load_bridge, with_channels
from lib_delta.diffusion.families import Family
from lib_delta.diffusion.latent_spaces import Space
from lib_delta.errors import CheckpointError, SettingError
from lib_delta.files.weight_file import WeightFile
from lib_delta.models import taesd
from lib_delta.request.setting_choices import BRIDGES
from tests.support.tiny_unet import randn

CLEAN, NOISE = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
SIGMA = torch.tensor([0.5, 9.0])
S = SIGMA[:, None, None, None]
X = CLEAN + S * NOISE
K = 0.18215 / 0.13025


def test_models_of_one_latent_share_everything() -> None:
    x, sigma, crossing = IdentityBridge().to_source(X, SIGMA, CLEAN)
    assert x is X
    assert sigma is SIGMA
    assert IdentityBridge().delta_to_target(NOISE, crossing) is NOISE


def test_the_same_snr_form_scales_the_whole_state() -> None:
    x, sigma, _ = ScaleBridge(K).to_source(X, SIGMA, CLEAN)
    torch.testing.assert_close(x, K * CLEAN + K * S * NOISE)
    torch.testing.assert_close(sigma, K * SIGMA)


def test_the_published_form_keeps_the_noise_level() -> None:
    x, sigma, _ = ScaleBridge(K, "published").to_source(X, SIGMA, CLEAN)
    torch.testing.assert_close(x, K * CLEAN + S * NOISE, atol=1e-5, rtol=1e-5)
    assert torch.equal(sigma, SIGMA)


@pytest.mark.parametrize("form", ["same_snr", "published"])
def test_a_change_of_the_clean_part_comes_back_as_itself(form: str) -> None:
    bridge = ScaleBridge(K, form)
    _, _, crossing = bridge.to_source(X, SIGMA, CLEAN)
    _, _, changed = bridge.to_source(X, SIGMA, CLEAN + 0.1 * NOISE)
    back = bridge.delta_to_target(changed.denoised - crossing.denoised, crossing)
    torch.testing.assert_close(back, 0.1 * NOISE, atol=1e-5, rtol=1e-5)


def test_noise_beyond_the_sources_schedule_is_shown_at_its_limit() -> None:
    sigma = torch.tensor([4518.0, 3.0])
    x = CLEAN + sigma[:, None, None, None] * NOISE
    x_source, limited, _ = NoiseLimitBridge(14.6).to_source(x, sigma, CLEAN)
    torch.testing.assert_close(limited, torch.tensor([14.6, 3.0]))
    torch.testing.assert_close(x_source[0], (CLEAN + 14.6 * NOISE)[0], atol=1e-3, rtol=1e-3)
    assert torch.equal(x_source[1], x[1])


def test_bridges_compose_in_order() -> None:
    halves = Composed((ScaleBridge(2.0), ScaleBridge(K / 2, "published")))
    x, sigma, crossing = halves.to_source(X, SIGMA, CLEAN)
    torch.testing.assert_close(sigma, 2 * SIGMA)
    torch.testing.assert_close(x, K * CLEAN + 2 * S * NOISE, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(crossing.denoised, K * CLEAN)
    torch.testing.assert_close(halves.delta_to_target(K * NOISE, crossing), NOISE)


def test_the_two_families_choose_the_bridge() -> None:
    assert choose_bridge(Family.SD1, Family.SD2) == IdentityBridge()
    assert choose_bridge(Family.SDXL, Family.SDXL) == IdentityBridge()
    assert choose_bridge(Family.SD1, Family.SDXL, form="same_snr") == ScaleBridge(K)
    assert choose_bridge(Family.SDXL, Family.SD2, form="published") == ScaleBridge(1 / K, "published")
    limited = choose_bridge(Family.SD1, Family.SDXL, sigma_max=14.6, form="same_snr")
    assert limited == Composed((NoiseLimitBridge(14.6), ScaleBridge(K)))


KNOWN = [Space.SD1, Space.SDXL, Space.SD3, Space.FLUX1]
PAIRS = list(itertools.permutations(KNOWN, 2))


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda space: space.key)
def test_every_pair_of_spaces_has_a_learned_bridge(source: Space, target: Space) -> None:
    clean, residual = randn(2, target.channels, 8, 16), randn(2, target.channels, 8, 16, seed=1)
    bridge = choose_bridge(source, target, form="learned", size="picture")
    x, sigma, crossing = bridge.to_source(clean + S * residual, SIGMA, clean)
    assert x.shape == crossing.denoised.shape == (2, source.channels, 8, 16)
    assert torch.equal(sigma, SIGMA)
    noise = (x - crossing.denoised) / S
    assert float(noise.std()) == pytest.approx(float(residual.std()), rel=0.15)
    delta = randn(2, source.channels, 8, 16, seed=2)
    carried = bridge.delta_to_target(delta, crossing)
    assert carried.shape == clean.shape and carried.abs().mean() > 0.1
    assert not bridge.delta_to_target(torch.zeros_like(delta), crossing).any()
    torch.testing.assert_close(bridge.delta_to_target(2.5 * delta, crossing), 2.5 * carried, atol=1e-4, rtol=1e-4)
    other = randn(2, source.channels, 8, 16, seed=3)
    both = carried + bridge.delta_to_target(other, crossing)
    torch.testing.assert_close(bridge.delta_to_target(delta + other, crossing), both, atol=1e-4, rtol=1e-4)


def test_learned_maps_are_small() -> None:
    learned = [path for path in WEIGHTS.glob("*.safetensors") if "stitched" not in path.name]
    assert sum(path.stat().st_size for path in learned if "flux2" not in path.name) < 2_000_000
    assert all(path.stat().st_size < 550_000 for path in learned if "flux2" in path.name)


def test_autocast_and_half_precision_do_not_touch_a_learned_bridge() -> None:
    bridge = choose_bridge(Family.SD1, Family.SDXL, form="learned", size="picture")
    x, _, crossing = bridge.to_source(X, SIGMA, CLEAN)
    carried = bridge.delta_to_target(NOISE, crossing)
    with torch.autocast("cpu", torch.bfloat16):
        under, _, also = bridge.to_source(X, SIGMA, CLEAN)
        assert torch.equal(under, x)
        assert torch.equal(bridge.delta_to_target(NOISE, also), carried)
    halved, _, _ = bridge.to_source(X.half(), SIGMA, CLEAN.half())
    assert halved.dtype == torch.float32
    torch.testing.assert_close(halved, x, atol=0.02, rtol=0.01)


def test_latents_of_another_kind_than_the_bridge_is_for_are_refused() -> None:
    with pytest.raises(SettingError, match="sd1-sd3 is for latents of 16 channels, and the main model's have 4"):
        choose_bridge(Family.SD1, Family.SD3).to_source(X, SIGMA, CLEAN)


def test_noise_stays_white_when_channels_are_more_or_fewer() -> None:
    noise = randn(1, 16, 64, 64)
    fewer, more = with_channels(noise, 4), with_channels(noise[:, :4], 16)
    for white in (fewer, more):
        rows = white[0].flatten(1)
        torch.testing.assert_close(rows @ rows.T / rows.shape[1], torch.eye(len(rows)), atol=0.08, rtol=0)


def test_the_source_of_a_learned_bridge_sees_large_pictures_at_its_own_size() -> None:
    bridge = choose_bridge(Family.SD1, Family.SDXL, form="learned")
    assert bridge.source_size(64, 64) == (64, 64)
    assert bridge.source_size(96, 96) == (96, 96)
    assert bridge.source_size(128, 128) == (64, 64)
    assert bridge.source_size(112, 144) == (56, 72)
    assert bridge.source_size(152, 104) == (76, 52)  # half the size, which maps predict
    assert bridge.source_size(192, 192) == (64, 64)
    assert choose_bridge(Family.SD1, Family.SDXL, size="picture").source_size(128, 128) == (128, 128)
    assert choose_bridge(Family.SD1, Family.SDXL, size=640).source_size(128, 128) == (80, 80)
    assert choose_bridge(Family.SD1, Family.SDXL, form="published").source_size(128, 128) == (128, 128)
    assert choose_bridge(Family.SD1, Family.SD2).source_size(128, 128) == (128, 128)


@pytest.mark.parametrize("size", [32, "large", 512.0, True])
def test_a_size_of_the_side_model_that_is_none_is_refused(size: object) -> None:
    with pytest.raises(SettingError, match="size of the side model"):
        choose_bridge(Family.SD1, Family.SDXL, size=size)


def test_averaged_noise_lowers_the_level_that_the_source_is_asked_at() -> None:
    clean, noise = torch.zeros(2, 4, 32, 64), randn(2, 4, 32, 64)
    bridge = ResolutionBridge(22, 22)
    x, sigma, crossing = bridge.to_source(clean + S * noise, SIGMA, clean)
    assert x.shape == (2, 4, 16, 32)
    torch.testing.assert_close(sigma, SIGMA / 2)
    torch.testing.assert_close(x.std((1, 2, 3)), sigma, rtol=0.05, atol=0)
    back = bridge.delta_to_target(torch.ones_like(x), crossing)
    torch.testing.assert_close(back, torch.ones_like(clean))


def test_noise_of_unit_variance_stays_white_at_any_size() -> None:
    clean, noise = torch.zeros(1, 4, 48, 48), randn(1, 4, 48, 48)
    x, sigma, _ = ResolutionBridge(32, 32, "unit").to_source(clean + 3 * noise, torch.tensor([3.0]), clean)
    assert torch.equal(sigma, torch.tensor([3.0]))
    assert float(x.std()) == pytest.approx(3, rel=0.05)
    assert float((x[..., 1:] * x[..., :-1]).mean()) == pytest.approx(0, abs=0.5)
    assert len(x.unique()) == x.numel()


def test_sizes_that_do_not_divide_still_average_to_the_level_that_is_told() -> None:
    clean, noise = torch.zeros(1, 64, 40, 40), randn(1, 64, 40, 40)
    x, sigma, _ = ResolutionBridge(24, 24).to_source(noise, torch.ones(1), clean)
    assert x.shape[-2:] == (24, 24)
    assert float(x.std()) == pytest.approx(float(sigma), rel=0.03)


def test_the_status_line_tells_space_bridge_and_size() -> None:
    assert bridge_status(Family.SD1, Family.SDXL, 112, 144) == "SDXL latents: stitched bridge, 72 x 56"
    assert bridge_status(Family.SD1, Family.CHROMA, 64, 64) == "FLUX.1 latents: stitched bridge, 64 x 64"
    assert bridge_status(Family.SD1, Family.SD2, 96, 64) == "SD 1.x/2.x latents: same as the side model's, 64 x 96"
    assert "scale only (published)" in bridge_status(Family.SD1, Family.SDXL, 64, 64, form="published")


def test_requests_offer_the_forms_of_the_registry() -> None:
    assert form_names() == BRIDGES
    assert [form.label for form in registry.FORMS if form.name != "taesd"] == [
        choose_bridge(Family.SD1, Family.SDXL, form=name, size="picture").label
        for name in form_names()
        if name != "taesd"
    ]


def test_a_form_is_added_by_a_line_in_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(settings: BridgeSettings) -> ScaleBridge:
        assert (settings.source.key, settings.target.key, settings.tiled) == ("sd1", "sdxl", True)
        return ScaleBridge(3.0)

    added = BridgeForm("threefold", "scale only (threefold)", make)
    monkeypatch.setattr(registry, "FORMS", (*registry.FORMS, added))
    made = choose_bridge(Family.SD1, Family.SDXL, 5.0, form="threefold", tiled=True)
    assert made == Composed((ScaleBridge(3.0), NoiseLimitBridge(5.0)))


def test_latents_that_no_bridge_leads_to_are_refused() -> None:
    reached = r"SD 1\.x/2\.x, SDXL, SD 3, FLUX\.1 or FLUX\.2"
    named = r"Wan 2\.1 \(Qwen-Image, Wan\)"
    with pytest.raises(SettingError, match=rf"no bridge leads .* to those of {named}: .* latents of {reached}"):
        choose_bridge(Family.SD1, Family.QWEN_IMAGE)
    with pytest.raises(SettingError, match="must be stitched, learned or taesd, not published"):
        choose_bridge(Family.SD1, Family.FLUX, form="published")
    with pytest.raises(SettingError, match="form of a bridge must be one of"):
        choose_bridge(Family.SD1, Family.SDXL, form="other")


@pytest.mark.parametrize("source", [Family.SD1, Family.SDXL], ids=lambda family: family.label)
def test_a_model_of_packed_latents_is_reached_as_one_of_the_same_latents(source: Family) -> None:
    """FLUX.2's models see squares of four points as channels of one, and Mugen sees the points."""
    packed, plain = (choose_bridge(source, target, size="picture") for target in (Family.FLUX2, Family.MUGEN))
    points, noise = randn(2, 32, 16, 24), randn(2, 32, 16, 24, seed=1)

    def squares(z: torch.Tensor) -> torch.Tensor:
        """Pack points as the WebUI does: ``c (i pi) (j pj) -> (c pi pj) i j``."""
        return z.reshape(2, -1, 8, 2, 12, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, -1, 8, 12)

    assert Family.FLUX2.latent_channels == 128 and Family.FLUX2.latent_stride == 16
    found = packed.to_source(squares(points + S * noise), SIGMA, squares(points))
    wanted = plain.to_source(points + S * noise, SIGMA, points)
    assert torch.equal(found[0], wanted[0]) and found[0].shape == (2, 4, 16, 24)
    assert packed.source_size(8, 12) == plain.source_size(16, 24)
    delta = randn(2, 4, 16, 24, seed=2)
    carried = packed.delta_to_target(delta, found[2])
    assert torch.equal(carried, squares(plain.delta_to_target(delta, wanted[2]))) and carried.any()
    assert not packed.delta_to_target(torch.zeros_like(delta), found[2]).any()
    assert describe_bridge(packed, Family.FLUX2, 64, 64).startswith("FLUX.2 latents: ")


def test_the_taesd_bridge_does_not_know_flux2() -> None:
    with pytest.raises(SettingError, match=r"taesd does not know latents of FLUX\.2"):
        choose_bridge(Family.SD1, Family.FLUX2, form="taesd")


def test_a_map_that_knows_half_the_size_gives_it_and_averages_for_others() -> None:
    torch.manual_seed(0)
    state = FilteredState(4, 4, 3, half=6)
    for parameter in state.parameters():
        torch.nn.init.normal_(parameter)
    z = randn(1, 4, 16, 24)
    whole = F.conv2d(F.pad(z, (1,) * 4, mode="replicate"), state.filter.weight, state.filter.bias)
    half = F.conv2d(F.pad(z, (2,) * 4, mode="replicate"), state.halving.weight, state.halving.bias, 2)
    torch.testing.assert_close(state(z), whole)
    torch.testing.assert_close(state(z, (8, 12)), half)
    torch.testing.assert_close(state(z, (4, 6)), F.avg_pool2d(whole, 4))
    square = z[..., :16]
    bridge = replace(load_bridge(WEIGHTS / "sd1-sdxl.safetensors"), state=state, resolution=ResolutionBridge(8, 8))
    _, _, crossing = bridge.to_source(square, torch.ones(1), square)
    torch.testing.assert_close(crossing.denoised, state.halving(square))


@pytest.mark.parametrize(("channels", "reading", "writing"), [(4, 3, 3), (16, 1, 2)])
def test_a_stitched_map_is_the_two_autoencoders_and_a_filter_between(channels: int, reading: int, writing: int) -> None:
    torch.manual_seed(0)
    decoder, encoder = taesd.decoder(channels), taesd.encoder(4)
    state = StitchedState(channels, 4, reading=reading, writing=writing, width=3, half=4)
    first, last = decoder[: 3 + reading], torch.nn.Sequential(*encoder[-1 - writing :])
    state.reading.load_state_dict(first.state_dict())
    state.writing.load_state_dict(last.state_dict())
    for stitch in (state.middle, state.halving):
        torch.nn.init.normal_(stitch.weight, std=0.05)
        torch.nn.init.normal_(stitch.bias)
    assert state.channels == (channels, 4)
    z = randn(1, channels, 8, 12)
    around = F.pad(torch.cat((first(z), z), 1), (1,) * 4, mode="replicate")
    whole = last(F.conv2d(around, state.middle.weight, state.middle.bias))
    half = last(F.conv2d(around, state.halving.weight, state.halving.bias, 2))
    torch.testing.assert_close(state(z), whole)
    torch.testing.assert_close(state(z, (4, 6)), half)
    torch.testing.assert_close(state(z, (2, 3)), F.avg_pool2d(whole, 4))
    shapes = {key: tuple(value.shape) for key, value in state.state_dict().items()}
    again = state_map(shapes)
    again.load_state_dict(state.state_dict())
    assert torch.equal(again(z), state(z))


def test_weights_in_8_bits_are_nearly_what_they_were(tmp_path: Path) -> None:
    large, small = randn(8, 40, 8, 8) * torch.logspace(-3, 1, 8)[:, None, None, None], randn(8, 3, 3, 3)
    large[2] = 0
    save_file(pack({"large": large, "small": small}), tmp_path / "packed.safetensors")
    with WeightFile.open(tmp_path / "packed.safetensors") as file:
        stored, read = file.tensor("large").dtype, unpacked(file)
    assert stored == torch.int8 and set(read) == {"large", "small"}
    off = (read["large"] - large).abs().flatten(1).amax(1)
    assert (off <= large.abs().flatten(1).amax(1) / 253).all()
    assert torch.equal(read["small"], small.half())


def test_a_damaged_file_of_a_bridge_is_refused(tmp_path: Path) -> None:
    save_file({"state.filter.other": torch.zeros(1)}, tmp_path / "a-b.safetensors")
    with pytest.raises(CheckpointError, match="a-b.safetensors holds no bridge"):
        load_bridge(tmp_path / "a-b.safetensors")


@pytest.mark.parametrize("settings", [{"k": 0.0}, {"k": float("nan")}, {"k": 1.0, "form": "other"}])
def test_a_scale_bridge_with_wrong_settings_is_refused(settings: dict) -> None:
    with pytest.raises(SettingError, match="scale bridge"):
        ScaleBridge(**settings)
