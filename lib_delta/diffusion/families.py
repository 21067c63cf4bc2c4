"""The families of models: their names, latent spaces, and text encoders' widths."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lib_delta.diffusion.latent_spaces import LATENT_STRIDE, Space


@dataclass(frozen=True)
class Sides:
    """The sides, in pixels, of square images: of the training, and the smallest and the largest handled well.

    Below ``smallest`` a model may work at twice the size; 0 if it never does.
    """

    smallest: int
    native: int
    largest: int


SD1_SIDES, SD2_SIDES, SDXL_SIDES = Sides(0, 512, 768), Sides(512, 768, 1024), Sides(768, 1024, 1536)


@dataclass(frozen=True)
class FamilyTraits:
    """The traits of a family.

    ``context_width`` is the width of the released models' encoded text.  Models see ``packing`` x ``packing`` points
    of a latent as channels of one point.  ``sides`` are the sizes that a side model of the family works at.
    """

    label: str
    space: Space
    context_width: int
    served: bool = True
    packing: int = 1
    sides: Sides = SDXL_SIDES


class Family(Enum):
    """A family of models that share a latent space and text encoders.

    Families that are not ``served`` cannot be the side model.  They are listed so that bridges can map to their
    latents and messages can name them.
    """

    SD1 = FamilyTraits("SD 1.x", Space.SD1, 768, sides=SD1_SIDES)
    SD2 = FamilyTraits("SD 2.x", Space.SD1, 1024, sides=SD2_SIDES)
    SDXL = FamilyTraits("SDXL", Space.SDXL, 2048)
    SDXL_REFINER = FamilyTraits("SDXL refiner", Space.SDXL, 1280, served=False)
    UNCLIP = FamilyTraits("SD 2.1 unCLIP", Space.SD1, 1024, served=False)
    SD3 = FamilyTraits("SD 3", Space.SD3, 4096, served=False)
    FLUX = FamilyTraits("Flux", Space.FLUX1, 4096, served=False)
    CHROMA = FamilyTraits("Chroma", Space.FLUX1, 4096, served=False)
    LUMINA2 = FamilyTraits("Lumina 2", Space.FLUX1, 2304, served=False)
    Z_IMAGE = FamilyTraits("Z-Image", Space.FLUX1, 2560, served=False)
    HIDREAM = FamilyTraits("HiDream", Space.FLUX1, 4096, served=False)
    FLUX2 = FamilyTraits("Flux 2", Space.FLUX2, 7680, served=False, packing=2)
    MUGEN = FamilyTraits("Mugen", Space.FLUX2, 2048, served=False)
    QWEN_IMAGE = FamilyTraits("Qwen-Image", Space.WAN21, 3584, served=False)
    WAN = FamilyTraits("Wan", Space.WAN21, 4096, served=False)

    @property
    def label(self) -> str:
        """The name for messages."""
        return self.value.label

    @property
    def space(self) -> Space:
        """The latent space of its models."""
        return self.value.space

    @property
    def sides(self) -> Sides:
        """The image sizes that a side model of the family works at."""
        return self.value.sides

    @property
    def scale_factor(self) -> float:
        """The factor from the autoencoder's latents to the denoising model's."""
        return self.space.scale_factor

    @property
    def latent_channels(self) -> int:
        """The number of channels of a model's input."""
        return self.space.channels * self.packing**2

    @property
    def packing(self) -> int:
        """The side of the square of latent points that one point of a model's input holds as channels."""
        return self.value.packing

    @property
    def latent_stride(self) -> int:
        """The image pixels per point of a model's input, along each side."""
        return LATENT_STRIDE * self.packing

    @property
    def context_width(self) -> int:
        """The width of the encoded text in the released models (test models are narrower)."""
        return self.value.context_width

    @property
    def served(self) -> bool:
        """Whether Delta Sampling can run models of this family as the side model."""
        return self.value.served


SERVED = ", ".join(family.label for family in Family if family.served)
