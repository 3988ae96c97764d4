"""The training loop, optimizers, schedules, resumable state."""
