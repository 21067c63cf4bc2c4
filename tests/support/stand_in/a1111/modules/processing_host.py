"""How a generation runs in AUTOMATIC1111."""

import torch
from modules import shared

without_gradients = torch.no_grad


def negative_is_needed(p):
    """The negative prompt is evaluated at CFG 1 too."""
    return True


def restore_model(p):
    """Nothing is put back between the passes."""
    return False


def apply_circular(model, enable):
    """Make pictures that can be tiled, or those that cannot."""
    model.networks.apply_circular(enable)


def parser_options():
    """What the prompt parser is told besides the steps."""
    return (shared.opts.use_old_scheduling,)


def take_notes(p):
    """What is noted of prompts is the model's own."""


def sample(p, **conds):
    return p.sample(**conds)
