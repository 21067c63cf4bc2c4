"""How a generation runs in Forge Neo."""

import torch
from backend.args import dynamic_args
from modules import shared
from modules.forge_schedule import sample  # noqa: F401

without_gradients = torch.inference_mode

for gone in ("live_preview_content", "pad_cond_uncond", "pad_cond_uncond_v0", "use_old_scheduling"):
    delattr(shared.opts, gone)
    shared.DEFAULTS.pop(gone)


def negative_is_needed(p):
    """The negative prompt is not encoded at CFG 1, of which a hires pass has its own."""
    return (p.hr_cfg if p.is_hr_pass else p.cfg_scale) != 1


def restore_model(p):
    """Drop what extensions have put on the model; they are asked again after this."""
    p.sd_model.forge_objects = p.sd_model.forge_objects_original.shallow_copy()
    return True


def apply_circular(model, enable):
    """Make pictures that can be tiled, or those that cannot."""
    model.networks.apply_circular(enable)


def parser_options():
    """What the prompt parser is told besides the steps."""
    return ()


def take_notes(p):
    """What the text engines have noted since the last picture is said of this one."""
    p.extra_generation_params.update(dynamic_args.last_extra_generation_params)
    dynamic_args.last_extra_generation_params.clear()
