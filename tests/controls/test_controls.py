"""ControlNets, T2I-Adapters and IP-Adapters do to the adapted model what diffusers' do, and nothing to the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_delta.adapters.inspection import Reference
from lib_delta.bridges.identity import IdentityBridge
from lib_delta.controls.control_file import load_control
from lib_delta.controls.control_map import ControlMap
from lib_delta.controls.guides import ControlNetGuide, FeatureGuide, ImageGuide, share
from lib_delta.core.conditioning import Conditioning
from lib_delta.core.delta_reuse import REUSE_PLANS, DeltaReuse
from lib_delta.core.guidance import DeltaGuidance
from lib_delta.core.guides import GuideInputs, TimedGuide
from lib_delta.core.source import Source
from lib_delta.core.steps import DenoiseStep, SourceStep
from lib_delta.core.strength import Strength
from lib_delta.diffusion.parameterization import Parameterization
from lib_delta.errors import AdapterError, SettingError
from lib_delta.models.controlnet import ControlNet, T2IAdapter, T2IConfig, feature_injection
from lib_delta.models.forked_layers import ForkedLayer
from lib_delta.models.injection import Injection
from lib_delta.models.ip_adapter import IPAdapter, TokenProjection, cross_attentions
from lib_delta.models.text import sdxl_label
from lib_delta.models.unet import TextContext, UNet
from tests.support.controls import HINTS, PICTURE, SIGMA, TOLD, X, image_tensors, save, tiny_control
from tests.support.diffusers_unet import SD1, SD1_FULL, SD2, SDXL, draw, narrow, pair, randomize
from tests.support.tiny_unet import adapt, randn, tiny_unet

diffusers = pytest.importorskip("diffusers")
LAYOUTS: dict[str, Any] = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}


def added(drawn: Mapping[str, Tensor]) -> dict[str, Any]:
    """What diffusers' models are told of an SDXL picture besides the text, and our label for it."""
    if "pooled" not in drawn:
        return {}
    sizes = torch.tensor([[512.0, 768.0, 8.0, 16.0, 1024.0, 640.0]] * len(drawn["x"]))
    return {"added_cond_kwargs": {"text_embeds": drawn["pooled"], "time_ids": sizes}}


def label(drawn: Mapping[str, Tensor]) -> Tensor | None:
    if "pooled" not in drawn:
        return None
    return sdxl_label(drawn["pooled"], 512, 768, top=8, left=16, target_height=1024, target_width=640)


def control_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k != "up_block_types"}


