"""The demo, from its command line to its picture, on tiny models with random weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.controls import image_tensors, save, their_encoder
from tests.support.demo_models import EMOJI

pytest.importorskip("k_diffusion")
pytest.importorskip("diffusers")

from demo.__main__ import main, parser
from demo.embedded import SETTINGS
from demo.grid import GAP, Layout, draw_grid
from demo.samplers import NAMES
from demo.train.denoisers import BASE
from lib_delta.models.unet import UNet


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new" / "demo.png"


def embedded(models: Path, out: Path, *more: str) -> int:
    return main(["--models", str(models), "--out", str(out), "--steps", "3", "--prompt", "fox", *more])


def own(models: Path, out: Path, *more: str) -> int:
    files = ["--target", str(models / "target.safetensors"), "--base", str(models / "base.safetensors")]
    words = ["--tokenizer", str(models / "tokenizer"), "--device", "cpu", "--steps", "2"]
    # Of this size pictures are shown as they are; smaller ones are enlarged and sharpened, and so is their rounding.
    words += ["--size", "128"]
    return main([*files, *words, "--out", str(out), *more])


def cells(picture: Path, rows: int, columns: int, side: int = 64) -> np.ndarray:
    """Cut a grid into ``(rows, columns, cell, cell, 3)``."""
    layout = Layout.of(side)
    sheet = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert sheet.shape[:2] == (layout.corner(rows, columns)[1], layout.corner(rows, columns)[0])

    def cell(row: int, column: int) -> np.ndarray:
        x, y = layout.corner(row, column)
        return sheet[y : y + layout.cell, x : x + layout.cell]

    return np.stack([np.stack([cell(r, c) for c in range(columns)]) for r in range(rows)])


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on stderr: one line, and nothing of Python's."""
    said = [line for line in capsys.readouterr().err.splitlines() if "step/s]" not in line and "s/step]" not in line]
    (line,) = [line for line in said if line.startswith("demo: ")]
    assert not any("Traceback" in line for line in said)
    return line


