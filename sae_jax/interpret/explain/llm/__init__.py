"""Asks language models behind an API what latents mean, and whether what was said holds."""
