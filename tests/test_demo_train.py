"""What training writes is what it goes on from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("resvg_py")

from demo.train import denoisers, export
from demo.train.common import Run, train
from demo.train.denoisers import BASE, BASE_TEXT, TARGET, TARGET_TEXT, Conditioned, load_conditioned
from demo.train.vae import CONFIG
from lib_delta.models.vae import VAE

VOCABULARY = 60


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_a_model_written_and_loaded_again_says_the_same_to_the_precision_of_the_file(
    family: str, tmp_path: Path
) -> None:
    layout, text = (BASE, BASE_TEXT) if family == "sd1" else (TARGET, TARGET_TEXT)
    torch.manual_seed(0)
    written, loaded = (Conditioned(layout, text, VOCABULARY).requires_grad_(False) for _ in range(2))
    getattr(export, family)(tmp_path / "model.safetensors", written, VAE(CONFIG))
    tokens = torch.randint(VOCABULARY, (2, 77))
    assert not torch.allclose(loaded.context(tokens), written.context(tokens), atol=0.1)
    load_conditioned(loaded, tmp_path / "model.safetensors")
    torch.testing.assert_close(loaded.context(tokens), written.context(tokens), rtol=0.01, atol=0.01)
    for key, value in written.unet.state_dict().items():
        torch.testing.assert_close(loaded.unet.state_dict()[key], value, rtol=1e-3, atol=1e-6)


class StoppedError(Exception):
    pass


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path) -> None:
    run = Run(steps=10, batch=8, rate=0.01, warmup=1, save_seconds=0)

    def made(folder: Path, stop_after: int | None = None) -> torch.Tensor:
        torch.manual_seed(0)
        layer, calls = torch.nn.Linear(3, 3), iter(range(100))

        def loss(generator: torch.Generator) -> torch.Tensor:
            if next(calls) == stop_after:
                raise StoppedError
            return layer(torch.randn(8, 3, generator=generator)).square().mean()

        trained = train("model", layer, loss, folder, run)
        assert isinstance(trained, torch.nn.Linear)
        return trained.weight

    for name in ("once", "twice"):
        (tmp_path / name).mkdir()
    with pytest.raises(StoppedError):
        made(tmp_path / "twice", stop_after=4)
    assert torch.equal(made(tmp_path / "once"), made(tmp_path / "twice"))


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_loss_of_a_perfect_prediction_is_0(prediction: str) -> None:
    signal = denoisers.alphas_cumprod()

    def perfect(noisy: torch.Tensor, t: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        # The pictures are all 0: what is there is noise.
        a = signal[t.long()][:, None, None, None]
        noise = noisy / (1 - a).sqrt()
        return noise if prediction == "eps" else a.sqrt() * noise

    loss = denoisers.denoising_loss(perfect, torch.zeros(5, 1, 4, 16, 16), torch.zeros(4, 1, 1), prediction, 8)
    assert loss(torch.Generator().manual_seed(0)) < 1e-8
