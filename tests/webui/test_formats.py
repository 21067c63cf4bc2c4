"""Adapter files of every format give with the delta what the WebUI's own network code gives.

Main checkpoint and base are the same model and lambda is 1, so the picture must be that of
``<lora:NAME:weight>``.  ``formats.py`` says what is left out of this, and why.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.webui import formats
from tests.support.webui.checkpoints import FULL, TINY, Size, draw
from tests.support.webui.client import Result, WebUI, decode, size_of_checkpoints, skip_without_infotexts
from tests.support.webui.files import Files
from tests.support.webui.formats import DIALECTS, FORMATS, LORA, PREFIX, Tensors, kohya
from tests.support.webui.results import NEAR, assert_same, delta_keys, plot, refusal, status, texts_of

LBW = {
    "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
    "0.5,1,0.25,0,1,0,0.5,1,0.75,1,0.25,0,1,-0.5,1,0.5,0.5": None,
    ",".join(str(round(0.2 + 0.06 * i, 2)) for i in range(26)): None,
    "0,1,0.5,1,0.25,1,0.5,1,0.75,1,0.5,1": None,
}
IN, OUT = ([f"{side}{i:02}" for i in range(12)] for side in ("IN", "OUT"))
# Values by how many there are, as the extension that introduced them orders them.
ORDER = {
    26: ["BASE", *IN, "M00", *OUT],
    17: ["BASE", *(IN[i] for i in (1, 2, 4, 5, 7, 8)), "M00", *OUT[3:]],
    12: ["BASE", *(IN[i] for i in (4, 5, 7, 8)), "M00", *OUT[:6]],
}


@pytest.fixture(scope="module")
def size() -> Size:
    return FULL if size_of_checkpoints() == "full" else TINY


@pytest.fixture(scope="module")
def folder(files: Files) -> Path | None:
    place = os.environ.get("WEBUI_DIR")
    return Path(place) / "models/Lora" if place else None


@pytest.fixture(scope="module", autouse=True)
def made(running: WebUI, folder: Path | None, size: Size, files: Files) -> None:
    """Put all files there are into the WebUI's folder."""
    if folder is None:
        return
    formats.make_formats(folder, size)
    by_block = replace(LORA, name=kohya(original=True)).tensors(size)
    for i, weights in enumerate(LBW):
        formats.write(folder / f"{PREFIX}blocks-{i}.safetensors", scaled(by_block, weights))
    for name, (tensors, _) in OTHER_FAMILIES.items():
        formats.write(folder / f"{PREFIX}other-{name}.safetensors", tensors())
    for name, part in EMBEDDINGS.items():
        vectors = 0.8 * draw("embedding", (3, 768))  # those of the user's own embedding
        bundle = {f"bundle_emb.{PREFIX}word-{name}.{part}": vectors}
        formats.write(folder / f"{PREFIX}bundle-{name}.safetensors", {**FORMATS["lora"].tensors(size), **bundle})
    for name, vectors in (("one", draw("one", (1, 768))), ("one-flat", draw("one", (1, 768))[0])):
        bundle = {f"bundle_emb.{PREFIX}word.emb_params": vectors}
        formats.write(folder / f"{PREFIX}bundle-{name}.safetensors", {**FORMATS["lora"].tensors(size), **bundle})
    for name, (tensors, _) in PARTLY.items():
        formats.write(folder / f"{PREFIX}partly-{name}.safetensors", {**FORMATS["loha"].tensors(size), **tensors})
    running.post("/sdapi/v1/refresh-loras", {})


@pytest.fixture(scope="module")
def plain(running: WebUI) -> Result:
    return running.generate()


def native(webui: WebUI, *tags: str, **changes: Any) -> Result:
    """The WebUI's own networks."""
    prompt = changes.pop("prompt", webui.defaults["prompt"])
    return webui.generate(prompt=" ".join([prompt, *(f"<lora:{PREFIX}{tag}>" for tag in tags)]), **changes)


def ours(webui: WebUI, files: Files, *picks: str, **settings: Any) -> Result:
    """The same as a delta."""
    return webui.generate(files.delta(loras=", ".join(PREFIX + pick for pick in picks), **settings))


