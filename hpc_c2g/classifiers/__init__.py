"""Classifiers: bundles, architectures, normalization and rates."""
