"""Load models before a pass; evaluate and combine parts of prompts and negative prompts in it."""

import torch

from backend.memory_management import load_models_gpu


def sampling_prepare(unet, x):
    """Load the model and the models that extensions added to it."""
    kept = unet.extra_preserved_memory_during_sampling
    models = [unet, *unet.extra_model_patchers_during_sampling]
    load_models_gpu(models, memory_required=kept, minimum_memory_required=kept)


class Condition:
    """A conditioning of the model."""

    def __init__(self, cond):
        self.cond = cond

    def can_concat(self, other):
        return self.cond.shape == other.cond.shape


def compiled(context, strength=1.0):
    """Return a part of a prompt, for all images."""
    return {"strength": strength, "model_conds": {"c_crossattn": Condition(context)}}


def calc_cond_uncond_batch(model, cond, uncond, x_in, timestep, model_options):
    """Return the weighted means of the parts and of the negative prompts, each within its mask.

    The model evaluates those of one text length together, in reverse order.
    """
    waiting = [(part, 0) for part in cond] + [(part, 1) for part in uncond or ()]
    sums, counts = (torch.zeros_like(x_in).repeat(2, 1, 1, 1, 1) for _ in range(2))
    while waiting:
        first = waiting[0][0]["model_conds"]["c_crossattn"]
        together = [first.can_concat(part["model_conds"]["c_crossattn"]) for part, _ in waiting]
        chosen = [entry for entry, fits in zip(waiting, together) if fits][::-1]
        waiting = [entry for entry, fits in zip(waiting, together) if not fits]
        output = _through(model, chosen, x_in, timestep, model_options)
        for (part, kind), rows in zip(chosen, output.chunk(len(chosen))):
            share = part["strength"] * part.get("mask", torch.ones(1, *x_in.shape[2:]))[:, None]
            sums[kind] += share * rows
            counts[kind] += share
    return tuple(sums / (counts + 1e-37))


def _through(model, chosen, x, timestep, options):
    kinds = [kind for _, kind in chosen]
    told = {"c_crossattn": torch.cat([part["model_conds"]["c_crossattn"].cond for part, _ in chosen])}
    x, timestep = x.repeat(len(kinds), 1, 1, 1), timestep.repeat(len(kinds))
    wrapper = options.get("model_function_wrapper")
    if wrapper is None:
        return model.apply_model(x, timestep, **told)
    return wrapper(model.apply_model, {"input": x, "timestep": timestep, "c": told, "cond_or_uncond": kinds})
