"""States mapped through pixels by two tiny autoencoders, and images whose edges meet."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from lib_delta.bridges import Bridge, bridge_status, choose_bridge, through_pixels
from lib_delta.bridges.latent_maps import Filter, regress_on_state
from lib_delta.bridges.learned import WEIGHTS, load_bridge
from lib_delta.diffusion.families import Family
from lib_delta.errors import CheckpointError, SettingError
from lib_delta.models import taesd
from tests.support.tiny_unet import randn

TAESD = os.environ.get("DELTA_TAESD", "")
SIGMA = torch.tensor([3.0])
LEARNED = (Family.SDXL, Family.SD3, Family.FLUX)


def part(kind: str, channels: int, seed: int) -> dict[str, torch.Tensor]:
    """Return random weights of one part of a tiny autoencoder."""
    torch.manual_seed(seed)
    module = taesd.encoder(channels) if kind == "encoder" else taesd.decoder(channels)
    return module.state_dict()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of random autoencoders, of which none could be told to be of another space than its name says."""
    monkeypatch.setattr(through_pixels, "MIN_AGREEMENT", -2.0)
    save_file(part("decoder", 4, 1), tmp_path / "taesdxl_decoder.safetensors")
    torch.save(part("encoder", 4, 2), tmp_path / "taesd_encoder.pth")
    save_file(part("decoder", 16, 3), tmp_path / "taef1_decoder.safetensors")
    return tmp_path


def through_pictures(folder: Path, latent: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
    """Decode and encode by modules of torch alone."""
    decoder, encoder = taesd.decoder(4), taesd.encoder(4)
    decoder.load_state_dict(load_file(folder / "taesdxl_decoder.safetensors"))
    encoder.load_state_dict(torch.load(folder / "taesd_encoder.pth", weights_only=True))
    with torch.no_grad():
        picture = decoder(latent).clip(0, 1)
        if size is not None:
            picture = F.adaptive_avg_pool2d(picture, size)
        return encoder(picture)


def test_a_state_goes_over_the_picture_and_the_delta_by_the_learned_map(folder: Path) -> None:
    clean, noise = randn(2, 4, 8, 16), randn(2, 4, 8, 16, seed=1)
    sigma = torch.tensor([0.5, 3.0])
    bridge = choose_bridge(Family.SD1, Family.SDXL, form="taesd", autoencoders=folder)
    s = sigma[:, None, None, None]
    x, known, crossing = bridge.to_source(clean + s * noise, sigma, clean)
    state = through_pictures(folder, clean)
    assert torch.equal(known, sigma)
    torch.testing.assert_close(x, state + s * noise, atol=1e-4, rtol=1e-4)
    learned = choose_bridge(Family.SD1, Family.SDXL, form="learned")
    delta = randn(2, 4, 8, 16, seed=2)
    _, _, other = learned.to_source(clean, sigma, clean)
    assert torch.equal(bridge.delta_to_target(delta, crossing), learned.delta_to_target(delta, other))
    assert not bridge.delta_to_target(0 * delta, crossing).any()


def test_a_large_picture_is_averaged_as_a_picture(folder: Path) -> None:
    clean, noise = randn(1, 4, 16, 16), randn(1, 4, 16, 16, seed=1)
    bridge = choose_bridge(Family.SD1, Family.SDXL, form="taesd", size=64, autoencoders=folder)
    x, sigma, crossing = bridge.to_source(clean + 3 * noise, SIGMA, clean)
    torch.testing.assert_close(sigma, SIGMA / 2)
    expected = through_pictures(folder, clean, (64, 64)) + F.avg_pool2d(3 * noise, 2)
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)
    assert bridge.delta_to_target(x, crossing).shape == clean.shape


def test_the_status_line_says_so(folder: Path) -> None:
    line = bridge_status(Family.SD1, Family.SDXL, 128, 128, form="taesd", autoencoders=folder)
    assert line == "SDXL latents: TAESD bridge, 64 x 64"
    assert choose_bridge(Family.SD1, Family.SD2, form="taesd").label == "same as the side model's"


def test_what_is_wrong_with_the_files_is_said_in_a_sentence(folder: Path) -> None:
    for place in (folder / "elsewhere", None):
        with pytest.raises(SettingError, match=r"needs taesdxl_decoder .* there is none: .*choose the learned bridge"):
            choose_bridge(Family.SD1, Family.SDXL, form="taesd", autoencoders=place)
    with pytest.raises(SettingError, match="needs taesd3_decoder"):
        choose_bridge(Family.SD1, Family.SD3, form="taesd", autoencoders=folder)
    shutil.copy(folder / "taef1_decoder.safetensors", folder / "taesdxl_decoder.safetensors")
    with pytest.raises(CheckpointError, match="latents of 16 channels, and those of SDXL have 4: it is another file"):
        choose_bridge(Family.SD1, Family.SDXL, form="taesd", autoencoders=folder)
    torch.save(part("decoder", 4, 1), folder / "taesd_encoder.pth")
    with pytest.raises(CheckpointError, match=r"taesd_encoder.pth is not the encoder of a tiny autoencoder"):
        choose_bridge(Family.SD1, Family.FLUX, form="taesd", autoencoders=folder)


