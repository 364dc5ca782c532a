"""Stable Diffusion 1 and 2 (Rombach et al. 2022): `--from sd`, and `--to sd` or `--to diffusers`.

A source becomes up to three things: a sampler's run, the run of its autoencoder, and a file of its text encoder in the
sampler's folder. What is needed to write it back is kept in <run>/source.
"""
