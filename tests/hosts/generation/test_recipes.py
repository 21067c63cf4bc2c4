"""Recipes in a generation: LoRAs of other formats, block weights, ranges of the run, bundled embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("k_diffusion", reason="k-diffusion is not installed, whose samplers the stand-ins run")
pytest.importorskip("transformers", reason="transformers is not installed, whose text encoder the stand-ins run")

from safetensors.torch import load_file, save_file

from tests.support.small_files import (
    TEXT_PREFIX,
    UNET_PREFIX,
    Files,
    checkpoint,
    lora_factors,
    with_lora,
    write,
    write_lora,
)
from tests.support.stand_in_webui import WebUI, relative

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchsde", "ignore:To copy construct from a tensor")
STEPS = 5  # progress 0, 0.25, 0.5, 0.75, 1


HOSTS = ("a1111", "forge")


def add_files(files: Files) -> None:
    write_lora(lora_factors(checkpoint(), seed=7), files.lora_file("pen"))


def latents(webui: WebUI, loras: str, **changes: Any) -> torch.Tensor:
    made = webui.latents({"base": "base", "loras": loras}, steps=STEPS, **changes)
    assert webui.callbacks.swallowed == []
    return made


def share_of_blocks(name: str, shares: dict[str, float]) -> float:
    """Return a weight's share: that of the first prefix of its name, else 1."""
    return next((share for prefix, share in shares.items() if name.startswith(prefix)), 1.0)


def with_shares(webui: WebUI, name: str, shares: dict[str, float]) -> str:
    """Write a checkpoint with the LoRA merged block by block, and return its name."""
    weights = checkpoint()
    for key, factors in lora_factors(weights).items():
        share = share_of_blocks(key, shares)
        weights = with_lora(weights, {key: factors}, share, share)
    write(weights, webui.files.checkpoint(name))
    webui.sd_models.list_models()
    return name


def test_block_weights_are_those_of_a_checkpoint_merged_block_by_block(webui: WebUI) -> None:
    # BASE 0.5, all of IN 0, M00 1, all of OUT 0.25 in the layout of 26.
    values = ",".join(["0.5", *["0"] * 12, "1", *["0.25"] * 12])
    shares = {
        TEXT_PREFIX: 0.5,
        f"{UNET_PREFIX}input_blocks": 0.0,
        f"{UNET_PREFIX}middle_block": 1.0,
        f"{UNET_PREFIX}output_blocks": 0.25,
    }
    wanted = webui.native(with_shares(webui, "by-blocks", shares), steps=STEPS)
    assert relative(latents(webui, f"ink:1:lbw={values}"), wanted) < 1e-4
    assert relative(latents(webui, "ink"), wanted) > 1e-2


def test_presets_are_known_by_their_names(webui: WebUI) -> None:
    ones = ",".join(["1"] * 26)
    assert torch.equal(latents(webui, f"ink:1:lbw={ones}"), latents(webui, "ink"))
    nothing = webui.generate({"base": "base", "loras": "ink:1:lbw=NONE"}, steps=STEPS).images
    assert relative(nothing, webui.latents(steps=STEPS)) < 1e-6


def test_two_loras_take_turns(webui: WebUI) -> None:
    """Each is active in its part of the run, as if it were the only one and the range were the delta's."""
    never = latents(webui, "ink:1:start=0.1:end=0.2")
    assert torch.equal(never, webui.latents(steps=STEPS))  # no step falls into the range
    first = webui.latents({"base": "base", "loras": "ink", "end": 0.5}, steps=STEPS)
    assert torch.equal(latents(webui, "ink:1:end=0.5"), first)
    late = webui.latents({"base": "base", "loras": "pen", "start": 0.6}, steps=STEPS)
    assert torch.equal(latents(webui, "pen:1:start=0.6"), late)
    both = latents(webui, "ink:1:end=0.5, pen:1:start=0.6")
    assert not torch.equal(both, first) and not torch.equal(both, late)
    swapped = latents(webui, "pen:1:start=0.6, ink:1:end=0.5")
    assert torch.equal(both, swapped)


def test_a_range_ends_the_cost_as_well(webui: WebUI) -> None:
    webui.generate({"base": "base", "loras": "ink:1:end=0.5"}, steps=STEPS)
    assert "delta in 3 steps, 3 passes" in webui.host.status()


def test_the_order_of_loras_does_not_matter(webui: WebUI) -> None:
    assert relative(latents(webui, "ink:0.7, pen:0.4"), latents(webui, "pen:0.4, ink:0.7")) < 1e-5


