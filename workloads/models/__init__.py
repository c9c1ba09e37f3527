"""Make, look at and check model checkpoints."""
