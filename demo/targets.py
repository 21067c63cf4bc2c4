"""Embedded targets with other latents than the base, and the ways to map a delta to them.

``own`` has an autoencoder that was trained independently of the base's.  ``flow`` has one with 16 channels, and is
trained by flow matching.  ``large`` has the base's autoencoder, and pictures of twice the size.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from demo.autoencoders import Autoencoder, of_vae
from demo.pipeline import Model
from lib_delta.bridges import (
    Bridge,
    Composed,
    Crossing,
    IdentityBridge,
    Noise,
    NoiseLimitBridge,
    ResolutionBridge,
    ScaleBridge,
)
from lib_delta.bridges.identity import SameSize
from lib_delta.bridges.latent_maps import DifferenceMap
from lib_delta.bridges.learned import LearnedBridge, load_bridge, with_channels
from lib_delta.diffusion.parameterization import Parameterization, Prediction, Schedule
from lib_delta.errors import CheckpointError
from lib_delta.files.checkpoint import UNET_PREFIX, VAE_PREFIX
from lib_delta.files.weight_file import WeightFile
from lib_delta.models.loading import load_vae, load_weights
from lib_delta.models.unet import UNet

# "as it is": the base sees the target's latents; "decoded": one autoencoder decodes, the other encodes; "decoded
# state": that for the state, and the learned map for the delta; the last two show the base an average of its own size.
Way = Literal["as it is", "scale", "learned", "decoded", "decoded state", "averaged", "unit"]
PREDICTION = "delta.prediction"
# Fingerprints of the models that a file was made for: the usual target's UNet, and the autoencoders of a bridge.
TARGET, SOURCE_VAE, TARGET_VAE = "delta.target", "delta.source_vae", "delta.target_vae"
SIDE = 16  # side of the latents that the base was trained on


def target_file(models: Path, name: str) -> Path:
    """Return the file of a target's weights, which contains those that differ from the usual target's."""
    return models / f"target-{name}.safetensors"


def bridge_file(models: Path, name: str) -> Path:
    """Return the file of the maps between a target's latents and the base's."""
    return models / f"bridge-{name}.safetensors"


def fingerprint(network: nn.Module) -> str:
    """Return 16 hexadecimal digits that identify a network's weights in half precision, the type of files."""
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().half().numpy().tobytes())
    return digest.hexdigest()[:16]


def _check(file: WeightFile, made_for: dict[str, nn.Module], what: str, stage: str) -> None:
    """Raise :class:`CheckpointError` unless a file was made for these networks."""
    if any(file.metadata.get(key) != fingerprint(network) for key, network in made_for.items()):
        raise CheckpointError(
            f"{file.name} was made for {what}: make it again (python run.py train --stage {stage}), or put "
            "back the files that it was made with"
        )


def load_target(path: Path, target: Model) -> Model:
    """Return the usual target with its weights and autoencoder replaced by those of a file.

    Raises :class:`CheckpointError` if the file was made for another target than this one.
    """
    with WeightFile.open(path) as file:
        _check(file, {TARGET: target.unet}, "another target than is here", path.stem)
        changed = file.below(UNET_PREFIX)
        weights = {**target.unet.state_dict(), **{key: changed.tensor(key) for key in changed.shapes}}
        channels = weights["out.2.weight"].shape[0]
        with torch.device("meta"):
            network = UNet(replace(target.unet.config, in_channels=channels, out_channels=channels))
        load_weights(network, weights, path.name)
        own = any(key.startswith(VAE_PREFIX) for key in file.shapes)
        prediction = cast(Prediction, file.metadata[PREDICTION])
        return replace(
            target,
            name=path.name,
            unet=network,
            vae=load_vae(file) if own else target.vae,
            parameterization=Parameterization(
                prediction, flow_schedule() if prediction == "flow" else Schedule.stable_diffusion()
            ),
        )


def flow_schedule() -> Schedule:
    """Return the times 1/1001 to 1000/1001 of flow matching as a schedule, for samplers that follow one."""
    time = torch.arange(1, 1001, dtype=torch.float64) / 1001
    return Schedule((1 - time) ** 2 / ((1 - time) ** 2 + time**2))


def bridge_of(way: Way, base: Model, target: Model, maps: Path) -> Bridge:
    """Return the bridge for a way; ``maps`` is the file of the learned ones."""
    known = base.parameterization.schedule.sigma_max
    limit = (NoiseLimitBridge(known),) if target.parameterization.schedule.sigma_max > known else ()
    return Composed((_crossing(way, base, target, maps), *limit))


def _crossing(way: Way, base: Model, target: Model, maps: Path) -> Bridge:
    if way == "as it is":
        return IdentityBridge()
    if way == "scale":
        return ScaleBridge(base.family.scale_factor / target.family.scale_factor)
    if way == "learned":
        return load_maps(maps, base, target)
    if way in ("averaged", "unit"):
        return ResolutionBridge(SIDE, SIDE, cast(Noise, way))
    assert base.vae is not None and target.vae is not None
    ends = of_vae(base.vae, base.family.scale_factor), of_vae(target.vae, target.family.scale_factor)
    return DecodedBridge(*ends, load_maps(maps, base, target).difference if way == "decoded state" else None)


def load_maps(path: Path, base: Model, target: Model) -> LearnedBridge:
    """Read the learned maps between the latents of two models.

    Raises :class:`CheckpointError` if they were fitted to other autoencoders than the models'.
    """
    assert base.vae is not None and target.vae is not None
    with WeightFile.open(path) as file:
        _check(file, {SOURCE_VAE: base.vae, TARGET_VAE: target.vae}, "other autoencoders than are here", path.stem)
    return load_bridge(path)


@dataclass(frozen=True)
class DecodedBridge(SameSize):
    """Decode with one autoencoder, encode with the other; ``difference`` None maps the delta the same way."""

    source: Autoencoder
    target: Autoencoder
    difference: DifferenceMap | None = None

    @property
    def label(self) -> str:
        return "decoded"

    def to_source(self, x: Tensor, sigma: Tensor, denoised: Tensor) -> tuple[Tensor, Tensor, Crossing]:
        clean = self.source.encode(self.target.decode(denoised))
        return clean + with_channels(x - denoised, clean.shape[1]), sigma, Crossing(clean, target=denoised)

    @torch.no_grad()
    def delta_to_target(self, delta: Tensor, crossing: Crossing) -> Tensor:
        if self.difference is not None and crossing.target is not None:
            return self.difference(delta, crossing.target)
        with_it, without = (
            self.target.encode(self.source.decode(z)) for z in (crossing.denoised + delta, crossing.denoised)
        )
        return with_it - without
