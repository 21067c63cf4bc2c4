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
    """Return whether the negative prompt is encoded: not at CFG 1; the hires pass has its own CFG scale."""
    return (p.hr_cfg if p.is_hr_pass else p.cfg_scale) != 1


def restore_model(p):
    """Drop all patches of extensions, which are then called again."""
    p.sd_model.forge_objects = p.sd_model.forge_objects_original.shallow_copy()
    return True


def apply_circular(model, enable):
    """Make images tileable, or not."""
    model.networks.apply_circular(enable)


def parser_options():
    """Return the prompt parser's arguments after the steps."""
    return ()


def take_notes(p):
    """Add the text engines' notes since the last picture to this one's infotext."""
    p.extra_generation_params.update(dynamic_args.last_extra_generation_params)
    dynamic_args.last_extra_generation_params.clear()
