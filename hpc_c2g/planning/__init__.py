"""Predicted memory, time and scaling of a run on a cluster, before it is submitted."""
