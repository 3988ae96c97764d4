"""Image-text pairs: captions, tokens, towers, the model of both, and how well they find one another."""