def test_the_sweep_writes_a_grid_and_a_record_of_what_it_printed(
    models: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record_file = out.with_suffix(".json")
    options = ["--prompt", "Castle", "--lambdas", "0,2", "--sampler", "euler", "--json", str(record_file)]
    assert embedded(models, out, *options) == 0
    printed, record = capsys.readouterr().out, json.loads(record_file.read_text("utf-8"))

    rows = record["columns"]
    assert [row["column"] for row in rows] == ["base", "adapted", "target", "lambda 0", "lambda 2"]
    assert [row["evaluations"] for row in rows] == [3, 3, 3, 3, 6]
    assert all(0 <= row[mark] <= 1 for row in rows for mark in ("style", "content"))
    assert all(row["seconds"] > 0 for row in rows)
    for row in rows:
        assert f"{row['column']:11}{row['style']:8.2f}{row['content']:9.2f}{row['seconds']:8.1f} s" in printed
    assert record["settings"]["prompts"] == ["fox", "Castle"]
    assert [strength["value"] for strength in record["settings"]["strengths"]] == [0, 2]
    assert record["settings"]["sampler"] == "euler"
    assert str(out) in printed
    assert record["picture"] == str(out)

    grid = cells(out, rows=2, columns=5)
    base, adapted, target, zero, two = grid.transpose(1, 0, 2, 3, 4)
    assert (zero == target).all()
    assert (two != target).any()
    assert (adapted != base).any()
    assert (target[0] != target[1]).any()


def test_the_prompts_that_the_models_know_are_listed(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--models", str(models), "--list"]) == 0
    assert capsys.readouterr().out.split("\n")[:4] == [*EMOJI, "emoji 0"]


def test_an_unknown_prompt_gets_the_nearest_names_and_no_smear(
    models: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embedded(models, out, "--prompt", "castles") == 2
    assert "do not know 'castles': is 'castle' or 'cat face' meant?" in sentence(capsys)
    assert not out.exists()


def test_a_range_spares_the_source(models: Path, out: Path) -> None:
    record = out.with_suffix(".json")
    options = ["--steps", "4", "--lambdas", "1", "--range", "0.5", "1", "--cfg", "1", "--json", str(record)]
    assert embedded(models, out, *options) == 0
    target, delta = json.loads(record.read_text("utf-8"))["columns"][-2:]
    assert (target["evaluations"], delta["evaluations"]) == (4, 6)


def test_own_files_draw_what_the_embedded_models_draw(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs, record = tmp_path / "ours.png", tmp_path / "theirs.png", tmp_path / "own.json"
    same = [
        "--prompt",
        "castle",
        "--lambdas",
        "0,1.5",
        "--cfg",
        "3",
        "--source-cfg",
        "3",
        "--steps",
        "2",
        "--seed",
        "7",
        "--size",
        "128",
    ]
    assert main(["--models", str(models), "--out", str(ours), "--prompt", "fox", *same]) == 0
    lora = f"{models / 'lineart.safetensors'}:1.0"
    capsys.readouterr()
    assert own(models, theirs, "--lora", lora, "--prompt", "fox", *same, "--json", str(record)) == 0
    # One batch of both prompts, or one after the other: rounding differs.
    assert np.abs(cells(ours, 2, 5) - cells(theirs, 2, 5)).max() <= 2
    rows = json.loads(record.read_text("utf-8"))["columns"]
    assert [row["evaluations"] for row in rows] == [4, 4, 4, 4, 8]
    assert [row["style"] for row in rows] == [None] * 5
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["base", "-", "-"]


def test_own_files_take_weights_and_fine_tuned_checkpoints(models: Path, tmp_path: Path) -> None:
    pictures = {}
    lora, tuned = str(models / "lineart.safetensors"), str(models / "tuned.safetensors")
    for name, adapters in {
        "nothing": ["--lora", f"{lora}:0"],
        "merged": ["--lora", f"{lora}:0.4", "--lora", f"{lora}:0.6"],
        "bypass": ["--lora", lora, "--form", "bypass"],
        "tuned": ["--adapted", tuned],
    }.items():
        out = tmp_path / f"{name}.png"
        assert own(models, out, "--prompt", "fox", "--lambdas", "1", *adapters) == 0
        pictures[name] = cells(out, 1, 4)[0]
    for picture in (pictures["nothing"][1], pictures["merged"][0], pictures["tuned"][0]):
        # Where it is computed beside an adapted model, the base's sums are in another order.
        assert np.abs(picture - pictures["nothing"][0]).max() <= 1
    assert (pictures["nothing"][3] == pictures["nothing"][2]).all()
    assert np.abs(pictures["merged"] - pictures["bypass"]).max() <= 2
    assert np.abs(pictures["merged"][3] - pictures["merged"][2]).max() > 2
    assert np.abs(pictures["tuned"][3] - pictures["merged"][3]).max() > 2


def test_without_a_base_an_adapter_is_put_on_the_embedded_one(models: Path, tmp_path: Path) -> None:
    drawn = {}
    for name, options in {
        "as it is": [],
        "named": ["--lora", str(models / "lineart.safetensors")],
        "tuned": ["--adapted", str(models / "tuned.safetensors")],
    }.items():
        out = tmp_path / f"{name}.png"
        assert embedded(models, out, "--lambdas", "1", *options) == 0
        drawn[name] = cells(out, 1, 4)[0]
    assert (drawn["named"] == drawn["as it is"]).all()
    assert (drawn["tuned"][0] == drawn["as it is"][0]).all()
    assert (drawn["tuned"][1] != drawn["as it is"][1]).any()


def test_a_map_is_followed_beside_or_without_other_adapters(models: Path, tmp_path: Path) -> None:
    control = ["--control", str(models / "edges.png"), "--control-model", str(models / "edges.safetensors")]
    drawn = {}
    for name, arguments in {
        "map": control,
        "map by its own model": control[:2],
        "map above all": [*control, "--control-mode", "control"],
        "weight 0": [f"{control[0]}", f"{control[1]}:0", *control[2:]],
        "map and LoRA": [*control, "--lora", str(models / "lineart.safetensors")],
        "LoRA": ["--lora", str(models / "lineart.safetensors")],
    }.items():
        out = tmp_path / f"{name}.png"
        assert embedded(models, out, "--lambdas", "1", *arguments) == 0
        drawn[name] = cells(out, 1, 4)
    base, adapted, target, delta = range(4)
    assert (drawn["weight 0"][0, base] == drawn["weight 0"][0, adapted]).all()
    assert (drawn["weight 0"][0, target] == drawn["weight 0"][0, delta]).all()
    assert (drawn["map by its own model"] == drawn["map"]).all()
    for a, b in (
        ("map", "weight 0"),
        ("map", "map above all"),
        ("map", "LoRA"),
        ("map and LoRA", "map"),
        ("map and LoRA", "LoRA"),
    ):
        assert (drawn[a][0, delta] != drawn[b][0, delta]).any()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--image-model", "x"], "--image, --image-model and --image-encoder are needed together"),
        (["--image", "edges.png"], "image-prompt.safetensors cannot be read"),
        (
            ["--control", "edges.png", "--control", "edges.png", "--control-model", "edges.safetensors"],
            "there are 2 --control and 1 --control-model",
        ),
        (["--control", "names.json", "--control-model", "edges.safetensors"], "cannot be read as a picture"),
        (["--control", "edges.png", "--control-model", "lineart.safetensors"], "is a LoRA"),
        (["--control", "edges.png", "--control-model", "base.safetensors"], "is a checkpoint"),
    ],
)
def test_maps_and_models_that_cannot_be_used_are_said_in_one_sentence(
    models: Path, out: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    paths = [text if text.startswith("--") else str(models / text) for text in arguments]
    assert embedded(models, out, *paths) == 2
    assert said in sentence(capsys)


def test_a_picture_prompts_the_adapted_model(models: Path, tmp_path: Path) -> None:
    _, encoder = their_encoder(tmp_path)
    unet = UNet(BASE)
    adapter = save(tmp_path / "ip.safetensors", image_tensors("base", unet, BASE.context_width))
    reference = ["--image-model", str(adapter), "--image-encoder", str(encoder), "--image", str(models / "edges.png")]
    for name, arguments in {"with": reference, "without": [*reference[:-1], f"{reference[-1]}:0"]}.items():
        assert embedded(models, tmp_path / f"{name}.png", "--lambdas", "1", *arguments) == 0
    base, adapted, target, delta = range(4)
    drawn, plain = (cells(tmp_path / f"{name}.png", 1, 4)[0] for name in ("with", "without"))
    assert (plain[base] == plain[adapted]).all() and (plain[target] == plain[delta]).all()
    assert (drawn[base] != drawn[adapted]).any() and (drawn[target] != drawn[delta]).any()


def test_a_larger_size_is_decoded_whole(models: Path, out: Path) -> None:
    lora = ["--lora", str(models / "lineart.safetensors")]
    assert own(models, out, "--prompt", "fox", "--lambdas", "1", "--size", "128", "--dtype", "bf16", *lora) == 0
    assert cells(out, 1, 4, side=128).shape == (1, 4, 128, 128, 3)


OWN = ["--target", "no.safetensors", "--base", "no.safetensors", "--lora", "no.safetensors"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (OWN, "--prompt is needed with your own files"),
        ([*OWN, "--prompt", "fox"], "no.safetensors cannot be read"),
        ([*OWN[:4], "--prompt", "fox", "--control", "x"], "there are 1 --control and 0 --control-model"),
        ([*OWN[:4], "--prompt", "fox"], "--target, --base and a --lora, --adapted, --control or --image are needed"),
        (["--prediction", "v"], "--prediction is for your own files"),
        ([*OWN, "--prompt", "fox", "--device", "warp"], "--device warp cannot be used here"),
        ([*OWN, "--prompt", "fox", "--device", "cpu", "--dtype", "fp16"], "--dtype fp16 needs a GPU"),
        (["--size", "100"], "--size is 100: a multiple of 64 is needed"),
        (["--steps", "0"], "--steps is 0: 2 to 1000 are needed"),
        (["--cfg", "nan"], "--cfg is nan: 1 to 100 is needed"),
        (["--source-cfg", "0"], "--source-cfg is 0.0: 1 to 100 is needed"),
        (["--seed", "-1"], "--seed is -1"),
        (["--sampler", "magic"], "--sampler is magic: one of euler"),
        (["--lambdas", "1,11"], "lambda must be between 0 and 10"),
        (["--range", "0.7", "0.2"], "start (0.7) must not come after end (0.2)"),
        (["--out", "picture.jpg"], "the name of a .png file is needed"),
        (["--models", "nowhere"], "base.safetensors cannot be read"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_sentence(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(options) == 2
    assert said in sentence(capsys)


def test_an_adapter_that_is_not_the_bases_is_said_in_one_sentence(
    models: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert own(models, out, "--prompt", "fox", "--adapted", str(models / "target.safetensors")) == 2
    assert "target.safetensors is made for SD 2.x" in sentence(capsys)
    assert not out.exists()


def test_help_tells_samplers_and_defaults_and_loads_no_torch() -> None:
    said = " ".join(parser().format_help().split())
    assert all(name in said for name in NAMES)
    for default in (SETTINGS.sampler, f"{SETTINGS.steps}; own", f"{SETTINGS.cfg:g}; own", f"{SETTINGS.size}; own"):
        assert f"(default: {default}" in said
    quick = "import sys; from demo.__main__ import parser; parser().format_help(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", quick], check=True, cwd=Path(__file__).parents[2])


def test_a_grid_shows_each_picture_where_its_labels_are(tmp_path: Path) -> None:
    shades = torch.linspace(-1, 1, 6).view(2, 3, 1, 1, 1).expand(2, 3, 3, 64, 64)
    draw_grid(shades, ["one", "a label that is much too long for a row of the grid " * 5], ["a", "b", "c"]).save(
        tmp_path / "grid.png"
    )
    found = cells(tmp_path / "grid.png", 2, 3)
    assert [int(found[r, c].mean()) for r in range(2) for c in range(3)] == [0, 51, 102, 153, 204, 255]
    sheet, layout = np.asarray(Image.open(tmp_path / "grid.png").convert("L")), Layout.of(64)
    for column in range(3):
        x, y = layout.corner(0, column)
        assert (sheet[:y, x : x + layout.cell] < 128).any()
    for row in range(2):
        _, y = layout.corner(row, 0)
        assert (sheet[y : y + layout.cell, : layout.left - GAP] < 128).any()
    assert (sheet[layout.corner(0, 0)[1] :, layout.left - GAP : layout.left] == 255).all()