def their_control(config: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        theirs: nn.Module = diffusers.ControlNetModel(**control_config(config))
    theirs = theirs.to_empty(device="cpu").eval().requires_grad_(False)
    randomize(theirs, seed=3)
    return theirs


@pytest.mark.parametrize("size", [(16, 16), (11, 9)], ids=["even", "odd"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_controlnet_and_the_unet_it_steers_equal_diffusers(
    layout: str, size: tuple[int, int], tmp_path: Path
) -> None:
    config = LAYOUTS[layout]
    ours, theirs = pair(config)
    control, drawn = their_control(config), draw(config, size)
    picture = randn(2, 3, 8 * size[0], 8 * size[1], seed=9).sigmoid()
    down, middle = control(drawn["x"], drawn["t"], drawn["context"], picture, 0.7, return_dict=False, **added(drawn))
    loaded = load_control(save(tmp_path / "control.safetensors", control.state_dict()), ours).model
    assert isinstance(loaded, ControlNet)
    residuals = loaded(drawn["x"], drawn["t"], drawn["context"], loaded.hint(picture), label(drawn))
    for residual, expected in zip(residuals, (*down, middle), strict=True):
        assert (0.7 * residual - expected).abs().max() < 1e-4
    assert all(expected.std() > 0.01 for expected in (*down, middle))
    arguments = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle, **added(drawn)}
    expected = theirs(drawn["x"], drawn["t"], drawn["context"], **arguments).sample
    guide = ControlNetGuide(loaded, ControlMap(picture), 0.7)
    two = forked(ours, drawn, [guide])
    assert (two[1] - expected).abs().max() < 1e-4
    alone = theirs(drawn["x"], drawn["t"], drawn["context"], **added(drawn)).sample
    assert (two[0] - alone).abs().max() < 1e-4
    assert (alone - expected).abs().max() > 0.01


def inputs_of(drawn: Mapping[str, Tensor]) -> GuideInputs:
    rows = len(drawn["x"])
    return GuideInputs(
        drawn["x"], drawn["t"], drawn["context"], label(drawn), torch.arange(rows), torch.zeros(rows, dtype=torch.bool)
    )


def forked(unet: UNet, drawn: Mapping[str, Tensor], guides: list[Callable[[GuideInputs], Injection]]) -> Tensor:
    injection = sum((guide(inputs_of(drawn)) for guide in guides), Injection())
    own = label(drawn)
    return unet(drawn["x"][None], drawn["t"], drawn["context"][None], None if own is None else own[None], injection)


def test_a_controlnet_under_every_name_is_the_same(tmp_path: Path) -> None:
    unet = narrow(SD1)
    theirs = their_control(SD1)
    one = load_control(save(tmp_path / "diffusers.safetensors", theirs.state_dict()), unet).model.state_dict()
    base = unet.state_dict()
    prefixed = {f"control_model.{k}": v for k, v in one.items()}
    difference = {k: v - base[k] if k in base else v for k, v in one.items()} | {"difference": torch.zeros(0)}
    factors: dict[str, Tensor] = {"lora_controlnet": torch.zeros(0)}
    for key, weight in one.items():
        if key in base and weight.ndim > 1:
            u, s, v = torch.linalg.svd((weight - base[key]).flatten(1), full_matrices=False)
            layer = key.removesuffix(".weight")
            factors |= {f"{layer}.up": u * s, f"{layer}.down": v}
        else:
            factors[key] = weight
    for name, tensors in {"bare": one, "prefixed": prefixed, "difference": difference, "factors": factors}.items():
        read = load_control(save(tmp_path / f"{name}.safetensors", tensors), unet)
        assert read.kind == ("Control-LoRA" if name == "factors" else "ControlNet")
        for key, weight in read.model.state_dict().items():
            torch.testing.assert_close(weight, one[key], atol=1e-5, rtol=1e-5)
    torch.save(prefixed, tmp_path / "control.pth")
    assert torch.equal(
        load_control(tmp_path / "control.pth", unet).model.state_dict()["zero_convs.0.0.weight"],
        one["zero_convs.0.0.weight"],
    )


@pytest.mark.parametrize(
    ("layout", "form", "channels"),
    [
        ("sd1", "full_adapter", 1),
        ("sd1", "full_adapter", 3),
        ("sd2", "full_adapter", 3),
        ("sd1", "light_adapter", 3),
        ("sdxl", "full_adapter_xl", 3),
    ],
)
def test_a_t2i_adapter_equals_diffusers(layout: str, form: str, channels: int, tmp_path: Path) -> None:
    config = LAYOUTS[layout]
    ours, theirs = pair(config)
    widths = list(config["block_out_channels"])
    # SDXL's adapters have four levels for the model's three; the light form repeats the last by itself.
    given = [*widths, widths[-1]] if layout == "sdxl" else widths[:-1] if form == "light_adapter" else widths
    adapter = diffusers.T2IAdapter(channels, given, 2, 16 if layout == "sdxl" else 8, form).eval().requires_grad_(False)
    randomize(adapter)
    drawn = draw(config, (16, 16))
    picture = randn(2, channels, 128, 128, seed=9).sigmoid()
    expected = adapter(picture)
    read = load_control(save(tmp_path / "t2i.safetensors", adapter.state_dict()), ours)
    assert read.kind == "T2I-Adapter"
    for feature, theirs_ in zip(read.model(picture), expected, strict=True):
        assert (feature - theirs_).abs().max() < 1e-4
    own = label(drawn)
    two = ours(
        drawn["x"][None], drawn["t"], drawn["context"][None], None if own is None else own[None],
        feature_injection(ours, read.model(picture)),
    )  # fmt: skip
    sample = theirs(
        drawn["x"], drawn["t"], drawn["context"],
        down_intrablock_additional_residuals=[e.clone() for e in expected], **added(drawn),
    ).sample  # fmt: skip
    assert (two[1] - sample).abs().max() < 1e-4
    torch.testing.assert_close(two[0], forked(ours, drawn, [])[0])
    if channels == 3:
        guided = forked(ours, drawn, [FeatureGuide(read.model, ours, ControlMap(picture))])
        torch.testing.assert_close(guided, two, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(9, 13), (11, 10), (8, 5)])
@pytest.mark.parametrize("layout", ["sd1", "sdxl"])
def test_a_t2i_adapters_features_fit_every_size_of_latents(layout: str, size: tuple[int, int], tmp_path: Path) -> None:
    """Its map is read at the next size that the UNet's halvings divide."""
    config = LAYOUTS[layout]
    unet, widths = narrow(config), list(config["block_out_channels"])
    kind = ([*widths, widths[-1]], 2, 16, "full_adapter_xl") if layout == "sdxl" else (widths, 2, 8, "full_adapter")
    adapter = diffusers.T2IAdapter(3, *kind).eval().requires_grad_(False)
    randomize(adapter)
    read = load_control(save(tmp_path / "t2i.safetensors", adapter.state_dict()), unet).model
    drawn, picture = draw(config, size), randn(1, 3, 8 * size[0], 8 * size[1], seed=9).sigmoid()
    two = forked(unet, drawn, [FeatureGuide(read, unet, ControlMap(picture))])
    assert two.shape == (2, *drawn["x"].shape) and (two[1] - two[0]).abs().max() > 1e-3


def original_t2i(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename diffusers' full adapter to the original release's flat blocks, of which two make a level."""
    out = {}
    for key, tensor in theirs.items():
        parts = key.removeprefix("adapter.").split(".")
        if parts[0] == "body":
            block = 2 * int(parts[1]) + (int(parts[3]) if parts[2] == "resnets" else 0)
            parts = ["body", str(block), *(parts[4:] if parts[2] == "resnets" else parts[2:])]
        out[".".join(parts)] = tensor
    return out


def test_a_t2i_adapter_under_the_original_names_is_the_same(tmp_path: Path) -> None:
    unet = narrow(SD1)
    theirs = diffusers.T2IAdapter(3, list(SD1["block_out_channels"]), 2, 8, "full_adapter").requires_grad_(False)
    randomize(theirs)
    read = [
        load_control(save(tmp_path / f"{i}.safetensors", tensors), unet).model
        for i, tensors in enumerate((theirs.state_dict(), original_t2i(theirs.state_dict())))
    ]
    theirs_, originals = (model.state_dict() for model in read)
    assert theirs_.keys() == originals.keys()
    assert all(torch.equal(theirs_[key], originals[key]) for key in theirs_)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["base", "plus", "full"])
def test_an_ip_adapter_equals_diffusers(form: str, layout: str, tmp_path: Path) -> None:
    config = LAYOUTS[layout]
    ours, theirs = pair(config)
    context = config["cross_attention_dim"]
    tensors = image_tensors(form, ours, context)
    seen = randn(2, 40, seed=8) if form == "base" else randn(2, 257, 40, seed=8)
    split: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        split[part][rest] = tensor
    theirs._load_ip_adapter_weights([split])  # type: ignore[operator]
    for processor in theirs.attn_processors.values():  # type: ignore[union-attr, operator]
        if hasattr(processor, "scale"):
            processor.scale = [0.6]
    drawn = draw(config, (8, 8))
    told = {**added(drawn).get("added_cond_kwargs", {}), "image_embeds": [seen[:, None]]}
    expected = theirs(drawn["x"], drawn["t"], drawn["context"], added_cond_kwargs=told).sample
    # The release's own file is a dictionary of dictionaries.
    torch.save(split, tmp_path / "ip.bin")
    read = load_control(tmp_path / "ip.bin", ours)
    assert read.kind == "IP-Adapter"
    tokens = read.model.image_proj(seen)
    # The guide tells rows apart by prompt and negative prompt: here the second row stands for the latter.
    guide = ImageGuide(read.model, ours, (tokens[0], tokens[1]), 0.6)
    inputs = inputs_of(drawn)
    inputs = GuideInputs(inputs.x, inputs.t, inputs.context, inputs.label, inputs.images, torch.tensor([False, True]))
    own = label(drawn)
    two = ours(drawn["x"][None], drawn["t"], drawn["context"][None], None if own is None else own[None], guide(inputs))
    error = (two[1] - expected).abs().max()
    assert error < 1e-4
    assert (two[0] - expected).abs().max() > 0.01


def half(
    unet: UNet, control: ControlNet, context: Tensor, weights: list[float], x: Tensor = X, picture: Tensor = PICTURE
) -> Tensor:
    """The estimate of one model for one prompt; without weights it is the base's."""
    eps = Parameterization("eps")
    scaled, t = eps.model_input(x, SIGMA)
    rows = context.expand(len(x), -1, -1)
    injection = Injection()
    if weights:
        hint = control.hint(picture).expand(2, -1, -1, -1)
        residuals = [w * r for w, r in zip(weights, control(scaled, t, rows, hint), strict=True)]
        injection = Injection(decoder=dict(enumerate(residuals)), single_branch=True)
    return eps.denoised(unet(scaled[None], t, rows[None], None, injection)[0], x, SIGMA)


def by_hand(
    unet: UNet,
    control: ControlNet,
    weights: list[float],
    cfg: float,
    skip_uncond: bool = False,
    x: Tensor = X,
    picture: Tensor = PICTURE,
) -> Tensor:
    """The textbook way: base and adapted in passes of their own, cond and uncond apart."""

    def guided(steered: bool) -> Tensor:
        cond = half(unet, control, TOLD.cond, weights if steered else [], x, picture)
        uncond = half(unet, control, TOLD.uncond, weights if steered and not skip_uncond else [], x, picture)
        return uncond + cfg * (cond - uncond)

    return guided(True) - guided(False)


@pytest.mark.parametrize("cfg", [1.0, 5.0])
@pytest.mark.parametrize("mode", ["balanced", "prompt", "control"])
def test_one_forked_pass_equals_two_models(mode: Any, cfg: float) -> None:
    unet = tiny_unet()
    control = tiny_control(unet)
    source = Source(
        unet, Parameterization("eps"), TOLD, guides=[ControlNetGuide(control, ControlMap(PICTURE), 0.8, mode)]
    )
    soft = 1.0 if mode == "balanced" else 0.825
    count = len(unet.input_blocks) + 1
    weights = [0.8 * soft ** (count - 1 - i) for i in range(count)]
    expected = by_hand(unet, control, weights, cfg, skip_uncond=mode == "control")
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(source.delta(SourceStep(X, SIGMA, cfg)), expected, atol=1e-3, rtol=1e-3)


def test_the_map_follows_the_resolution_of_a_hires_pass() -> None:
    """The second pass is of another size and shape, which neither 8 latents nor the map's side divide."""
    unet = tiny_unet()
    control = tiny_control(unet)
    guide = ControlNetGuide(control, ControlMap(PICTURE, "just resize"))
    source = Source(unet, Parameterization("eps"), TOLD, guides=[guide])
    weights = [1.0] * (len(unet.input_blocks) + 1)
    for rows, columns in ((8, 8), (13, 11), (8, 8)):
        x = 5 * randn(2, 4, rows, columns, seed=rows)
        size = (8 * rows, 8 * columns)
        picture = PICTURE if size == (64, 64) else F.interpolate(PICTURE, size, mode="bicubic").clamp(0, 1)
        expected = by_hand(unet, control, weights, 5.0, x=x, picture=picture)
        torch.testing.assert_close(source.delta(SourceStep(x, SIGMA, 5.0)), expected, atol=1e-3, rtol=1e-3)


def test_what_is_painted_anew_is_hidden_from_the_controlnet_for_inpainting() -> None:
    """As its authors condition it: pixels under the mask are -1."""
    unet = tiny_unet()
    control = tiny_control(unet)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:40, 8:48] = 1
    source = Source(
        unet, Parameterization("eps"), TOLD, guides=[ControlNetGuide(control, ControlMap(PICTURE, hidden=mask))]
    )
    condition = PICTURE.clone()
    condition[mask.expand(-1, 3, -1, -1) > 0.5] = -1.0
    expected = by_hand(unet, control, [1.0] * (len(unet.input_blocks) + 1), 5.0, picture=condition)
    torch.testing.assert_close(source.delta(SourceStep(X, SIGMA, 5.0)), expected, atol=1e-3, rtol=1e-3)


def test_each_prompt_joined_by_and_is_steered() -> None:
    unet = tiny_unet()
    control = tiny_control(unet)
    conds = randn(3, 7, 16, seed=5)
    shares = ((1.0, 0.5), (0.7,))
    told = Conditioning(conds, TOLD.uncond, weights=shares)
    source = Source(unet, Parameterization("eps"), told, guides=[ControlNetGuide(control, ControlMap(PICTURE))])

    def composed(weights: list[float]) -> Tensor:
        uncond = half(unet, control, TOLD.uncond, weights)
        parts = [half(unet, control, cond[None], weights) for cond in conds]
        first = uncond[0] + 5 * sum(w * (part[0] - uncond[0]) for w, part in zip(shares[0], parts))
        return torch.stack((first, uncond[1] + 5 * shares[1][0] * (parts[2][1] - uncond[1])))

    expected = composed([1.0] * (len(unet.input_blocks) + 1)) - composed([])
    torch.testing.assert_close(source.delta(SourceStep(X, SIGMA, 5.0)), expected, atol=1e-3, rtol=1e-3)


def test_a_guide_counts_in_its_share_of_the_run() -> None:
    unet = tiny_unet()
    edges, pose = (ControlNetGuide(tiny_control(unet, seed), ControlMap(PICTURE)) for seed in (20, 21))
    source = Source(unet, Parameterization("eps"), TOLD, guides=[TimedGuide(edges, end=0.6), TimedGuide(pose, 0.3)])
    guidance = DeltaGuidance(Strength(1.0), IdentityBridge(), source)
    for progress, guides in ((0.0, [edges]), (0.3, [edges, pose]), (0.6, [edges, pose]), (0.7, [pose])):
        expected = Source(unet, Parameterization("eps"), TOLD, guides=guides).delta(SourceStep(X, SIGMA, 5.0))
        got = guidance(DenoiseStep(X, SIGMA, torch.zeros_like(X), 5.0, progress))
        torch.testing.assert_close(got, expected)
    assert source.evaluations == 4
    assert source.at_progress(0.1) is source.at_progress(0.2) is not source.at_progress(0.8)


def test_where_no_guide_counts_the_delta_is_0_and_costs_nothing() -> None:
    unet = tiny_unet()
    guide = TimedGuide(ControlNetGuide(tiny_control(unet), ControlMap(PICTURE)), 0.2, 0.6)
    source = Source(unet, Parameterization("eps"), TOLD, guides=[guide])
    assert not source.at_progress(0.7).delta(SourceStep(X, SIGMA, 5.0)).any() and source.evaluations == 0
    assert source.at_progress(0.6).delta(SourceStep(X, SIGMA, 5.0)).any() and source.evaluations == 1
    other = Conditioning(randn(1, 7, 16, seed=8), TOLD.uncond)
    prompted = Source(unet, Parameterization("eps"), TOLD, other, guides=[guide])
    assert prompted.at_progress(0.7).delta(SourceStep(X, SIGMA, 5.0)).any()


def test_a_delta_that_is_held_is_not_held_beyond_a_guides_end() -> None:
    unet = tiny_unet()
    guide = TimedGuide(ControlNetGuide(tiny_control(unet), ControlMap(PICTURE)), end=0.5)
    source = Source(unet, Parameterization("eps"), TOLD, guides=[guide])
    guidance = DeltaGuidance(Strength(1.0), IdentityBridge(), source, DeltaReuse(REUSE_PLANS["fast"]))

    def delta(progress: float) -> Tensor:
        return guidance(DenoiseStep(X, SIGMA, torch.zeros_like(X), 5.0, progress, levels=21))

    assert delta(0.4).any() and delta(0.45).any() and source.evaluations == 1
    assert not delta(0.55).any()


@pytest.mark.parametrize("share", [(0.6, 0.5), (-0.1, 1.0), (0.0, 1.1)])
def test_a_share_of_the_run_that_is_none_is_refused(share: tuple[float, float]) -> None:
    with pytest.raises(SettingError, match="two shares of the run from 0 to 1 are needed, the earlier first"):
        TimedGuide(lambda inputs: Injection(), *share)


def test_in_parts_the_delta_is_the_same() -> None:
    unet = tiny_unet()
    guides = [ControlNetGuide(tiny_control(unet), ControlMap(PICTURE))]
    source = Source(unet, Parameterization("eps"), TOLD, guides=guides)
    whole = source.delta(SourceStep(X, SIGMA, 5.0))
    source._evaluator.parts = 8
    torch.testing.assert_close(source.delta(SourceStep(X, SIGMA, 5.0)), whole, atol=1e-4, rtol=1e-4)


def rows_seen(unet: UNet, source: Source) -> dict[str, int]:
    """Count, for every layer of the UNet, how many rows it evaluates in one step."""
    seen = counted_rows(unet)
    source.delta(SourceStep(X, SIGMA, 5.0))
    return seen


def counted_rows(model: nn.Module) -> dict[str, int]:
    """Count, for every layer of a model, how many rows it evaluates from now on."""
    seen: dict[str, int] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, ForkedLayer):
            plain = layer.base

            def counted(x: Tensor, path: str = path, plain: Any = plain) -> Tensor:
                seen[path] = seen.get(path, 0) + len(x)
                return plain(x)

            layer.base = counted  # type: ignore[method-assign]
    return seen


