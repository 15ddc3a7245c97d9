"""Slurm: profiles of clusters, batch scripts, and the queue."""
