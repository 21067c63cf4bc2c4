"""Maps from every kind of picture file, at the size that a pass needs."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lib_delta.controls import picture_file
from lib_delta.controls.control_map import ControlMap
from lib_delta.controls.picture_file import pixels, pixels_of, read_picture
from lib_delta.errors import SettingError
from tests.support.tiny_unet import randn

GREY = np.linspace(0, 255, 48, dtype=np.uint8).reshape(6, 8)


def test_pictures_of_every_kind_are_the_same_map(tmp_path: Path) -> None:
    expected = torch.from_numpy(GREY.astype(np.float32) / 255)
    whole = np.dstack([GREY] * 3)
    alpha = np.dstack([whole, np.full_like(GREY, 255)])
    sixteen = GREY.astype(np.uint16) * 257
    for name, picture in {
        "grey.png": Image.fromarray(GREY),
        "rgb.png": Image.fromarray(whole),
        "rgba.png": Image.fromarray(alpha),
        "palette.png": Image.fromarray(GREY).convert("P"),
        "sixteen.png": Image.fromarray(sixteen),
    }.items():
        picture.save(tmp_path / name)
        read = read_picture(tmp_path / name)
        assert read.shape == (1, 3, 6, 8)
        torch.testing.assert_close(read, expected.expand(1, 3, 6, 8), atol=1e-4, rtol=0)


def test_what_is_transparent_is_black() -> None:
    picture = np.full((2, 2, 4), 255, np.uint8)
    picture[0, 0, 3] = 0
    assert pixels(picture)[0, :, 0, 0].tolist() == [0, 0, 0]
    assert pixels(picture)[0, :, 1, 1].tolist() == [1, 1, 1]


@pytest.mark.parametrize("array", [np.zeros((2, 2, 2)), np.zeros((0, 2, 3)), np.zeros(4), np.full((2, 2), np.nan)])
def test_arrays_that_are_no_pictures_are_refused(array: Any) -> None:
    with pytest.raises(SettingError, match="needed"):
        pixels(array)


def test_files_that_are_no_pictures_or_too_large_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    for name in ("no.png", "missing.png"):
        with pytest.raises(SettingError, match="cannot be read as a picture"):
            read_picture(tmp_path / name)
    Image.fromarray(GREY).save(tmp_path / "large.png")
    monkeypatch.setattr(picture_file, "MAX_PIXELS", 40)
    with pytest.raises(SettingError, match="large.png has 8 x 6 pixels"):
        read_picture(tmp_path / "large.png")


@pytest.mark.parametrize("size", [(5, 9), (64, 64), (30, 7), (200, 120)])
@pytest.mark.parametrize("resize", ["just resize", "crop and resize", "resize and fill"])
def test_a_map_has_the_size_that_is_asked_for(resize: Any, size: tuple[int, int]) -> None:
    found = ControlMap(randn(2, 3, 40, 60).sigmoid(), resize).at(*size, 3)
    assert found.shape == (2, 3, *size)
    assert found.min() >= 0 and found.max() <= 1
    assert ControlMap(randn(1, 3, 40, 60).sigmoid(), resize).at(*size, 1).shape == (1, 1, *size)


def test_cropping_keeps_the_middle_and_filling_keeps_all() -> None:
    picture = torch.zeros(1, 3, 8, 16)
    picture[..., 8:] = 1
    cropped = ControlMap(picture, "crop and resize").at(8, 8, 3)
    assert torch.equal(cropped, picture[..., 4:12])
    filled = ControlMap(picture, "resize and fill").at(16, 16, 3)
    assert torch.equal(filled[..., 4:12, :], picture)
    assert torch.equal(filled[..., 0, :], picture[..., 0, :]) and torch.equal(filled[..., -1, :], picture[..., 0, :])


def test_where_the_source_sees_a_picture_squeezed_its_map_is_squeezed_alike() -> None:
    lines = torch.zeros(1, 3, 60, 100)
    lines[..., 20] = 1  # a picture of 40 x 80 contains all its columns, but not all its rows
    frames = [((32, 32), (40, 80)), ((64, 128), (80, 160))]
    seen = ControlMap(lines, "crop and resize", frames=frames)
    place = (seen.at(32, 32, 3)[0, 0, 0] * torch.arange(32)).sum() / seen.at(32, 32, 3)[0, 0, 0].sum()
    assert float(place) == pytest.approx(20.5 / 100 * 32 - 0.5, abs=0.3)
    filled = ControlMap(lines, "resize and fill", frames=[((32, 32), (60, 60))]).at(32, 32, 3)
    assert torch.equal(filled, ControlMap(lines, "resize and fill").at(32, 32, 3))
    hidden = torch.zeros(1, 1, 5, 10)
    hidden[..., 5:] = 1
    painted = ControlMap(lines, "crop and resize", hidden=hidden, frames=frames).at(32, 32, 3)
    assert ((painted[0, 0] == -1).nonzero()[:, 1] >= 16).all() and (painted[0, 0, :, 16:] == -1).all()


def test_labels_stay_labels_and_shades_are_averaged() -> None:
    labels = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.2, 0.4, 0.6]])[torch.arange(64) % 4]
    picture = labels.T.reshape(1, 3, 8, 8)
    small = ControlMap(picture).at(3, 3, 3)
    known = {tuple(row) for row in labels.tolist()}
    assert {tuple(row) for row in small[0].flatten(1).T.tolist()} <= known
    shades = (0.2 + 0.6 * torch.eye(8)).expand(1, 3, 8, 8)
    assert float(ControlMap(shades).at(4, 4, 3)[0, 0, 0, 0]) == pytest.approx(0.5)


def test_a_narrow_stroke_of_a_mask_hides_all_of_it() -> None:
    stroke = torch.zeros(1, 1, 8, 8)
    stroke[..., 3] = 1
    assert (ControlMap(torch.rand(1, 3, 64, 64), hidden=stroke).at(64, 64, 3)[0, 0, 20, 25:31] == -1).all()


def test_an_unknown_resize_mode_is_refused() -> None:
    with pytest.raises(SettingError, match="resize mode is 'fit': one of just resize"):
        ControlMap(randn(1, 3, 4, 4), "fit")  # type: ignore[arg-type]


def with_text(png: bytes, name: bytes, text: bytes) -> bytes:
    """Return a PNG with a compressed text chunk behind its header."""
    chunk = b"zTXt" + name + b"\0\0" + zlib.compress(text)
    return png[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0" + b"b'Exif\\x00\\x00'",  # written by old software
        b"Exif\0\0" + b"II*\0\xff\xff\xff\x7f",
        b"Exif\0\0" + b"II*\0\x08\0\0\0\x05\0\x12\x01\x03",
        b"Exif\0\0",
        b"MM",
    ],
)
def test_a_picture_whose_exif_is_broken_has_its_pixels(exif: bytes, tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.dstack([GREY] * 3)).save(stream, "PNG")
    profile = b"\nexif\n%8d\n" % len(exif) + exif.hex().encode() + b"\n"
    broken = with_text(stream.getvalue(), b"Raw profile type exif", profile)
    (tmp_path / "x.png").write_bytes(broken)
    wanted = read_picture(stream.getvalue())
    assert torch.equal(read_picture(broken), wanted) and torch.equal(read_picture(tmp_path / "x.png"), wanted)
    assert torch.equal(pixels_of(Image.open(io.BytesIO(broken)), "a picture"), wanted)


def test_exif_that_is_whole_turns_a_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.fromarray(np.dstack([GREY] * 3)).save(stream, "PNG", exif=exif)
    expected = torch.from_numpy(np.rot90(GREY, -1).astype(np.float32) / 255)
    torch.testing.assert_close(read_picture(stream.getvalue())[0, 0], expected)


@pytest.mark.parametrize("content", [b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"", b"\x89PNG\r\n\x1a\n"])
def test_a_refusal_tells_of_the_picture_and_of_no_object(content: bytes) -> None:
    with pytest.raises(SettingError, match="^the picture of unit 1 cannot be read as a picture") as caught:
        read_picture(content, "the picture of unit 1")
    assert "0x" not in str(caught.value) and "object" not in str(caught.value)


def test_an_image_of_a_widget_that_is_cut_off_is_told() -> None:
    """PIL reads pixels when they are asked for, which may be here."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(stream, "PNG")
    picture = Image.open(io.BytesIO(stream.getvalue()[:4000]))
    with pytest.raises(SettingError, match="^the picture of unit 2 cannot be read as a picture"):
        pixels_of(picture, "the picture of unit 2")
