"""Classifiers: bundles, architectures, fitting to the margin, rates and certificates."""
