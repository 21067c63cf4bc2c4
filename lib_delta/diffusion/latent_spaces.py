"""The latent spaces of the released autoencoders; several families of models may share one."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

LATENT_STRIDE = 8  # image pixels per latent pixel, along each side, in all of these spaces


@dataclass(frozen=True)
class SpaceTraits:
    """The traits of a latent space: a denoising model's input is ``scale_factor * (latent - shift)``."""

    key: str
    label: str
    channels: int
    scale_factor: float
    shift: float = 0.0


class Space(Enum):
    """A latent space; scale factors and shifts come from each release's configuration.

    No bridge maps to the last one; it is listed so that messages can name it.  FLUX.2's latents are those after the
    normalisation of its autoencoder.
    """

    SD1 = SpaceTraits("sd1", "SD 1.x/2.x", 4, 0.18215)
    SDXL = SpaceTraits("sdxl", "SDXL", 4, 0.13025)
    SD3 = SpaceTraits("sd3", "SD 3", 16, 1.5305, 0.0609)
    FLUX1 = SpaceTraits("flux1", "FLUX.1", 16, 0.3611, 0.1159)
    FLUX2 = SpaceTraits("flux2", "FLUX.2", 32, 1.0)
    WAN21 = SpaceTraits("wan21", "Wan 2.1", 16, 1.0)

    @property
    def key(self) -> str:
        """The name in file names and file contents."""
        return self.value.key

    @property
    def label(self) -> str:
        """The name for messages."""
        return self.value.label

    @property
    def channels(self) -> int:
        """The number of channels of a latent."""
        return self.value.channels

    @property
    def scale_factor(self) -> float:
        """The factor from the autoencoder's latents, less :attr:`shift`, to the denoising model's."""
        return self.value.scale_factor

    @property
    def shift(self) -> float:
        """The number subtracted from the autoencoder's latents before they are scaled."""
        return self.value.shift