def test_a_recipe_comes_back_from_the_infotext(webui: WebUI) -> None:
    recipe = "ink:0.8:te=0.5:lbw=MIDD:start=0.2:end=0.8, pen"
    made = webui.generate({"base": "base", "loras": recipe}, steps=STEPS)
    assert recipe in made.infotexts[0]


@pytest.mark.parametrize("kind", ["hada", "lokr", "diff"])
def test_other_formats_than_lora(webui: WebUI, kind: str) -> None:
    """A file with a checkpoint's difference gives the same as the adapted checkpoint."""
    generator = torch.Generator().manual_seed(3)
    weights = checkpoint()
    tensors: dict[str, torch.Tensor] = {}
    for name in [n for n in weights if n.startswith(UNET_PREFIX) and "to_q.weight" in n]:
        rows, columns = weights[name].shape
        layer = f"lora_unet_{name.removeprefix(UNET_PREFIX).removesuffix('.weight').replace('.', '_')}"
        parts, difference = FORMATS[kind](rows, columns, generator)
        tensors |= {f"{layer}.{part}": tensor for part, tensor in parts.items()}
        weights[name] = weights[name] + difference
    save_file(tensors, webui.files.lora_file(kind))
    write(weights, webui.files.checkpoint(f"with-{kind}"))
    webui.host.catalog.refresh_loras()
    webui.sd_models.list_models()
    wanted = webui.native(f"with-{kind}", steps=STEPS)
    assert relative(webui.latents(steps=STEPS), wanted) > 1e-3
    assert relative(latents(webui, kind), wanted) < 1e-4


def random_pair(rows: int, columns: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator) / columns**0.5


def hada(rows: int, columns: int, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    (a, b), (c, d) = random_pair(rows, columns, generator), random_pair(rows, columns, generator)
    parts = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": torch.tensor(4.0)}
    return parts, 2.0 * (a @ b) * (c @ d)


def lokr(rows: int, columns: int, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    left, right = torch.randn(4, 4, generator=generator), torch.randn(rows // 4, columns // 4, generator=generator) / 9
    return {"lokr_w1": left, "lokr_w2": right, "alpha": torch.tensor(1.0)}, torch.kron(left, right)


def diff(rows: int, columns: int, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    difference = torch.randn(rows, columns, generator=generator) / columns**0.5
    return {"diff": difference}, difference


FORMATS = {"hada": hada, "lokr": lokr, "diff": diff}


def test_an_embedding_that_came_with_a_lora_can_be_named(webui: WebUI) -> None:
    """A bundled embedding works in the side model's prompt as the same file does in the user's folder."""
    vectors = load_file(webui.files.embeddings / f"{webui.files.embedding}.safetensors")["emb_params"]
    bundled = {**load_file(webui.files.lora_file()), "bundle_emb.qqq.string_to_param.*": vectors}
    save_file(bundled, webui.files.lora_file("bundle"))
    webui.host.catalog.refresh_loras()
    named = {"base": "base", "loras": "ink", "prompt": f"a {webui.files.embedding} cat"}
    by_file = webui.latents(named, steps=STEPS)
    by_bundle = webui.latents({**named, "loras": "bundle", "prompt": "a qqq cat"}, steps=STEPS)
    assert torch.equal(by_bundle, by_file)
    without = webui.latents({**named, "prompt": "a qqq cat"}, steps=STEPS)
    assert not torch.equal(without, by_file)  # it left with the LoRA


def test_an_adapted_prompt_alone_is_an_adaptation(webui: WebUI) -> None:
    told, prompt = {"base": "base", "adapted_prompt": "a dog on a log"}, "a dog on a log"
    wanted = webui.latents(steps=STEPS, prompt=prompt)
    assert relative(webui.latents(told, steps=STEPS), wanted) < 1e-4  # main = base, so the delta is all of it
    assert torch.equal(webui.latents(told, steps=STEPS, prompt=prompt), wanted)  # the same prompt: nothing to add


def test_keys_without_a_layer_are_told_below_the_picture(webui: WebUI) -> None:
    extra = {**load_file(webui.files.lora_file()), "lora_unet_no_such_layer.alpha": torch.tensor(1.0)}
    save_file(extra, webui.files.lora_file("partly"))
    webui.host.catalog.refresh_loras()
    made = webui.generate({"base": "base", "loras": "partly, ink"}, steps=STEPS)
    (comment,) = made.comments
    assert "partly.safetensors" in comment and f"1 of its {len(extra)} keys match no layer" in comment
