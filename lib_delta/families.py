"""The families of models: what their latents and their text look like, and how to name them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Traits:
    """``scale_factor`` multiplies the autoencoder's latents; ``context_width`` is that of the released models."""

    label: str
    scale_factor: float
    latent_channels: int
    context_width: int
    served: bool = True


class Family(Enum):
    """A family of models that share a latent space and text encoders.

    Those that are not ``served`` are known by their weights only, so that a message can name them.
    Scale factors come from each release's own configuration.
    """

    SD1 = Traits("SD 1.x", 0.18215, 4, 768)
    SD2 = Traits("SD 2.x", 0.18215, 4, 1024)
    SDXL = Traits("SDXL", 0.13025, 4, 2048)
    SDXL_REFINER = Traits("SDXL refiner", 0.13025, 4, 1280, served=False)
    UNCLIP = Traits("SD 2.1 unCLIP", 0.18215, 4, 1024, served=False)
    SD3 = Traits("SD 3", 1.5305, 16, 4096, served=False)
    FLUX = Traits("Flux", 0.3611, 16, 4096, served=False)

    @property
    def label(self) -> str:
        """The name for messages."""
        return self.value.label

    @property
    def scale_factor(self) -> float:
        """What the autoencoder's latents are multiplied by before the denoising model sees them."""
        return self.value.scale_factor

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.value.latent_channels

    @property
    def context_width(self) -> int:
        """Width of the encoded text in the released models (narrow test models have their own)."""
        return self.value.context_width

    @property
    def served(self) -> bool:
        """Whether Delta Sampling can run models of this family."""
        return self.value.served


SERVED = ", ".join(family.label for family in Family if family.served)
