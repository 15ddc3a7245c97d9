"""Data sets: for fitting one's own classifiers, and for judging generators afterwards.

Nothing under ``kkt``, ``generators`` or ``training`` imports this package: generator training never sees an image.
"""
