"""Masked computation on the visible units of an image."""
