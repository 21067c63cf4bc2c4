"""LoRA recipes, timelines, and block weights."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lib_delta.adapters.block_weights import LAYOUTS, PRESETS, BlockWeights
from lib_delta.errors import SettingError
from lib_delta.request.lora_recipe import Pick, format_picks, parse_picks
from lib_delta.request.request import Request


def test_recipes_are_parsed_as_people_write_them() -> None:
    assert parse_picks("moxin:0.8, lineart:1:te=0.5\n c ") == (Pick("moxin", 0.8), Pick("lineart", 1, 0.5), Pick("c"))
    assert parse_picks("") == parse_picks(" , ") == ()
    (pick,) = parse_picks("a:0.5:te=0:lbw=MIDD:start=0.2:end=0.8:dyn=4")
    assert pick == Pick("a", 0.5, 0.0, "MIDD", 0.2, 0.8, 4)
    assert parse_picks("a:unet=0.5:te=1") == (Pick("a", 0.5, 1.0),)


def test_tags_of_the_webui_are_picks_too() -> None:
    assert parse_picks("<lora:moxin:0.8>") == (Pick("moxin", 0.8),)
    assert parse_picks("a:0.5 <lora:my, b:0.2:0.7> <lyco:c:1:dyn=4>") == (
        Pick("a", 0.5),
        Pick("my, b", 0.7, 0.2),
        Pick("c", 1.0, rank=4),
    )


def test_recipes_are_as_short_as_possible() -> None:
    assert format_picks([Pick("a"), Pick("b", 0.8), Pick("c", 1.0, 0.5)]) == "a, b:0.8, c:1:te=0.5"


def test_a_list_of_block_weights_is_not_split_at_its_commas() -> None:
    values = ",".join(["1", "0.5", *["0"] * 15])
    first, second = parse_picks(f"a:1:lbw={values}:end=0.5, b")
    assert first == Pick("a", blocks=values, end=0.5) and second == Pick("b")
    assert parse_picks(f"a:1:lbw={values.replace(',', ', ')}, b") == (Pick("a", blocks=values), Pick("b"))


TEXTS = st.text(min_size=1, max_size=12).map(str.strip).filter(bool)
NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)
SHARES = st.floats(0, 1)
BLOCKS = st.sampled_from(["", "MIDD", "ALL0.5", ",".join(["0.5"] * 17), ",".join(["1"] * 12), ",".join(["-2"] * 26)])
PICKS = st.builds(
    lambda name, weight, text, blocks, shares, rank: Pick(name, weight, text, blocks, *sorted(shares), rank),
    TEXTS,
    NUMBERS,
    st.none() | NUMBERS,
    BLOCKS,
    st.tuples(SHARES, SHARES),
    st.none() | st.integers(1, 10**6),
)


@given(st.lists(PICKS, max_size=4))
@example([Pick("a, b:c"), Pick("1.5"), Pick('say "x"'), Pick("back\\slash"), Pick("a=b")])
@example([Pick("a", blocks=",".join(["1"] * 17)), Pick("0.5"), Pick("7", 2.0)])
def test_recipes_round_trip_exactly(picks: list[Pick]) -> None:
    assert list(parse_picks(format_picks(picks))) == picks


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("a:b", "LoRA pick 'a:b' has weight 'b': a number is needed"),
        (":1", "LoRA pick ':1' has no name"),
        ("a:1:2", "cannot be read at '2'"),
        ("a:1:xx=2", "cannot be read at 'xx=2'"),
        ("a:1:te=1:te=2", "cannot be read at 'te=2'"),
        ("a:nan", "has weight 'nan': a number is needed"),
        ("a:1:start=0.8:end=0.2", "has start 0.8 and end 0.2"),
        ("a:1:end=2", "has start 0 and end 2"),
        ("a:1:dyn=0", "has dyn=0: a whole number"),
        ("a:1:lbw=NOSUCH", "block weights 'NOSUCH' cannot be read"),
        ("a:1:lbw=1,1,1", "block weights '1,1,1' cannot be read"),
        ("a:1:lbw=R,1,1,1,1,1,1,1,1,1,1,1", "cannot be read"),
    ],
)
def test_errors_quote_the_invalid_part(recipe: str, sentence: str) -> None:
    with pytest.raises(SettingError) as error:
        parse_picks(recipe)
    assert sentence in str(error.value)


def test_each_item_of_an_api_list_is_one_pick() -> None:
    request = Request.from_arguments([{"loras": ["my, lora:0.5", "b:1:te=0"]}])
    assert request.picks() == (Pick("my, lora", 0.5), Pick("b", 1.0, 0.0))


def test_prompt_tags_take_the_same_options() -> None:
    tag = ["moxin", "1.2", "weight=0.8", "te=0.5", "lbw=MIDD", "end=0.5"]
    request = Request().with_tags([tag])
    assert request.strength == 1.2 and request.picks() == (Pick("moxin", 0.8, 0.5, "MIDD", 0.0, 0.5),)


# Which LoRAs are active when.


def test_stages_include_every_point_of_a_run() -> None:
    request = Request(enabled=True, loras="a:1:end=0.5, b:1:start=0.3:end=0.7, c")
    stages = request.stages()
    assert stages == {(True, False, True), (True, True, True), (False, True, True), (False, False, True)}
    assert all(request.active(progress / 100) in stages for progress in range(101))
    assert Request().stages() == {()}


# Block weights: the UNet of SD 1.x has 12 input blocks, a middle block and 12 output blocks.


@pytest.mark.parametrize("count", LAYOUTS)
def test_each_value_weighs_its_block(count: int) -> None:
    blocks = BlockWeights.parse(",".join(str(i + 1) for i in range(count)))
    for i, name in enumerate(LAYOUTS[count]):
        path = f"{'input' if name.startswith('IN') else 'output'}_blocks.{int(name[-2:]) if i else 0}.0.x"
        path = "middle_block.1.x" if name == "M00" else path
        assert (blocks.text if name == "BASE" else blocks.at(path)) == i + 1
    named = set(LAYOUTS[count])
    assert {blocks.at(f"input_blocks.{i}.1.x") for i in range(12) if f"IN{i:02}" not in named} <= {0.0}


def test_layers_outside_the_blocks_keep_their_weight() -> None:
    blocks = BlockWeights.parse("NONE")
    assert blocks.at("time_embed.0") == blocks.at("out.2") == 1.0 and blocks.at("middle_block.0.in_layers.2") == 0.0


def test_presets_have_17_values() -> None:
    assert all(len(values.split(",")) == 17 for values in PRESETS.values())
    deep = BlockWeights.parse("OUTD")
    assert (deep.at("output_blocks.3.1.x"), deep.at("output_blocks.7.1.x"), deep.text) == (1.0, 0.0, 1.0)


def test_the_text_encoders_weight_includes_base() -> None:
    values = ",".join(["0.5", *["1"] * 16])
    assert Pick("a", 0.8, blocks=values).text_weight == 0.4
    assert Pick("a", 0.8, text=0.6, blocks=values).text_weight == 0.3


def test_importing_recipes_imports_no_torch() -> None:
    code = "import sys, lib_delta.request.lora_recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("text", ["moxin:0,8", "ink, moxin:1,25:te=0", "moxin:0.5:te=0,5"])
def test_a_decimal_comma_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match="write 0.8 with a point"):
        parse_picks(text)


def test_quoted_numbers_are_names() -> None:
    assert [pick.name for pick in parse_picks('moxin:0, 8, "9":0.5')] == ["moxin", "8", "9"]
