"""Fitting bridges, and measuring them: on latents that we know to be related, and on tiny autoencoders if given."""

from __future__ import annotations

import itertools
import json
import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("scipy", reason="scipy is not installed, whose filters draw the styles")

from demo import bridges as measured
from demo.autoencoders import TINY, Autoencoder, tiny, tiny_part
from demo.bridge_judge import PictureJudge, markdown, summary
from demo.edits import NAMES
from demo.edits import edited as edited_by
from demo.train import bridges as stage
from demo.train.bridges_difference import LARGE, Batch, Examples, Lessons, TinyPair, fit_difference, trained
from demo.train.bridges_fit import Size, detailed, linear_bridge, save, with_twice
from demo.train.bridges_pictures import EDITS, Sizes, draw, edited
from demo.train.bridges_stitch import Layers, Seam, copy_layers, seen_through, stitched, tuned, until_seam
from demo.train.bridges_styles import STYLES, styled
from demo.train.common import Run
from demo.train.data import Emoji
from lib_delta.bridges.latent_maps import DifferenceMap, FilteredState, StitchedState
from lib_delta.bridges.learned import LearnedBridge, load_bridge, weights_path
from lib_delta.bridges.stitched_difference import StitchedDifference, load_stitched, stitched_path
from lib_delta.diffusion.latent_spaces import Space
from lib_delta.errors import CheckpointError
from lib_delta.files.checkpoint import UNET_PREFIX, VAE_PREFIX
from lib_delta.models import taesd
from lib_delta.models.vae import VAE, VAEConfig
from tests.support.tiny_unet import randn

TAESD = os.environ.get("DELTA_TAESD", "")
MIX = randn(16, 4, 3, 3, seed=5) / 6


def pictures(count: int = 40) -> torch.Tensor:
    return randn(count, 2, 4, 12, 12)


def other_space(latents: torch.Tensor) -> torch.Tensor:
    """A second autoencoder's latents: a filter of the first's, and an offset."""
    padded = F.pad(latents.flatten(0, 1), [1] * 4, mode="replicate")
    return F.conv2d(padded, MIX).unflatten(0, latents.shape[:2]) + 0.5


def test_a_linear_bridge_finds_a_linear_relation() -> None:
    source = pictures()
    target = other_space(source)
    bridge = linear_bridge(source, target)
    new = randn(2, 4, 12, 12, seed=9)
    there = other_space(new[:, None])[:, 0]
    x, _, crossing = bridge.to_source(there, torch.ones(2), there)
    # From 16 mixed channels the 4 are had back nearly whole, away from the edges.
    assert float((x - new)[..., 3:-3, 3:-3].square().mean()) < 0.02
    change = 0.3 * randn(2, 4, 12, 12, seed=10)
    true = other_space((new + change)[:, None])[:, 0] - there
    torch.testing.assert_close(bridge.delta_to_target(change, crossing), true, atol=2e-3, rtol=1e-2)


