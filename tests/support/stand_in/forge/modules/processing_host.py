"""How a generation runs in Forge."""

import torch
from backend.text_processing import classic_engine
from modules import shared
from modules.forge_schedule import sample  # noqa: F401

without_gradients = torch.inference_mode


def negative_is_needed(p):
    """The negative prompt is not encoded at CFG 1, of which a hires pass has its own."""
    return (p.hr_cfg if p.is_hr_pass else p.cfg_scale) != 1


def restore_model(p):
    """Drop what extensions have put on the model; they are asked again after this."""
    p.sd_model.forge_objects = p.sd_model.forge_objects_original.shallow_copy()
    return True


def apply_circular(model, enable):
    """Forge has switched it off: the main model's pictures stay as they are, whatever is asked for."""


def parser_options():
    """What the prompt parser is told besides the steps."""
    return (shared.opts.use_old_scheduling,)


def take_notes(p):
    """What the text engine has noted since the last picture is said of this one."""
    p.extra_generation_params.update(classic_engine.last_extra_generation_params)
    classic_engine.last_extra_generation_params = {}
