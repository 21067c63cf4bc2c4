"""Train targets with other latents than the base: of another autoencoder, with more channels, or twice as large.

Each continues from the trained target, with its text encoder unchanged.  It only has to learn to read and draw other
latents, so its attention stays unchanged too.  For another number of channels, the first and the last convolution start
anew.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor

from demo.autoencoders import of_vae
from demo.targets import SOURCE_VAE, TARGET_VAE, bridge_file, fingerprint, target_file
from demo.train import bridges, export
from demo.train.bridges_fit import Size, save
from demo.train.bridges_pictures import Array
from demo.train.common import Run, train
from demo.train.data import Emoji, augment, load_large, to_float
from demo.train.denoisers import (
    TARGET,
    TARGET_TEXT,
    Conditioned,
    all_contexts,
    denoising_loss,
    flow_loss,
    initialise,
    latent_variants,
    load_conditioned,
)
from demo.train.vae import OWN, SCALE, SIXTEEN, train_decoder, train_vae
from lib_delta.bridges import LearnedBridge
from lib_delta.models.unet import SpatialTransformer, UNet
from lib_delta.models.vae import VAE, VAEConfig

Pair = tuple[Tensor, Tensor]
FITTED_ON = 1600  # pictures, each with an edit
NETWORK = Size()


@dataclass(frozen=True)
class Kind:
    """The properties of a target: ``vae`` None is the base's autoencoder, ``large`` doubles the pictures' size."""

    prediction: Literal["v", "flow"]
    vae: VAEConfig | None = None
    large: bool = False


KINDS = {"own": Kind("v", OWN), "large": Kind("v", large=True), "flow": Kind("flow", SIXTEEN)}
RUNS = {
    "vae-own-colour": Run(steps=250, batch=16, rate=2e-3, warmup=50, average=0.97, seed=21),
    "vae-own": Run(steps=800, batch=16, rate=2e-3, average=0.99, seed=21),
    "vae-own-decoder": Run(steps=300, batch=16, rate=2e-3, warmup=50, average=0.99, seed=26),
    "vae-flow-colour": Run(steps=200, batch=8, rate=2e-3, warmup=50, average=0.97, seed=22),
    "vae-flow": Run(steps=800, batch=8, rate=2e-3, average=0.99, seed=22),
    "vae-flow-decoder": Run(steps=250, batch=16, rate=2e-3, warmup=50, average=0.99, seed=27),
    "target-own": Run(steps=800, batch=32, rate=1e-3, warmup=50, average=0.995, seed=23),
    "target-large": Run(steps=300, batch=16, rate=5e-4, warmup=50, average=0.99, seed=24),
    "target-flow": Run(steps=600, batch=32, rate=1e-3, warmup=50, average=0.995, seed=25),
}
NEEDS: dict[str, tuple[str, ...]] = {
    "vae-own": (),
    "vae-flow": (),
    "bridge-own": ("vae", "vae-own"),
    "bridge-flow": ("vae", "vae-flow"),
    "target-own": ("target", "vae-own"),
    "target-flow": ("target", "vae-flow"),
    "target-large": ("target",),
}


@dataclass(frozen=True)
class Bench:
    """The inputs of the stages: ``tokens`` and ``strong`` are as in :mod:`demo.train.denoisers`.

    ``emoji`` are those of the models' names.
    """

    cache: Path
    models: Path
    vae: Callable[[], VAE]
    every: Emoji
    emoji: Emoji
    tokens: Tensor
    strong: int

    def stages(self) -> dict[str, Callable[[], None]]:
        """Return the function of each stage of :data:`NEEDS`."""
        steps = {"vae": self.train_vae, "bridge": self.fit_bridge, "target": self.train_target}
        return {stage: partial(steps[stage.split("-")[0]], stage.split("-")[1]) for stage in NEEDS}

    def train_vae(self, name: str) -> None:
        """Train an autoencoder independently of the base's: with other initial weights and other draws."""
        config, stage = KINDS[name].vae, f"vae-{name}"
        assert config is not None
        torch.manual_seed(RUNS[stage].seed)
        trained = train_vae(self.every, self.cache, RUNS[f"{stage}-colour"], RUNS[stage], config, stage)
        trained = train_decoder(trained, self.emoji, self.cache, RUNS[f"{stage}-decoder"], f"{stage}-decoder")
        torch.save(trained.state_dict(), self.cache / f"{stage}.pt")

    def own_vae(self, name: str) -> VAE:
        """Return a target's autoencoder, which may be the base's."""
        config = KINDS[name].vae
        if config is None:
            return self.vae()
        vae = VAE(config)
        vae.load_state_dict(torch.load(self.cache / f"vae-{name}.pt", weights_only=True))
        return vae.requires_grad_(False)

    def fit_bridge(self, name: str) -> None:
        """Fit the maps between the base's latents and a target's, by the code that fits the extension's.

        The pictures are those that these autoencoders were trained on: emoji on white, and edits of them.
        """
        vaes = {"base": self.vae(), name: self.own_vae(name)}
        autoencoders = {key: of_vae(vae, SCALE) for key, vae in vaes.items()}
        unknown = self.every.only([prompt for prompt in self.every.prompts if prompt not in self.emoji.prompts])
        latents = bridges.encode(autoencoders, FITTED_ON, on_white(bridges.coloured(unknown)))
        fitted = bridges.fit(latents["base"], latents[name], NETWORK)
        about = {"source": "base", "target": f"target-{name}", "pictures": str(FITTED_ON)}
        flat, line_art = (0.5 + 0.5 * to_float(self.emoji.pictures[look]) for look in ("flat", "lineart"))
        base, own = ((each.encode(flat), each.encode(line_art)) for each in autoencoders.values())
        about |= held_out(fitted, base, own)
        about |= {key: fingerprint(vae) for key, vae in zip((SOURCE_VAE, TARGET_VAE), vaes.values())}
        print(about)
        save(fitted, bridge_file(self.models, name), about)

    def train_target(self, name: str) -> None:
        """Continue the training of the usual target, and write the weights that differ."""
        kind, run, vae = KINDS[name], RUNS[f"target-{name}"], self.own_vae(name)
        model = Conditioned(TARGET, TARGET_TEXT, int(self.tokens.max()) + 1)
        load_conditioned(model, self.models / "target.safetensors")
        contexts, start = all_contexts(model.requires_grad_(False), self.tokens), model.unet
        unet = (
            copy.deepcopy(start).requires_grad_(True)
            if kind.vae is None
            else prepared_for(start, kind.vae.latent_channels)
        )

        def predict(noisy: Tensor, t: Tensor, index: Tensor) -> Tensor:
            return unet(noisy[None], t, contexts[index][None])[0]

        pictures = load_large(self.cache, self.emoji.prompts, "noto") if kind.large else self.emoji.pictures["noto"]
        stored = self.cache / f"latents-noto-{name}.pt"
        latents = latent_variants(vae, pictures, self.strong, stored, seed=7)
        flow = kind.prediction == "flow"
        loss = flow_loss(predict, latents, run.batch) if flow else denoising_loss(predict, latents, "v", run.batch)
        trained = train(
            f"target-{name}", unet, loss, self.cache, run, [p for p in unet.parameters() if p.requires_grad]
        )
        export.differing(
            target_file(self.models, name), trained, start, None if kind.vae is None else vae, kind.prediction
        )