def test_a_state_map_learns_what_latents_are_at_twice_the_size() -> None:
    small = pictures()

    def large(latents: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(other_space(latents).flatten(0, 1), 2).unflatten(0, latents.shape[:2])

    state = with_twice(FilteredState(4, 4), small, large(small))
    new = randn(1, 2, 4, 12, 12, seed=9)
    torch.testing.assert_close(state(new[0], (24, 24)), large(new)[0], atol=1e-3, rtol=1e-3)
    assert not state(new[0]).any()  # the map of the same size is that of before


def test_networks_improve_on_filters_where_the_relation_bends(tmp_path: Path) -> None:
    source = pictures(60)
    target = other_space(source).tanh()
    linear = linear_bridge(source, target)
    size = Size(hidden=16, blocks=1, steps=60, batch=16)
    trained = stage.fit(source, target, size)
    before, after = (b.state(target[:, 0]).sub(source[:, 0]).square().mean() for b in (linear, trained))
    assert after < before
    save(trained, tmp_path / "a-b.safetensors", {"source": "a"})
    again = load_bridge(tmp_path / "a-b.safetensors")
    torch.testing.assert_close(again.state(target[:, 0]), trained.state(target[:, 0]), atol=0.02, rtol=0.02)
    assert torch.equal(again.difference.filter.weight, linear.difference.filter.weight.half().float())


def test_a_state_map_learns_what_latents_are_at_half_the_size() -> None:
    source = pictures()
    target = other_space(source)
    halves = 2 * F.avg_pool2d(source.flatten(0, 1), 2).unflatten(0, source.shape[:2]) - 0.3
    state = stage.fit(source, target, halves=halves).state
    new = randn(2, 1, 4, 12, 12, seed=9)
    wanted = 2 * F.avg_pool2d(new[:, 0], 2) - 0.3
    error = (state(other_space(new)[:, 0], (6, 6)) - wanted)[..., 1:-1, 1:-1]
    assert float(error.square().mean()) < 0.03
    averaged = stage.fit(source, target).state(other_space(new)[:, 0], (6, 6))
    assert float((averaged - wanted).square().mean()) > 0.1


def tiny_folder(folder: Path) -> Path:
    """Write tiny autoencoders of random weights for every space."""
    for seed, (space, name) in enumerate(TINY.items()):
        torch.manual_seed(seed)
        for part in taesd.PARTS:
            made = getattr(taesd, part)(space.channels)
            save_file(made.state_dict(), folder / f"{name}_{part}.safetensors")
    return folder


@pytest.mark.parametrize("layers", [Layers(), Layers(reading=1, writing=2)])
def test_a_filter_is_found_between_two_autoencoders(tmp_path: Path, layers: Layers) -> None:
    """Where what the encoder makes on its way is a filter of what the decoder reads, the encoder's end follows."""
    folder = tiny_folder(tmp_path)
    decoder, encoder = tiny_part(folder, Space.SD3, "decoder"), tiny_part(folder, Space.SD1, "encoder")
    z, mix = randn(48, 16, 12, 12), randn(64, 80, 3, 3, seed=1) / 30

    def made(latents: torch.Tensor) -> torch.Tensor:
        known = torch.cat((decoder[: 3 + layers.reading](latents), latents), 1)
        return F.conv2d(F.pad(known, [1] * 4, mode="replicate"), mix)

    features = made(z)
    halves = F.avg_pool2d(features, 2)
    # The blocks of the encoder that are left out are no filter: where some are, the fit is to what they make.
    skipped = encoder[len(until_seam(encoder)) : -1 - layers.writing]
    state = stitched(decoder, encoder, layers, z, Seam(features, halves, z))
    new = randn(4, 16, 12, 12, seed=9)
    wanted = encoder[len(until_seam(encoder)) :](made(new))
    error = (state(new) - wanted).square().mean() / wanted.var()
    assert float(error) < (1e-3 if not len(skipped) else 0.2)
    half = encoder[len(until_seam(encoder)) :](F.avg_pool2d(made(new), 2))
    assert float((state(new, (6, 6)) - half).square().mean() / half.var()) < (1e-3 if not len(skipped) else 0.3)


def test_a_stitched_map_trains_to_less_error_on_latents_of_both_sizes(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    state = StitchedState(4, 4, reading=1, writing=1, width=3, half=4)
    for part in (state.middle, state.halving):
        torch.nn.init.normal_(part.weight, std=0.05)
    z = randn(32, 4, 8, 8)
    same, half = z.flip(1), F.avg_pool2d(z, 2)
    look = seen_through(same, randn(32, 192, 8, 8, seed=3))
    before = [float((state(z, size) - wanted).square().mean()) for size, wanted in (((8, 8), same), ((4, 4), half))]
    run = Run(steps=20, batch=16, rate=2e-3, warmup=2, average=0.8)
    trained = tuned(state, z, (same, half), look, run, "tuned", folder)
    after = [float((trained(z, size) - wanted).square().mean()) for size, wanted in (((8, 8), same), ((4, 4), half))]
    assert after[0] < 0.8 * before[0] and after[1] < 0.8 * before[1]


def test_the_stage_writes_a_bridge_for_every_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path)
    monkeypatch.setattr(stage, "generated", lambda emoji: lambda rng: draw(rng, Sizes(32, 1), None))
    options = Namespace(autoencoders=None, taesd=folder, out=tmp_path / "out", pictures=16, steps=1, cache=tmp_path)
    options.pair, options.stitch = None, ["sd1-sdxl", "sdxl-sd3"]
    stage.run(options, lambda: Emoji([], {name: torch.zeros(0, 3, 64, 64).byte() for name in ("flat", "noto")}))
    pairs = list(itertools.permutations(TINY, 2))
    assert len(list(options.out.iterdir())) == len(pairs) + 2 == 14
    for source, target, knows_half in ((Space.SD1, Space.SDXL, True), (Space.SDXL, Space.SD3, False)):
        stitched_map = load_stitched(options.out / stitched_path(source, target).name)
        assert stitched_map.maps_half == knows_half
    for source, target in pairs:
        bridge = load_bridge(options.out / weights_path(source, target).name)
        latent, delta = randn(1, target.channels, 8, 8), randn(1, source.channels, 8, 8)
        _, _, crossing = bridge.to_source(latent, torch.ones(1), latent)
        assert bridge.delta_to_target(delta, crossing).shape == latent.shape
        assert isinstance(bridge.state, StitchedState) == (source is Space.SD1)
        assert (bridge.difference.detail is not None) == (source is Space.SD1)


def test_maps_between_any_two_tiny_autoencoders_are_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path)
    monkeypatch.setattr(stage, "generated", lambda emoji: lambda rng: draw(rng, Sizes(32, 1), None))
    files = [folder / f"{TINY[s]}_{part}.safetensors" for s in (Space.SDXL, Space.FLUX1) for part in taesd.PARTS]
    options = Namespace(pair=files, name="a-b", out=tmp_path / "out", pictures=16, steps=0, cache=tmp_path, taesd=None)
    stage.run(options, lambda: Emoji([], {name: torch.zeros(0, 3, 64, 64).byte() for name in ("flat", "noto")}))
    bridge = load_bridge(options.out / "a-b.safetensors")
    stitched_map = load_stitched(options.out / "a-b-stitched.safetensors")
    latent, delta = randn(1, 16, 8, 8), randn(1, 4, 8, 8, seed=1)
    _, _, crossing = bridge.to_source(latent, torch.ones(1), latent)
    known = bridge.state.known(latent)
    made = stitched_map(delta, crossing.denoised, known, bridge.difference.features(delta, latent))
    assert made.shape == latent.shape and made.any()


