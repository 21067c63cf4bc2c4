"""How a generation runs in Forge."""

import torch

without_gradients = torch.inference_mode


def negative_is_needed(p):
    """The negative prompt is not encoded at CFG 1, of which a hires pass has its own."""
    return (p.hr_cfg if p.is_hr_pass else p.cfg_scale) != 1


def restore_model(p):
    """Drop what extensions have put on the model; they are asked again after this."""
    p.sd_model.forge_objects = p.sd_model.forge_objects_original.shallow_copy()
    return True
