"""Evaluation of generated samples against real data, after and apart from training."""
