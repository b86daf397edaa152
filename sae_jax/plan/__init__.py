"""What a run will take, told before there is a device: `sae-jax plan`."""
