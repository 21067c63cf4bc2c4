"""Bridges show the target's noisy state to the source in the source's latent space, and carry the delta back.

The target's step holds all the information: ``x``, ``sigma`` and the denoised estimate determine the noise.  A bridge
maps the clean part to the source's latent space and adds noise again there.  So no second state is carried along, and
every sampler of the target works unchanged.
"""

from lib_delta.bridges.base import Bridge, BridgeForm, BridgeSettings, Crossing
from lib_delta.bridges.choose import (
    SideSize,
    bridge_status,
    choose_bridge,
    describe_bridge,
    may_enlarge,
    reachable_spaces,
)
from lib_delta.bridges.composed import Composed
from lib_delta.bridges.identity import IdentityBridge
from lib_delta.bridges.learned import LearnedBridge
from lib_delta.bridges.noise_limit import NoiseLimitBridge
from lib_delta.bridges.registry import form_names
from lib_delta.bridges.resolution import Noise, ResolutionBridge
from lib_delta.bridges.scale import ScaleBridge

__all__ = [
    "Bridge",
    "BridgeForm",
    "BridgeSettings",
    "Composed",
    "Crossing",
    "IdentityBridge",
    "LearnedBridge",
    "Noise",
    "NoiseLimitBridge",
    "ResolutionBridge",
    "ScaleBridge",
    "SideSize",
    "bridge_status",
    "choose_bridge",
    "describe_bridge",
    "form_names",
    "may_enlarge",
    "reachable_spaces",
]
