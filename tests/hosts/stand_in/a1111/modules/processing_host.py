"""How a generation runs in AUTOMATIC1111."""

import torch

without_gradients = torch.no_grad


def negative_is_needed(p):
    """The negative prompt is evaluated at CFG 1 too."""
    return True


def restore_model(p):
    """Nothing is put back between the passes."""
    return False
