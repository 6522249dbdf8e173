"""Optimizers with the group lasso inside the update."""

from prunetrain_kernels.optim.sgd import SGD, ProximalSGD

__all__ = ["SGD", "ProximalSGD"]
