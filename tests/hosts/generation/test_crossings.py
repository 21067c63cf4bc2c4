"""Deltas that cross to other latents, in whole generations: with what is computed here, by other means, in their place.

The main checkpoint is asked for its own estimate, and what the delta must be is added to it by the functions below;
the samplers that run on that are the same.  Guidance of the main model is 1, so that what is added to a row is added
to the picture; the side model has its own scale of 5.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("k_diffusion", reason="k-diffusion is not installed, whose samplers the stand-ins run")
pytest.importorskip("transformers", reason="transformers is not installed, whose text encoder the stand-ins run")

from k_diffusion import external
from safetensors.torch import load_file

from lib_delta.bridges import learned, through_pixels
from lib_delta.diffusion.latent_spaces import Space
from lib_delta.errors import SettingError
from lib_delta.models import taesd
from tests.support.small_files import Files, checkpoint, write
from tests.support.stand_in_webui import FORGES, WebUI, relative
from tests.support.stitched_formula import StitchedFormula
from tests.support.tiny_unet import randn

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchsde", "ignore:To copy construct from a tensor")
DELTA = {"base": "base", "loras": "ink"}
MAPS = Path(__file__).resolve().parents[3] / "lib_delta" / "bridges" / "weights"
SIDE_CFG, SIDE_SIGMA_MAX = 3.0, 14.6146
PROMPTS = ["a cat on a mat"], ["blue"]
# What the WebUIs' models of each space are told by: Forge's numbers, and AUTOMATIC1111's flag.
SPACES = {"sdxl": ((4, 0.13025), "is_sdxl"), "sd3": ((16, 1.5305), "is_sd3"), "flux1": ((16, 0.3611), "")}


HOSTS = ("a1111", "forge", "neo")


def add_files(files: Files) -> None:
    write(checkpoint(seed=7), files.checkpoint("other"))


Evaluation = Callable[..., Tensor]  # (x, sigma, context) -> denoised, a row each


def where_models_are_asked(webui: WebUI) -> tuple[type, str]:
    """Return the class and the name of the method that evaluates the main checkpoint."""
    if webui.name in FORGES:
        return webui.module("loaded_model").KModel, "apply_model"
    return webui.module("sd_samplers_cfg_denoiser").CFGDenoiser, "_model"


def put(monkeypatch: pytest.MonkeyPatch, webui: WebUI, evaluate: Callable[[Evaluation], Evaluation]) -> None:
    """Evaluate the main checkpoint by ``evaluate(original)``."""
    owner, name = where_models_are_asked(webui)
    original = getattr(owner, name)

    def method(self: Any, x: Tensor, sigma: Tensor, *context: Tensor, **named: Tensor) -> Tensor:
        # Forge passes the text by keyword.
        return evaluate(lambda *asked: original(self, *asked))(x, sigma, *context, *named.values())

    monkeypatch.setattr(owner, name, method)


def has_latents_of(monkeypatch: pytest.MonkeyPatch, webui: WebUI, space: str) -> None:
    """Make the main checkpoint work in a latent space."""
    model = type(webui.shared.sd_model)
    (channels, factor), flag = SPACES[space]
    latents = SimpleNamespace(latent_channels=channels, scale_factor=factor)
    monkeypatch.setattr(model, "model_config", SimpleNamespace(latent_format=latents), raising=False)
    monkeypatch.setattr(model, "latent_channels", channels)
    if flag:
        monkeypatch.setattr(model, flag, True)


def is_of_flow_matching(monkeypatch: pytest.MonkeyPatch, webui: WebUI, shift: float) -> None:
    """Make the main checkpoint run from t = 1 to 0 on ``(1 - t) * x0 + t * noise``, with shifted times."""
    t = torch.arange(1, 1001) / 1000
    times = shift * t / (1 + (shift - 1) * t)
    loaded = webui.module("loaded_model")
    monkeypatch.setattr(loaded.LoadedModel, "noised", lambda self, x, noise, t: (1 - t) * x + t * noise)
    put(monkeypatch, webui, lambda _: lambda x, t, context: 0.3 * torch.tanh(x) + 0.1 * context.mean())
    if webui.name in FORGES:
        monkeypatch.setattr(loaded.Predictor, "sigmas", property(lambda _: times, lambda p, v: None), False)
        monkeypatch.setattr(loaded.Predictor, "prediction_type", "const", raising=False)
    else:
        denoiser = webui.module("sd_samplers_kdiffusion").CFGDenoiserKDiffusion
        made = staticmethod(lambda _: external.DiscreteSchedule(times, quantize=False))
        monkeypatch.setattr(denoiser, "make_inner_model", made)


class Expected:
    """The expected delta, by the formulas alone."""

    def __init__(self, webui: WebUI, space: str, flow: bool, stitched: bool = False) -> None:
        self.flow, self.maps = flow, load_file(MAPS / f"sd1-{space}.safetensors")
        self.stitched = StitchedFormula(Space.SD1, Space[space.upper()]) if stitched else None
        self.maps = {name: self._whole(name) for name in self.maps}
        before = webui.shared.sd_model
        self.models = [self._loaded(webui, name) for name in (webui.files.base, webui.files.tuned)]
        webui.shared.sd_model = before

    @staticmethod
    def _loaded(webui: WebUI, name: str) -> Callable[[Tensor, Tensor], Tensor]:
        info = webui.sd_models.get_closet_checkpoint_match(name)
        webui.shared.sd_model = model = webui.sd_models.load_model(info)
        cond, uncond = (model.get_learned_conditioning(texts) for texts in PROMPTS)
        alphas = webui.module("network").alphas_cumprod()
        inner = SimpleNamespace(apply_model=model.networks.__call__, alphas_cumprod=alphas)
        wrapped = external.CompVisDenoiser.__new__(external.CompVisDenoiser)
        torch.nn.Module.__init__(wrapped)
        external.CompVisDenoiser.__init__(wrapped, inner, quantize=webui.name in FORGES)

        def denoised(x: Tensor, sigma: Tensor) -> Tensor:
            negative, positive = (wrapped(x, sigma, context=c.expand(len(x), -1, -1)) for c in (uncond, cond))
            return negative + SIDE_CFG * (positive - negative)

        return denoised

    def __call__(self, x: Tensor, level: Tensor, denoised: Tensor) -> Tensor:
        """Return the delta for the target's state at one level; ``denoised`` is the target's estimate."""
        known, value = denoised.double(), float(level)
        if self.flow:
            noise = (x.double() - (1 - value) * known) / value
            sigma = SIDE_SIGMA_MAX if value == 1 else min(value / (1 - value), SIDE_SIGMA_MAX)
        else:
            noise, sigma = (x.double() - known) / value, value
        if noise.shape[1] == 16:
            noise = noise.reshape(len(noise), 4, 4, *noise.shape[-2:]).sum(2) / 2
        state = (self.state(denoised) + sigma * noise).float()
        levels = torch.full((len(x),), sigma)
        base, tuned = (model(state, levels) for model in self.models)
        if self.stitched is not None:
            return self.stitched(tuned - base, self.state(denoised), denoised)
        return self.difference(tuned - base, denoised)

    def _whole(self, name: str) -> Tensor:
        """Return weights, which may be stored in 8 bits with a factor for each output channel."""
        weight, scale = self.maps[name].float(), self.maps.get(f"{name}.scale")
        return weight if scale is None else weight * scale[:, None, None, None]

    def state(self, z: Tensor) -> Tensor:
        """Apply the target's tiny decoder, the filter, and the source's encoder."""
        maps = {name.removeprefix("state."): weight for name, weight in self.maps.items() if name.startswith("state.")}

        def convolved(h: Tensor, layer: str) -> Tensor:
            return F.conv2d(h, maps[f"{layer}.weight"], maps[f"{layer}.bias"], padding=1)

        def blocks(h: Tensor, part: str, first: int) -> Tensor:
            for block in (f"{part}.{n}.conv" for n in range(first, 9) if f"{part}.{n}.conv.0.weight" in maps):
                inner = convolved(convolved(h, f"{block}.0").relu(), f"{block}.2").relu()
                h = (h + convolved(inner, f"{block}.4")).relu()
            return h

        read = blocks(convolved(3 * (z / 3).tanh(), "reading.1").relu(), "reading", 3)
        written = blocks(filtered(torch.cat((read, z), 1), maps["middle.weight"], maps["middle.bias"]), "writing", 0)
        last = max(int(name.split(".")[1]) for name in maps if name.startswith("writing."))
        return convolved(written, f"writing.{last}")

    def difference(self, delta: Tensor, target: Tensor) -> Tensor:
        """Apply the filter, and the one that takes detail from the target's latent."""
        carried = filtered(delta, self.maps["difference.filter.weight"])
        images = []
        for change, z in zip(carried.double(), target.double()):
            soft = F.avg_pool2d(F.pad(z[None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0]
            rows = torch.cat((z, soft)).flatten(1).T
            rows, wanted = rows - rows.mean(0), change.flatten(1).T
            gram = rows.T @ rows / len(rows) + 0.01 * torch.eye(rows.shape[1]).double()
            moment = rows.T @ (wanted - wanted.mean(0)) / len(rows)
            images.append((rows @ torch.linalg.inv(gram) @ moment + wanted.mean(0)).T.reshape(change.shape))
        both = torch.cat((carried, torch.stack(images).float()), 1)
        return filtered(both, self.maps["difference.detail.weight"])


def filtered(z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Filter with repeated edges."""
    reach = weight.shape[-1] // 2
    return F.conv2d(F.pad(z, (reach,) * 4, mode="replicate"), weight, bias)


def assert_crossed(monkeypatch: pytest.MonkeyPatch, webui: WebUI, expected: Expected, **changes: Any) -> None:
    """Check that the extension gives the same as the delta inside the main checkpoint's estimates."""
    changes = {"cfg_scale": 1.0, "steps": 4, **changes}
    if changes.get("enable_hr"):
        changes = {"hr_cfg": 1.0, **changes}
    plain, made = webui.latents(**changes), webui.generate(DELTA, **changes)
    assert webui.callbacks.swallowed == [] and "Delta bridge: stitched" in made.infotexts[0]

    def with_delta(original: Evaluation) -> Evaluation:
        def evaluate(x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
            out, images = original(x, sigma, context), changes.get("batch_size", 1)
            delta = expected(x[:images], sigma[0], out[:images])
            return out + delta.repeat(len(x) // images, 1, 1, 1)

        return evaluate

    with monkeypatch.context() as patch:
        put(patch, webui, with_delta)
        wanted = webui.latents(**changes)
    assert relative(plain, wanted) > 1e-3
    assert float((made.images - wanted).norm() / (plain - wanted).norm()) < 2e-3


KEPT = torch.zeros(1, 1, 1).expand(1, 8, 8).clone()
KEPT[..., :3] = 1


def generations(channels: int) -> dict[str, dict[str, Any]]:
    """Return the generated latents by name."""
    init, mask = randn(1, channels, 8, 8, seed=8), KEPT.expand(channels, -1, -1)
    return {
        "txt2img": {},
        "a batch": {"batch_size": 2},
        "Heun": {"sampler_name": "Heun"},
        "DPM++ 2M": {"sampler_name": "DPM++ 2M"},
        "DPM++ SDE": {"sampler_name": "DPM++ SDE"},
        "Euler a": {"sampler_name": "Euler a"},
        "img2img": {"init_latent": init, "denoising_strength": 0.6},
        "inpainting": {"init_latent": init, "denoising_strength": 0.8, "mask": mask, "nmask": 1 - mask},
        "hires fix": {"enable_hr": True, "hr_second_pass_steps": 3},
        "not square": {"width": 64, "height": 96},
    }


@pytest.mark.parametrize("name", generations(4))
def test_a_delta_crosses_to_sdxl(webui: WebUI, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    webui.use("other")
    has_latents_of(monkeypatch, webui, "sdxl")
    assert_crossed(monkeypatch, webui, Expected(webui, "sdxl", flow=False, stitched=True), **generations(4)[name])
    assert "SDXL latents: stitched bridge" in webui.host.status()


def test_a_picture_of_a_learned_bridge_is_restored(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    webui.use("other")
    has_latents_of(monkeypatch, webui, "sdxl")
    plain, expected = webui.latents(cfg_scale=1.0, steps=4), Expected(webui, "sdxl", flow=False)
    made = webui.generate({**DELTA, "bridge": "learned"}, cfg_scale=1.0, steps=4)
    assert "Delta bridge: learned" in made.infotexts[0] and "learned bridge" in webui.host.status()
    stitched = webui.generate(DELTA, cfg_scale=1.0, steps=4)
    assert relative(stitched.images, made.images) > 1e-4

    def with_delta(original: Evaluation) -> Evaluation:
        def evaluate(x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
            out = original(x, sigma, context)
            return out + expected(x[:1], sigma[0], out[:1]).repeat(len(x), 1, 1, 1)

        return evaluate

    put(monkeypatch, webui, with_delta)
    wanted = webui.latents(cfg_scale=1.0, steps=4)
    assert float((made.images - wanted).norm() / (plain - wanted).norm()) < 2e-3


FLOWS = [
    *(("sd3", 3.0, name) for name in generations(16)),
    *(("flux1", 1.0, name) for name in ("txt2img", "Heun", "img2img")),
]


@pytest.mark.parametrize(("space", "shift", "name"), FLOWS)
def test_a_delta_crosses_to_models_of_flow_matching(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch, space: str, shift: float, name: str
) -> None:
    if space == "flux1" and webui.name not in FORGES:
        pytest.skip("AUTOMATIC1111 runs no model with FLUX.1's latents")
    has_latents_of(monkeypatch, webui, space)
    is_of_flow_matching(monkeypatch, webui, shift)
    assert_crossed(monkeypatch, webui, Expected(webui, space, flow=True, stitched=True), **generations(16)[name])
    label = {"sd3": "SD 3", "flux1": "FLUX.1"}[space]
    assert f"{label} latents: stitched bridge" in webui.host.status()


def test_guidance_of_sd_3_is_added_up_with_the_delta(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the side model's scale: the delta is added once, whatever the number of rows."""
    has_latents_of(monkeypatch, webui, "sd3")
    is_of_flow_matching(monkeypatch, webui, 3.0)
    made = webui.generate(DELTA, cfg_scale=4.5, steps=4)
    plain = webui.latents(cfg_scale=4.5, steps=4)
    assert 1e-3 < relative(made.images, plain) < 10 and "Delta lambda: 1" in made.infotexts[0]
    assert torch.equal(webui.latents({**DELTA, "lambda": 0}, cfg_scale=4.5, steps=4), plain)


def test_a_sampler_of_timesteps_has_none_for_sd_3(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    if webui.name in FORGES:
        pytest.skip("Forge gives all samplers' states in one scale")
    has_latents_of(monkeypatch, webui, "sd3")
    with pytest.raises(SettingError, match="the sampler DDIM .* SD 3 .*: choose another sampler"):
        webui.generate(DELTA, sampler_name="DDIM")


def test_the_side_model_can_be_shown_the_picture_of_the_webuis_own_tiny_autoencoders(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(webui.module("paths_internal"), "models_path", str(tmp_path))
    has_latents_of(monkeypatch, webui, "sdxl")
    asked = {**DELTA, "bridge": "taesd"}
    with pytest.raises(SettingError, match="needs taesdxl_decoder .*VAE-taesd, and there is none"):
        webui.generate(asked)
    monkeypatch.setattr(through_pixels, "MIN_AGREEMENT", -2.0)  # random weights belong to no space
    (tmp_path / "VAE-taesd").mkdir()
    torch.manual_seed(4)
    for name, part in (("taesdxl_decoder", taesd.decoder(4)), ("taesd_encoder", taesd.encoder(4))):
        torch.save(part.state_dict(), tmp_path / "VAE-taesd" / f"{name}.pth")
    other, made = webui.latents(DELTA, steps=2), webui.generate(asked, steps=2)
    assert "Delta bridge: taesd" in made.infotexts[0]
    assert "SDXL latents: TAESD bridge, 8 x 8" in webui.host.status()
    assert made.images.isfinite().all() and relative(made.images, other) > 1e-3


def test_tiles_are_tiles_for_the_bridge(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    has_latents_of(monkeypatch, webui, "sdxl")
    seen = []
    original = learned.load_bridge
    monkeypatch.setattr(
        learned, "load_bridge", lambda path, tiled=False: seen.append(tiled) or original(path, tiled=tiled)
    )
    for tiling in (True, False, None):
        seen.clear()
        webui.generate(DELTA, steps=1, tiling=tiling)
        assert seen and (True in seen) is (tiling is True and webui.name != "forge")
