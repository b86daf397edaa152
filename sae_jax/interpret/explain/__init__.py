"""Says what latents mean, and measures how well what is said holds."""