def test_the_encoder_runs_once_for_both_branches() -> None:
    unet = tiny_unet()
    control = tiny_control(unet)
    source = Source(unet, Parameterization("eps"), TOLD, guides=[ControlNetGuide(control, ControlMap(PICTURE))])
    of_control = counted_rows(control)
    seen = rows_seen(unet, source)
    # Once for the adapted model, with and without prompt; the map is read once, as one row.
    assert {rows for path, rows in of_control.items() if not path.startswith("input_hint_block")} == {4}
    assert {rows for path, rows in of_control.items() if path.startswith("input_hint_block")} == {1}
    assert seen.keys() >= {path for path, _ in unet.named_modules() if path.endswith("to_out.0")}
    # Two images, with and without prompt: 4 rows, and only 2 until the prompt is first looked at; 8 in the decoder.
    assert {rows for path, rows in seen.items() if path.startswith(("input_blocks", "middle_block"))} == {2, 4}
    decoder = {p: r for p, r in seen.items() if p.startswith(("output_blocks", "out.")) and "emb_layers" not in p}
    assert {rows for path, rows in decoder.items() if not path.endswith(("attn2.to_k", "attn2.to_v"))} == {8}


def test_a_weight_of_0_is_exactly_nothing(tmp_path: Path) -> None:
    unet = tiny_unet()
    path = save(tmp_path / "ip.safetensors", image_tensors("base", unet, 16))
    adapter = load_control(path, unet).model
    tokens = adapter.image_proj(randn(2, 40))
    guides = [
        ControlNetGuide(tiny_control(unet), ControlMap(PICTURE), 0.0),
        ImageGuide(adapter, unet, (tokens[0], tokens[1]), 0.0),
    ]
    source = Source(unet, Parameterization("eps"), TOLD, guides=guides)
    assert not source.delta(SourceStep(X, SIGMA, 5.0)).any()
    assert len(source.denoised(SourceStep(X, SIGMA, 5.0))) == 1


