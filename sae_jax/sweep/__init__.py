"""Sweeps: grids of runs that share one reading of the data, and the workers that train them."""
