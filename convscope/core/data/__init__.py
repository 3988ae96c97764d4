"""Shards, sample order, decoding, transforms, embedded data sets."""