def assert_differs(a: Result, b: Result) -> None:
    assert np.abs(a.pictures - b.pictures).max() > 10 * NEAR


def needs_automatic1111(webui: WebUI, reads: str) -> None:
    """Skip a comparison with Forge, whose own network code does not read what is compared, or reads it otherwise."""
    if webui.get("/delta-sampling/status")["host"] != "AUTOMATIC1111":
        pytest.skip(f"this WebUI's own code {reads}")


OTHERWISE = {"norms": "reads no norms", "lokr-tucker": "leaves out a LoKr's alpha where there is a Tucker core"}


# Of Forge Neo alone, by how tags begin.
OTHERWISE_IN_NEO = {
    "oft-constraint:": "counts OFT's constraint once, and not for each output",
    "oft-rescale:": "leaves out OFT's rescale",
    "oft-both:": "leaves out OFT's rescale",
    "boft-both:": "counts BOFT's constraint once, and not for each output",
    "boft:0.4:": "counts BOFT's weight twice",
}


def assert_as_native(webui: WebUI, files: Files, plain: Result, tags: list[str], picks: list[str]) -> None:
    host = webui.get("/delta-sampling/status")["host"]
    for tag in tags:
        if reads := OTHERWISE.get(tag.split(":")[0]):
            needs_automatic1111(webui, reads)
        neo = next((reads for start, reads in OTHERWISE_IN_NEO.items() if tag.startswith(start)), None)
        if neo and host == "Forge Neo":
            pytest.skip(f"this WebUI's own code {neo}")
    wanted, got = native(webui, *tags), ours(webui, files, *picks)
    if host != "AUTOMATIC1111" and np.array_equal(wanted.pictures, plain.pictures):
        pytest.skip("this WebUI does not read the format")
    assert_differs(wanted, plain)
    assert_same(got, wanted)


# Formats.


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_read_as_the_webui_reads_it(
    webui: WebUI, files: Files, size: Size, plain: Result, name: str
) -> None:
    assert_as_native(webui, files, plain, [f"{name}:1"], [name])
    form = FORMATS[name]
    text = sum(layer.text for layer in form.layers(size))
    unet = len(form.layers(size)) - text
    what = f"({form.algorithm}) adapts {unet} layers of the UNet and {text} of the text encoder."
    assert status(webui)[1] == f"{PREFIX}{name}.{form.ending} {what}"


@pytest.mark.parametrize("name", DIALECTS)
def test_a_dialect_is_another_spelling(webui: WebUI, files: Files, plain: Result, name: str) -> None:
    """The WebUI's own code does not read these."""
    wanted, got = ours(webui, files, DIALECTS[name][0]), ours(webui, files, name)
    assert_differs(wanted, plain)
    assert np.abs(got.pictures - wanted.pictures).max() <= (0 if name != "kohya-oft-diffusers" else NEAR)
    assert "match no layer" not in status(webui)[1]


WEIGHTED = ["lora", "loha", "lokr-both-low", "ia3-outputs", "full-bias", "norms", "oft-rescale", "boft", "dora-lora"]


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_of_text_encoder_and_unet(webui: WebUI, files: Files, plain: Result, name: str) -> None:
    assert_as_native(webui, files, plain, [f"{name}:0.4:0.8"], [f"{name}:0.8:te=0.4"])


def test_named_and_negative_weights(webui: WebUI, files: Files, plain: Result) -> None:
    assert_as_native(webui, files, plain, ["lora:te=0:unet=-0.5"], ["lora:te=0:unet=-0.5"])


@pytest.mark.parametrize("name", ["lora", "lora-no-alpha"])
@pytest.mark.parametrize("rank", [1, 3])
def test_some_ranks_of_a_dylora(webui: WebUI, files: Files, plain: Result, name: str, rank: int) -> None:
    needs_automatic1111(webui, "knows no dyn=")
    assert_as_native(webui, files, plain, [f"{name}:1:dyn={rank}"], [f"{name}:1:dyn={rank}"])
    assert_differs(ours(webui, files, f"{name}:1:dyn={rank}"), ours(webui, files, name))


