"""What a network learned, one file an analysis."""