def test_a_stitched_difference_is_fitted_to_less_error_than_the_linear_map(tmp_path: Path) -> None:
    """On the examples it is fitted to, with the layers of random autoencoders."""
    pair = TinyPair.of_folder(tiny_folder(tmp_path), Space.SD1, Space.SDXL)
    rng = np.random.default_rng(3)
    shown = torch.from_numpy(np.stack([draw(rng, Sizes(32, 1), None) for _ in range(8)]))
    for encoder in (pair.source_encoder, pair.target_encoder):  # to latents of variance 1, as trained ones make
        with torch.no_grad():
            spread = encoder(shown).std((0, 2, 3))
            encoder[-1].weight /= spread[:, None, None, None]
            encoder[-1].bias /= spread
    examples = Examples.draw(pair, 24, lambda rng: draw(rng, Sizes(32, 1), None))
    source, target = examples.source[:, :2], examples.target[:, :2]
    linear = linear_bridge(source, target)
    bridge = LearnedBridge(linear.state, detailed(linear.difference, source, target))
    lessons = Lessons(examples, bridge)

    def errors(difference: Callable[[Batch], torch.Tensor]) -> list[float]:
        """Return the mean squared errors at full size and at half."""
        off = [torch.cat([difference(b) - b.true for b in lessons.parts(half)]) for half in (False, True)]
        return [float(each.square().mean()) for each in off]

    def stitched_error(made: StitchedDifference) -> list[float]:
        return errors(lambda b: made(b.change, b.state, b.known, b.features))

    run = Run(steps=0, batch=8, rate=2e-3, warmup=5, average=0.9)
    made = fit_difference(pair, examples, bridge, LARGE, run, "none", tmp_path)
    linear_error = errors(lambda b: bridge.difference.from_features(b.features))
    assert all(a < 0.7 * b for a, b in zip(stitched_error(made), linear_error))
    # Random autoencoders leave training nothing to gain on this, so it has to find the last filters again.
    for last in (made.out, made.half_out):
        torch.nn.init.zeros_(last.weight)
    before = stitched_error(made)
    after = stitched_error(trained(made, pair, lessons, replace(run, steps=80), "some", tmp_path))
    assert all(a < 0.8 * b for a, b in zip(after, before))