# AUTOMATIC1111 lets a network that reads the weights ((IA)^3, GLoRA, OFT, DoRA) see what those before it have made of
# them, so that their order counts; here, as in LyCORIS, each is a difference to the base.  These do not read them.
SEVERAL = [("lora:0.5", "loha:0.4", "lokr-second-low:0.4"), ("full-bias:0.5", "norms:0.5", "locon-tucker:0.5")]


@pytest.mark.parametrize("several", SEVERAL, ids=" ".join)
def test_several_at_once_in_any_order(webui: WebUI, files: Files, plain: Result, several: tuple[str, ...]) -> None:
    assert_as_native(webui, files, plain, [*several], [*several])
    assert_as_native(webui, files, plain, [*several], [*reversed(several)])


# Bundled embeddings.

EMBEDDINGS = {"a1111": "string_to_param.*", "flat": "emb_params", "clip": "clip_l"}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_an_embedding_that_came_with_a_lora(webui: WebUI, files: Files, name: str) -> None:
    """The side model knows its name; the main one, which does not, is given the user's own, of the same vectors."""
    needs_automatic1111(webui, "reads no embeddings that came with a LoRA")
    word = f"a {PREFIX}word-{name} on a mat"
    wanted = native(webui, f"bundle-{name}:1", prompt=word)
    settings = files.delta(loras=f"{PREFIX}bundle-{name}", prompt=word)
    got = webui.generate(settings, prompt=f"a {files.embedding} on a mat")
    assert_differs(wanted, native(webui, "lora:1", prompt=word))
    assert_same(got, wanted)
    assert f"contains the embedding {PREFIX}word-{name}." in status(webui)[1]


def test_a_single_vector_needs_no_dimension_of_its_own(webui: WebUI, files: Files) -> None:
    word = f"a {PREFIX}word on a mat"
    one, flat = ours(webui, files, "bundle-one", prompt=word), ours(webui, files, "bundle-one-flat", prompt=word)
    assert np.array_equal(one.pictures, flat.pictures)
    assert_differs(one, ours(webui, files, "lora", prompt=word))


def test_its_name_is_forgotten_with_the_lora(webui: WebUI, files: Files) -> None:
    word = f"a {PREFIX}word-flat on a mat"
    before = ours(webui, files, "lora", prompt=word)
    with_it = ours(webui, files, "bundle-flat", prompt=word)
    assert_differs(with_it, before)
    assert np.array_equal(ours(webui, files, "lora", prompt=word).pictures, before.pictures)


# Block weights and ranges.


def scaled(tensors: Tensors, weights: str) -> Tensors:
    """Multiply what each block's factors make by the block's weight."""
    values = [float(value) for value in (LBW[weights] or weights).split(",")]
    shares = dict(zip(ORDER[len(values)], values))
    blocks = formats.blocks_of(tensors)
    return {
        # Blocks that a list leaves out count as 0, what is in no block as 1.
        key: tensor * (shares.get(blocks[key], 0.0) if blocks[key] else 1.0) if "lora_up" in key else tensor
        for key, tensor in tensors.items()
    }


@pytest.mark.parametrize("number", range(len(LBW)))
def test_block_weights(webui: WebUI, files: Files, plain: Result, number: int) -> None:
    weights = list(LBW)[number]
    assert_as_native(webui, files, plain, [f"blocks-{number}:0.8"], [f"ldm-names:0.8:lbw={weights}"])
    assert_differs(ours(webui, files, f"ldm-names:0.8:lbw={weights}"), ours(webui, files, "ldm-names:0.8"))


def test_block_weights_and_a_weight_for_the_text_encoder(webui: WebUI, files: Files, plain: Result) -> None:
    weights = list(LBW)[1]
    assert_as_native(webui, files, plain, ["blocks-1:0.4:0.8"], [f"ldm-names:0.8:te=0.4:lbw={weights}"])


