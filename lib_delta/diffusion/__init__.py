"""Families of diffusion models, their parameterizations and latent spaces."""