def test_all_together_with_new_weights_equal_two_models(tmp_path: Path) -> None:
    """A fine-tuned or LoRA-adapted layer, two ControlNets and a picture: the sum of nothing but their own effects."""
    unet = tiny_unet()
    controls = [tiny_control(unet), tiny_control(unet, seed=21)]
    adapter = load_control(save(tmp_path / "ip.safetensors", image_tensors("base", unet, 16)), unet).model
    tokens = adapter.image_proj(randn(2, 40))
    weights = {name: w + 0.1 * w.std() * randn(*w.shape, seed=9) for name, w in unet.state_dict().items()}

    def guides(model: UNet) -> list[Any]:
        return [
            *(ControlNetGuide(control, ControlMap(PICTURE), 0.5) for control in controls),
            ImageGuide(adapter, model, (tokens[0], tokens[1]), 0.7),
        ]

    alone = deepcopy(unet)
    alone.load_state_dict(weights)
    eps = Parameterization("eps")
    expected = Source(alone, eps, TOLD, guides=guides(alone)).denoised(SourceStep(X, SIGMA, 5.0))[-1]
    base = Source(unet, eps, TOLD).denoised(SourceStep(X, SIGMA, 5.0))[0]
    delta = Source(adapt(unet, weights), eps, TOLD, guides=guides(unet)).delta(SourceStep(X, SIGMA, 5.0))
    torch.testing.assert_close(delta, expected - base, atol=1e-3, rtol=1e-3)