@pytest.mark.parametrize(("start", "end"), [(0.4, 1), (0, 0.6), (0.3, 0.7), (0.5, 0.5)])
@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M", "DDIM"])
def test_the_range_of_the_only_lora_is_the_deltas(
    webui: WebUI, files: Files, plain: Result, sampler: str, start: float, end: float
) -> None:
    changes = {"sampler_name": sampler, "steps": 6}
    of_delta = webui.generate(files.delta(loras=f"{PREFIX}lora", start=start, end=end), **changes)
    of_lora = webui.generate(files.delta(loras=f"{PREFIX}lora:1:start={start}:end={end}"), **changes)
    assert np.array_equal(of_delta.pictures, of_lora.pictures)
    whole, nothing = webui.generate(files.delta(loras=f"{PREFIX}lora"), **changes), webui.generate(**changes)
    assert not np.array_equal(of_lora.pictures, whole.pictures)
    if start < end:
        assert not np.array_equal(of_lora.pictures, nothing.pictures)


def test_two_loras_one_after_the_other(webui: WebUI, files: Files) -> None:
    """A LoRA that ends early does not count later, and one that starts late not before."""
    early, late = (f"{PREFIX}lora:1:end=0.4", f"{PREFIX}loha:1:start=0.6")
    both = webui.generate(files.delta(loras=f"{early}, {late}"))
    either = [webui.generate(files.delta(loras=one)) for one in (early, late)]
    always = webui.generate(files.delta(loras=f"{PREFIX}lora, {PREFIX}loha"))
    everything = [both, always, *either]
    for i, a in enumerate(everything):
        assert not any(np.array_equal(a.pictures, b.pictures) for b in everything[i + 1 :])
    again = webui.generate(files.delta(loras=f"{late}, {early}"))
    assert_same(again, both)


# Files for something else, and files of which a part fits.


def matrix(*shape: int) -> torch.Tensor:
    return 0.1 * draw("other", shape)


def pair(layer: str, down: str, up: str, out: int, inputs: int) -> Callable[[], Tensors]:
    return lambda: {f"{layer}.{down}": matrix(4, inputs), f"{layer}.{up}": matrix(out, 4)}


KOHYA = ("lora_down.weight", "lora_up.weight")
PEFT = ("lora_A.weight", "lora_B.weight")
ATTN = "down_blocks.1.attentions.0.transformer_blocks.{}.attn2.to_k"
ATTN_ = ATTN.replace(".", "_")
SD2, SDXL, FLUX, SD3 = r"SD 2\.x", "SDXL", "Flux", "SD 3"
OTHER_FAMILIES: dict[str, tuple[Callable[[], Tensors], str]] = {
    "kohya-sd2": (pair(f"lora_unet_{ATTN_.format(0)}", *KOHYA, 640, 1024), SD2),
    "kohya-sdxl": (pair(f"lora_unet_{ATTN_.format(0)}", *KOHYA, 640, 2048), SDXL),
    "kohya-sdxl-deep": (pair("lora_unet_input_blocks_7_1_transformer_blocks_9_attn1_to_q", *KOHYA, 1280, 1280), SDXL),
    "kohya-sdxl-text": (pair("lora_te2_text_model_encoder_layers_0_mlp_fc1", *KOHYA, 5120, 1280), SDXL),
    "diffusers-sd2": (pair(f"unet.{ATTN.format(0)}", *PEFT, 640, 1024), SD2),
    "diffusers-sdxl": (pair(f"unet.{ATTN.format(1)}", *PEFT, 640, 2048), SDXL),
    "diffusers-sdxl-text": (pair("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", *PEFT, 5120, 1280), SDXL),
    "peft-sdxl": (pair(f"base_model.model.{ATTN.format(0)}", *PEFT, 640, 2048), SDXL),
    "lycoris-lokr-sdxl": (
        lambda: {
            f"lycoris_unet_{ATTN_.format(0)}.lokr_w1": matrix(4, 4),
            f"lycoris_unet_{ATTN_.format(0)}.lokr_w2": matrix(160, 512),
        },
        SDXL,
    ),
    "lycoris-loha-sd2": (
        lambda: {
            f"lycoris_unet_{ATTN_.format(0)}.hada_w{i}_{side}": matrix(*shape)
            for i in (1, 2)
            for side, shape in (("a", (640, 4)), ("b", (4, 1024)))
        },
        SD2,
    ),
    "ia3-sdxl": (
        lambda: {
            f"lora_unet_{ATTN_.format(1)}.weight": matrix(640),
            f"lora_unet_{ATTN_.format(1)}.on_input": torch.tensor(0.0),
        },
        SDXL,
    ),
    "kohya-flux": (pair("lora_unet_double_blocks_0_img_attn_qkv", *KOHYA, 9216, 3072), FLUX),
    "diffusers-flux": (pair("transformer.single_transformer_blocks.0.attn.to_q", *PEFT, 3072, 3072), FLUX),
    "kohya-sd3": (pair("lora_unet_joint_blocks_0_context_block_attn_qkv", *KOHYA, 4608, 1536), SD3),
    "diffusers-sd3": (pair("transformer.transformer_blocks.0.attn.to_q", *PEFT, 1536, 1536), SD3),
    "kohya-oft-sdxl": (
        lambda: {"oft_unet_input_blocks_7_1_transformer_blocks_9_attn1_to_q.oft_blocks": matrix(160, 8, 8)},
        SDXL,
    ),
}