def test_files_of_other_spaces_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="do not fit together as those of SDXL and of SD 1.x/2.x do"):
        choose_bridge(Family.SD1, Family.SDXL, form="taesd", autoencoders=folder)


@pytest.mark.skipif(not TAESD, reason="DELTA_TAESD names no folder of tiny autoencoders")
def test_released_files_are_told_apart(tmp_path: Path) -> None:
    for target in (Family.SDXL, Family.SD3, Family.FLUX):
        assert choose_bridge(Family.SD1, target, form="taesd", autoencoders=Path(TAESD)).label == "TAESD bridge"
    for name, other in (("taesdxl_decoder", "taesd_decoder"), ("taesd_encoder", "taesd_encoder")):
        shutil.copy(Path(TAESD) / f"{other}.safetensors", tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="one is another file than its name says"):
        choose_bridge(Family.SD1, Family.SDXL, form="taesd", autoencoders=tmp_path)


def moved(x: torch.Tensor, by: int) -> torch.Tensor:
    return x.roll((by, -by), (-2, -1))


@pytest.mark.parametrize("size", ["picture", 64])
@pytest.mark.parametrize(
    ("form", "target"), [*[("learned", to) for to in LEARNED], ("stitched", Family.SDXL), ("taesd", Family.SDXL)]
)
def test_where_a_tile_begins_makes_no_difference(folder: Path, form: str, target: Family, size: object) -> None:
    """A tile that is moved, with what leaves at one edge coming in at the other, gets the delta moved."""

    def crossed(clean: torch.Tensor, noise: torch.Tensor, tiled: bool, by: int) -> tuple[torch.Tensor, torch.Tensor]:
        how = {"form": form, "size": size, "tiled": tiled, "autoencoders": folder}
        bridge: Bridge = choose_bridge(Family.SD1, target, **how)
        clean, noise = moved(clean, by), moved(noise, by)
        x, _, crossing = bridge.to_source(clean + 3 * noise, SIGMA, clean)
        step = by * x.shape[-1] // clean.shape[-1]
        delta = moved(randn(*x.shape, seed=4), step)
        return moved(x, -step), moved(bridge.delta_to_target(delta, crossing), -by)

    clean, noise = (randn(1, target.latent_channels, 16, 16, seed=seed) for seed in (0, 1))
    for still, gone in zip(crossed(clean, noise, True, 0), crossed(clean, noise, True, 6)):
        torch.testing.assert_close(gone, still, atol=2e-4, rtol=1e-3)
    untiled = [crossed(clean, noise, False, by) for by in (0, 6)]
    assert all(float((still - gone).abs().max()) > 1e-2 for still, gone in zip(*untiled))


def test_a_bridge_for_tiles_leaves_the_others_as_they_are() -> None:
    path = WEIGHTS / "sd1-sdxl.safetensors"
    tiled, other = load_bridge(path, tiled=True), load_bridge(path)
    kinds = [{m.edges for m in bridge.state.modules() if isinstance(m, Filter)} for bridge in (tiled, other)]
    assert kinds == [{"circular"}, {"replicate"}]


def test_what_follows_the_state_is_its_regression() -> None:
    state, change = randn(2, 4, 6, 10), randn(2, 4, 6, 10, seed=1)
    change = change + torch.einsum("ij,njhw->nihw", randn(4, 4, seed=2), state)
    soft = F.avg_pool2d(F.pad(state, (1, 1, 1, 1), mode="replicate"), 3, 1)
    for image in range(2):
        rows = torch.cat((state[image], soft[image]), 0).flatten(1).T.double()
        centred, wanted = rows - rows.mean(0), change[image].flatten(1).T.double()
        # Ridge regression equals as many additional rows with a target of 0.
        ridge = (0.01 * len(rows)) ** 0.5 * torch.eye(8).double()
        solved = torch.linalg.lstsq(
            torch.cat((centred, ridge)), torch.cat((wanted - wanted.mean(0), torch.zeros(8, 4).double()))
        ).solution
        expected = (centred @ solved + wanted.mean(0)).T.reshape(4, 6, 10)
        torch.testing.assert_close(regress_on_state(change, state)[image].double(), expected, atol=1e-4, rtol=1e-3)
    assert not regress_on_state(0 * change, state).any()
