"""Measuring speed: the training step, the reading of batches, and the peers beside them."""
