"""Generators, multiplier networks and latents."""