def test_each_image_has_its_own_map() -> None:
    unet = tiny_unet()
    control = tiny_control(unet)
    pictures = torch.cat((PICTURE, 1 - PICTURE))
    both = Source(unet, Parameterization("eps"), TOLD, guides=[ControlNetGuide(control, ControlMap(pictures))])
    delta = both.delta(SourceStep(X, SIGMA, 5.0))
    for i in (0, 1):
        single = Source(
            unet, Parameterization("eps"), TOLD, guides=[ControlNetGuide(control, ControlMap(pictures[i : i + 1]))]
        )
        torch.testing.assert_close(delta[i], single.delta(SourceStep(X, SIGMA, 5.0))[i], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("weight_type", ["ease in", "ease out", "ease in-out", "reverse in-out"])
def test_eased_weights_stay_within_their_share(weight_type: Any) -> None:
    shares = [share(weight_type, i, 16, "input") for i in range(16)]
    assert all(0.05 <= s <= 1 for s in shares) and max(shares) > 0.9 and min(shares) < 0.2


def change(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({key: tensor})


ONE = torch.ones(1, 1)
REFUSALS: dict[str, tuple[dict[str, Tensor], str]] = {
    "a LoRA": ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(4, 4)}, "is a LoRA"),
    "a VAE": ({"first_stage_model.encoder.conv_in.weight": torch.ones(4, 3, 3, 3)}, "is an autoencoder"),
    "an embedding": ({"emb_params": torch.ones(1, 16)}, "textual inversion"),
    "a union ControlNet": ({"task_embedding": torch.ones(6, 320)}, "a union ControlNet, which is not supported"),
    "ProMax": (
        {"controlnet_down_blocks.0.weight": ONE, "control_add_embedding.linear_1.weight": ONE},
        "union ControlNet",
    ),
    "for SD 3": ({"controlnet_blocks.0.weight": ONE, "joint_blocks.0.x": ONE}, "for a transformer model"),
    "for FLUX.1": ({"controlnet_x_embedder.weight": ONE, "transformer_blocks.0.x": ONE}, "for a transformer model"),
    "a style adapter": ({"style_embedding": ONE, "ln_post.weight": ONE}, "a T2I style adapter"),
    "an image encoder": ({"vision_model.embeddings.class_embedding": ONE}, "is an image encoder"),
    "FaceID with LoRA": ({"ip_adapter.0.to_q_lora.down.weight": ONE, "image_proj.proj.weight": ONE}, "FaceID"),
    "FaceID plus": ({"image_proj.perceiver_resampler.latents": ONE, "ip_adapter.1.to_k_ip.weight": ONE}, "FaceID"),
    "LLLite": ({"lllite_unet_input_blocks_4_1.depth.0.weight": torch.ones(4, 4)}, "LLLite"),
    "FaceID": ({"image_proj.proj.0.weight": torch.ones(24, 512)}, "FaceID"),
    "anything": ({"weird": torch.ones(1)}, "no kind that is known"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_other_files_are_refused_by_name(name: str, tmp_path: Path) -> None:
    tensors, sentence = REFUSALS[name]
    with pytest.raises(AdapterError, match=sentence):
        load_control(save(tmp_path / "x.safetensors", tensors), tiny_unet())


def test_a_checkpoint_and_other_families_are_refused(tmp_path: Path) -> None:
    unet = tiny_unet()
    checkpoint = {f"model.diffusion_model.{k}": v for k, v in unet.state_dict().items()}
    with pytest.raises(AdapterError, match="is a checkpoint of SD 1.x"):
        load_control(save(tmp_path / "base.safetensors", checkpoint), unet)
    for config in (SD2, SDXL):
        other = save(tmp_path / "other.safetensors", their_control(config).state_dict())
        with pytest.raises(AdapterError, match="is made for .* is needed"):
            load_control(other, narrow(SD1))
    adapter = save(tmp_path / "ip.safetensors", image_tensors("base", narrow(SD2), 96))
    with pytest.raises(AdapterError, match="is made for"):
        load_control(adapter, narrow(SD1))
    t2i = diffusers.T2IAdapter(3, list(SD2["block_out_channels"]), 2, 8, "full_adapter").state_dict()
    with pytest.raises(AdapterError, match="T2I-Adapter of the base's family"):
        load_control(save(tmp_path / "t2i.safetensors", t2i), narrow(SD1))


@pytest.mark.parametrize("own", ["sd2", "sdxl"])
def test_a_source_of_a_later_family_refuses_what_was_made_for_sd_1(own: str, tmp_path: Path) -> None:
    unet = narrow(LAYOUTS[own])
    files = {
        "a ControlNet": their_control(SD1).state_dict(),
        "under the original names": ControlNet(narrow(SD1).config, HINTS).state_dict(),
        "an IP-Adapter": image_tensors("base", narrow(SD1), SD1["cross_attention_dim"]),
    }
    for name, tensors in files.items():
        with pytest.raises(AdapterError, match="is made for .* is needed"):
            load_control(save(tmp_path / f"{name}.safetensors", tensors), unet)
    if own == "sd2":
        return  # a T2I-Adapter knows no text, and the widths of SD 1.x and 2.x are the same
    widths = SDXL["block_out_channels"]
    t2i = diffusers.T2IAdapter(3, [*widths, widths[-1]], 2, 8, "full_adapter").state_dict()
    with pytest.raises(AdapterError, match="T2I-Adapter of the base's family"):
        load_control(save(tmp_path / "t2i.safetensors", t2i), unet)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda t: t.pop("zero_convs.0.0.weight"), "lacks 1 of"),
        (lambda t: t.pop("input_hint_block.4.weight"), "do not follow each other"),
        (change("zero_convs.1.0.weight", torch.ones(3, 3, 1, 1)), "with shape"),
        (change("zero_convs.0.0.bias", torch.full((32,), float("nan"))), "NaN or infinity"),
    ],
)
def test_damaged_controlnets_are_refused(spoil: Any, sentence: str, tmp_path: Path) -> None:
    unet = tiny_unet()
    tensors = tiny_control(unet).state_dict()
    spoil(tensors)
    with pytest.raises(AdapterError, match=sentence):
        load_control(save(tmp_path / "x.safetensors", tensors), unet)


