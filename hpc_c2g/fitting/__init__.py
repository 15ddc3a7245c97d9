"""Fitting, importing and certifying classifiers: the only part of a classifier that sees its data."""