@pytest.mark.parametrize("name", OTHER_FAMILIES)
def test_a_file_for_another_family_is_named_as_such(webui: WebUI, files: Files, plain: Result, name: str) -> None:
    sentence = refusal(webui, files.delta(loras=f"{PREFIX}other-{name}"))
    family, file = OTHER_FAMILIES[name][1], rf"{PREFIX}other-{name}\.safetensors"
    assert re.match(rf"{file} is made for .*{family}.*, and one for the base model", sentence)
    assert "\n" not in sentence
    assert np.array_equal(webui.generate().pictures, plain.pictures)


def test_another_family_is_refused_before_sampling(webui: WebUI, files: Files) -> None:
    """A run of so many steps would take minutes."""
    started = time.perf_counter()
    refusal(webui, files.delta(loras=f"{PREFIX}other-kohya-sdxl"), steps=150, width=512, height=512)
    assert time.perf_counter() - started < 20


# What a good file holds besides, and how many of its keys match no layer.
PARTLY: dict[str, tuple[Tensors, int]] = {
    "stray": ({f"lora_unet_{ATTN_.format(0)}_x.lora_{side}.weight": matrix(4, 4) for side in ("up", "down")}, 2),
    "notes": ({"some.number": matrix(3), "training_step": matrix(1)}, 2),
}


@pytest.mark.parametrize("name", PARTLY)
def test_a_file_that_fits_in_part_is_used_and_what_does_not_is_counted(
    webui: WebUI, files: Files, plain: Result, size: Size, name: str
) -> None:
    wanted, got = ours(webui, files, "loha"), ours(webui, files, f"partly-{name}")
    assert np.array_equal(got.pictures, wanted.pictures)
    assert_differs(got, plain)
    total = len(FORMATS["loha"].tensors(size)) + len(PARTLY[name][0])
    assert status(webui)[1].endswith(f"; {PARTLY[name][1]} of its {total} keys match no layer.")


WRONG_RECIPES = {
    "block weights of another number": (":1:lbw=1,0,1", r"block weights '1,0,1' cannot be read"),
    "an unknown preset": (":1:lbw=MIDDLE", r"block weights 'MIDDLE' cannot be read: NONE, ALL, .* 12, 17, 20 or 26"),
    "a range the wrong way round": (":1:start=0.8:end=0.2", r"start 0\.8 and end 0\.2: two shares"),
    "no ranks": (":1:dyn=0", r"dyn=0: a whole number of ranks, 1 or more, is needed"),
    "an unknown option": (":1:speed=3", r"cannot be read at 'speed=3'"),
}


@pytest.mark.parametrize("case", WRONG_RECIPES.values(), ids=WRONG_RECIPES)
def test_a_recipe_that_cannot_be_read_is_quoted(webui: WebUI, files: Files, case: tuple[str, str]) -> None:
    sentence = refusal(webui, files.delta(loras=f"{PREFIX}lora{case[0]}"))
    assert re.search(case[1], sentence), sentence
    assert "\n" not in sentence


