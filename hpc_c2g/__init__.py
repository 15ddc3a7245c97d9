"""Reconstruct an image generator from a trained classifier, with no training data."""

__version__ = "0.1.0"