def held_out(bridge: LearnedBridge, base: Pair, own: Pair) -> dict[str, str]:
    """Measure a bridge on emoji that were not used to fit it, before and after they become line art.

    ``base`` and ``own`` are the latents ``(N, C, H, W)`` of both in either space.
    """
    mapped, wanted = bridge.state(own[0]), base[0]
    about = wanted - wanted.mean((0, 2, 3), keepdim=True)
    carried, change = bridge.difference(base[1] - base[0], own[0]), own[1] - own[0]
    found = {
        "state_unexplained": (mapped - wanted).square().sum() / about.square().sum(),
        "line_art_cosine": F.cosine_similarity(carried.flatten(1), change.flatten(1)).mean(),
    }
    if base[0].shape == own[0].shape:
        found["state_unexplained_as_it_is"] = (own[0] - wanted).square().sum() / about.square().sum()
        found["line_art_cosine_as_it_is"] = F.cosine_similarity(
            (base[1] - base[0]).flatten(1), change.flatten(1)
        ).mean()
    return {key: f"{float(value):.3f}" for key, value in found.items()}


def prepared_for(unet: UNet, channels: int) -> UNet:
    """Return a copy of a UNet for latents of ``channels``: its ends are new, and its attention does not train."""
    other = initialise(UNet(replace(unet.config, in_channels=channels, out_channels=channels)))
    ends = ("input_blocks.0.0.", "out.2.")
    other.load_state_dict({k: v for k, v in unet.state_dict().items() if not k.startswith(ends)}, strict=False)
    for module in other.modules():
        if isinstance(module, SpatialTransformer):
            module.requires_grad_(False)
    return other


def on_white(emoji: Tensor) -> Callable[[Generator], Array]:
    """Return a function that draws one of ``(N, 3, 64, 64)`` emoji, moved and recoloured; ``(3, 64, 64)`` in 0..1."""

    def picture(rng: Generator) -> Array:
        chosen = to_float(emoji[int(rng.integers(len(emoji)))][None])
        moved = augment(chosen, torch.Generator().manual_seed(int(rng.integers(2**31))), strong=rng.random() < 0.5)
        return (0.5 + 0.5 * moved[0]).clamp(0, 1).numpy()

    return picture
