"""What the rooms share; it knows none of them."""
