"""Proxies: rules of our own for concepts, by which it is measured how specific a latent is."""
