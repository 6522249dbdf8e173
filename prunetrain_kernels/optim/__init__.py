"""Optimizers with the lasso inside the update (not there yet)."""
