"""The prompt parser, without an option for old scheduling."""

from modules.prompt_grammar import (  # noqa: F401
    SdConditioning,
    get_learned_conditioning,
    get_multicond_learned_conditioning,
    reconstruct_cond_batch,
    reconstruct_multicond_batch,
)
