"""SLURM: a private one on this machine, to try and test submission."""
