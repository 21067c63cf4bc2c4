"""Targets with latents of their own: their training, what their files hold, and the ways to them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.tiny_unet import randn

pytest.importorskip("k_diffusion")
pytest.importorskip("diffusers")
pytest.importorskip("resvg_py")

from demo import crossings
from demo.autoencoders import Autoencoder
from demo.pipeline import Place, Settings, load_model
from demo.studio import Studio, Task
from demo.targets import DecodedBridge, bridge_file, bridge_of, flow_schedule, load_target, target_file
from demo.train import targets as stages
from demo.train.bridges_fit import Size
from demo.train.data import Emoji
from demo.train.denoisers import flow_loss
from lib_delta.core.strength import Strength
from lib_delta.errors import CheckpointError
from lib_delta.files.weight_file import WeightFile
from lib_delta.models.vae import VAE
from tests.support.demo_models import EMOJI


@pytest.fixture(scope="module")
def trained(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of models, with every target trained for two steps."""
    cache = tmp_path_factory.mktemp("cache")
    names = ["fox", "castle", "cat face"]
    sets = {key: (255 * torch.rand(5, 3, 64, 64)).byte() for key in ("flat", "noto", "lineart")}
    every = Emoji([*names, "yo yo", "zebra"], sets)
    torch.save((255 * torch.rand(3, 3, 128, 128)).byte(), cache / "emoji-noto-large.pt")
    place, tokenizer = Place.cpu(), models / "tokenizer"
    vae = load_model(models / "base.safetensors", place, tokenizer).vae
    assert isinstance(vae, VAE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "RUNS", {key: replace(run, steps=2, batch=2) for key, run in stages.RUNS.items()})
        patch.setattr(stages, "FITTED_ON", 16)
        patch.setattr(stages, "NETWORK", Size(hidden=8, blocks=1, steps=2, batch=4))
        tokens = torch.full((4, 77), 2)
        tokens[:, -1] = len(json.loads((tokenizer / "vocab.json").read_text("utf-8"))) - 1
        bench = stages.Bench(cache, models, lambda: vae, every, every.only(names), tokens, strong=6)
        for stage in bench.stages().values():
            stage()
    return models


def test_a_file_holds_what_differs_and_the_loaded_target_is_the_trained_one(trained: Path) -> None:
    target = load_model(trained / "target.safetensors", Place.cpu(), trained / "tokenizer")
    for name, channels, prediction in (("own", 4, "v"), ("large", 4, "v"), ("flow", 16, "flow")):
        with WeightFile.open(target_file(trained, name)) as file:
            attention = [key for key in file.shapes if ".transformer_blocks." in key]
            assert bool(attention) == (name == "large")
            assert any(key.startswith("first_stage_model.") for key in file.shapes) == (name != "large")
            ends = file.tensor("model.diffusion_model.out.2.weight")
        loaded = load_target(target_file(trained, name), target)
        assert loaded.unet.config.out_channels == channels and loaded.parameterization.prediction == prediction
        assert torch.equal(loaded.unet.state_dict()["out.2.weight"], ends.float())
        attended = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
        kept = torch.equal(loaded.unet.state_dict()[attended], target.unet.state_dict()[attended])
        assert kept == (name != "large")
        assert loaded.vae is not None and loaded.vae.config.latent_channels == channels


@pytest.mark.parametrize(("name", "way"), [(name, way) for name, ways in crossings.WAYS.items() for way in ways])
def test_a_delta_reaches_every_target_on_every_way(trained: Path, name: str, way: str) -> None:
    studio = Studio(trained)
    few = crossings.settings_of(name, Settings(steps=2, sampler="euler"))
    alone = Task("target", tuple(EMOJI[:1]), (0,), few, target=name)
    delta = replace(alone, kind="delta", way=way)  # type: ignore[arg-type]
    made = {key: studio.run(task).latents for key, task in {"alone": alone, "with": delta}.items()}
    none = studio.run(replace(delta, strength=Strength(0.0))).latents
    side = 32 if name == "large" else 16
    assert made["with"].shape == (1, 16 if name == "flow" else 4, side, side)
    assert torch.equal(none, made["alone"])
    assert torch.isfinite(made["with"]).all() and not torch.allclose(made["with"], made["alone"], atol=1e-4)


