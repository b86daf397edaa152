"""Scaling laws: fitted to the results of runs, with intervals, predictions and figures."""
