"""What training writes is what it goes on from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("resvg_py")

from demo.train import denoisers, export
from demo.train.__main__ import ADAPTERS
from demo.train.adapters import Adapter
from demo.train.common import Run, train
from demo.train.denoisers import BASE, BASE_TEXT, TARGET, TARGET_TEXT, Conditioned, load_conditioned
from demo.train.vae import CONFIG
from lib_delta.adapters.adapter_file import load_adapter
from lib_delta.models.unet import UNet
from lib_delta.models.vae import VAE
from tests.support.tiny_unet import randn

VOCABULARY = 60
ALGORITHMS = {
    "lineart": "LoRA",
    "lineart-seed2": "LoRA",
    "lineart-seed3": "LoRA",
    "lineart-loha": "LoHa",
    "lineart-lokr": "LoKr",
    "lineart-ia3": "(IA)^3",
    "lineart-oft": "OFT",
    "pixelart": "LoRA",
    "concepts": "LoRA",
}


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    model = UNet(BASE).requires_grad_(False)
    for i, weight in enumerate(model.parameters()):
        weight.copy_(0.1 * randn(*weight.shape, seed=i))
    return model


def moved(adapter: Adapter) -> Adapter:
    """Take an adapter away from where training starts: factors that are 0 hide the others."""
    with torch.no_grad():
        for i, tensor in enumerate(adapter.tensors):
            if tensor.requires_grad:
                tensor += 0.05 * randn(*tensor.shape, seed=i)
    return adapter


def total(adapter: Adapter, unet: UNet) -> torch.Tensor:
    """Return one number that hangs on every adapted weight."""
    return torch.stack(
        [(weight * randn(*weight.shape, seed=i)).sum() for i, weight in enumerate(adapter.merged(unet).values())]
    ).sum()


@pytest.mark.parametrize("stage", ADAPTERS)
def test_before_training_an_adapter_leaves_the_base_as_it_is(stage: str, unet: UNet) -> None:
    for key, weight in Adapter(unet, ADAPTERS[stage]).merged(unet).items():
        torch.testing.assert_close(weight, unet.get_parameter(key), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("stage", ADAPTERS)
def test_the_weights_that_were_trained_are_those_that_the_file_makes(stage: str, unet: UNet, tmp_path: Path) -> None:
    adapter = moved(Adapter(unet, ADAPTERS[stage])).half().float()  # as the file rounds them
    export.adapter(tmp_path / "adapter.safetensors", adapter)
    loaded = load_adapter(tmp_path / "adapter.safetensors", unet)
    assert not loaded.unmatched
    assert loaded.algorithms() == {ALGORITHMS[stage]: len(loaded.unet)}
    trained = adapter.merged(unet)
    assert {f"{path}.weight" for path in loaded.unet} == trained.keys()
    for path, layer in loaded.unet.items():
        weight = unet.get_parameter(f"{path}.weight")
        torch.testing.assert_close(trained[f"{path}.weight"], weight + layer.merged_difference(weight))


@pytest.mark.parametrize("stage", ADAPTERS)
def test_gradients_are_the_slopes_of_the_weights(stage: str, unet: UNet) -> None:
    adapter = moved(Adapter(unet, ADAPTERS[stage]))
    total(adapter, unet).backward()
    way = [randn(*tensor.shape, seed=1000 + i) for i, tensor in enumerate(adapter.tensors)]
    trained = [(tensor, w) for tensor, w in zip(adapter.tensors, way) if tensor.requires_grad]
    slope = sum(float((tensor.grad * w).sum()) for tensor, w in trained)

    def along(step: float) -> float:
        with torch.no_grad():
            for tensor, w in trained:
                tensor += step * w
            value = float(total(adapter, unet).double())
            for tensor, w in trained:
                tensor -= step * w
        return value

    assert all(float(tensor.grad.abs().sum()) > 0 for tensor, _ in trained)
    assert (along(1e-3) - along(-1e-3)) / 2e-3 == pytest.approx(slope, rel=0.02)


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

    loss = denoisers.denoising_loss(perfect, torch.zeros(5, 1, 4, 16, 16), prediction, 8)
    assert loss(torch.Generator().manual_seed(0)) < 1e-8