def test_unknown_modes_are_refused() -> None:
    unet = tiny_unet()
    with pytest.raises(SettingError, match="control mode is 'all': one of balanced"):
        ControlNetGuide(tiny_control(unet), ControlMap(PICTURE), mode="all")  # type: ignore[arg-type]
    t2i = T2IAdapter(T2IConfig(3, (32, 64), 1, 8, (1,)))
    with pytest.raises(SettingError, match="control mode is 'all': one of balanced"):
        FeatureGuide(t2i, unet, ControlMap(PICTURE), mode="all")  # type: ignore[arg-type]
    adapter = IPAdapter(TokenProjection(40, 16, 4), 16, [])
    with pytest.raises(SettingError, match="weight type is 'all': one of linear"):
        ImageGuide(adapter, unet, (randn(1), randn(1)), weight_type="all")  # type: ignore[arg-type]


def test_full_width_controlnet_equals_diffusers(tmp_path: Path) -> None:
    theirs = their_control(SD1_FULL)
    assert sum(p.numel() for p in theirs.parameters()) == 361_279_120
    unet = Reference.sd15().unet
    read = load_control(save(tmp_path / "control.safetensors", theirs.state_dict()), unet, torch.float32, "cpu").model
    drawn, picture = draw(SD1_FULL, (8, 8), batch=1), PICTURE
    down, middle = theirs(drawn["x"], drawn["t"], drawn["context"], picture, return_dict=False)
    residuals = read(drawn["x"], drawn["t"], drawn["context"], read.hint(picture))
    for residual, expected in zip(residuals, (*down, middle), strict=True):
        assert (residual - expected).abs().max() < 1e-4 * max(1.0, float(expected.std()))