def test_every_style_makes_pictures() -> None:
    rng = np.random.default_rng(0)
    first, second = (draw(rng, Sizes(36, 1), None) for _ in range(2))
    for style in STYLES.values():
        for _ in range(6):
            changed = style(rng, first, second)
            assert changed.shape == (3, 36, 36) and np.isfinite(changed).all()
    for _ in range(20):
        changed = styled(rng, first, second)
        assert changed.dtype == np.float32 and changed.min() >= 0 and changed.max() <= 1


def test_differences_take_detail_from_the_targets_latent() -> None:
    """The source knows coarsely that all is made stronger by half, and the target's latent has what is fine."""
    before = pictures(60)[:, 0]
    target = torch.stack((before, 1.5 * before), 1)
    soft = F.avg_pool2d(F.pad(before, [2] * 4, mode="replicate"), 5, 1)
    source = torch.stack((soft, 1.5 * soft), 1)
    linear = linear_bridge(source, target).difference
    fitted = detailed(linear, source, target)
    new = randn(2, 4, 12, 12, seed=9)
    change = 0.5 * F.avg_pool2d(F.pad(new, [2] * 4, mode="replicate"), 5, 1)
    errors = [float((made - 0.5 * new).square().mean()) for made in (linear(change, new), fitted(change, new))]
    assert errors[1] < 0.6 * errors[0]


def test_pictures_and_every_edit_are_pictures() -> None:
    rng = np.random.default_rng(0)
    first, second = (draw(rng, Sizes(32, 2), None) for _ in range(2))
    for kind in EDITS:
        changed, name = edited(rng, first, second, (kind, kind))
        assert changed.shape == (3, 32, 32) and name == kind
        assert changed.min() >= 0 and changed.max() <= 1 and np.isfinite(changed).all()
    assert all(edit(torch.rand(1, 3, 16, 16)).shape == (1, 3, 16, 16) for edit in measured.EDITS.values())