def test_what_was_made_for_another_target_or_other_autoencoders_is_refused(trained: Path) -> None:
    base, target = (
        load_model(trained / f"{n}.safetensors", Place.cpu(), trained / "tokenizer") for n in ("base", "target")
    )
    own = load_target(target_file(trained, "own"), target)
    assert bridge_of("learned", base, own, bridge_file(trained, "own")).label == "learned bridge"
    with pytest.raises(CheckpointError, match=r"bridge-flow.safetensors was made for other autoencoders than are here"):
        bridge_of("learned", base, own, bridge_file(trained, "flow"))
    target.unet.state_dict()["out.2.bias"][0] += 1
    with pytest.raises(CheckpointError, match=r"target-own.safetensors was made for another target .*--stage target-"):
        load_target(target_file(trained, "own"), target)


def test_the_base_is_shown_its_own_size_and_no_more_noise_than_it_knows(trained: Path) -> None:
    base, target = (
        load_model(trained / f"{n}.safetensors", Place.cpu(), trained / "tokenizer") for n in ("base", "target")
    )
    large = load_target(target_file(trained, "large"), target)
    x, sigma = randn(2, 4, 32, 32), torch.tensor([3.0, 0.5])
    for way, factor in (("averaged", 0.5), ("unit", 1.0)):
        shown, at, _ = bridge_of(way, base, large, Path()).to_source(x, sigma, 0.1 * x)  # type: ignore[arg-type]
        assert shown.shape == (2, 4, 16, 16)
        torch.testing.assert_close(at, factor * sigma)
    flow = load_target(target_file(trained, "flow"), target)
    bridge = bridge_of("learned", base, flow, trained / "bridge-flow.safetensors")
    shown, at, _ = bridge.to_source(randn(1, 16, 16, 16), torch.tensor([900.0]), randn(1, 16, 16, 16, seed=1))
    assert shown.shape == (1, 4, 16, 16)
    assert float(at) == pytest.approx(base.parameterization.schedule.sigma_max)


def test_decoding_with_one_and_encoding_with_the_other_carries_states_and_deltas() -> None:
    doubled = Autoencoder(lambda pictures: 2 * pictures, lambda latents: latents / 2)
    halved = Autoencoder(lambda pictures: pictures / 2, lambda latents: 2 * latents)
    clean, noise = 0.2 * torch.rand(1, 3, 4, 4) + 0.1, randn(1, 3, 4, 4)
    bridge = DecodedBridge(source=doubled, target=halved)
    x, _, crossing = bridge.to_source(clean + noise, torch.ones(1), clean)
    torch.testing.assert_close(x, 4 * clean + noise)
    delta = 0.1 * randn(1, 3, 4, 4, seed=2).abs()
    torch.testing.assert_close(bridge.delta_to_target(delta, crossing), delta / 4)
    assert not bridge.delta_to_target(torch.zeros_like(delta), crossing).any()


def test_flow_matching_is_sampled_along_its_own_times() -> None:
    schedule = flow_schedule()
    assert schedule.sigma_max == pytest.approx(1000)
    # Time 500 / 1001, as sigma.
    assert float(schedule.t_to_sigma(torch.tensor([499.0]))) == pytest.approx(500 / 501, rel=1e-5)


def test_the_loss_of_a_perfect_flow_is_0() -> None:
    def perfect(noisy: torch.Tensor, t: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        # The pictures are all 0: what is there is noise, as large as the time is late.
        return noisy / (t / 1000)[:, None, None, None].clamp(min=1e-6)

    loss = flow_loss(perfect, torch.zeros(5, 1, 16, 16, 16), 8)
    assert loss(torch.Generator().manual_seed(0)) < 1e-8


def test_content_is_compared_at_one_style_between_the_rows_of_a_sweep() -> None:
    sweep = [{"style_share": style, "near_ratio": near} for style, near in ((0.4, 0.8), (0.6, 0.7), (0.9, 0.1))]
    assert crossings.kept_at(0.5, sweep) == pytest.approx(0.75)
    assert crossings.kept_at(0.2, sweep) == pytest.approx(0.9)
    assert crossings.kept_at(0.95, sweep) is None
