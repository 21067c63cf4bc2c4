"""Requests: API arguments, prompt tags, infotext, and the two passes of hires fix."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_delta import __version__
from lib_delta.errors import SettingError
from lib_delta.request.fields import SETTINGS, UNITS
from lib_delta.request.infotext import from_infotext, infotext_labels
from lib_delta.request.passes import Passes
from lib_delta.request.request import Request
from lib_delta.request.schema import schema
from lib_delta.request.setting_choices import BRIDGES


def test_named_and_positional_arguments_give_the_same_request():
    named = {"lambda": 1.5, "start": 0.1, "end": 0.9, "base": "v1-5", "loras": ["a:0.5", "b"], "hires": "first pass"}
    positional = [True, 1.5, 0.1, 0.9, "constant", 1, 1, "v1-5", "None", "a:0.5, b", "", "", "", "first pass"]
    assert Request.from_arguments([named, 1.0, "padding"]) == Request.from_arguments(positional)
    assert Request.from_arguments([]) == Request()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([{"lamda": 1}], "no argument 'lamda': is 'lambda' meant?"),
        ([{"zzz": 1}], "no argument 'zzz', only enabled, lambda"),
        ([{"lambda": "1"}], "'lambda' must be a number from 0 to 10, not \"1\""),
        ([{"lambda": 11}], "'lambda' must be a number from 0 to 10, not 11"),
        ([{"lambda": float("nan")}], "'lambda' must be a number"),
        ([{"lambda": True}], "'lambda' must be a number"),
        ([{"enabled": 1}], "'enabled' must be true or false, not 1"),
        ([{"curve": "zigzag"}], "'curve' must be one of constant, linear, cosine, sigmoid"),
        ([{"base": 3}], "'base' must be a text, not 3"),
        ([{"start": 0.8, "end": 0.2}], "start .0.8. must not come after end"),
        ([{"loras": "a:b"}], "LoRA pick 'a:b' has weight 'b': a number is needed"),
        ([{"loras": ":1"}], "has no name"),
        ([{"loras": "a:1:2"}], "cannot be read at '2'"),
        ([{"loras": ["a", 1]}], "'loras' must be a text"),
        ([True] * 22, "takes 21 arguments, and 15 more for each unit: 22 were given"),
        (["yes"], "'enabled' must be true or false"),
    ],
)
def test_errors_name_the_key(arguments, sentence):
    with pytest.raises(SettingError, match=sentence):
        Request.from_arguments(arguments)


def test_the_schema_has_every_key_and_its_defaults_are_accepted():
    described = schema()["properties"]
    assert list(described) == [f.key for f in (*SETTINGS, UNITS)]
    defaults = {key: about["default"] for key, about in described.items()}
    assert Request.from_named(json.loads(json.dumps(defaults))) == Request(enabled=True)


def test_tags_enable_the_delta_and_join_the_picks_of_an_accordion_that_is_on():
    off = Request(loras="left:0.3").with_tags([["moxin", "1.5"]])
    assert (off.enabled, off.strength, off.loras) == (True, 1.5, "moxin")
    on = Request(enabled=True, strength=0.7, loras="left:0.3").with_tags([["a", "weight=0.8", "te=0"]])
    assert (on.strength, on.loras) == (0.7, "left:0.3, a:0.8:te=0")
    assert Request(loras="x").with_tags([]) == Request(loras="x")


def test_a_pasted_picture_with_a_tag_has_its_lora_once():
    made = Request().with_tags([["moxin", "1.5", "weight=0.8"]])
    pasted = Request(enabled=True, strength=1.5, loras=made.infotext()["Delta LoRAs"])
    assert pasted.with_tags([["moxin", "1.5", "weight=0.8"]]) == made


@pytest.mark.parametrize(
    ("tags", "sentence"),
    [
        ([["a", "1"], ["b", "2"]], "ask for lambda 1 and 2"),
        ([["a", "x"]], "<delta:a:x> has lambda 'x'"),
        ([[""]], "cannot be read"),
        ([["a", "1", "2"]], "cannot be read"),
        ([["a", "11"]], "'lambda' must be a number from 0 to 10"),
    ],
)
def test_invalid_tags_are_refused(tags, sentence):
    with pytest.raises(SettingError, match=sentence):
        Request().with_tags(tags)


NAMES = (
    st.text(st.characters(whitelist_categories=("L", "N"), whitelist_characters="_-. ()"), min_size=1)
    .map(str.strip)
    .filter(bool)
)


@given(
    st.builds(
        Request,
        enabled=st.just(True),
        strength=st.integers(0, 200).map(lambda n: n / 20),
        start=st.integers(0, 10).map(lambda n: n / 20),
        end=st.integers(10, 20).map(lambda n: n / 20),
        curve=st.sampled_from(["constant", "cosine"]),
        base=NAMES,
        prompt=st.sampled_from(["", "a, (cat:1.2)"]),
        hires=st.sampled_from(["both", "first pass"]),
        loras=st.sampled_from(["", "moxin:0.8, lineart:1:te=0.5"]),
    )
)
def test_infotext_restores_everything(request_):
    values = request_.infotext({request_.base: "abc1230000", "moxin": "def456"})
    assert {f.name: from_infotext(values, f.name) for f in fields(Request)} == {
        f.name: getattr(request_, f.name) for f in fields(Request)
    }


def test_infotext_is_short_and_empty_without_a_delta():
    assert Request(strength=2).infotext() == {}
    assert Request(enabled=True).infotext() == {
        "Delta lambda": "1",
        "Delta bridge": "stitched",
        "Delta version": __version__,
    }
    values = Request(enabled=True, base="v1-5", loras="moxin:0.8").infotext({"v1-5": "0123456789", "moxin": "bbb"})
    assert values == {
        "Delta lambda": "1",
        "Delta base": "v1-5 [0123456789]",
        "Delta LoRAs": "moxin:0.8",
        "Delta bridge": "stitched",
        "Delta LoRA hashes": "moxin: bbb",
        "Delta version": __version__,
    }
    assert from_infotext({}, "enabled") is False
    assert all(len(label) < 30 and label.startswith("Delta ") for label in infotext_labels().values())


def test_importing_requests_imports_no_torch():
    code = "import sys, lib_delta.request.request; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("size", ["automatic", "picture", "640", 640])
def test_sizes_of_the_side_model(size):
    request = Request.from_named({"size": size})
    assert request.side_size == (640 if str(size).isdecimal() else size)
    assert from_infotext(request.infotext(), "size") == str(size)


@pytest.mark.parametrize("size", ["", "large", "63", "5000", "64.5", True, 0.5])
def test_wrong_sizes_of_the_side_model_are_refused(size):
    with pytest.raises(SettingError, match="'size' must be automatic, picture or a whole number of pixels"):
        Request.from_named({"size": size})


def test_a_picture_whose_text_names_no_bridge_restores_the_legacy_bridge():
    assert from_infotext({"Delta lambda": "1"}, "bridge") == "same_snr"
    for bridge in BRIDGES:
        assert from_infotext(Request(enabled=True, bridge=bridge).infotext(), "bridge") == bridge


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
def test_infotext_without_a_finite_number_gives_the_default(text: str) -> None:
    assert from_infotext({"Delta lambda": text}, "strength") == 1.0


def test_stages_include_a_lora_that_is_active_only_between_two_others():
    request = Request(enabled=True, loras="a:1:end=0.4, b:1:start=0.4:end=0.6, c:1:start=0.6")
    assert request.stages() == {
        *((True, False, False), (True, True, False), (False, True, False)),
        *((False, True, True), (False, False, True)),
    }


@pytest.mark.parametrize("name", ["name [x]", "name [v2]", "name [0123456789]", "name []"])
@pytest.mark.parametrize("known", [False, True])
def test_a_name_that_ends_in_brackets_is_restored_whole(name, known):
    values = Request(enabled=True, base=name).infotext({name: "abcdef0123"} if known else {})
    assert from_infotext(values, "base") == name


def test_infotext_writes_no_brackets_without_a_hash():
    assert Request(enabled=True, base="name [v2]").infotext()["Delta base"] == "name [v2]"
    assert from_infotext({"Delta base": "name [v2] []"}, "base") == "name [v2]", "as earlier versions wrote it"


def test_a_pass_without_delta_adds_no_loras_and_infotext_omits_those_of_an_accordion_that_is_off():
    off = Request(loras="c")
    first, hires = Request(enabled=True, loras="a"), Request(enabled=True, strength=0, loras="b")
    assert [pick.name for pick in Passes(first, hires).picks()] == ["a"]
    both = Passes(first, Request(enabled=True, loras="b"))
    assert both.as_infotext(off).loras == "" and both.as_infotext(replace(off, enabled=True)).loras == "c"
