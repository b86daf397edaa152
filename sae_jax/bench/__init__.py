"""Measures our own speed: the training step, reading, harvest, and packs of runs."""
