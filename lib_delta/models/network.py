"""The interface between a denoising network and the code that evaluates, adapts and places it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn


class Network(nn.Module, ABC):
    """A denoising network on forked layers, such as the UNet.

    Its activations have the branch axis of :mod:`lib_delta.models.forked_layers`.  Adapters are attached to its forked
    layers, by their module paths.
    """

    @property
    @abstractmethod
    def entry(self) -> Tensor:
        """A weight of the network's entry; inputs have to be on its device and of its type.

        It belongs to no streamed part, so that it is on the device that a stream computes on.
        """

    @property
    @abstractmethod
    def streamed_parts(self) -> Sequence[nn.Module]:
        """The blocks in the order in which they run; a stream has only one of them on the device at a time.

        Forked layers outside of them stay on the device.  Weights that are no forked layer's must be in one of them.
        """