def test_an_exact_bridge_measures_as_exact() -> None:
    def shrink(picture: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(picture, 8)

    def enlarge(latents: torch.Tensor) -> torch.Tensor:
        return F.interpolate(latents, scale_factor=8.0)

    spaces = {Space.SD1: Autoencoder(shrink, enlarge), Space.SDXL: Autoencoder(shrink, enlarge)}
    latents = measured.Latents(torch.rand(2, 3, 64, 64), spaces)
    row = measured.figures(latents, lambda source, target: _same(3))["sd1->sdxl"]
    assert row["state_unexplained"] == pytest.approx(0, abs=1e-6)
    assert row["state_psnr"] == pytest.approx(row["state_psnr_ceiling"], abs=1e-3)
    # Of these autoencoders the average of a latent is the latent of the picture at half the size.
    assert row["half_unexplained"] == pytest.approx(0, abs=1e-6) == row["state_unexplained_averaged"]
    assert row["half_psnr"] == pytest.approx(row["half_psnr_ceiling"], abs=1e-3)
    assert all(row[name] == pytest.approx(1, abs=1e-4) for name in measured.EDITS)
    assert "sdxl->sd1" in measured.markdown({"sdxl->sd1": row})


def _same(channels: int) -> LearnedBridge:
    both = LearnedBridge(FilteredState(channels, channels, 1), DifferenceMap(channels, channels, 1))
    for module in (both.state, both.difference):
        module.filter.weight.data = torch.eye(channels)[:, :, None, None]
    return both


def test_without_autoencoders_the_stage_says_where_they_are_found(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no autoencoders were given: .*VAE-taesd"):
        stage.read(Namespace(autoencoders=None, taesd=None))
    with pytest.raises(SystemExit, match="has no taesd: .*WebUIs download them"):
        stage.read(Namespace(autoencoders=None, taesd=tmp_path))


def test_a_tiny_autoencoder_is_read_by_its_shapes(tmp_path: Path) -> None:
    torch.save(taesd.encoder(16).state_dict(), tmp_path / "e.pth")
    torch.save(taesd.decoder(4).state_dict(), tmp_path / "d.pth")
    assert taesd.load_taesd(tmp_path / "e.pth", "encoder")(torch.rand(1, 3, 16, 24)).shape == (1, 16, 2, 3)
    assert taesd.load_taesd(tmp_path / "d.pth", "decoder")(torch.rand(1, 4, 2, 3)).shape == (1, 3, 16, 24)
    with pytest.raises(CheckpointError, match="e.pth is not the decoder of a tiny autoencoder"):
        taesd.load_taesd(tmp_path / "e.pth", "decoder")
    more = {**taesd.decoder(4).state_dict(), "3.gate.weight": torch.zeros(256, 64, 1, 1)}
    save_file(more, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"other layers than TAESD's \(3\.gate\.weight\)"):
        taesd.load_taesd(tmp_path / "more.safetensors", "decoder")


def test_a_block_that_normalises_over_the_image_is_read_as_its_formula(tmp_path: Path) -> None:
    """TAEF2 has such blocks at the latents' size."""
    plain = taesd.decoder(32)
    pool = [0.1 * randn(256, 64, 1, 1), 1 + 0.1 * randn(256), 0.1 * randn(256), 0.1 * randn(64, 256, 1, 1)]
    names = ("0.weight", "1.weight", "1.bias", "3.weight")
    weights = {**plain.state_dict(), **{f"3.pool.{name}": value for name, value in zip(names, pool)}}
    save_file(weights, tmp_path / "taef2_decoder.safetensors")
    read = taesd.load_taesd(tmp_path / "taef2_decoder.safetensors", "decoder")
    x = randn(2, 64, 6, 6).relu()
    wide = F.conv2d(x, pool[0]).unflatten(1, (4, 64)).flatten(2)
    wide = (wide - wide.mean(2, keepdim=True)) / (wide.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    wide = wide.reshape(2, 256, 6, 6) * pool[1][:, None, None] + pool[2][:, None, None]
    pooled = x + F.conv2d(wide.relu(), pool[3])
    torch.testing.assert_close(read[3](x), plain[3](pooled), atol=1e-5, rtol=1e-4)
    # A map takes the layers without it.
    layers = taesd.first_of_decoder(32, 1)
    copy_layers(layers, read[:4])
    assert torch.equal(layers(randn(1, 32, 4, 4)), plain[:4](randn(1, 32, 4, 4)))


def checkpoint(path: Path, more: dict[str, torch.Tensor]) -> Path:
    """Write a file that has an autoencoder, and of a UNet what tells its family."""
    torch.manual_seed(len(more))
    autoencoder = VAE(VAEConfig(levels=(8, 8, 8, 8), res_blocks=1))
    tensors = {VAE_PREFIX + key: value for key, value in autoencoder.state_dict().items()}
    save_file({**tensors, f"{UNET_PREFIX}input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3), **more}, str(path))
    return path


def test_checkpoints_own_autoencoders_are_measured_and_their_filters_fitted_anew(tmp_path: Path) -> None:
    labels = {f"{UNET_PREFIX}label_emb.0.0.weight": torch.zeros(8, 8)}
    files = [checkpoint(tmp_path / "sd15.safetensors", {}), checkpoint(tmp_path / "sdxl.safetensors", labels)]
    (tmp_path / "photos").mkdir()
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 255, (8, 6, 3), np.uint8)
        Image.fromarray(noise).resize((240, 320)).save(tmp_path / "photos" / f"{i}.png")
    options = Namespace(autoencoders=files, taesd=None, photos=tmp_path / "photos", pictures=16)
    options.bridges_out = tmp_path / "bridges.json"
    measured.measure(options)
    table = json.loads(options.bridges_out.read_text("utf-8"))
    assert table.keys() == {"sd1->sdxl", "sdxl->sd1"}
    for row in table.values():
        # What was fitted to these autoencoders knows them better than the maps of the released ones.
        assert row["refitted"]["state_unexplained"] < row["state_unexplained"]
        assert row["refitted"]["grey"] > row["grey"]
    assert Image.open(tmp_path / "bridges.png").size == (4 * measured.SIDE, 2 * measured.SIDE + 18)
    with pytest.raises(SystemExit, match="sd15.safetensors shares its latent space, SD 1.x/2.x, with another"):
        stage.read(Namespace(autoencoders=[files[0], files[0]], taesd=None))


@pytest.mark.skipif(not TAESD, reason="DELTA_TAESD names no folder of tiny autoencoders")
def test_the_shipped_maps_beat_scale_on_photos() -> None:
    autoencoders = tiny(Path(TAESD))
    assert set(autoencoders) == set(TINY)
    few = {space: autoencoders[space] for space in (Space.SD1, Space.SDXL)}
    table = measured.figures(measured.Latents(measured.photos(None)[:3], few), measured.shipped)
    state, change = table["sdxl->sd1"], table["sd1->sdxl"]
    assert state["state_unexplained"] < 0.5 and state["scale"]["state_unexplained"] > 1.2
    assert state["state_psnr"] > 20 > state["scale"]["state_psnr"]
    assert all(change[name] > 0.75 > change["scale"][name] for name in ("grey", "warm", "hue", "line_art"))


def test_the_judge_gives_an_exact_way_the_true_changes_score() -> None:
    def shrink(pictures: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(torch.cat((pictures, pictures[:, :1]), 1), 8)

    def enlarge(latents: torch.Tensor) -> torch.Tensor:
        return F.interpolate(latents[:, :3], scale_factor=8.0)

    spaces = {Space.SD1: Autoencoder(shrink, enlarge), Space.SDXL: Autoencoder(shrink, enlarge)}
    judge = PictureJudge(torch.rand(2, 3, 96, 96), spaces, (Space.SD1, Space.SDXL))
    judge.bridges["learned"] = _same(4)
    scores = judge.measure(("grey", "night", "paste"))
    for row in scores.values():
        assert row["learned"].cosine == pytest.approx(1, abs=1e-4)
        assert row["learned"].size == pytest.approx(1, abs=1e-4)
        assert row["learned"].psnr == pytest.approx(row["true"].psnr, abs=1e-3)
    assert scores["night"]["none"].psnr < scores["night"]["true"].psnr and scores["night"]["none"].size == 0
    rows = summary(scores)
    assert rows["learned"]["worst"] == 0 and rows["true"]["psnr"] == pytest.approx(rows["learned"]["psnr"], abs=1e-3)
    assert "| learned | 1.00 | 1.00 |" in markdown(scores, "exact")


def test_every_edit_makes_pictures() -> None:
    for name in NAMES:
        changed = edited_by(torch.rand(2, 3, 48, 48), name)
        assert changed.shape == (2, 3, 48, 48) and float(changed.min()) >= 0 and float(changed.max()) <= 1
    assert len(NAMES) == 19


@pytest.mark.skipif(not TAESD, reason="DELTA_TAESD names no folder of tiny autoencoders")
@pytest.mark.parametrize("ratio", [1.0, 2.0, 1.5, 3.0])
def test_the_stitched_map_is_better_in_pictures_than_the_learned_one(ratio: float) -> None:
    """By PSNR of decoded edits of photos: on average, and never worse by more than .2 dB."""
    photos, autoencoders = measured.photos(None)[:3], tiny(Path(TAESD))
    rows = summary(PictureJudge(photos, autoencoders, (Space.SD1, Space.SDXL), ratio).measure())
    gain = 0.2 if ratio == 1.5 else 0.5
    assert rows["none"]["psnr"] < rows["learned"]["psnr"] + gain < rows["stitched"]["psnr"] < rows["true"]["psnr"]
    assert rows["stitched"]["worst"] > -0.2
    assert rows["stitched"]["cosine"] > rows["learned"]["cosine"] + 0.03
    assert rows["stitched"]["size"] > rows["learned"]["size"]
    assert rows["scale"]["psnr"] < rows["none"]["psnr"] < rows["taesd"]["psnr"] < rows["stitched"]["psnr"]
