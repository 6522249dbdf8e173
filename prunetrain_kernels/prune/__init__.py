"""Pruning a model and its optimizer in place."""

from prunetrain_kernels.prune.reconfigure import LayerChange, Reconfiguration, reconfigure

__all__ = ["LayerChange", "Reconfiguration", "reconfigure"]
