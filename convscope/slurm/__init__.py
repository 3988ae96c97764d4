"""Submission to SLURM and the job that runs there."""
