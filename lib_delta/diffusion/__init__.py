"""Families of diffusion models: what they predict, and the latent spaces that they work in."""
