"""Measures how good an SAE is: alone on activations, and inside its language model."""
