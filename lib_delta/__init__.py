"""Delta Sampling: add the effect of one model's adaptations to another model's pictures."""

__version__ = "0.2.0"
