"""Tells what a run will take, before there is a device: `sae-jax plan`."""
