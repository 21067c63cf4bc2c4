"""How a generation runs in Forge."""

import torch
from backend.text_processing import classic_engine
from modules import shared
from modules.forge_schedule import sample  # noqa: F401

without_gradients = torch.inference_mode


def negative_is_needed(p):
    """Return whether the negative prompt is encoded: not at CFG 1; the hires pass has its own CFG scale."""
    return (p.hr_cfg if p.is_hr_pass else p.cfg_scale) != 1


def restore_model(p):
    """Drop all patches of extensions, which are then called again."""
    p.sd_model.forge_objects = p.sd_model.forge_objects_original.shallow_copy()
    return True


def apply_circular(model, enable):
    """Do nothing: Forge ignores the setting for tiling."""


def parser_options():
    """Return the prompt parser's arguments after the steps."""
    return (shared.opts.use_old_scheduling,)


def take_notes(p):
    """Add the text engine's notes since the last picture to this one's infotext."""
    p.extra_generation_params.update(classic_engine.last_extra_generation_params)
    classic_engine.last_extra_generation_params = {}
