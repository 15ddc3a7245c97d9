"""Slurm: what a cluster wants to be told, the batch script, the questions to the queue."""
