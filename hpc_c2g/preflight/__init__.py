"""Checks before a study starts (``c2g doctor``): folder, machine, Slurm's settings and, by a small job, the nodes themselves."""