def test_full_width_t2i_adapter_equals_diffusers(tmp_path: Path) -> None:
    theirs = diffusers.T2IAdapter(3, [320, 640, 1280, 1280], 2, 8, "full_adapter").eval().requires_grad_(False)
    randomize(theirs)
    path = save(tmp_path / "t2i.safetensors", theirs.state_dict())
    read = load_control(path, Reference.sd15().unet, torch.float32, "cpu").model
    for feature, expected in zip(read(PICTURE), theirs(PICTURE), strict=True):
        assert (feature - expected).abs().max() < 1e-4 * max(1.0, float(expected.std()))


def test_full_width_ip_adapter_equals_diffusers(tmp_path: Path) -> None:
    """Each of the 16 cross-attentions of SD 1.5 beside diffusers' own with its processor, and the projection."""
    from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection

    unet = Reference.sd15().unet
    tensors = image_tensors("base", unet, 768, seen=1024)
    model = load_control(save(tmp_path / "ip.safetensors", tensors), unet, torch.float32, "cpu").model
    seen = randn(2, 1024, seed=8)
    projection = ImageProjection(1024, 768, 4).requires_grad_(False)
    names = {"proj": "image_embeds", "norm": "norm"}
    loaded = {f"{names[k.split('.')[1]]}.{k.split('.')[2]}": v for k, v in tensors.items() if k.startswith("image_")}
    projection.load_state_dict(loaded)
    tokens = model.image_proj(seen)
    assert (tokens - projection(seen)).abs().max() < 1e-4
    guide = ImageGuide(model, unet, (tokens[0], tokens[1]), 0.6)
    text = randn(2, 77, 768, seed=3)
    drawn = GuideInputs(text, text, text, None, torch.arange(2), torch.tensor([False, True]))
    injection = guide(drawn)
    layers = list(cross_attentions(unet))
    assert len(layers) == len(injection.extra_attention) == 16
    for number, (_, layer) in enumerate(layers):
        width, ours = layer.to_q.weight.shape[0], layer.to_empty(device="cpu")
        theirs = Attention(width, 768, heads=8, dim_head=width // 8).requires_grad_(False)
        randomize(theirs, seed=number)
        ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k in ours.state_dict()})
        processor = IPAdapterAttnProcessor2_0(width, 768, num_tokens=[4], scale=0.6).requires_grad_(False)
        key = f"ip_adapter.{2 * number + 1}.to_"
        processor.to_k_ip[0].weight.copy_(tensors[f"{key}k_ip.weight"])
        processor.to_v_ip[0].weight.copy_(tensors[f"{key}v_ip.weight"])
        hidden = randn(2, 16, width, seed=50 + number)
        expected = processor(theirs, hidden, encoder_hidden_states=(text, [tokens[:, None]]))
        got = ours(hidden[None], TextContext.of(text[None]), replace(injection, single_branch=True))[0]
        assert (got - expected).abs().max() < 1e-4 * max(1.0, float(expected.std()))
        assert (got - ours(hidden[None], TextContext.of(text[None]))[0]).abs().max() > 0.01
