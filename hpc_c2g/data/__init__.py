"""Data sets, for fitting classifiers and for evaluating generators afterwards.

Nothing under ``kkt``, ``generators`` or ``training`` imports this package: generator training never sees an image.
"""
