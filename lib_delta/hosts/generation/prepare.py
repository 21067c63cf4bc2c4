"""Prepare a batch: load the side model, attach its adapters and units, and encode its prompts.

This module imports the models: :mod:`lib_delta.hosts.generation.lifecycle` imports it before the first delta.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib_delta.bridges import choose_bridge
from lib_delta.core.heatmap import HeatMap
from lib_delta.core.source import Source
from lib_delta.diffusion.families import Family
from lib_delta.diffusion.latent_spaces import LATENT_STRIDE
from lib_delta.errors import DeltaError, SettingError
from lib_delta.hosts.generation.batch_request import has_adaptation
from lib_delta.hosts.generation.run import Run
from lib_delta.hosts.prompts.encoder import CachedEncoder
from lib_delta.hosts.prompts.pass_prompts import prompts_per_pass, side_prompts, without_networks
from lib_delta.hosts.settings import one_of, option, warn_once
from lib_delta.request.lora_recipe import Active, Pick
from lib_delta.request.passes import Passes
from lib_delta.request.request import Request
from lib_delta.request.setting_choices import ADAPTER_FORMS
from lib_delta.runtime.compiling import compile_unet
from lib_delta.runtime.side_model import AdapterPick, SideModel

if TYPE_CHECKING:
    from lib_delta.hosts.base import Host


def prepare_run(host: Host, p: Any, passes: Passes, on_fault: Callable[[DeltaError], None]) -> Run:
    """Return a batch's run, with its side model where the WebUI samples.

    Raises :class:`SettingError` for an incomplete request.
    """
    request = passes.first if passes.first.wanted else passes.hires
    _check_complete(request, passes)
    model = _load(host, p, passes, request)
    _set_controls(host, p, passes, model, request)
    run = Run(
        passes,
        model,
        _make_sources(host, p, passes, model),
        on_fault,
        heat=HeatMap() if option("show", False) else None,
        autoencoders=host.tiny_autoencoders(),
    )
    run.bridge(host.main_model())  # raises if there is none
    host.enter(p, model)
    return run


def _check_complete(request: Request, passes: Passes) -> None:
    adaptation = has_adaptation(passes)
    if not (request.base or adaptation):
        raise SettingError(
            "Delta Sampling is switched on, and nothing is chosen: choose a base checkpoint, which is the "
            "model that your LoRA was made for, and the LoRA, or switch it off"
        )
    if not request.base:
        raise SettingError(
            "Delta Sampling needs the checkpoint that the LoRA was made for: choose a base checkpoint, "
            "or one for always in Settings > Delta Sampling > Default base checkpoint"
        )
    if not adaptation:
        raise SettingError(
            "Delta Sampling has nothing to add: choose a LoRA, an adapted checkpoint, an adapted prompt, "
            "or a unit with a ControlNet or IP-Adapter"
        )


def _load(host: Host, p: Any, passes: Passes, request: Request) -> SideModel:
    """Return the base with the passes' adapters, and comment on layers that they do not match."""

    def comment(sentence: str) -> None:
        p.comment(f"Delta Sampling: {sentence}")

    picks = [_adapter_pick(host, pick) for pick in passes.picks()]
    base = host.catalog.file_named(request.base, comment)
    adapted = host.catalog.file_named(request.adapted, comment) if request.adapted else base
    if adapted != base:
        picks.append(AdapterPick(adapted))
    model = host.load_side_model(base)
    form = one_of("form", ADAPTER_FORMS)
    model.adapt(picks, "bypass" if form == ADAPTER_FORMS[-1] else form)  # type: ignore[arg-type]
    compile_unet(model.unet, option("compile", False) is True, warn_once)
    for file in model.adapters:
        if file.unmatched:
            comment(file.report())
    return model


def _adapter_pick(host: Host, pick: Pick) -> AdapterPick:
    path = Path(host.catalog.lora(pick.name).filename)
    return AdapterPick(path, pick.weight, pick.text_weight, pick.blocks, pick.rank)


def _set_controls(host: Host, p: Any, passes: Passes, model: SideModel, request: Request) -> None:
    """Attach the units' files to the side model, and write the hashes of their maps into the infotext."""
    picks, map_hashes = host.units.picks(p, passes, functools.partial(_side_size, host, model, request))
    model.set_controls(picks)
    p.extra_generation_params.update(map_hashes)


def _side_size(host: Host, model: SideModel, request: Request, height: int, width: int) -> tuple[int, int]:
    """Return the side model's size, in pixels, for an image of this size."""
    family = host.main_model().family
    bridge = choose_bridge(
        model.report.family,
        family,
        form=request.bridge,
        size=request.side_size,
        autoencoders=host.tiny_autoencoders(),
    )
    stride = family.latent_stride
    rows, columns = bridge.source_size(-(-height // stride), -(-width // stride))
    return LATENT_STRIDE * rows, LATENT_STRIDE * columns


def _text_size(host: Host, p: Any, model: SideModel, request: Request, hires: bool) -> tuple[int, int] | None:
    """Return the size that a pass's prompts are encoded for, which only SDXL is conditioned on."""
    if model.report.family is not Family.SDXL:
        return None
    height, width = (p.hr_upscale_to_y, p.hr_upscale_to_x) if hires else (p.height, p.width)
    # WebUIs reckon one side of a resized image as a fraction.
    return _side_size(host, model, request, int(height), int(width))


def _make_sources(host: Host, p: Any, passes: Passes, model: SideModel) -> dict[tuple[bool, Active], Source]:
    """Encode the prompts of each pass, for each set of LoRAs that is active at some point of it."""
    sources = {}
    with CachedEncoder(model, host.text_engine(model), host.text_device()) as encode:
        for hires, prompts_of_pass in prompts_per_pass(p, passes):
            size = _text_size(host, p, model, passes.of(hires), hires)
            texts = replace(prompts_of_pass, size=size)
            base_cond = encode(None, texts.prompts, texts)
            adapted_prompts = side_prompts(passes.of(hires).adapted_prompt, texts.prompts)
            prompts = without_networks(adapted_prompts, len(adapted_prompts)) if adapted_prompts else None
            for active in passes.stages(hires):
                adapted_cond = None
                if model.text_state(active) or prompts:
                    adapted_cond = encode(active, prompts or texts.prompts, texts)
                sources[hires, active] = Source(
                    model.unet,
                    model.parameterization,
                    base_cond,
                    adapted_cond,
                    quantize=host.quantized(),
                    guides=model.controls.guides,
                )
    return sources
