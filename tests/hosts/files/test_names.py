"""Files by their names: names with dots, linked folders, and several models with one name."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("k_diffusion", reason="k-diffusion is not installed, whose samplers the stand-ins run")
pytest.importorskip("transformers", reason="transformers is not installed, whose text encoder the stand-ins run")

from lib_delta.errors import DeltaError
from tests.support.small_controls import make_controls, picture
from tests.support.small_files import make_files
from tests.support.stand_in_webui import WebUI, running


@pytest.fixture(scope="module")
def webui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    files = make_files(tmp_path_factory.mktemp("names") / "webui")
    make_controls(files)
    with running("a1111", files) as webui:
        yield webui


@pytest.fixture
def folder(webui: WebUI, tmp_path: Path) -> Iterator[Path]:
    """Return the folder of ControlNets, which is afterwards what it was."""
    folder = webui.files.folder / "models" / "ControlNet"
    before = set(folder.iterdir())
    yield folder
    for new in set(folder.iterdir()) - before:
        if new.is_symlink() or new.is_file():
            new.unlink()
        else:
            shutil.rmtree(new)
    webui.host.units.files.refresh()


def names(webui: WebUI) -> list[str]:
    webui.host.units.files.refresh()
    found: list[str] = webui.host.units.files.names()
    return found


UNIT = {"image": picture()}


@pytest.mark.parametrize(
    ("delta", "prompt", "sentence"),
    [
        ({"loras": ["ink.v2"]}, "a cat", "there is no LoRA 'ink.v2' .*: is 'ink' meant"),
        ({}, "a cat <delta:ink.v2:1>", "there is no LoRA 'ink.v2' .*: is 'ink' meant"),
        ({"loras": ["ink.json"]}, "a cat", "there is no LoRA 'ink.json'"),
        ({"units": [{"model": "edges.v11", **UNIT}]}, "a cat", "'edges.v11' .*: is 'edges' meant"),
        ({"units": [{"model": "edges.v11 [1a2b3c4d]", **UNIT}]}, "a cat", "is 'edges' meant"),
    ],
)
def test_a_name_with_a_dot_is_no_other_file(delta: dict[str, Any], prompt: str, sentence: str, webui: WebUI) -> None:
    with pytest.raises(DeltaError, match=sentence):
        webui.generate({"base": "base", **delta}, prompt=prompt)


@pytest.mark.parametrize("ending", ["", ".safetensors", ".SAFETENSORS", ".pt"])
def test_a_model_files_own_ending_is_understood(ending: str, webui: WebUI) -> None:
    assert webui.host.catalog.lora(f"ink{ending}") is webui.host.catalog.lora("ink")
    assert webui.host.units.files.file(f"edges{ending}", 1).stem == "edges"


def link(path: Path, target: Path) -> None:
    try:
        path.symlink_to(target, target_is_directory=target.is_dir())
    except OSError as error:  # Windows asks for a right that users may lack
        pytest.skip(f"links cannot be made here ({error})")


def test_models_in_linked_folders_are_found(webui: WebUI, folder: Path, tmp_path: Path) -> None:
    shared = tmp_path / "drive" / "sd15"
    (shared / "more").mkdir(parents=True)
    for name in ("shared.safetensors", "more/deep.safetensors"):
        shutil.copy(folder / "edges.safetensors", shared / name)
    link(folder / "linked", shared)
    link(shared / "loop", folder / "linked")
    link(shared / "back", folder)
    link(folder / "again", shared)
    assert names(webui) == ["deep", "edges", "look", "shared"]
    assert webui.host.units.files.file("shared", 1).is_file()


def test_two_links_to_one_file_are_two_names(webui: WebUI, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "edges.safetensors", tmp_path / "blob")
    link(folder / "canny.safetensors", tmp_path / "blob")
    link(folder / "lines.safetensors", tmp_path / "blob")
    assert names(webui) == ["canny", "edges", "lines", "look"]


def test_a_link_of_the_same_name_is_no_second_model(webui: WebUI, folder: Path) -> None:
    (folder / "links").mkdir()
    link(folder / "links" / "edges.safetensors", folder / "edges.safetensors")
    assert names(webui) == ["edges", "look"]


def test_models_of_diffusers_are_called_as_their_folders(webui: WebUI, folder: Path) -> None:
    for name in ("control_v11e_sd15_shuffle", "lineart/controlnet"):
        (folder / name).mkdir(parents=True)
        shutil.copy(folder / "edges.safetensors", folder / name / "diffusion_pytorch_model.safetensors")
    assert names(webui) == ["control_v11e_sd15_shuffle", "edges", "lineart", "look"]
    # As such files were called before, and as users may write.
    written = webui.host.units.files.file("lineart/controlnet/diffusion_pytorch_model.safetensors", 1)
    assert written == webui.host.units.files.file("lineart", 1)
    with pytest.raises(DeltaError, match="there is no ControlNet or IP-Adapter 'diffusion_pytorch_model'"):
        webui.host.units.files.file("diffusion_pytorch_model", 1)


def test_models_of_one_name_are_told_apart_by_their_paths(
    webui: WebUI, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same path may stand in two folders; none of the models is lost."""
    from lib_delta.hosts.files import control_files

    for where in (folder / "sd15", tmp_path / "one" / "sd15", tmp_path / "two" / "sd15"):
        where.mkdir(parents=True)
        shutil.copy(folder / "edges.safetensors", where / "tile.safetensors")
    folders = [folder, tmp_path / "one", tmp_path / "two", folder]
    monkeypatch.setattr(control_files, "_model_folders", lambda: folders)
    found = names(webui)
    assert found == [
        "ControlNet/sd15/tile.safetensors",
        "edges",
        "look",
        "one/sd15/tile.safetensors",
        "two/sd15/tile.safetensors",
    ]
    assert len({webui.host.units.files.file(name, 1) for name in found}) == 5