def test_ranks_of_what_has_none(webui: WebUI, files: Files) -> None:
    sentence = refusal(webui, files.delta(loras=f"{PREFIX}loha:1:dyn=2"))
    assert "has no ranks to choose from (dyn=2)" in sentence


# Recipes in tags, infotext and plots.

RECIPE = "0.8:te=0.4:lbw=MIDD:start=0.2:end=0.9"
LISTED = "0.8:lbw=0.5,1,0.25,0,1,0,0.5,1,0.75,1,0.25,0,1,-0.5,1,0.5,0.5"


@pytest.mark.parametrize("recipe", [RECIPE, LISTED], ids=["preset", "values"])
def test_a_tag_says_what_the_api_says(webui: WebUI, files: Files, recipe: str) -> None:
    wanted = webui.generate(files.delta(**{"lambda": 1.2, "loras": f"{PREFIX}lora:{recipe}"}))
    tag = f"<delta:{PREFIX}lora:1.2:weight={recipe}>"
    got = webui.generate({"enabled": False, "base": files.sd1}, prompt=f"{webui.defaults['prompt']} {tag}")
    assert np.array_equal(got.pictures, wanted.pictures)
    assert texts_of(got.infotexts[0]) == texts_of(wanted.infotexts[0])


def test_an_infotext_restores_a_recipe(webui: WebUI, files: Files) -> None:
    skip_without_infotexts(webui)
    recipe = f"{PREFIX}lora:{RECIPE}, {PREFIX}loha:{LISTED}, {PREFIX}lora-no-alpha:1:dyn=2"
    first = webui.generate(files.delta(loras=recipe))
    assert delta_keys(first.infotexts[0])["Delta LoRAs"] == recipe
    answer = webui.post("/sdapi/v1/txt2img", {"infotext": first.infotexts[0]})
    again = np.asarray(decode(answer["images"][0]).convert("RGB"), int)
    assert delta_keys(json.loads(answer["info"])["infotexts"][0])["Delta LoRAs"] == recipe
    assert np.array_equal(again, first.pictures[0])


def test_a_plot_over_recipes(webui: WebUI, files: Files) -> None:
    recipes = [f"{PREFIX}lora:{RECIPE}", f"{PREFIX}lora:{LISTED}", f"{PREFIX}loha:0.5:end=0.5"]
    cells = plot(webui, files.delta(), {"[Delta] LoRAs": ", ".join(recipes)})
    assert [texts_of(cell.infotext)["Delta LoRAs"] for cell in cells] == recipes
    for cell, recipe in zip(cells, recipes):
        assert np.array_equal(cell.picture, webui.generate(files.delta(loras=recipe)).pictures[0])


# What stays loaded.


def fastest(generate: Callable[[int], object], times: int = 3) -> float:
    taken = []
    for i in range(times):
        started = time.perf_counter()
        generate(i)
        taken.append(time.perf_counter() - started)
    return min(taken)


def test_nothing_is_loaded_anew_for_a_weight_or_another_lora(webui: WebUI, files: Files) -> None:
    weights, loras = [0.5, 0.6, 0.7, 0.8], [f"{PREFIX}lora", f"{PREFIX}loha"]

    def generate(recipe: str) -> None:
        webui.generate(files.delta(loras=recipe), steps=1)

    def load_anew(_: int) -> None:
        webui.options(delta_sampling_cache=0)
        generate(loras[0])
        webui.options(delta_sampling_cache=1)

    anew = fastest(load_anew)
    generate(loras[0])
    same = fastest(lambda _: generate(loras[0]))
    weight = fastest(lambda i: generate(f"{loras[0]}:{weights[i]}"))
    swap = fastest(lambda i: generate(loras[(i + 1) % 2]))
    print(f"the same {same:.2f} s, another weight {weight:.2f} s, another LoRA {swap:.2f} s, all anew {anew:.2f} s")
    assert max(weight, swap) - same < 0.5 * (anew - same)
