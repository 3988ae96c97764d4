"""Draws from arrays; knows no model."""
