"""Models for the demo that have learnt nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from demo.metrics import Judges
from demo.train import export
from demo.train.adapters import Adapter, low_rank
from demo.train.denoisers import BASE, BASE_TEXT, TARGET, TARGET_TEXT, Conditioned, initialise
from demo.train.vae import CONFIG
from lib_delta.models.controlnet import ControlNet
from lib_delta.models.vae import VAE
from tests.support.tiny_unet import randn

TOKENIZER = Path(__file__).parents[2] / "demo" / "models" / "tokenizer"
EMOJI = ["cat face", "castle", "fox"]


def shaken(module: nn.Module, seed: int) -> Any:
    """Move every weight a little, so that none of a new module's zeros stay."""
    with torch.no_grad():
        for i, weight in enumerate(module.parameters()):
            weight += 0.03 * randn(*weight.shape, seed=seed * 10_000 + i)
    return module


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like demo/models, of models that have learnt nothing."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    vocabulary = len(json.loads((TOKENIZER / "vocab.json").read_text("utf-8")))
    torch.manual_seed(0)
    autoencoder = VAE(CONFIG)
    base = shaken(Conditioned(BASE, BASE_TEXT, vocabulary), 1)
    export.sd1(folder / "base.safetensors", base, autoencoder)
    export.sd2(folder / "target.safetensors", shaken(Conditioned(TARGET, TARGET_TEXT, vocabulary), 2), autoencoder)
    export.adapter(folder / "lineart.safetensors", shaken(Adapter(base.unet, low_rank(4)), 3))
    export.unet_only(folder / "tuned.safetensors", shaken(base, 4))
    control = shaken(initialise(ControlNet(BASE, (3, 16, 16, 32, 32, 64, 32))), 5)
    save_file(control.half().state_dict(), str(folder / "edges.safetensors"))
    Image.fromarray(np.eye(64, dtype=np.uint8) * 255).save(folder / "edges.png")
    names, concepts = [*EMOJI, *(f"emoji {i}" for i in range(9))], ["ladder"]
    export.metrics(folder / "metrics.safetensors", Judges(len(names) + len(concepts)))
    (folder / "names.json").write_text(json.dumps(names), "utf-8")
    (folder / "concepts.json").write_text(json.dumps(concepts), "utf-8")
    return folder
