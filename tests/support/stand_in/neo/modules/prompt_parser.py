"""The prompt parser, which knows of no old scheduling."""

from modules.prompt_grammar import (  # noqa: F401
    get_learned_conditioning,
    get_multicond_learned_conditioning,
    reconstruct_cond_batch,
    reconstruct_multicond_batch,
)
