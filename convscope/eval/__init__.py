"""Evaluation of frozen and fine-tuned backbones, one file a protocol."""
