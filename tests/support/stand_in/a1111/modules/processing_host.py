"""How a generation runs in AUTOMATIC1111."""

import torch
from modules import shared

without_gradients = torch.no_grad


def negative_is_needed(p):
    """Return True: the negative prompt is encoded at CFG 1 too."""
    return True


def restore_model(p):
    """Do nothing between the passes."""
    return False


def apply_circular(model, enable):
    """Make images tileable, or not."""
    model.networks.apply_circular(enable)


def parser_options():
    """Return the prompt parser's arguments after the steps."""
    return (shared.opts.use_old_scheduling,)


def take_notes(p):
    """Do nothing: notes on prompts are the model's."""


def sample(p, **conds):
    return p.sample(**conds)
