"""Training: the state, the step, the loop, what is written as it goes, checkpoints."""
