"""Scaling: grids, sweeps that share one pass of data, and the laws fitted to their results."""
