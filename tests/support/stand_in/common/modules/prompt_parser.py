"""The prompt parser, with the option to count steps as old versions did."""

from modules import prompt_grammar
from modules.prompt_grammar import (  # noqa: F401
    SdConditioning,
    reconstruct_cond_batch,
    reconstruct_multicond_batch,
    schedule,
)


def get_learned_conditioning(model, prompts, steps, hires_steps=None, use_old_scheduling=False):
    return prompt_grammar.get_learned_conditioning(model, prompts, steps, hires_steps)


def get_multicond_learned_conditioning(model, prompts, steps, hires_steps=None, use_old_scheduling=False):
    return prompt_grammar.get_multicond_learned_conditioning(model, prompts, steps, hires_steps)
